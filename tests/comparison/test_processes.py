"""Cells as processes: their environment, how they end, and the state after an interruption."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from badit import Run, load_results
from badit.comparison.worker import error_of, start_cell
from badit.recipe.loading import build_recipe
from badit.runs.resolved import resolve
from badit.support.files import read_json
from badit.training.checkpoints import last_checkpoint
from comparison.cells import LORA, FakeProcess, by_status, compare_module, compared


def results_of(values):
    return read_json(Path(values["output"]) / "results.json")


@pytest.mark.slow
def test_cell_runs_in_its_own_process(values):
    values["compare"]["methods"] = LORA
    (cell,) = compared(values, jobs=2)["cells"]
    assert (cell["status"], cell["error"]) == ("done", None)
    assert cell["environment"]["torch_threads"] == max(1, (os.cpu_count() or 1) // 2)
    folder = Path(values["output"]) / "lora" / "lr-0.01" / "seed-0"
    assert (folder / "log.txt").is_file()
    assert not (folder / "error.txt").exists()
    assert load_results(values["output"]).scored_methods == ["lora"]


def test_seeds_of_a_method_run_in_parallel_and_cells_get_the_free_gpu(values, monkeypatch):
    """One long cell keeps its GPU busy, so all short cells must use the other GPU."""
    long_began, last_began, shares = threading.Event(), threading.Event(), {}

    class Cell(FakeProcess):
        def __init__(self, folder, *, score, threads, device):
            shares[folder.name] = (threads, device)
            is_long = folder.name == "seed-0"
            if is_long:
                long_began.set()
            elif len(shares) == 4:
                last_began.set()
            self._waits_for = last_began if is_long else long_began

        def wait(self):
            self._waits_for.wait()
            return 3

    monkeypatch.setattr(compare_module, "start_cell", Cell)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    values["compare"] |= {"methods": LORA, "seeds": [0, 1, 2, 3]}
    lines = []
    results = compared(values, jobs=2, report=lines.append)
    assert by_status(results, status="failed") == [f"lora/{seed}" for seed in range(4)]
    assert sum("(ended with exit code 3" in line for line in lines) == 4
    threads, device = shares.pop("seed-0")
    assert threads == 4
    assert set(shares.values()) == {(4, 1 - device)}


@pytest.mark.slow
def test_errors_of_killed_cells_are_explained(values):
    run = resolve(build_recipe({**values, "compare": None}))
    run.prepare_folder()
    folder = run.folder.path
    with start_cell(folder, score=True, threads=None, device=None) as process:
        process.send_signal(signal.SIGKILL)
        assert error_of(folder, process.wait()) == "killed by SIGKILL (out of memory?)"


def test_process_gets_threads_and_gpu_from_its_environment(tmp_path, monkeypatch):
    shown = "os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES'], sys.flags.safe_path"
    script = f"import os, sys; print({shown}); sys.exit(7)"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    start = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **k: start([*command[:2], "-c", script], **k)
    )
    (log := tmp_path / "log.txt").write_text("of an earlier attempt")
    with start_cell(tmp_path, score=True, threads=3, device=1) as process:
        assert error_of(tmp_path, process.wait()) == f"ended with exit code 7; see {log}"
    assert log.read_text() == "3 1 True\n", "the current folder is not on sys.path"


@pytest.mark.slow
def test_cell_stops_when_its_standard_input_is_closed():
    script = """
import sys, time
from badit.comparison import worker
worker.run_cell = lambda folder, score: print(folder, score, flush=True) or time.sleep(9999)
sys.argv = ["worker", "FOLDER", "search"]
worker.main()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as process:
        assert process.stdout.readline() == "FOLDER False\n"
        assert process.poll() is None
        process.stdin.close()
        assert process.wait() == -signal.SIGTERM


@pytest.mark.slow
def test_sigterm_stops_command_and_cell_and_saves_a_checkpoint(values, tmp_path):
    values["training"] |= {"max_steps": 100_000, "logging_steps": 1}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    command = [sys.executable, "-m", "badit", "compare", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    cell = Run.at(Path(values["output"]) / "lora" / "lr-0.01" / "seed-0")
    try:
        while process.poll() is None and not (
            cell.metrics_path.is_file() and cell.metrics_path.stat().st_size
        ):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
    finally:
        process.kill()
    assert (process.returncode, out) == (130, "")
    message = "badit: interrupted; run the same command again to resume"
    lines = [line for line in err.splitlines() if not line.endswith(" …")]  # what a wait is for
    assert lines == ["lora/lr-0.01/seed-0: training and scoring", "", message]
    steps = cell.metrics_path.read_text().count("\n")
    assert last_checkpoint(cell.checkpoints_path) == cell.checkpoints_path / f"checkpoint-{steps}"
    assert not (cell.path / "error.txt").exists()
    time.sleep(0.5)
    assert cell.metrics_path.read_text().count("\n") == steps, "the cell has stopped too"
    assert by_status(results_of(values), status="missing", error=None) == ["lora/0", "badit/0"]


@pytest.fixture
def _ctrl_c_interrupts():
    """Restores the default SIGINT handler: shells make background processes ignore SIGINT."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures("_ctrl_c_interrupts")
def test_interrupted_search_stops_cells_and_selects_no_rate(values, monkeypatch):
    """Ctrl-C while one of two methods searches its last rate must not select a rate."""
    values["compare"]["learning_rates"] = [0.001, 0.01]
    waiting, stopped, lines = threading.Event(), [], []

    class Cell(FakeProcess):
        def __init__(self, folder, **options):
            self._folder, self._stop = folder, threading.Event()

        def send_signal(self, how):
            stopped.append(str(self._folder.relative_to(values["output"])))
            self._stop.set()

        def wait(self):
            method, rate, _ = self._folder.parts[-3:]
            if (method, rate) == ("lora", "lr-0.01"):
                (self._folder / "validation.json").write_text('{"loss": 1.0}')
                return 0
            if method == "lora":
                waiting.set()
            else:
                waiting.wait()
                os.kill(os.getpid(), signal.SIGINT)
            self._stop.wait()
            return 130

    monkeypatch.setattr(compare_module, "start_cell", Cell)
    with pytest.raises(KeyboardInterrupt):
        compared(values, jobs=2, report=lines.append)
    assert sorted(stopped) == ["badit/lr-0.01/seed-0", "lora/lr-0.001/seed-0"]
    assert not any("learning rate" in line or "FAILED" in line for line in lines)
    assert (
        by_status(results_of(values), selected=True)
        == by_status(results_of(values), status="failed")
        == []
    )


@pytest.mark.usefixtures("_ctrl_c_interrupts")
def test_second_interruption_kills_the_cells(values, monkeypatch):
    values["compare"]["methods"] = LORA
    told = []

    def ctrl_c_later():
        threading.Timer(
            0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)
        ).start()

    class Slow(FakeProcess):
        def __init__(self, *arguments, **options):
            self.ended = threading.Event()

        def send_signal(self, how):
            told.append(how)
            ctrl_c_later() if how == signal.SIGTERM else self.ended.set()

        def wait(self):
            ctrl_c_later()
            self.ended.wait()
            return 130

    monkeypatch.setattr(compare_module, "start_cell", Slow)
    with pytest.raises(KeyboardInterrupt):
        compared(values)
    assert told == [signal.SIGTERM, signal.SIGKILL]
    assert by_status(results_of(values), status="missing", error=None) == ["lora/0"]

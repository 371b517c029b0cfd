"""The command line as a user meets it: help, exit codes, one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import docstring_parser
import pytest
import yaml

from badit.cli import app, main

COMMANDS = [name for name in app if not name.startswith("-")]


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_parameter_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"Usage: badit {command}" in capsys.readouterr().out
    described = {
        parameter.arg_name for parameter in docstring_parser.parse(app[command].default_command.__doc__).params
    }
    assert described >= {argument.field_info.name for argument in app[command].assemble_argument_collection()}


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom badit.cli import main\n"
        f"main({arguments!r})\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("arguments", [["trian"], ["train"], ["train", "x", "--nope", "x"]])
def test_a_wrong_command_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("badit: ")
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "missing.yaml"], "missing.yaml: cannot be read"),
        (["evaluate", "missing-run"], "missing-run: has no config.yaml"),
        (["generate", "missing-run", "Hello"], "missing-run: has no config.yaml"),
        (["tasks", "missing-data"], "missing-data"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("badit: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_tasks_lists_the_built_in_suite(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "builtin"]) == 0
    shown = capsys.readouterr().out
    assert "review_sentiment" in shown
    assert "16 tasks, all valid" in shown


def test_overrides_may_follow_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("data: {train_per_task: 3, test_per_task: 2}\n")
    assert main(["train", "recipe.yaml", "data.train_per_task=4", "--dry-run", "output=somewhere"]) == 0
    assert "64 training and 32 test instances; the run would be written to somewhere" in capsys.readouterr().out
    assert main(["train", "recipe.yaml", "--dry-run", "output=somewhere", "--jbos"]) == 2
    assert "--jbos" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("data: {train_per_task: 3, test_per_task: 2}\n")
    assert main(["train", "recipe.yaml", "output=somewhere", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "16 tasks, 48 training and 32 test instances; the run would be written to somewhere" in shown
    assert yaml.safe_load(shown.rpartition("\n16 tasks")[0])["output"] == "somewhere"
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_train_evaluate_generate(
    recipe_values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_values))
    assert main(["train", str(path), "training.num_train_epochs=1"]) == 0
    shown = capsys.readouterr().out
    assert "badit Rouge-L" in shown
    assert "mean over tasks" in shown
    run = recipe_values["output"]
    scores = json.loads((Path(run) / "scores.json").read_text())
    assert main(["evaluate", run]) == 0
    assert json.loads((Path(run) / "scores.json").read_text()) == scores
    assert main(["generate", run, "Name the capital.", "--max-new-tokens", "2"]) == 0


def test_an_interruption_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import badit.data

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(badit.data, "load_tasks", interrupt)
    assert main(["tasks", "builtin"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_debug_shows_the_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "badit", "--debug", "tasks", "missing-data"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr

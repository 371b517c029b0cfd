"""The recipe of a small comparison, and cells that run in the test's process."""

from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

from badit.comparison import worker
from badit.comparison.results import RESULTS
from badit.runs.folder import ERROR
from badit.support.files import read_json

compare_module = import_module("badit.comparison.compare")  # badit.compare is the function

LORA = {"lora": {"name": "lora", "r": 4}}


def comparison_values(material, output, **compare):
    """Returns a recipe that compares LoRA and BADIT of equal ranks, in two steps per run."""
    methods = {
        "lora": {"name": "lora", "r": 8},
        "badit": {"name": "badit", "num_experts": 4, "r": 2},
    }
    return {
        "model": {"name": str(material / "model"), "dtype": "float32"},
        "data": {"source": str(material / "tasks.jsonl"), "validation_per_task": 2},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01},
        "evaluation": {"batch_size": 8, "max_new_tokens": 2},
        "compare": {"methods": methods, "seeds": [0], **compare},
        "output": str(output),
    }


class FakeProcess(AbstractContextManager):
    """Replaces a cell's process in a ``with`` statement."""

    def __exit__(self, *error):
        pass


class InlineCell(FakeProcess):
    """Replaces start_cell: runs the same worker in the test's process."""

    started = []  # noqa: RUF012

    def __init__(self, folder, *, score, threads, device):
        (folder / ERROR).unlink(missing_ok=True)
        self.started.append("/".join(folder.parts[-3:]))
        self._folder, self._score = folder, score

    def wait(self):
        return worker.run_cell(self._folder, score=self._score)


def by_status(results, **wanted):
    """Returns ``method/seed`` of the cells whose fields have these values."""
    cells = [
        cell
        for cell in results["cells"]
        if wanted.items() <= {key: cell[key] for key in wanted}.items()
    ]
    return [f"{cell['method']}/{cell['seed']}" for cell in cells]


def compared(values, report=None, **options):
    """Runs a comparison, and returns results.json; ``report`` is called with lines of progress."""
    with patch.object(compare_module, "say", report):
        compare_module.compare(values, progress=report is not None, **options)
    return read_json(Path(values["output"]) / RESULTS)

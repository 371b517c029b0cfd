"""A small comparison's recipe, and cells that run without a process of their own."""

from importlib import import_module

from badit import worker
from badit.recipe import build_recipe
from badit.worker import ERROR

compare_module = import_module("badit.compare")  # badit.compare is the function

LORA = {"lora": {"name": "lora", "r": 4}}


def comparison_values(material, output, **compare):
    """A recipe that compares LoRA with BADIT, with equal budgets; two steps per run."""
    methods = {"lora": {"name": "lora", "r": 8}, "badit": {"name": "badit", "num_experts": 4, "r": 2}}
    return {
        "model": {"name": str(material / "model"), "dtype": "float32"},
        "data": {"source": str(material / "tasks.jsonl"), "validation_per_task": 2},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01},
        "evaluation": {"batch_size": 8, "max_new_tokens": 2},
        "compare": {"methods": methods, "seeds": [0], **compare},
        "output": str(output),
    }


class InlineCell:
    """Replaces a cell's process: the same worker, in the process of the test."""

    started = []  # noqa: RUF012

    def __init__(self, folder, *, score, threads, device):
        (folder / ERROR).unlink(missing_ok=True)
        self.started.append(f"{folder.parent.name}/{folder.name}")
        self._folder, self._score = folder, score

    def stop(self, how):
        """It runs while it is waited for, so there is nothing to stop."""

    def wait(self):
        code = worker.run_cell(self._folder, score=self._score)
        return None if code == 0 else (self._folder / ERROR).read_text().strip()


def by_status(results, **wanted):
    """``method/seed`` of the cells whose fields have these values."""
    cells = [cell for cell in results["cells"] if wanted.items() <= {key: cell[key] for key in wanted}.items()]
    return [f"{cell['method']}/{cell['seed']}" for cell in cells]


def compared(values, **options):
    """The results of a comparison, by default without progress reports."""
    return compare_module.compare(build_recipe(values), **{"report": lambda line: None, **options})

"""A run is a folder: its paths and the readers of its files."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from badit.support.errors import BaditError, explained
from badit.support.files import read_json, read_jsonl, refuse_links

if TYPE_CHECKING:
    import pandas as pd

    from badit.recipe.schema import Recipe

ERROR = "error.txt"  # of a comparison's run that failed
LOG = "log.txt"  # the output of a comparison's run
RECORD = "export.json"  # in the folder of an export: the run that it was made from, and its options
RESULTS = "results.json"  # in the folder of a comparison
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's name, without importing PEFT
AnyPath = str | os.PathLike[str]  # a folder or a file; a Run can be passed as its folder


def adoption(adapter: AnyPath) -> str:
    """Returns the command that makes a run of an adapter."""
    return shlex.join(["badit", "adopt", os.fspath(adapter), "--data", "FILE"])


def refuse_no_adapter(path: AnyPath) -> None:
    """Raises BaditError unless the folder has an adapter's configuration."""
    folder = Path(path)
    if (folder / ADAPTER_CONFIG).is_file():
        return
    fix = "give the folder that save_pretrained or save_model has written"
    nested = sorted(file.parent.name for file in folder.glob(f"*/{ADAPTER_CONFIG}"))
    if nested:
        fix = f"give one of its folders that have: {', '.join(nested)}"
    raise BaditError(f"{folder}: has no {ADAPTER_CONFIG}, so it is no adapter; {fix}")


def refuse_unanalyzable(target: str, data: str | None) -> None:
    """Raises BaditError if an analysis without data is of neither a run nor a comparison.

    Also for a run without tasks.
    """
    folder = Path(target)
    if data is not None or (folder / RESULTS).is_file():
        return
    if (folder / "config.yaml").is_file():
        RunFolder(folder).recipe.data.sources()
        return
    fix = "to analyze a base model, set its tasks with --data"
    if (folder / ADAPTER_CONFIG).is_file():
        fix = f"make a run of this adapter: {adoption(target)}"
    raise BaditError(f"{target}: not a run's folder; {fix}")


def refuse_run(output: AnyPath) -> None:
    """Raises BaditError if the folder of a comparison has a run."""
    if RunFolder.at(output).config_path.is_file():
        fix = "choose another output=FOLDER for the comparison"
        raise BaditError(f"{os.fspath(output)}: contains a run; {fix}")


def read_export(path: Path) -> dict[str, Any]:
    """Reads a JSON file that may be in the folder of an export, which may be untrusted."""
    if (path.parent / RECORD).is_file():
        refuse_links(path.parent)
    return read_json(path)


class RunFolder:
    """A run, given by its folder. Properties read the folder's files at every access.

    With ``check``, BaditError if the folder has neither a run nor an export (for push), or if a
    link leads out of it. If the recipe has ``model.trust_remote_code``, loading the model needs
    ``trust_remote_code`` here too.
    """

    def __init__(
        self, path: AnyPath, *, check: bool = True, trust_remote_code: bool = False
    ) -> None:
        self.path = Path(path)
        self.trust_remote_code = trust_remote_code
        self.config_path = self.path / "config.yaml"  # the resolved recipe
        self.environment_path = self.path / "environment.json"  # see the property environment
        self.metrics_path = self.path / "metrics.jsonl"  # one line per logged step
        # {"rouge_l", "rouge_l_instances", …, "tasks": {name: {…}}}
        self.scores_path = self.path / "scores.json"
        # The same of the tasks of the run that this one extends, if their test data was given.
        self.earlier_scores_path = self.path / "scores-earlier.json"
        self.predictions_path = self.path / "predictions"  # one .jsonl per task
        # Of a comparison: {task: {metric: [value per instance]}}
        self.instances_path = self.path / "instances.json"
        # Of a comparison: the loss that selects the learning rate.
        self.validation_path = self.path / "validation.json"
        # In PEFT's format; of a sequence of tasks, after the last one.
        self.adapter_path = self.path / "adapter"
        self.checkpoints_path = self.path / "checkpoints"  # from which an interrupted run resumes
        self.regroupings_path = self.path / "regroupings.jsonl"  # the log of regroupings (DOG)
        self.analysis_path = self.path / "analysis"  # the tables of `badit analyze`, one .json each
        # Mean gates per task, measured by `badit export` or `studio`.
        self.gates_path = self.path / "gates.json"
        if check:
            self._refuse_other_folder()

    def _refuse_other_folder(self) -> None:
        if not self.config_path.is_file() and not (self.path / RECORD).is_file():
            problem = "has no config.yaml, so it is not a run"
            fix = "create one: badit train RECIPE"
            if (self.path / ADAPTER_CONFIG).is_file():
                problem = "is an adapter, not a run"
                fix = f"make a run of it: {adoption(self.path)}"
            raise BaditError(f"{self.path}: {problem}; {fix}")
        refuse_links(self.path)

    @classmethod
    def at(cls, path: AnyPath) -> Self:
        """Returns a run whose folder may not exist yet, or a stage of a run, without checks."""
        return cls(path, check=False)

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    def _repr_html_(self) -> str:
        """Returns the run and its scores as HTML, for notebooks."""
        if not self.config_path.is_file():  # an export
            return f"<p>{escape(repr(self))}</p>"
        recipe = f"<p>{escape(repr(self.recipe))}</p>"
        if not self.scores_path.is_file():
            return f"{recipe}<p>not scored yet</p>"
        scores = self.scores.pivot(index="task", columns="metric", values="score")
        return recipe + scores.round(2).to_html()

    def trusted_recipe(self) -> Recipe:
        """Returns the recipe, to load its model.

        BaditError if the model runs its own Python code and the caller does not allow this.
        """
        recipe = self.recipe
        if recipe.model.trust_remote_code and not self.trust_remote_code:
            problem = f"is true, so Python code of the model {recipe.model.name!r:.60} would run"
            option = "--trust-remote-code (badit harness: --trust_remote_code)"
            fix = f"allow it with {option} if you trust run and model"
            raise BaditError(f"{self.config_path}: model.trust_remote_code: {problem}; {fix}")
        return recipe

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run. Its ``output`` is the current folder of the run."""
        from badit.recipe.saved import load_config

        return load_config(self.config_path).model_copy(update={"output": str(self.path)})

    @property
    def scores(self) -> pd.DataFrame:
        """The scores on the recipe's split: task, metric, score (0 to 100), n."""
        from badit.runs.scores import read_scores, scores_frame

        if not self.scores_path.is_file():
            command = shlex.join(["badit", "evaluate", str(self.path)])
            raise BaditError(f"{self.path}: has no scores yet; compute them with: {command}")
        return scores_frame(read_scores(self.scores_path))

    @property
    def predictions(self) -> pd.DataFrame:
        """The scored answers: task, instance_id, prediction, references, prompt, nll."""
        import pandas as pd

        from badit.runs.predictions import read_predictions

        predictions = read_predictions(self.predictions_path)
        return pd.DataFrame([vars(prediction) for prediction in predictions])

    @property
    def metrics(self) -> pd.DataFrame:
        """The training log: step, loss, learning_rate, grad_norm …, one row per logged step."""
        import pandas as pd

        return pd.DataFrame(self.log(self.metrics_path))

    def log(self, path: Path) -> Iterator[dict[str, Any]]:
        """Yields the lines of a log of the run.

        Steps of a sequence are counted from the start of its first stage.
        """
        first_step = 0
        # Sorted names of stages are in training order.
        for folder in sorted(self.path.glob("stages/*")) or [self.path]:
            file = folder / path.name
            with explained(file, fix="delete the file to skip it", any_error=True):
                for line in read_jsonl(file):
                    yield {**line, "step": first_step + line["step"]}
            # The last step of a stage is always in metrics.jsonl, but not in other logs.
            metrics = folder / self.metrics_path.name
            with explained(metrics, any_error=True):
                first_step += max((line["step"] for line in read_jsonl(metrics)), default=0)

    def adapter_option(self, name: str) -> Any:
        """Returns an option of the adapter's configuration, unchecked; None if it has none."""
        config_path = self.adapter_path / ADAPTER_CONFIG
        if not config_path.is_file():
            return None
        return read_json(config_path).get(name)

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and hardware; under ``training``: parameters, steps, seconds and memory."""
        content = read_json(self.environment_path)
        for section in ("inputs", "training"):
            if not isinstance(content.get(section, {}), dict):
                fix = "restore it, or train again"
                raise BaditError(f"{self.environment_path}: {section}: must be an object; {fix}")
        return content

    @property
    def known_environment(self) -> dict[str, Any]:
        """Like ``environment``, but empty if the file does not exist yet."""
        return self.environment if self.environment_path.is_file() else {}

    @property
    def is_adopted(self) -> bool:
        """Whether a script has trained the adapter."""
        return "adopted" in self.known_environment

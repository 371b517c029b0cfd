"""A run is a folder: its paths, its readers, and whether it belongs to a recipe."""

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

ERROR, LOG = "error.txt", "log.txt"  # of a comparison's run
RECORD = "export.json"  # in the folder of an export: the run that it was made from, and its options
AnyPath = str | os.PathLike[str]  # a folder or a file; a Run can be passed as its folder


class RunFolder:
    """A run, given by its folder. Properties read the folder's files at every access.

    With ``check``, BaditError if the folder has neither a run nor an export (for push), or if a link leads out of it.
    If the recipe has ``model.trust_remote_code``, loading the model needs ``trust_remote_code`` here too.
    """

    def __init__(
        self, path: AnyPath, *, check: bool = True, trust_remote_code: bool = False
    ) -> None:
        self.path, self.trust_remote_code = Path(path), trust_remote_code
        self.config_path = self.path / "config.yaml"  # the resolved recipe
        self.environment_path = self.path / "environment.json"  # see the property environment
        self.metrics_path = self.path / "metrics.jsonl"  # one line per logged step
        self.scores_path = (
            self.path / "scores.json"
        )  # {"rouge_l", "rouge_l_instances", …, "tasks": {name: {…}}}
        self.predictions_path = self.path / "predictions"  # one .jsonl per task
        self.instances_path = (
            self.path / "instances.json"
        )  # of a comparison: {task: {metric: [value per instance]}}
        self.validation_path = (
            self.path / "validation.json"
        )  # of a comparison: the loss that selects the learning rate
        self.adapter_path = (
            self.path / "adapter"
        )  # in PEFT's format; of a sequence of tasks, after the last one
        self.checkpoints_path = self.path / "checkpoints"  # from which an interrupted run resumes
        self.regroupings_path = self.path / "regroupings.jsonl"  # the log of regroupings (DOG)
        self.angles_path = (
            self.path / "angles.jsonl"
        )  # angles between experts, in runs without regrouping
        self.analysis_path = self.path / "analysis"  # the tables of `badit analyze`, one .json each
        self.gates_path = (
            self.path / "gates.json"
        )  # mean gates per task, measured by `badit export` or `studio`
        if check and not self.config_path.is_file() and not (self.path / RECORD).is_file():
            raise BaditError(
                f"{self.path}: has no config.yaml, so it is not a run; create one: badit train RECIPE"
            )
        if check:
            refuse_links(self.path)

    @classmethod
    def at(cls, path: AnyPath) -> Self:
        """A run whose folder may not exist yet, or a stage of a run. The folder is not checked."""
        return cls(path, check=False)

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    def _repr_html_(self) -> str:
        """Returns the run and its scores as HTML, for notebooks."""
        if not self.config_path.is_file():  # an export
            return f"<p>{escape(repr(self))}</p>"
        about = f"<p>{escape(repr(self.recipe))}</p>"
        if not self.scores_path.is_file():
            return f"{about}<p>not scored yet</p>"
        return (
            about
            + self.scores.pivot(index="task", columns="metric", values="score").round(2).to_html()
        )

    def trusted_recipe(self) -> Recipe:
        """Returns the recipe; BaditError if its model runs its own Python code and the caller does not allow this."""
        recipe = self.recipe
        if recipe.model.trust_remote_code and not self.trust_remote_code:
            problem = f"is true, so Python code of the model {recipe.model.name!r:.60} would run"
            fix = "allow it with --trust-remote-code (badit harness: --trust_remote_code) if you trust run and model"
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

        return pd.DataFrame(
            [vars(prediction) for prediction in read_predictions(self.predictions_path)]
        )

    @property
    def metrics(self) -> pd.DataFrame:
        """The training log: step, loss, learning_rate, grad_norm …, one row per logged step."""
        import pandas as pd

        return pd.DataFrame(self.log(self.metrics_path))

    def log(self, path: Path) -> Iterator[dict[str, Any]]:
        """Yields the lines of a log of the run. Steps of a sequence are counted from the start of its first stage."""
        start, folders = 0, sorted(self.path.glob("stages/*")) or [self.path]
        for folder, before in zip(folders, [None, *folders], strict=False):
            if before is not None:
                metrics = before / self.metrics_path.name
                with explained(metrics, any_error=True):
                    start += max((line["step"] for line in read_jsonl(metrics)), default=0)
            with explained(folder / path.name, fix="delete the file to skip it", any_error=True):
                for line in read_jsonl(folder / path.name):
                    yield {**line, "step": start + line["step"]}

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and hardware; under ``training``: parameters, steps, seconds and memory."""
        content = read_json(self.environment_path)
        for part in ("inputs", "training"):
            if not isinstance(content.get(part, {}), dict):
                raise BaditError(
                    f"{self.environment_path}: {part}: must be an object; restore it, or train again"
                )
        return content

    @property
    def known_environment(self) -> dict[str, Any]:
        """Like ``environment``, but empty if the file does not exist yet."""
        return self.environment if self.environment_path.is_file() else {}

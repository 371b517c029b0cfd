"""What the command line does, as functions for scripts and notebooks: files and typed results come out.

    run = badit.train("recipes/own-tasks.yaml", data={"source": "my-tasks.jsonl"}, output="runs/mine")
    run.scores.tasks["capitals"].rouge_l
    badit.generate(run, "Name the capital of France.")

A recipe is the path of a YAML file, a :class:`~badit.recipe.Recipe`, or plain values by section. What is given beside
it is laid over it, section by section and key by key, as over a recipe that another one extends. A run is given by its
folder or as a :class:`Run`. Bad input raises :class:`~badit.errors.BaditError`; ``progress=False`` shows no bars.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack, cast

import pandas as pd

from badit.analysis.analyze import analyze as _analyze
from badit.analysis.tables import load_frames
from badit.comparison.compare import compare as _compare
from badit.comparison.compare import report_to_stderr
from badit.errors import BaditError
from badit.evaluation.evaluate import read_predictions
from badit.evaluation.results import Results, Scores, load_results, load_scores
from badit.files import read_json, read_jsonl
from badit.metrics import Prediction
from badit.recipe import Recipe, RecipeLike, RecipeValues, load_config, make_recipe
from badit.report import write_report as _write_report
from badit.runs import RunFolder
from badit.train import Plan, Split, make_plan
from badit.training.scoring import answers, load_run
from badit.training.scoring import evaluate as _evaluate
from badit.training.scoring import train_and_score as _train

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: A folder or a file; a Run stands for its folder.
AnyPath = str | os.PathLike[str]
#: One text, or several.
Texts = TypeVar("Texts", str, list[str])


@dataclass(frozen=True)
class Run:
    """A run, by its folder: ``Run("runs/mine")``. What is asked for is read from there, each time anew.

    Attributes:
        path: the folder.
    """

    path: Path

    def __init__(self, path: AnyPath) -> None:
        object.__setattr__(self, "path", Path(path))

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def _folder(self) -> RunFolder:
        return RunFolder.existing(self.path)

    @property
    def recipe(self) -> Recipe:
        """What the run was made by."""
        return load_config(self._folder.config)

    @property
    def scores(self) -> Scores:
        """Those on the recipe's own split."""
        file = self._folder.scores
        if not file.is_file():
            raise BaditError(f"{self.path}: has no scores yet; make them with: badit evaluate {self.path}")
        return load_scores(file)

    @property
    def predictions(self) -> list[Prediction]:
        """The answers that the scores are of, with prompts and references, by task."""
        return read_predictions(self._folder.predictions)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The training's log: a record for every logged step."""
        return list(read_jsonl(self._folder.metrics))

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and hardware; under ``training``, parameters, steps, seconds and memory."""
        return read_json(self._folder.environment)

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """What :func:`analyze` has measured, by name; none before."""
        return _tables(self._folder.path)

    def load(self, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
        """The base model with what the run has learnt, for inference, and the tokenizer."""
        folder = self._folder
        return load_run(folder, folder.recipe(trust_remote_code=trust_remote_code))


@dataclass(frozen=True)
class Analysis:
    """What :func:`analyze` has measured.

    Attributes:
        path: the folder, whose ``analysis`` holds the tables.
        tables: by name; ``pandas.DataFrame(table.records())`` makes a frame of one.
    """

    path: Path
    tables: Mapping[str, pd.DataFrame]


def plan(recipe: RecipeLike | None = None, /, **values: Unpack[RecipeValues]) -> Plan:
    """Validates a recipe and its data and says what a training would work on, without any of it.

    Raises:
        BaditError: a wrong or unknown key or value, or bad data.
    """
    return make_plan(make_recipe(recipe, values))


def train(recipe: RecipeLike | None = None, /, *, progress: bool = True, **values: Unpack[RecipeValues]) -> Run:
    """Trains and scores a recipe, or goes on where that was interrupted; what is done is not done again.

    Args:
        recipe: a file, a Recipe or plain values (default: the defaults).
        progress: show bars on stderr.
        values: laid over the recipe, such as ``training={"num_train_epochs": 2}`` and ``output="runs/mine"``.

    Returns:
        The run, with its scores. Of several processes under a launcher only the first scores.

    Raises:
        BaditError: bad input, or an output folder that holds another recipe's run.
    """
    made = make_recipe(recipe, values)
    _train(made, progress=progress)
    return Run(made.output)


def evaluate(
    run: AnyPath, *, split: Split | None = None, progress: bool = True, trust_remote_code: bool = False
) -> Scores:
    """Scores a run again, on its recipe's split or another one, and keeps scores and predictions in its folder.

    Args:
        run: a run.
        split: ``"test"`` or ``"validation"``.
        progress: show a bar on stderr.
        trust_remote_code: run Python code that comes with the run's base model.

    Raises:
        BaditError: no such run, no adapter yet or a damaged one, or a split without instances.
    """
    return Scores.model_validate(
        _evaluate(Path(run), split=split, progress=progress, trust_remote_code=trust_remote_code)
    )


def generate(
    run: AnyPath,
    prompts: Texts,
    *,
    task: str | None = None,
    max_new_tokens: int = 50,
    batch_size: int = 16,
    progress: bool = False,
    trust_remote_code: bool = False,
) -> Texts:
    """A run's greedy answer to a prompt's text, or to each of several, in the prompt format of its recipe.

    The model is loaded anew by every call: give all prompts at once, or keep the model of :meth:`Run.load`.

    Args:
        run: a run.
        prompts: one text, which gives one answer, or several.
        task: the task that they belong to, which only methods that tell tasks apart ask for.
        max_new_tokens: the longest answer, in tokens.
        batch_size: prompts decoded at a time.
        progress: show a bar on stderr.
        trust_remote_code: run Python code that comes with the run's base model.

    Raises:
        BaditError: no such run, no adapter yet, or an empty prompt.
    """
    found = answers(
        RunFolder.existing(run),
        [prompts] if isinstance(prompts, str) else list(prompts),
        task=task,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
        trust_remote_code=trust_remote_code,
    )
    return cast("Texts", found[0] if isinstance(prompts, str) else found)


def compare(
    recipe: RecipeLike | None = None, /, *, jobs: int = 1, progress: bool = True, **values: Unpack[RecipeValues]
) -> Results:
    """Trains and scores methods side by side, or goes on with that; a cell that fails stops no other.

    Args:
        recipe: as for :func:`train`, with a ``compare`` section.
        jobs: runs at a time, each with its share of the processor's cores and, in turn, one of the GPUs.
        progress: a line on stderr for every cell that begins or ends.
        values: laid over the recipe, such as ``compare={"seeds": [0]}``.

    Returns:
        Every cell with its scores; :func:`badit.summarise` sums them up by method, :func:`badit.table` prints them.

    Raises:
        BaditError: bad input. What goes wrong within a cell is in its ``error``.
    """
    if jobs < 1:
        raise BaditError(f"jobs: must be at least 1, not {jobs}")
    made = make_recipe(recipe, values)
    _compare(made, jobs=jobs, report=report_to_stderr if progress else lambda line: None)
    return load_results(made.output)


def analyze(
    target: AnyPath,
    *,
    data: AnyPath | None = None,
    instances: int = 8,
    output: AnyPath | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> Analysis:
    """Measures interference between tasks, what experts do, and what tasks gain or lose together.

    Args:
        target: a run, a comparison's folder, or the name or folder of a base model.
        data: tasks to measure on, as in a recipe's ``data.source``. A base model needs them; a run has its own.
        instances: how many of each task, at least 2.
        output: the folder for the tables (default: the target's own, for a base model ``runs/analysis``).
        progress: show bars on stderr.
        trust_remote_code: run Python code that comes with a run's base model.

    Raises:
        BaditError: no such run or model, bad data, or tables of other settings in the folder.
    """
    folder = _analyze(
        os.fspath(target),
        data=None if data is None else os.fspath(data),
        instances=instances,
        output=None if output is None else Path(output),
        progress=progress,
        trust_remote_code=trust_remote_code,
    )
    return Analysis(folder, _tables(folder))


def write_report(
    runs: AnyPath | Sequence[AnyPath],
    output: AnyPath = "report.html",
    *,
    title: str | None = None,
    figures: AnyPath | None = None,
) -> Path:
    """Writes one self-contained page on a run or a comparison, or on several side by side.

    Args:
        runs: runs, comparisons' folders or results.json files; differences between runs are taken to the first.
        output: the page.
        title: its heading (default: the runs' names).
        figures: a folder for every figure as .svg and .pdf.

    Returns:
        The page's path.

    Raises:
        BaditError: badit[report] is not installed, a folder is no run, a file is damaged, or the page cannot be
            written.
    """
    several = [runs] if isinstance(runs, str | os.PathLike) else runs
    return _write_report(several, output, title=title, figures=figures)


def _tables(folder: Path) -> dict[str, pd.DataFrame]:
    return load_frames(folder / "analysis")

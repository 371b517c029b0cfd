"""A run is a folder; :class:`Run` is all that can be read from it and done with it.

Every command on a run is a method here, which imports the modules that do the work.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from badit.errors import BaditError, say
from badit.files import OWNER, read_json, read_jsonl, refuse_links, write_text

if TYPE_CHECKING:
    import pandas as pd
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from badit.export import Export
    from badit.recipe import Recipe, RecipeLike
    from badit.results import Results
    from badit.train import Plan

# In the folder of an export, what it was made of.
RECORD = "export.json"
#: A folder or a file; a Run stands for its folder.
AnyPath = str | os.PathLike[str]


class Run:
    """A run by its folder. Properties read the folder's files at every access.

    With ``check``, BaditError if the folder holds no run (nor an export, to be pushed), or if a link leads out of it.
    """

    def __init__(self, path: AnyPath, *, check: bool = True) -> None:
        self.path = Path(path)
        self.config_path = self.path / "config.yaml"  # the resolved recipe
        self.environment_path = self.path / "environment.json"  # see environment
        self.metrics_path = self.path / "metrics.jsonl"  # a line per logged step
        self.scores_path = self.path / "scores.json"  # {"rouge_l", "rouge_l_instances", …, "tasks": {name: {…}}}
        self.predictions_path = self.path / "predictions"  # a .jsonl per task
        self.instances_path = self.path / "instances.json"  # of a comparison's: {task: {metric: [each instance's]}}
        self.validation_path = self.path / "validation.json"  # of a comparison's: the loss that chooses the rate
        self.adapter_path = self.path / "adapter"  # as PEFT saves it; of a sequence of tasks, after the last one
        self.checkpoints_path = self.path / "checkpoints"  # what an interrupted run resumes from
        self.regroupings_path = self.path / "regroupings.jsonl"  # the log of DOG
        self.angles_path = self.path / "angles.jsonl"  # between experts, of mixtures that do not regroup
        self.analysis_path = self.path / "analysis"  # tables of `badit analyze`, a .json each
        self.gates_path = self.path / "gates.json"  # tasks' mean gates, as `badit export` or `studio` measured them
        if check and not self.config_path.is_file() and not (self.path / RECORD).is_file():
            raise BaditError(f"{self.path}: has no config.yaml, so it is no run's folder; make one: badit train RECIPE")
        if check:
            refuse_links(self.path)

    @classmethod
    def at(cls, path: AnyPath) -> Run:
        """The files of a run that may not be there yet, or of a stage of a run."""
        return cls(path, check=False)

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def _repr_html_(self) -> str:
        """For notebooks: the run and its scores."""
        if not self.config_path.is_file():  # an export
            return f"<p>{escape(repr(self))}</p>"
        about = f"<p>{escape(repr(self.recipe))}</p>"
        if not self.scores_path.is_file():
            return f"{about}<p>not scored yet</p>"
        return about + self.scores.pivot(index="task", columns="metric", values="score").round(2).to_html()

    def stage(self, number: int, task: str) -> Run:
        """The folder of one task of a sequence, counted from 1, with the same files as they were after that task."""
        return Run.at(self.path / "stages" / f"{number:02d}-{task}")

    @classmethod
    def prepare(cls, recipe: Recipe) -> Run:
        """The recipe's output folder: made, or taken up again if it holds the same recipe's run; else BaditError."""
        from badit.recipe import differing_keys, dump_recipe

        run = cls.at(recipe.output)
        refuse_links(run.path)
        if run.config_path.is_file():
            aside = {"output", "compare"}
            if keys := differing_keys(run.recipe.model_dump(exclude=aside), recipe.model_dump(exclude=aside)):
                other = f"holds a run of another recipe (it differs in {', '.join(keys[:5])})"
                raise BaditError(f"{run.path}: {other}; choose another output=FOLDER, or remove that one")
            return run
        # Its mark and a partial file are what a process leaves that is killed in its first write.
        remains = run.path.is_dir() and all(p.name == OWNER or p.suffix == ".partial" for p in run.path.iterdir())
        if run.path.exists() and not remains:
            raise BaditError(f"{run.path}: exists and is not a run's folder; choose another output=FOLDER")
        run.path.mkdir(parents=True, exist_ok=True)
        write_text(run.config_path, dump_recipe(recipe))
        return run

    def trusted_recipe(self, trust_remote_code: bool = False) -> Recipe:
        """The recipe; BaditError if it asks for the base model's own code and the caller does not allow it."""
        recipe = self.recipe
        if recipe.model.trust_remote_code and not trust_remote_code:
            raise BaditError(
                f"{self.config_path}: model.trust_remote_code: is true, so Python code that comes with the "
                f"model {recipe.model.name!r:.60} would run; allow it with --trust-remote-code if you trust both"
            )
        return recipe

    @property
    def recipe(self) -> Recipe:
        """The recipe that the run was made by, with the folder where the run is now as its output."""
        from badit.recipe import load_config

        return load_config(self.config_path).model_copy(update={"output": str(self.path)})

    @property
    def scores(self) -> pd.DataFrame:
        """The scores on the recipe's split: task, metric, score (0 to 100), n."""
        from badit.results import read_scores, scores_frame

        if not self.scores_path.is_file():
            raise BaditError(f"{self.path}: has no scores yet; make them with: badit evaluate {self.path}")
        return scores_frame(read_scores(self.scores_path))

    @property
    def predictions(self) -> pd.DataFrame:
        """The answers that were scored: task, id, prompt, prediction, references."""
        import pandas as pd

        from badit.evaluate import read_predictions

        return pd.DataFrame([vars(prediction) for prediction in read_predictions(self.predictions_path)])

    @property
    def metrics(self) -> pd.DataFrame:
        """The training log: step, loss, learning_rate, grad_norm …, a row per logged step."""
        import pandas as pd

        return pd.DataFrame(read_jsonl(self.metrics_path))

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and hardware; under ``training`` parameters, steps, seconds and memory."""
        return read_json(self.environment_path)

    @property
    def known_environment(self) -> dict[str, Any]:
        """``environment`` as far as it is written: empty before the training begins."""
        return self.environment if self.environment_path.is_file() else {}

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """What :meth:`analyze` has measured, by name; empty before."""
        from badit.analysis.tables import load_frames

        return load_frames(self.analysis_path)

    def load(self, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
        """The base model with what the run has learnt, for inference, and the tokenizer."""
        from badit.evaluate import load_run

        return load_run(self, self.trusted_recipe(trust_remote_code))

    def evaluate(
        self,
        *,
        split: Literal["test", "validation"] | None = None,
        progress: bool = True,
        trust_remote_code: bool = False,
    ) -> pd.DataFrame:
        """Score a run again, on the test or the validation split.

        Scores and predictions are kept in the run's folder.

        Args:
            split: the split to score; the recipe's own by default.
            progress: show a bar on stderr.
            trust_remote_code: run Python code that comes with the run's base model, if its recipe asks for it as well.

        Returns:
            The scores: task, metric, score (0 to 100), n.

        Raises:
            BaditError: no such run, no adapter yet or a damaged one, or a split without instances.
        """
        from badit.evaluate import evaluate
        from badit.results import scores_frame

        return scores_frame(evaluate(self.path, split=split, progress=progress, trust_remote_code=trust_remote_code))

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        task: str | None = None,
        raw: bool = False,
        max_new_tokens: int = 50,
        batch_size: int = 16,
        progress: bool = False,
        trust_remote_code: bool = False,
    ) -> Any:
        """Answer a prompt with a run's adapter, by greedy decoding; BaditError for an empty prompt.

        Every call loads the model: give all prompts at once, or keep the model of :meth:`load`.

        Args:
            prompts: one text, which gives one answer, or a list of texts.
            task: a task of the run's data, by name or number: the texts are inputs, and become the prompts that it was
                trained with.
            raw: with ``task``, take the texts as whole prompts. Methods that tell tasks apart need the task anyway.
            max_new_tokens: the longest answer, in tokens.
            batch_size: prompts decoded at a time.
            progress: show a bar on stderr.
            trust_remote_code: run Python code that comes with the run's base model, if its recipe asks for it as well.
        """
        from badit.data import load_sources
        from badit.generation import generate_answers
        from badit.train import encoded_texts

        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not all(text.strip() for text in texts):
            raise BaditError("the prompt is empty")
        recipe = self.trusted_recipe(trust_remote_code)
        found = None if task is None else load_sources(recipe.data.sources(), [task])[0]
        model, tokenizer = self.load(trust_remote_code=trust_remote_code)
        answers = generate_answers(
            model,
            tokenizer,
            encoded_texts(tokenizer, recipe, texts, None if raw else found, model, max_new_tokens),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=progress,
            tasks=None if found is None else [found.name] * len(texts),
        )
        return answers[0] if isinstance(prompts, str) else answers

    def analyze(
        self,
        *,
        data: AnyPath | None = None,
        instances: int = 8,
        output: AnyPath | None = None,
        progress: bool = True,
        trust_remote_code: bool = False,
    ) -> dict[str, pd.DataFrame]:
        """Measures the run: see :func:`analyze`."""
        options = {"progress": progress, "trust_remote_code": trust_remote_code}
        return analyze(self.path, data=data, instances=instances, output=output, **options)

    def export(
        self,
        output: AnyPath,
        *,
        task: str | None = None,
        all_tasks: bool = False,
        gates: AnyPath | None = None,
        rank: int | None = None,
        merged: bool = False,
        score: bool = False,
        engine: Literal["transformers", "vllm"] = "transformers",
        progress: bool = True,
        trust_remote_code: bool = False,
    ) -> Export:
        """Write a run as a plain LoRA or a merged model, for PEFT, vLLM and llama.cpp.

        Gates that follow the prompt become fixed. What is written needs no badit; docs/serving.md has the commands.

        Args:
            output: the folder to write.
            task: fix the gates to this task's mean (default: the mean over the run's tasks).
            all_tasks: write an adapter for each task, into subfolders with the tasks' names.
            gates: fix the gates to those of a file, such as an export's gates.json.
            rank: compress to this rank (default: the rank that is exact, at most 512).
            merged: write a whole model instead of an adapter.
            score: score the export on the run's split as well, into its scores.json.
            engine: what answers for the scores; vllm must be installed.
            progress: show bars on stderr.
            trust_remote_code: run Python code that comes with the run's base model, if its recipe asks for it as well.

        Raises:
            BaditError: no such run or task, an output that is in use, or a method that cannot be exported.
        """
        from badit.export import export, score_export

        choices: dict[str, Any] = {"task": task, "all_tasks": all_tasks, "gates": gates, "rank": rank, "merged": merged}
        options: dict[str, Any] = {"progress": progress, "trust_remote_code": trust_remote_code}
        exported = export(self.path, output, **choices, **options)
        if score:
            score_export(self.path, exported, engine=engine, **options)
        return exported

    def push(self, repository: str, *, private: bool = False) -> str:
        """Upload a run's adapter or an export to the Hugging Face hub, with a model card.

        Log in first: hf auth login.

        Args:
            repository: ORG/NAME on the hub, created if it does not exist.
            private: make a new repository private.

        Returns:
            The repository's web address.

        Raises:
            BaditError: nothing to upload, not logged in, or the hub refuses.
        """
        from badit.card import push_to_hub

        return push_to_hub(self, repository, private=private)


def plan(recipe: RecipeLike | None = None, /, **values: Any) -> Plan:
    """Validates a recipe and its data, and says what a training would work on. BaditError for any mistake in them."""
    from badit.recipe import make_recipe
    from badit.train import make_plan

    return make_plan(make_recipe(recipe, values))


def train(
    recipe: RecipeLike | None = None,
    /,
    *,
    progress: bool = True,
    allow_changed_inputs: bool = False,
    **values: Any,
) -> Run:
    """Trains and scores a recipe, or continues where that was interrupted; what is done is not done again.

    Args:
        recipe: a file, a Recipe or plain values (default: the defaults).
        progress: show bars on stderr.
        allow_changed_inputs: continue a run although its data or base weights have changed, and record that.
        values: override the recipe's, such as ``training={"num_train_epochs": 2}`` and ``output="runs/mine"``.

    Returns:
        The run, with its scores. Of several processes under a launcher only the first scores.

    Raises:
        BaditError: bad input, or an output folder that holds another recipe's run.
    """
    from badit.evaluate import train_and_score
    from badit.recipe import make_recipe

    made = make_recipe(recipe, values)
    train_and_score(made, progress=progress, allow_changed_inputs=allow_changed_inputs)
    return Run(made.output)


def compare(recipe: RecipeLike | None = None, /, *, jobs: int = 1, progress: bool = True, **values: Any) -> Results:
    """Trains and scores methods side by side, or continues; a cell that fails stops no other.

    Args:
        recipe: as for :func:`train`, with a ``compare`` section.
        jobs: runs at a time, each with its share of the processor's cores and, in turn, one of the GPUs.
        progress: a line on stderr for every cell that begins or ends.
        values: override the recipe's, such as ``compare={"seeds": [0]}``.

    Returns:
        Every cell with its scores; :func:`badit.summarise` sums them up by method, :func:`badit.table` prints them.

    Raises:
        BaditError: bad input. What goes wrong within a cell is in its ``error``.
    """
    from badit.compare import compare
    from badit.recipe import make_recipe
    from badit.results import load_results

    if jobs < 1:
        raise BaditError(f"jobs: must be at least 1, not {jobs}")
    made = make_recipe(recipe, values)
    compare(made, jobs=jobs, report=say if progress else lambda line: None)
    return load_results(made.output)


def analyze(
    target: AnyPath,
    *,
    data: AnyPath | None = None,
    instances: int = 8,
    output: AnyPath | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> dict[str, pd.DataFrame]:
    """Measure interference between tasks, and what a run's experts do.

    Tables go to OUTPUT/analysis, a .json each with every column explained. The same command continues after an
    interruption.

    Args:
        target: a run's folder, a comparison's, or a base model (with --data) such as smollm2-135m.
        data: tasks to measure on: a folder, a .jsonl file, or 'builtin' (default: the run's own).
        instances: instances per task, at least 2.
        output: the folder to write to (default: the target, for a base model runs/analysis).
        progress: show bars on stderr.
        trust_remote_code: run Python code that comes with a run's base model, if its recipe asks for it as well.

    Returns:
        The tables by name.

    Raises:
        BaditError: no such run or model, bad data, or tables of other settings in the folder.
    """
    from badit.analysis import analyze
    from badit.analysis.tables import load_frames

    source = None if data is None else os.fspath(data)
    return load_frames(analyze(os.fspath(target), source, instances, output, progress, trust_remote_code) / "analysis")

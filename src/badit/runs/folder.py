"""A run is a folder. :class:`Run` reads its files, and has the operations on it as methods.

The methods import the modules that implement them when they are called.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from badit.support.errors import BaditError, explained, refuse_unknown
from badit.support.files import OWNER, read_json, read_jsonl, refuse_links, write_text

if TYPE_CHECKING:
    import pandas as pd
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from badit.export.exporting import Export
    from badit.recipe.schema import Recipe, RecipeLike
    from badit.training.fit import Plan

ERROR, LOG = "error.txt", "log.txt"  # of a comparison's run
RECORD = "export.json"  # in the folder of an export: the run that it was made from, and its options
AnyPath = str | os.PathLike[str]  # a folder or a file; a Run can be passed as its folder


class Run:
    """A run, given by its folder. Properties read the folder's files at every access.

    With ``check``, BaditError if the folder has neither a run nor an export (for push), or if a link leads out of it.
    If the recipe has ``model.trust_remote_code``, loading the model needs ``trust_remote_code`` here too.
    """

    def __init__(self, path: AnyPath, *, check: bool = True, trust_remote_code: bool = False) -> None:
        self.path, self.trust_remote_code = Path(path), trust_remote_code
        self.config_path = self.path / "config.yaml"  # the resolved recipe
        self.environment_path = self.path / "environment.json"  # see the property environment
        self.metrics_path = self.path / "metrics.jsonl"  # one line per logged step
        self.scores_path = self.path / "scores.json"  # {"rouge_l", "rouge_l_instances", …, "tasks": {name: {…}}}
        self.predictions_path = self.path / "predictions"  # one .jsonl per task
        self.instances_path = self.path / "instances.json"  # of a comparison: {task: {metric: [value per instance]}}
        self.validation_path = self.path / "validation.json"  # of a comparison: the loss that selects the learning rate
        self.adapter_path = self.path / "adapter"  # in PEFT's format; of a sequence of tasks, after the last one
        self.checkpoints_path = self.path / "checkpoints"  # from which an interrupted run resumes
        self.regroupings_path = self.path / "regroupings.jsonl"  # the log of regroupings (DOG)
        self.angles_path = self.path / "angles.jsonl"  # angles between experts, in runs without regrouping
        self.analysis_path = self.path / "analysis"  # the tables of `badit analyze`, one .json each
        self.gates_path = self.path / "gates.json"  # mean gates per task, measured by `badit export` or `studio`
        if check and not self.config_path.is_file() and not (self.path / RECORD).is_file():
            raise BaditError(f"{self.path}: has no config.yaml, so it is not a run; create one: badit train RECIPE")
        if check:
            refuse_links(self.path)

    @classmethod
    def at(cls, path: AnyPath) -> Run:
        """A run whose folder may not exist yet, or a stage of a run. The folder is not checked."""
        return cls(path, check=False)

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def _repr_html_(self) -> str:
        """Returns the run and its scores as HTML, for notebooks."""
        if not self.config_path.is_file():  # an export
            return f"<p>{escape(repr(self))}</p>"
        about = f"<p>{escape(repr(self.recipe))}</p>"
        if not self.scores_path.is_file():
            return f"{about}<p>not scored yet</p>"
        return about + self.scores.pivot(index="task", columns="metric", values="score").round(2).to_html()

    @classmethod
    def prepare(cls, recipe: Recipe) -> Run:
        """Creates the recipe's output folder, or reuses it if it has a run of the same recipe; else BaditError."""
        from badit.recipe.schema import dump_recipe

        run = cls(recipe.output, check=False, trust_remote_code=recipe.model.trust_remote_code)
        if not run.belongs_to(recipe):
            run.path.mkdir(parents=True, exist_ok=True)
            run.environment_path.unlink(missing_ok=True)
            write_text(run.config_path, dump_recipe(recipe))
        return run

    def belongs_to(self, recipe: Recipe) -> bool:
        """Returns whether the folder has a run that began to train the recipe; BaditError if it has other files."""
        from badit.recipe.schema import differing_keys

        refuse_links(self.path)

        def has_only(*allowed: Path) -> bool:
            # A process that is killed in its first write leaves the owner file and a .partial file.
            files = (path for path in self.path.rglob("*") if path.suffix != ".partial" and not path.is_dir())
            return all(path in (self.path / OWNER, *allowed) for path in files)

        record = self.config_path, self.environment_path
        if all(path.is_file() for path in record) and has_only(*record, self.path / ERROR, self.path / LOG):
            return False
        if self.config_path.is_file():
            mine, its = (one.model_dump(mode="json", exclude={"output", "compare"}) for one in (self.recipe, recipe))
            if keys := differing_keys(mine, its):
                other = f"holds a run of another recipe (it differs in {', '.join(keys[:5])})"
                raise BaditError(f"{self.path}: {other}; choose another output=FOLDER, or remove the folder")
            return True
        if self.path.exists() and not (self.path.is_dir() and has_only()):
            raise BaditError(f"{self.path}: exists and is not a run's folder; choose another output=FOLDER")
        return False

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
        from badit.recipe.schema import load_config

        return load_config(self.config_path).model_copy(update={"output": str(self.path)})

    @property
    def scores(self) -> pd.DataFrame:
        """The scores on the recipe's split: task, metric, score (0 to 100), n."""
        from badit.evaluation.scores import read_scores, scores_frame

        if not self.scores_path.is_file():
            command = shlex.join(["badit", "evaluate", str(self.path)])
            raise BaditError(f"{self.path}: has no scores yet; compute them with: {command}")
        return scores_frame(read_scores(self.scores_path))

    @property
    def predictions(self) -> pd.DataFrame:
        """The scored answers: task, instance_id, prediction, references, prompt, nll."""
        import pandas as pd

        from badit.evaluation.scoring import read_predictions

        return pd.DataFrame([vars(prediction) for prediction in read_predictions(self.predictions_path)])

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
                raise BaditError(f"{self.environment_path}: {part}: must be an object; restore it, or train again")
        return content

    @property
    def known_environment(self) -> dict[str, Any]:
        """Like ``environment``, but empty if the file does not exist yet."""
        return self.environment if self.environment_path.is_file() else {}

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables written by :meth:`analyze`, by name; empty if there are none."""
        from badit.analysis.tables import load_frames

        return load_frames(self.analysis_path)

    def load(self) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
        """Loads the base model with the run's trained weights, for inference, and the tokenizer."""
        from badit.training.fit import load_run

        return load_run(self)

    def evaluate(
        self,
        *,
        split: Literal["test", "validation"] | None = None,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> pd.DataFrame:
        """Score a run again, on the test or the validation split.

        Scores and predictions are written to the run's folder.

        Args:
            split: the split to score (default: the recipe's).
            batch_size: number of prompts decoded at a time (default: the recipe's); a smaller one needs less memory.
            progress: show a progress bar on stderr.

        Returns:
            The scores: task, metric, score (0 to 100), n.

        Raises:
            BaditError: the run does not exist, its adapter is missing or damaged, or the split has no instances.
        """
        from badit.evaluation.scoring import evaluate
        from badit.evaluation.scores import scores_frame

        return scores_frame(evaluate(self, split=split, batch_size=batch_size, progress=progress))

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        task: str | None = None,
        raw: bool = False,
        max_new_tokens: int = 50,
        batch_size: int = 16,
        progress: bool = False,
    ) -> Any:
        """Answers prompts with a run's adapter, by greedy decoding; BaditError for an empty prompt.

        Every call loads the model: pass all prompts at once, or keep the model returned by :meth:`load`.

        Args:
            prompts: one text, for which one answer is returned, or a list of texts, for a list of answers.
            task: name or number of a task of the run's data; the texts are then inputs, and are formatted as in the
                task's training prompts.
            raw: use the texts unchanged as prompts, without the line break that ends whole prompts in training without
                a chat template; also with ``task``, for methods that need the task of every row.
            max_new_tokens: maximum number of tokens of an answer.
            batch_size: number of prompts decoded at a time.
            progress: show a progress bar on stderr.
        """
        from badit.data import load_sources
        from badit.evaluation.generation import generate_answers
        from badit.training.methods import build_method
        from badit.training.fit import encoded_texts

        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not all(text.strip() for text in texts):
            raise BaditError("the prompt is empty")
        recipe = self.trusted_recipe()
        if task is None and build_method(recipe.method).needs_tasks:
            raise BaditError(f"{self.path}: {recipe.method['name']} needs the name of a task; add --task TASK")
        found = None if task is None else load_sources(recipe.data.sources(), [task])[0]
        if found is not None and found.has_several_instructions and not raw:
            raise BaditError(f"--task: {found.name} has several instructions; give whole prompts, with --raw")
        model, tokenizer = self.load()
        ids = encoded_texts(tokenizer, recipe, texts, found, model, max_new_tokens, raw=raw)
        tasks = None if found is None else [found.name] * len(texts)
        answers = generate_answers(
            model, tokenizer, ids, tasks=tasks, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
        )
        return answers[0] if isinstance(prompts, str) else answers

    def analyze(
        self, *, data: AnyPath | None = None, instances: int = 8, output: AnyPath | None = None, progress: bool = True
    ) -> dict[str, pd.DataFrame]:
        """Measures the run; see :func:`analyze`."""
        options: dict[str, Any] = {"progress": progress, "trust_remote_code": self.trust_remote_code}
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
    ) -> Export:
        """Write a run as a plain LoRA or a merged model, for PEFT, vLLM and llama.cpp.

        Gates that depend on the prompt are fixed. The result loads without badit; docs/serving.md has the commands.

        Args:
            output: the folder to write.
            task: fix the gates to this task's mean (default: the mean over the tasks, refused for clusters of prompts).
            all_tasks: write one adapter per task, in subfolders named after the tasks.
            gates: fix the gates to those of a file, such as an export's gates.json.
            rank: compress to this rank (default: the exact rank, at most 512).
            merged: write a complete model instead of an adapter. Quantised base weights are refused.
            score: also score the export on the run's split, and write its scores.json.
            engine: the library that generates the answers to score; vllm must be installed separately.
            progress: show progress bars on stderr.

        Raises:
            BaditError: the run or task does not exist, the output is in use, or the method cannot be exported.
        """
        from badit.export.exporting import export, score_export

        if engine != "transformers" and not score:
            raise BaditError("--engine: generates the answers to score; add --score, or remove it")
        choices: dict[str, Any] = {"task": task, "all_tasks": all_tasks, "gates": gates, "rank": rank, "merged": merged}
        exported = export(self, output, **choices, progress=progress)
        if score:
            score_export(self, exported, engine=engine, progress=progress)
        return exported

    def push(self, repository: str, *, private: bool = False) -> str:
        """Upload a run's adapter or an export to the Hugging Face hub, with a model card.

        Log in first: hf auth login.

        Args:
            repository: ORG/NAME on the hub, created if it does not exist.
            private: make a new repository private.

        Returns:
            The URL of the repository.

        Raises:
            BaditError: there is nothing to upload, you are not logged in, or the hub refuses the upload.
        """
        from badit.hub.card import push_to_hub

        return push_to_hub(self, repository, private=private)


def plan(recipe: RecipeLike | None = None, /, **values: Any) -> Plan:
    """Validates a recipe and its data, and returns its tasks and method. Loads no model. BaditError if invalid."""
    from badit.recipe.schema import make_recipe
    from badit.training.fit import make_plan

    return make_plan(make_recipe(recipe, values))


def analyze(
    target: AnyPath,
    *,
    data: AnyPath | None = None,
    instances: int = 8,
    output: AnyPath | None = None,
    progress: bool = True,
    trust_remote_code: bool = False,
) -> dict[str, pd.DataFrame]:
    """Measure interference between tasks, and how a run uses its experts.

    Tables are written to OUTPUT/analysis, one .json each, which explains every column.
    The same command resumes an interrupted analysis.

    Args:
        target: a run's folder, a comparison's folder, or a base model (with --data) such as smollm2-135m.
        data: tasks to measure on: a folder, a .jsonl file, or 'builtin' (default: the run's own).
        instances: number of instances per task, at least 2 (not used with a comparison).
        output: the folder to write to (default: the target; for a base model, runs/analysis).
        progress: show progress bars on stderr.
        trust_remote_code: run the base model's own Python code, if the run's recipe allows this too.

    Returns:
        The tables by name.

    Raises:
        BaditError: the run or model does not exist, the data is invalid, or the folder has tables of other settings.
    """
    from badit.analysis import analyze
    from badit.analysis.tables import load_frames

    source = None if data is None else os.fspath(data)
    return load_frames(analyze(os.fspath(target), source, instances, output, progress, trust_remote_code) / "analysis")


def table(
    results: AnyPath,
    *,
    format: Literal["text", "markdown", "latex", "csv"] = "text",
    metric: str = "rouge_l",
    by_task: bool = False,
    released: bool = False,
    reference: str | None = None,
) -> str:
    """Print a comparison's results as text, Markdown, LaTeX or CSV.

    Args:
        results: a comparison's results.json, or its folder.
        format: the format of the table. LaTeX is a booktabs tabular, CSV has full precision.
        metric: the metric of differences, ranks and --by-task: rouge_l, exact_match or nll.
        by_task: print a row per task and a column per method.
        released: compute forgetting and transfer as SAPT's released code does, of a sequential comparison.
        reference: the method that the others are compared with (default: the comparison's own).

    Returns:
        The text, which the command prints.

    Raises:
        BaditError: the file is missing or damaged, or an option is unknown or not valid for the protocol.
    """
    from badit.evaluation.metrics import METRICS
    from badit.comparison.tables import FORMATS, method_table, task_table
    from badit.comparison.results import load_results

    refuse_unknown("--format", format, FORMATS)
    refuse_unknown("--metric", metric, METRICS)
    found = load_results(results)
    found = replace(found, reference=reference or found.reference)
    refuse_unknown("--reference", found.reference, found.methods)
    sequence = found.protocol == "sequential" and not by_task
    if released and not sequence:
        raise BaditError("--released: valid only for a sequential comparison and without --by-task; omit it")
    if reference and by_task:
        raise BaditError("--reference: a table by task has no differences; omit it")
    if metric != "rouge_l" and sequence:
        raise BaditError("--metric: forgetting and transfer are measured in Rouge-L; omit it, or add --by-task")
    return FORMATS[format](task_table(found, metric) if by_task else method_table(found, metric, released))

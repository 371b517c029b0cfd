"""The operations on recipes and runs: training, scoring, analysis, export and upload.

Every operation imports the rooms that implement it when it is called.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from badit.runs.folder import AnyPath, RunFolder
from badit.support.console import is_main_process, loading_libraries
from badit.support.errors import BaditError, refuse_unknown

if TYPE_CHECKING:
    import pandas as pd
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from badit.export.exporting import Export
    from badit.recipe.schema import RecipeLike
    from badit.runs.resolved import ResolvedRun


class Run(RunFolder):
    """A run, given by its folder, with the operations on it.

    BaditError if the folder has neither a run nor an export (for push), or if a link leads out of
    it. If the recipe has ``model.trust_remote_code``, loading the model needs ``trust_remote_code``
    here too.
    """

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The tables written by :meth:`analyze`, by name; empty if there are none."""
        from badit.analysis.tables import load_frames

        return load_frames(self.analysis_path)

    def load(self) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
        """Loads the base model with the run's trained weights, for inference, and the tokenizer."""
        with loading_libraries():
            from badit.runs.resolved import open_run
            from badit.training.loading import load_run

        return load_run(open_run(self))

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
            batch_size: number of prompts decoded at a time (default: the recipe's); a smaller one
                needs less memory.
            progress: show a progress bar on stderr.

        Returns:
            The scores: task, metric, score (0 to 100), n.

        Raises:
            BaditError: the run does not exist, its adapter is missing or damaged, or the split has
                no instances.
        """
        from badit.recipe.loading import make_recipe
        from badit.runs.scores import scores_frame
        from badit.runs.unresolved import UnresolvedRun

        read = UnresolvedRun(self, self.trusted_recipe())
        read.refuse_unscorable(split or read.recipe.evaluation.split)
        with loading_libraries():
            from badit.evaluation.scoring import evaluate
            from badit.runs.resolved import open_run

        run = open_run(self, read.tasks)
        if batch_size is not None:
            # Validated as in a recipe.
            run.recipe = make_recipe(run.recipe, {"evaluation": {"batch_size": batch_size}})
        return scores_frame(evaluate(run, split=split, progress=progress))

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

        Every call loads the model: pass all prompts at once, or keep the model returned by
        :meth:`load`.

        Args:
            prompts: one text, for which one answer is returned, or a list of texts, for a list of
                answers.
            task: name or number of a task of the run's data; the texts are then inputs, and are
                formatted as in the task's training prompts.
            raw: use the texts unchanged as prompts, without the line break that ends whole prompts
                in training without a chat template; also with ``task``, for methods that need the
                task of every row.
            max_new_tokens: maximum number of tokens of an answer.
            batch_size: number of prompts decoded at a time.
            progress: show a progress bar on stderr.
        """
        with loading_libraries():
            from badit.evaluation.prompts import answer_texts
            from badit.runs.resolved import open_run

        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        answers = answer_texts(
            open_run(self),
            texts,
            task=task,
            raw=raw,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=progress,
        )
        return answers[0] if isinstance(prompts, str) else answers

    def extend(
        self,
        data: AnyPath,
        *,
        output: AnyPath | None = None,
        overrides: Sequence[str] = (),
        progress: bool = True,
        **values: Any,
    ) -> Run:
        """Adds tasks to the run, without the data of its tasks and without changing their answers.

        A new task gets an expert and clusters of prompts of its own, and may use earlier experts.
        The run itself is not changed. The same call resumes an interrupted training.

        Args:
            data: the new tasks, as ``data.source`` of a recipe.
            output: the folder of the result (default: the run's folder with ``-extended``).
            overrides: ``key=value`` overrides of the recipe, as of the command.
            progress: show progress bars on stderr.
            values: override the recipe's values, such as ``extend={"rank": 16}``.

        Returns:
            The new run, with the scores of the new tasks. Those of the earlier tasks are in
            ``scores-earlier.json``, if ``extend.earlier`` has their test data.

        Raises:
            BaditError: the run cannot be extended, a task is already covered or has the name of an
                earlier one, or the data is invalid.
        """
        from badit.runs.extending import extended_recipe
        from badit.runs.unresolved import read_run

        recipe = extended_recipe(self, data, output, overrides, values)
        read = read_run(recipe)
        with loading_libraries():
            from badit.evaluation.scoring import train_and_score
            from badit.runs.resolved import resolve

        run = resolve(recipe, read.tasks)
        train_and_score(run, progress=progress)
        trusts_code = recipe.model.trust_remote_code
        return Run(run.folder.path, check=is_main_process(), trust_remote_code=trusts_code)

    def remove_task(
        self, task: str, *, output: AnyPath | None = None, overrides: Sequence[str] = ()
    ) -> Run:
        """Writes a copy of the run without an added task; the other tasks stay bit-identical.

        Args:
            task: the name of a task that was added alone.
            output: the folder of the copy (default: the run's folder with ``-without-TASK``).
            overrides: only ``output=FOLDER``, as of the command.

        Raises:
            BaditError: the task is not one that was added alone, or the folder exists.
        """
        for override in overrides:
            key, _, value = override.partition("=")
            if key != "output":
                raise BaditError(f"{override!r:.80}: --remove takes only output=FOLDER")
            output = value
        with loading_libraries():
            from badit.runs.resolved import open_run
            from badit.training.removal import remove_task

        run = open_run(self)
        folder = remove_task(run, task, output or f"{self.path}-without-{task}")
        return Run(folder, trust_remote_code=self.trust_remote_code)

    def analyze(
        self,
        *,
        data: AnyPath | None = None,
        instances: int = 8,
        output: AnyPath | None = None,
        progress: bool = True,
    ) -> dict[str, pd.DataFrame]:
        """Measures the run; see :func:`analyze`."""
        return analyze(
            self.path,
            data=data,
            instances=instances,
            output=output,
            progress=progress,
            trust_remote_code=self.trust_remote_code,
        )

    def export(  # noqa: PLR0913 (the options of badit export)
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

        Gates that depend on the prompt are fixed. The result loads without badit; docs/serving.md
        has the commands.

        Args:
            output: the folder to write.
            task: fix the gates to this task's mean (default: the mean over the tasks, refused for
                clusters of prompts).
            all_tasks: write one adapter per task, in subfolders named after the tasks.
            gates: fix the gates to those of a file, such as an export's gates.json.
            rank: compress to this rank (default: the exact rank, at most 512).
            merged: write a complete model instead of an adapter. Quantised base weights are
                refused.
            score: also score the export on the run's split, and write its scores.json.
            engine: the library that generates the answers to score; vllm must be installed
                separately.
            progress: show progress bars on stderr.

        Raises:
            BaditError: the run or task does not exist, the output is in use, or the method cannot
                be exported.
        """
        from badit.export.options import ExportOptions, refuse_export
        from badit.runs.unresolved import UnresolvedRun

        if engine != "transformers" and not score:
            raise BaditError("--engine: generates the answers to score; add --score, or remove it")
        options = ExportOptions(task, all_tasks, gates, rank, merged)
        refuse_export(UnresolvedRun(self, self.trusted_recipe()), output, options)
        with loading_libraries():
            from badit.export.exporting import export
            from badit.export.scoring import refuse_unscorable, score_export
            from badit.runs.resolved import open_run

        run = open_run(self)
        if score:
            refuse_unscorable(run, options, engine)
        exported = export(run, output, options, progress=progress)
        if score:
            score_export(run, exported, engine=engine, progress=progress)
        return exported

    def push(self, repository: str, *, private: bool = False) -> str:
        """Upload a run's adapter or an export to the Hugging Face hub, with a model card.

        Log in first: hf auth login. The card says how to install badit if the environment variable
        BADIT_INSTALL_FROM names a package of an index, or a repository such as git+https://….

        Args:
            repository: ORG/NAME on the hub, created if it does not exist.
            private: make a new repository private.

        Returns:
            The URL of the repository.

        Raises:
            BaditError: there is nothing to upload, you are not logged in, or the hub refuses the
                upload.
        """
        from badit.hub.upload import push_to_hub

        return push_to_hub(self, repository, private=private)


def train(
    recipe: RecipeLike | None = None,
    /,
    *,
    progress: bool = True,
    allow_changed_inputs: bool = False,
    **values: Any,
) -> Run:
    """Trains and scores a recipe, or resumes an interrupted run. Finished work is not repeated.

    Args:
        recipe: a file, a Recipe or plain values (default: the default recipe).
        progress: show progress bars on stderr.
        allow_changed_inputs: resume the run even if its data, base model or tokenizer have
            changed, and record the change.
        values: override the recipe's values, such as ``training={"num_train_epochs": 2}`` and
            ``output="runs/mine"``.

    Returns:
        The run, with its scores. With several processes (accelerate, torchrun), only rank 0 scores.

    Raises:
        BaditError: invalid input, or the output folder has a run of another recipe.
    """
    from badit.recipe.loading import make_recipe
    from badit.runs.unresolved import read_run

    read = read_run(make_recipe(recipe, values))
    with loading_libraries():
        from badit.evaluation.scoring import train_and_score
        from badit.runs.resolved import resolve

    run = resolve(read.recipe, read.tasks)
    train_and_score(run, progress=progress, allow_changed_inputs=allow_changed_inputs)
    return Run(
        run.folder.path,
        # Other ranks may get here before rank 0 has written the folder.
        check=is_main_process(),
        trust_remote_code=run.recipe.model.trust_remote_code,
    )


def adopt(
    adapter: AnyPath,
    /,
    *,
    data: AnyPath | None = None,
    output: AnyPath = "runs/adopted",
    any_prompts: bool = False,
    **values: Any,
) -> Run:
    """Makes a run of an adapter that a script trained, without training it.

    The base model is loaded once with the adapter, to check that they fit. Unless ``values`` set
    them, prompt.chat_template and prompt.separator become those with which the prompts of the data
    are like those of the training, as the clusters of prompts show that the adapter stores.

    Args:
        adapter: the folder with adapter_config.json and adapter_model.safetensors, such as a
            checkpoint of a trainer.
        data: tasks to score and to analyze, as a recipe's data.source (default: none).
        output: the folder of the run, which must be new or empty.
        any_prompts: adopt even if the prompts are unlike those of the training, as for other tasks.
        values: further values of a recipe's sections model, data, prompt and evaluation, such as
            ``model={"name": "org/name"}``.

    Raises:
        BaditError: the adapter is incomplete, of another kind or for another base model, or the
            prompts are unlike those of its training.
    """
    from badit.authoring.adoption import adopt

    source = None if data is None else os.fspath(data)
    run, _ = adopt(Path(adapter), os.fspath(output), source, values, any_prompts=any_prompts)
    return Run(run.folder.path, trust_remote_code=run.recipe.model.trust_remote_code)


def plan(recipe: RecipeLike | None = None, /, **values: Any) -> ResolvedRun:
    """Returns a recipe with every default, its tasks and its method; BaditError if invalid.

    Loads no model.
    """
    from badit.recipe.loading import make_recipe
    from badit.runs.resolved import resolve

    return resolve(make_recipe(recipe, values))


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
        target: a run's folder, a comparison's folder, or a base model (with --data) such as
            smollm2-135m.
        data: tasks to measure on, as a recipe's data.source: a file, a folder, a pattern with *, a
            dataset on the hub or 'builtin' (default: the run's own).
        instances: number of instances per task, at least 2 (not used with a comparison).
        output: the folder to write to (default: the target; for a base model, runs/analysis).
        progress: show progress bars on stderr.
        trust_remote_code: run the base model's own Python code, if the run's recipe allows this
            too.

    Returns:
        The tables by name.

    Raises:
        BaditError: the run or model does not exist, the data is invalid, or the folder has tables
            of other settings.
    """
    with loading_libraries():
        from badit.analysis import analyze
        from badit.analysis.tables import load_frames

    source = None if data is None else os.fspath(data)
    folder = analyze(os.fspath(target), source, instances, output, progress, trust_remote_code)
    return load_frames(folder / "analysis")


def table(
    results: AnyPath,
    *,
    format: Literal["text", "markdown", "latex", "csv"] = "text",
    metric: str | None = None,
    by_task: bool = False,
    released: bool = False,
    reference: str | None = None,
) -> str:
    """Print a comparison's results as text, Markdown, LaTeX or CSV.

    Args:
        results: a comparison's results.json, or its folder.
        format: the format of the table. LaTeX is a booktabs tabular, CSV has full precision.
        metric: the metric of differences, ranks and --by-task: rouge_l, exact_match, nll or, of
            preference data, preference (default: preference, or rouge_l without it).
        by_task: print a row per task and a column per method.
        released: compute forgetting and transfer as SAPT's released code does, of a sequential
            comparison.
        reference: the method that the others are compared with (default: the comparison's own).

    Returns:
        The text, which the command prints.

    Raises:
        BaditError: the file is missing or damaged, or an option is unknown or not valid for the
            protocol.
    """
    from badit.comparison.results import load_results
    from badit.comparison.tables import FORMATS, method_table, task_table
    from badit.metrics.answers import METRICS

    # Errors name the options of badit table, which is this function.
    refuse_unknown("--format", format, FORMATS)
    if metric is not None:
        refuse_unknown("--metric", metric, METRICS)
    loaded = load_results(results)
    metric = metric or loaded.metric
    loaded = replace(loaded, reference=reference or loaded.reference)
    refuse_unknown("--reference", loaded.reference, loaded.methods)
    is_sequential = loaded.protocol == "sequential"
    if released and (by_task or not is_sequential):
        valid = "valid only for a sequential comparison and without --by-task"
        raise BaditError(f"--released: {valid}; omit it")
    if by_task:
        if reference:
            raise BaditError("--reference: a table by task has no differences; omit it")
        return FORMATS[format](task_table(loaded, metric))
    if metric != "rouge_l" and is_sequential:
        problem = "forgetting and transfer are measured in Rouge-L"
        raise BaditError(f"--metric: {problem}; omit it, or add --by-task")
    return FORMATS[format](method_table(loaded, metric, released))

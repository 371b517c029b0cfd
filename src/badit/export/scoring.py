"""Scores an export next to its run, as other tools load it.

The metric is Rouge-L, or the preference of preference data.
"""

from collections.abc import Callable
from importlib.util import find_spec
from itertools import count
from statistics import fmean
from typing import Any

from peft import PeftModel

from badit.data.encoding import end_of_turn_id
from badit.data.orders import resolve_names
from badit.evaluation.answers import Answer, score_model
from badit.evaluation.scoring import evaluate
from badit.export.exporting import SCORES, Export, ExportOptions
from badit.metrics.answers import METRICS
from badit.models import device, load_base_model, resolve_model
from badit.recipe.schema import Recipe
from badit.runs.fingerprints import changed_inputs, task_fingerprints
from badit.runs.resolved import ResolvedRun
from badit.runs.scores import read_scores
from badit.support.errors import BaditError, explained, refuse_unknown
from badit.support.files import exclusive, write_json
from badit.support.text import text_table
from badit.training.loading import load_base, model_dtype


def score_export(
    run: ResolvedRun, done: Export, *, engine: str = "transformers", progress: bool = True
) -> dict[str, Any]:
    """Loads an export as other tools do, scores it, and writes its ``scores.json``.

    ``tasks`` has for each task the score of the run (``routed``), the export (``frozen``) and
    their ``difference`` in the ``metric``; ``mean`` has the means. One task's export is scored on
    that task only; of an export of all tasks, each task uses its adapter. Returns the content of
    the file.
    """
    metric = _metric(run)
    with exclusive(done.folder):  # another export would replace the folder
        by_task = _scores_by_task(run, done, metric, engine, progress)
        content: dict[str, Any] = {}
        for part in (*done.tasks.values(), done):
            task = part.record["task"]
            of_part = {name: scores for name, scores in by_task.items() if task in (None, name)}
            mean = {}
            for key in ("routed", "frozen", "difference"):
                mean[key] = fmean(scores[key] for scores in of_part.values())
            content = {
                "metric": metric,
                "split": run.recipe.evaluation.split,
                "engine": engine,
                "mixture": part.record["mixture"],
                "tasks": of_part,
                "mean": mean,
            }
            write_json(part.folder / SCORES, content)
    return content


def refuse_unscorable(run: ResolvedRun, options: ExportOptions, engine: str) -> None:
    """Raises BaditError if an export with these options could not be scored, before it is made."""
    refuse_unknown("engine", engine, ["transformers", "vllm"])
    fix = "use transformers"
    if engine == "vllm" and run.recipe.model.quantisation is not None:
        raise BaditError(f"engine: vllm does not support model.quantisation; {fix}")
    if engine == "vllm" and _metric(run) == "preference":
        problem = "only generates answers, and preferences need the likelihoods of given ones"
        raise BaditError(f"engine: vllm {problem}; {fix}")
    if engine == "vllm" and find_spec("vllm") is None:
        raise BaditError(f"engine: vllm is not installed; install vLLM here, or {fix}")
    split = run.recipe.evaluation.split
    run.refuse_unscorable(split)
    tasks = {task.name: task for task in run.tasks}
    exported = [name for name in tasks if tasks[name].train] if options.all_tasks else []
    if options.task is not None:
        exported = resolve_names([options.task], list(tasks), field="--task")
    for name in exported:
        if not getattr(tasks[name], split):
            raise BaditError(f"{name}: no {split} instances to score; remove --score")


def _metric(run: ResolvedRun) -> str:
    has_preferences = all(task.has_preferences for task in run.tasks)
    return "preference" if has_preferences else "rouge_l"


def _scores_by_task(
    run: ResolvedRun, done: Export, metric: str, engine: str, progress: bool
) -> dict[str, dict[str, float]]:
    recipe = run.recipe
    split = recipe.evaluation.split
    has_scores = run.folder.scores_path.is_file()
    # The run's scores may be those of other instances.
    if not has_scores or changed_inputs(run.folder, task_fingerprints(run.tasks)):
        evaluate(run, progress=progress)
    routed = read_scores(run.folder.scores_path)["tasks"]
    vllm = _VllmEngine(done, recipe) if engine == "vllm" else None

    by_task: dict[str, dict[str, float]] = {}
    for exported in done.tasks.values() or [done]:
        tasks = [task for task in run.tasks if exported.record["task"] in (None, task.name)]
        answer: Answer | None = None
        model: Any = None  # also frees the previous export's
        if vllm is not None:
            tokenizer = vllm.tokenizer
            answer = vllm.answers_of(exported)
        else:
            model, tokenizer = _loaded(exported, run)
        frozen, _ = score_model(
            model, tokenizer, recipe, tasks, split, progress=progress, answer=answer
        )
        for name, scores in frozen["tasks"].items():
            before = routed[name][metric]
            after = scores[metric]
            difference = after - before
            by_task[name] = {"routed": before, "frozen": after, "difference": difference}
    return by_task


def _loaded(exported: Export, run: ResolvedRun) -> tuple[Any, Any]:
    """Returns an export's model, loaded without badit's tuner, and its tokenizer."""
    recipe = run.recipe
    if exported.rank is None:
        return load_base_model(
            exported.folder,
            dtype=model_dtype(recipe),
            trust_remote_code=run.folder.trust_remote_code,
            device=device(),
        )
    model, tokenizer = load_base(recipe)
    return PeftModel.from_pretrained(model, str(exported.folder)).eval(), tokenizer


class _VllmEngine:
    """vLLM with the base model of an export, which answers with the export's adapters."""

    def __init__(self, exported: Export, recipe: Recipe) -> None:
        base = str(exported.folder)
        revision = None
        lora = {}
        if exported.rank is not None:
            base = resolve_model(recipe.model.name)
            revision = recipe.model.revision
            lora = {"enable_lora": True, "max_lora_rank": exported.max_lora_rank}
        fix = "install vLLM here, or use transformers"
        with explained("engine: vllm", action="started", fix=fix, any_error=True):
            # It requires its own torch, so it is not installed with badit.
            from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

            is_cpu = device().type == "cpu"  # where compilation takes longer than it saves
            options = {"dtype": model_dtype(recipe), "revision": revision, **lora}
            self._engine = LLM(base, enforce_eager=is_cpu, **options)
        self.tokenizer = self._engine.get_tokenizer()
        self._settings = SamplingParams(
            # Greedy, as the run's own answers.
            temperature=0.0,
            max_tokens=recipe.evaluation.max_new_tokens,
            # Answers end with this token in training; the model's configuration may name another.
            stop_token_ids=[end_of_turn_id(self.tokenizer, recipe.prompt.chat_template)],
        )
        # vLLM identifies LoRAs by positive integers.
        self._numbers = count(1)

    def answers_of(self, exported: Export) -> Callable[[list[list[int]]], list[str]]:
        """Returns the function that answers prompts (token ids) with an export's adapter."""
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        request = None
        if exported.rank is not None:
            number = next(self._numbers)
            request = LoRARequest(str(number), number, str(exported.folder.resolve()))

        def answers(prompts: list[list[int]]) -> list[str]:
            inputs = [{"prompt_token_ids": ids} for ids in prompts]
            with explained("vLLM", action="used", any_error=True):
                outputs = self._engine.generate(inputs, self._settings, lora_request=request)
            return [output.outputs[0].text.strip() for output in outputs]

        return answers


def cost_table(scores: dict[str, Any]) -> str:
    """Returns a table of the scores per task, of a run with routing and of its export."""
    entries = dict(scores["tasks"])
    if len(entries) > 1:
        entries["mean over tasks"] = scores["mean"]
    rows = []
    for name, entry in entries.items():
        numbers = [
            f"{entry['routed']:.1f}",
            f"{entry['frozen']:.1f}",
            f"{entry['difference']:+.1f}",
        ]
        rows.append([name, *numbers])
    label = METRICS[scores["metric"]].label
    return text_table(["task", f"{label} routed", "frozen", "difference"], rows)

"""Answers prompts that a user gives, with a run's adapter."""

import shlex
from collections.abc import Sequence

from badit.data import Task, load_sources
from badit.evaluation.generation import generate_answers
from badit.runs.resolved import ResolvedRun
from badit.support.errors import BaditError
from badit.training.encoding import encoded_texts, refuse_long_prompts
from badit.training.loading import load_run


def answer_command(run: ResolvedRun) -> str:
    """Returns the command that answers an input of a task, or a prompt if no task can be named."""
    words = ["badit", "generate", str(run.folder.path)]
    tasks = [] if run.recipe.data.source is None else run.tasks
    for task in tasks:
        # The prompts of a task have its instruction and the form of the training.
        if not task.has_several_instructions:
            text = "PROMPT" if task.definition is None else "INPUT"
            return shlex.join([*words, "--task", task.name, text])
    if run.method.needs_tasks and tasks:
        words += ["--task", tasks[0].name, "--raw"]
    return shlex.join([*words, "PROMPT"])


def answer_texts(  # noqa: PLR0913 (the options of badit generate)
    run: ResolvedRun,
    texts: Sequence[str],
    *,
    task: str | None,
    raw: bool,
    max_new_tokens: int,
    batch_size: int,
    progress: bool,
) -> list[str]:
    """Answers texts by greedy decoding; options and errors as of :meth:`badit.Run.generate`."""
    # Refused before the model is loaded, which takes long.
    if not all(text.strip() for text in texts):
        raise BaditError("the prompt is empty")
    chosen_task = _chosen_task(run, task, raw)
    model, tokenizer = load_run(run)
    prompts = encoded_texts(tokenizer, run.recipe, texts, chosen_task, raw=raw)
    refuse_long_prompts(prompts, model, max_new_tokens)
    tasks = None
    if chosen_task is not None:
        tasks = [chosen_task.name] * len(texts)
    return generate_answers(
        model,
        tokenizer,
        prompts,
        tasks=tasks,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )


def _chosen_task(run: ResolvedRun, name: str | None, raw: bool) -> Task | None:
    """Returns the task of this name in the run's data, or None without a name."""
    if name is None:
        if run.method.needs_tasks:
            problem = f"{run.method.name} needs the name of a task; add --task TASK"
            raise BaditError(f"{run.folder.path}: {problem}")
        return None
    run.refuse_task_of_earlier_run(name)
    task = load_sources(run.recipe.data.sources(), [name])[0]
    if task.has_several_instructions and not raw:
        fix = "give whole prompts, with --raw"
        raise BaditError(f"--task: {task.name} has several instructions; {fix}")
    return task

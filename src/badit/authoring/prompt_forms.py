"""The prompts of an adopted adapter: the form that they had in its training."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from badit.data import AnswerCollator, batches_by_task
from badit.data.encoding import LINE_BREAK, encode_prompts, uses_template
from badit.data.prompts import build_prompt
from badit.data.tasks import SPLITS, Instance, Task
from badit.support.console import say
from badit.support.errors import BaditError
from badit.support.text import counted
from badit.training.encoding import encoded
from badit.tuner import BaditModel, hooks_of

if TYPE_CHECKING:
    from badit.runs.resolved import ResolvedRun

# Values of the keys chat_template and separator of a recipe's section prompt.
Form = dict[str, Any]

_COMPARED = 32  # prompts of each task
_SHOWN_TASKS = 5
_SHOWN_START = 150  # characters of a prompt that are shown, if it is longer than both together
_SHOWN_END = 100
_OTHER_PROMPTS = (
    "give the script's own rows (prompt and completion) as the data, or set prompt.encoding or "
    "data.instruction; add --any-prompts if these are other tasks"
)


@dataclass(frozen=True)
class _Comparison:
    """How the prompts of a form compare with those of the training."""

    form: Form
    unlike: list[str]  # tasks most of whose prompts are unlike those of the training
    shift: float  # the sum over tasks


def choose_form(run: ResolvedRun, model: Any, tokenizer: Any, *, any_prompts: bool) -> bool:
    """Sets the chat template and the separator of the run's prompts, unless its recipe does.

    The clusters of prompts that an adapter stores show whether prompts are like those of its
    training. Without clusters, the first form is chosen.

    Returns:
        Whether the prompts were compared and are like those of the training.

    Raises:
        BaditError: the prompts are unlike those of the training, and not ``any_prompts``.
    """
    given = _given(run)
    forms = _forms(run.tasks, tokenizer)
    allowed = [
        form | given
        for form in forms
        if uses_template(tokenizer, (form | given)["chat_template"])
        == uses_template(tokenizer, form["chat_template"])
    ]
    hooks: Any = hooks_of(model)
    if not isinstance(hooks, BaditModel) or not hooks.has_clusters:
        changes = _set_form(run, allowed[0])
        if changes:
            reason = "because the answers begin with white space"
            say(f"badit: the prompts are built with {changes}, {reason}")
        return False

    compared = [_compare(run, form, hooks, tokenizer) for form in allowed]
    best = _best_of(compared)
    if best is not None:
        changes = _set_form(run, best.form)
        chosen = f" with {changes}" if changes else ""
        say(f"badit: the prompts are like those of the training{chosen}")
        return True

    problem = f"the prompts of {', '.join(compared[0].unlike)} are unlike those of the training"
    if any_prompts:
        say(f"badit: warning: {problem}, so their gates may be wrong")
        return False
    fix = _OTHER_PROMPTS
    if given and _best_of(_compare(run, form, hooks, tokenizer) for form in forms) is not None:
        keys = " and ".join(f"prompt.{key}" for key in sorted(given))
        fix = f"leave out {keys}, which badit then finds itself"
    for line in shown_prompts(run, tokenizer):
        say(line)
    raise BaditError(f"data: {problem}, so their gates would be wrong; {fix}")


def shown_prompts(run: ResolvedRun, tokenizer: Any) -> list[str]:
    """Returns lines with a prompt of each task as badit builds it."""
    prompts = [
        build_prompt(task, _instances(task)[0], run.recipe.prompt.encoding)
        for task in run.tasks[:_SHOWN_TASKS]
    ]
    encoded_prompts = encode_prompts(tokenizer, prompts, **run.recipe.prompt.of_prompts)
    lines = ["Prompts as badit builds them, one of each task:"]
    for task, ids in zip(run.tasks, encoded_prompts, strict=False):
        # The notation of Python shows white space at the ends and special characters.
        lines.append(f"  {task.name}: {_shortened(str(tokenizer.decode(ids)))!r}")
    if len(run.tasks) > _SHOWN_TASKS:
        lines.append(f"  and {counted(len(run.tasks) - _SHOWN_TASKS, 'more task')}")
    return lines


def _forms(tasks: Sequence[Task], tokenizer: Any) -> list[Form]:
    """Returns the forms that prompts can have, the most likely one first."""
    separators = [LINE_BREAK, ""]
    # A script that joins prompt and completion without a separator needs such answers.
    if all(_instances(task)[0].outputs[0][:1].isspace() for task in tasks):
        separators.reverse()
    forms: list[Form] = [{"chat_template": "never", "separator": text} for text in separators]
    if uses_template(tokenizer, "auto"):
        forms.insert(0, {"chat_template": "auto"})
    return forms


def _given(run: ResolvedRun) -> Form:
    """Returns the keys of a form that the recipe sets."""
    section = run.recipe.prompt
    return section.model_dump(include=section.model_fields_set & {"chat_template", "separator"})


def _set_form(run: ResolvedRun, form: Form) -> str:
    """Gives the run's recipe a form of prompts; returns the keys that change, as overrides."""
    former = run.recipe.prompt
    changed = {key: value for key, value in form.items() if value != getattr(former, key)}
    section = former.model_copy(update=changed)
    run.recipe = run.recipe.model_copy(update={"prompt": section})
    return shlex.join(f"prompt.{key}={value}" for key, value in changed.items())


def _compare(run: ResolvedRun, form: Form, hooks: BaditModel, tokenizer: Any) -> _Comparison:
    section = run.recipe.prompt.model_copy(update=form)
    recipe = run.recipe.model_copy(update={"prompt": section})
    pairs = [(task, instance) for task in run.tasks for instance in _instances(task)[:_COMPARED]]
    examples = encoded(tokenizer, recipe, pairs, hooks.model)
    batches = batches_by_task(examples, AnswerCollator(tokenizer.pad_token_id), _COMPARED)
    found = hooks.likeness({task: list(of_task) for task, of_task in batches.items()})
    unlike = [
        f"{task} ({100 * of_task.unlike_share:.0f} %)"
        for task, of_task in found.items()
        if of_task.unlike_share > 0.5
    ]
    if len(unlike) > _SHOWN_TASKS:
        unlike[_SHOWN_TASKS:] = [f"{len(unlike) - _SHOWN_TASKS} more"]
    return _Comparison(form, unlike, sum(of_task.shift for of_task in found.values()))


def _best_of(compared: Iterable[_Comparison]) -> _Comparison | None:
    """Returns the form with the smallest shift of those that are like the training."""
    fitting = [one for one in compared if not one.unlike]
    return min(fitting, key=lambda one: one.shift, default=None)


def _instances(task: Task) -> tuple[Instance, ...]:
    """Returns the task's first split that has instances."""
    return next(filter(None, (getattr(task, split) for split in SPLITS)))


def _shortened(text: str) -> str:
    if len(text) <= _SHOWN_START + _SHOWN_END:
        return text
    return f"{text[:_SHOWN_START]} … {text[-_SHOWN_END:]}"

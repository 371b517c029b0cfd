"""The prompts of an adopted adapter: the form that they had in its training."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from badit.data import AnswerCollator, batches_by_task
from badit.data.encoding import LINE_BREAK, encode_prompts, uses_template
from badit.data.prompts import build_prompt
from badit.data.tasks import SPLITS, Instance, Task
from badit.evaluation.losses import prompt_losses
from badit.support.console import say, waiting
from badit.support.errors import BaditError
from badit.support.text import counted
from badit.training.encoding import encoded
from badit.tuner import BaditModel, hooks_of

if TYPE_CHECKING:
    from badit.recipe.schema import Recipe
    from badit.runs.resolved import ResolvedRun

# Values of the keys chat_template and separator of a recipe's section prompt.
Form = dict[str, Any]

_COMPARED = 32  # prompts of each task
_SCORED = 4  # instances of each task
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
    training. Without clusters, the form is chosen in which the adapter has the lowest loss.

    Returns:
        Whether the prompts were compared and are like those of the training.

    Raises:
        BaditError: the prompts are unlike those of the training, and not ``any_prompts``.
    """
    given = _given(run)
    forms = _forms(run.tasks, tokenizer)
    allowed = _with_given(forms, given, tokenizer)
    hooks: Any = hooks_of(model)
    if not isinstance(hooks, BaditModel) or not hooks.has_clusters:
        if len(allowed) > 1:
            _choose_by_loss(run, allowed, model, tokenizer)
        return False

    compared = [_compare(run, form, hooks, tokenizer) for form in allowed]
    best = _best_of(compared)
    if best is not None:
        run.recipe = _with_form(run.recipe, best.form)
        say(f"badit: the prompts are like those of the training, with {_overrides(best.form)}")
        return True

    problem = f"the prompts of {', '.join(compared[0].unlike)} are unlike those of the training"
    if any_prompts:
        say(f"badit: warning: {problem}, so their gates may be wrong")
        return False
    fix = _OTHER_PROMPTS
    if given and _best_of(_compare(run, form, hooks, tokenizer) for form in forms) is not None:
        keys = " and ".join(f"prompt.{key}" for key in sorted(given))
        fix = f"leave out {keys}, which badit then finds itself"
    for line in shown_prompts(run, tokenizer, tasks=1):
        say(line)
    raise BaditError(f"data: {problem}, so their gates would be wrong; {fix}")


def shown_prompts(run: ResolvedRun, tokenizer: Any, tasks: int = _SHOWN_TASKS) -> list[str]:
    """Returns lines with a prompt of each of the first tasks as badit builds it."""
    prompts = [
        build_prompt(task, _instances(task)[0], run.recipe.prompt.encoding)
        for task in run.tasks[:tasks]
    ]
    encoded_prompts = encode_prompts(tokenizer, prompts, **run.recipe.prompt.of_prompts)
    lines = ["Prompts as badit builds them, one of each task:"]
    for task, ids in zip(run.tasks, encoded_prompts, strict=False):
        # The notation of Python shows white space at the ends and special characters.
        lines.append(f"  {task.name}: {_shortened(str(tokenizer.decode(ids)))!r}")
    if len(run.tasks) > tasks:
        lines.append(f"  and {counted(len(run.tasks) - tasks, 'more task')}")
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


def _with_given(forms: Sequence[Form], given: Form, tokenizer: Any) -> list[Form]:
    """Returns the different forms with the given keys, without those that would lose theirs."""
    allowed = []
    for form in forms:
        wanted = form | given
        is_same_kind = uses_template(tokenizer, wanted["chat_template"]) == uses_template(
            tokenizer, form["chat_template"]
        )
        if is_same_kind and wanted not in allowed:
            allowed.append(wanted)
    return allowed


def _with_form(recipe: Recipe, form: Form) -> Recipe:
    return recipe.model_copy(update={"prompt": recipe.prompt.model_copy(update=form)})


def _overrides(form: Form) -> str:
    """Returns a form as overrides of a command line."""
    words = []
    for key, value in form.items():
        text = str(value)
        # A line break as YAML in quotes.
        words.append(f"prompt.{key}={text if text.isprintable() else json.dumps(text)}")
    return shlex.join(words)


def _choose_by_loss(run: ResolvedRun, forms: Sequence[Form], model: Any, tokenizer: Any) -> None:
    """Gives the run the form of prompts in which the adapter has the lowest loss."""
    losses = []
    for form in waiting(forms, "Forms of prompts", "form"):
        batches = _batches(run, form, model, tokenizer, _SCORED).values()
        sums_P, counts_P = prompt_losses(model, chain.from_iterable(batches))
        losses.append((sums_P.sum() / counts_P.sum(), form))
    (lowest, best), (next_lowest, second), *_ = sorted(losses, key=lambda pair: pair[0])
    run.recipe = _with_form(run.recipe, best)
    say(
        f"badit: the adapter's loss is lowest for prompts with {_overrides(best)} ({lowest:.2f}; "
        f"{next_lowest:.2f} with {_overrides(second)})"
    )


def _compare(run: ResolvedRun, form: Form, hooks: BaditModel, tokenizer: Any) -> _Comparison:
    batches = _batches(run, form, hooks.model, tokenizer, _COMPARED)
    found = hooks.likeness({task: list(of_task) for task, of_task in batches.items()})
    unlike = [
        f"{task} ({100 * of_task.unlike_share:.0f} %)"
        for task, of_task in found.items()
        if of_task.unlike_share > 0.5
    ]
    if len(unlike) > _SHOWN_TASKS:
        unlike[_SHOWN_TASKS:] = [f"{len(unlike) - _SHOWN_TASKS} more"]
    return _Comparison(form, unlike, sum(of_task.shift for of_task in found.values()))


def _batches(run: ResolvedRun, form: Form, model: Any, tokenizer: Any, count: int) -> Any:
    """Returns, by task, a batch of its first instances with prompts of a form."""
    pairs = [(task, instance) for task in run.tasks for instance in _instances(task)[:count]]
    examples = encoded(tokenizer, _with_form(run.recipe, form), pairs, model)
    return batches_by_task(examples, AnswerCollator(tokenizer.pad_token_id, with_tasks=True), count)


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

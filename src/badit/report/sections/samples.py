"""Sample predictions: what the models answered, beside the references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from badit.data import own_input
from badit.metrics import Prediction, exact_match, rouge_l
from badit.report.blocks import Answer, Note, Sample, Samples, Section
from badit.report.context import Report, quoted
from badit.report.members import Member, first_members
from badit.report.wording import number

_A_TASK, _OF_MANY_RUNS = 6, 3
_QUESTION, _ANSWER = 700, 400
_PARTLY = 50.0
_LEAD = (
    "A few instances of every task, spread over its test set and chosen without regard to the answers: "
    f"✓ right (equals a reference), ≈ partly right (Rouge-L of {_PARTLY:.0f} or more), ✗ wrong."
)


def section(report: Report) -> Section:
    found: list[Member] = []
    origins = []
    for source in report.sources:
        if own := [member for member in first_members(source) if member.run.predictions]:
            found += own
            origins.append(report.origin(source, "predictions/" if source.results is None else "…/predictions/"))
    if not found:
        note = Note("No predictions are kept. Make them:", f"badit evaluate {quoted(report.sources[0].path)}")
        return Section("samples", "Sample predictions", _LEAD, [note])
    tasks = dict.fromkeys(task for member in found for task in member.run.predictions)
    by_task = {task: samples_of(task, found) for task in tasks}
    block = Samples(
        by_task,
        {task: report.names.get(task, task) for task in tasks},
        "Long prompts show their end, which holds the instance's own input.",
        origins,
    )
    return Section("samples", "Sample predictions", _LEAD, [block])


def samples_of(task: str, members: Sequence[Member]) -> list[Sample]:
    """Instances that all runs with this task have answered, evenly spread."""
    answered = [
        (member, {answer.instance_id: answer for answer in member.run.predictions[task]})
        for member in members
        if task in member.run.predictions
    ]
    shared = [name for name in answered[0][1] if all(name in answers for _, answers in answered)]
    count = min(_A_TASK if len(answered) <= 3 else _OF_MANY_RUNS, len(shared))
    return [_sample(shared[i * len(shared) // count], answered) for i in range(count)]


def _sample(instance: str, answered: Sequence[tuple[Member, Mapping[str, Prediction]]]) -> Sample:
    first = answered[0][1][instance]
    return Sample(
        _question(first.prompt),
        [_cut(reference, _ANSWER) for reference in dict.fromkeys(first.references)][:4],
        [_answer(member.method, answers[instance]) for member, answers in answered],
    )


def _answer(run: str, answer: Prediction) -> Answer:
    score = rouge_l(answer.prediction, answer.references)
    right = exact_match(answer.prediction, answer.references) > 0
    verdict = "right" if right else "partly right" if score >= _PARTLY else "wrong"
    return Answer(run, _cut(answer.prediction, _ANSWER), verdict, f"Rouge-L {number(score, 0)}")


def _question(prompt: str) -> str:
    """The instance's own input, out of a prompt in the official encodings; else the prompt's end."""
    text = own_input(prompt) or prompt
    return text if len(text) <= _QUESTION else "…" + text[-_QUESTION:]


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"

"""``badit studio``: a loaded run for a local web page that shows its tasks, and answers side by side.

A prompt is answered by up to three variants of the model, called sides: "router" is the trained adapter, "hand" the
adapter with gates set by hand, "base" the base model. Gates are on the scale of :mod:`badit.analysis.gates`.

Shape suffixes: M = adapted modules, K = experts.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field

from badit.analysis.atlas import ABILITIES
from badit.analysis.gates import Experts, active_experts, changed_gates, task_gates
from badit.analysis.tables import layer_and_module, load_frame
from badit.data import Task
from badit.evaluation.generation import stream_answer
from badit.export.factors import KEEPS_BASE
from badit.runs.folder import RunFolder
from badit.runs.resolved import open_run
from badit.support.console import say
from badit.support.errors import BaditError, refuse_unknown
from badit.training.encoding import encoded_texts, refuse_long_prompts
from badit.training.loading import load_base, load_run

MAX_CHARACTERS = 20_000
MAX_NEW_TOKENS = 512
_EXAMPLES, _SHOWN_TASKS, _DIGITS = 6, 5, 5
_PAUSE = 0.01  # seconds for which the measuring thread releases the model, so that a waiting question gets it

Side = Literal["router", "hand", "base"]
Show = Callable[
    [str, Mapping[str, Any]], None
]  # sends an event (name, data) of the running answer to the page


class Question(BaseModel, extra="forbid", frozen=True):
    """A request of the page: a prompt or a task's input, the sides that answer, and the gates of the side "hand"."""

    text: Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS)]
    task: str | None = None
    sides: Annotated[list[Side], Field(min_length=1, max_length=3)]
    gates: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] = 64


class Session:
    """A loaded run. Its model is switched between the sides, so it answers one question at a time; others wait."""

    def __init__(self, run: RunFolder) -> None:
        resolved = open_run(run)
        self.run, self.recipe, self.method = run, resolved.recipe, resolved.method
        if self.method.config is None:
            raise BaditError(
                f"{run.path}: its method, {self.method.name}, trains no adapter; use another run"
            )
        self.tasks: dict[str, Task] = {}
        self.remark = ""
        try:
            self.tasks = {task.name: task for task in resolved.tasks}
        except BaditError as error:
            if self.method.needs_tasks:
                raise
            self.remark = f"The run's tasks cannot be loaded: {error}"
        self.model, self.tokenizer = load_run(resolved)
        # Initialisations such as PiSSA's change the base weights, also for a disabled adapter.
        kept = getattr(self.method.config, "init_lora_weights", True) in KEEPS_BASE
        self.base: Any = self.model if kept else load_base(self.recipe)[0]
        self.experts = active_experts(self.model)
        self.number_of_experts = self.experts[0].number if self.experts else 0
        self._free = threading.Lock()
        #: The mean gates (M, K) of each task; None until they are measured.
        self.task_gates: dict[str, np.ndarray] | None = None

    @property
    def unmeasured(self) -> bool:
        """Whether the tasks' gates are not known yet but can be measured."""
        return (
            bool(self.experts)
            and self.task_gates is None
            and any(task.train for task in self.tasks.values())
        )

    def measure(self) -> None:
        """Measures the tasks' gates, or reads them from the run's folder. Questions can be answered meanwhile."""
        if not self.unmeasured:
            return
        names = [name for name, task in self.tasks.items() if task.train]
        measured = task_gates(self.run, self.model, self.tokenizer, self.recipe, self.tasks, names)
        by_task: dict[str, np.ndarray] = {}
        try:
            for name in names:
                with self._free:
                    _, gates = next(measured)
                gates_MK = np.array([gates[one.layer.name] for one in self.experts])
                by_task[name] = gates_MK / gates_MK.mean(axis=1, keepdims=True)
                time.sleep(_PAUSE)
        except BaditError as error:
            say(f"badit: the tasks' gates cannot be measured: {error}")
        self.task_gates = by_task

    def about(self) -> dict[str, Any]:
        """Returns what the page shows about the run before the first question."""
        path = self.run.analysis_path / f"{ABILITIES.name}.json"
        return {
            "run": self.run.path.resolve().name,
            "method": self.method.name,
            "model": self.recipe.model.name,
            "tasks": list(self.tasks),
            "remark": self.remark,
            "needs_task": self.method.needs_tasks,
            "experts": self.number_of_experts,
            "abilities": load_frame(path)["tasks"].tolist() if path.is_file() else [],
            "modules": [layer_and_module(one.layer.name) for one in self.experts],
            "max_characters": MAX_CHARACTERS,
            "max_new_tokens": MAX_NEW_TOKENS,
            "new_tokens": min(self.recipe.evaluation.max_new_tokens, MAX_NEW_TOKENS),
        }

    def task(self, name: str) -> dict[str, Any]:
        """Returns a task's instruction and a few of its instances, preferably held-out ones."""
        refuse_unknown("task", name, self.tasks)
        task = self.tasks[name]
        known = (
            task.test or task.validation or task.train
        )  # a question has no own instruction and no history
        fitting = (
            each
            for each in known
            if not (each.instruction or each.history or len(each.input) > MAX_CHARACTERS)
        )
        examples = [
            {"input": one.input, "references": list(one.outputs)}
            for one in islice(fitting, _EXAMPLES)
        ]
        return {"name": task.name, "instruction": task.definition, "examples": examples}

    def check(self, question: Question) -> None:
        """Raises BaditError for a question that the run cannot answer."""
        if not question.text.strip():
            raise BaditError("text: the prompt is empty")
        if question.task is not None:
            refuse_unknown("task", question.task, self.tasks)
        elif self.method.needs_tasks:
            raise BaditError(f"task: {self.method.name} needs the prompt's task; choose one")
        experts, gates = self.number_of_experts, question.gates or []
        if "hand" in question.sides and not experts:
            raise BaditError(f"gates: {self.method.name} has no gates to set by hand")
        if "hand" in question.sides and (len(gates) != experts or max(gates) > experts):
            raise BaditError(
                f"gates: must be {experts} numbers from 0 to {experts}, one for each expert"
            )

    def answer(self, question: Question, show: Show) -> None:
        """Answers on every requested side, one after another; stops when ``show`` raises.

        Shows "prompt" once, then per side "gates" (not for "base" or without experts), "text" as it grows, and "end".
        """
        with self._free:
            task = None if question.task is None else self.tasks[question.task]
            (ids,) = encoded_texts(self.tokenizer, self.recipe, [question.text], task)
            refuse_long_prompts([ids], self.model, question.max_new_tokens)
            show("prompt", {"text": self.tokenizer.decode(ids), "tokens": len(ids)})
            for side in question.sides:
                self._answer(side, question, ids, show)

    def _answer(self, side: Side, question: Question, ids: list[int], show: Show) -> None:
        began = time.monotonic()
        by_hand = question.gates if side == "hand" else None
        switched: Any = (
            self.model.disable_adapter() if side == "base" else mixed(self.experts, by_hand)
        )
        model = self.base if side == "base" else self.model
        gates_shown = side == "base" or not self.experts

        def show_text(text: str) -> None:
            nonlocal gates_shown
            if (
                not gates_shown
            ):  # the prompt's forward pass has set the gates before the first token
                gates_MK = np.stack([used[one.layer.name].numpy() for one in self.experts]).astype(
                    float
                )
                known = (self.task_gates or {}).items()
                apart = sorted(
                    (float(np.abs(task_MK - gates_MK).mean()), task) for task, task_MK in known
                )
                near = [
                    {"task": task, "difference": difference}
                    for difference, task in apart[:_SHOWN_TASKS]
                ]
                shown = {"gates": gates_MK.round(_DIGITS).tolist(), "nearest": near}
                show("gates", {"side": side, **shown, "unmeasured": self.unmeasured})
                gates_shown = True
            show("text", {"side": side, "text": text})

        options = question.model_dump(include={"max_new_tokens", "task"})
        with switched as used:
            answer = stream_answer(model, self.tokenizer, ids, show=show_text, **options)
        show(
            "end", {"side": side, **answer._asdict(), "seconds": round(time.monotonic() - began, 2)}
        )


@contextmanager
def mixed(
    experts: Sequence[Experts], by_hand: Sequence[float] | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """A context in which prompts are answered with their own gates, or with gates (K) set by hand for all layers.

    Yields, by adapted module, the gates (K) of the first forward pass (the prompt), averaged over its positions.
    """
    used: dict[str, torch.Tensor] = {}

    def mixing(one: Experts, gates: torch.Tensor) -> torch.Tensor:
        # The neutral gate depends on the method: 1, or 1/K if its gates sum to 1. The sum of a softmax has rounding
        # errors, which must not be multiplied into gates set by hand.
        neutral = gates.mean(dim=-1, keepdim=True).round(decimals=6)
        if by_hand is not None:
            gates = neutral * torch.tensor(by_hand).to(gates)
        if one.layer.name not in used:
            used[one.layer.name] = (gates / neutral).flatten(0, -2).mean(dim=0).cpu()
        return gates

    with changed_gates(experts, mixing):
        yield used

"""A run at work for the page: what it is, its tasks, and answers side by side.

A prompt is answered by up to three mixtures, here called sides: "router" is the adapter as it was trained, "hand" the
adapter with gates set by hand, "base" the base model, with the adapter switched off.

Shape suffixes: M = adapted modules, K = experts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field

from badit.analysis.gates import Experts, active_experts, has_experts
from badit.analysis.tables import TidyTable
from badit.data import Instance, Task, encode_prompt
from badit.errors import BaditError, nearest
from badit.evaluate import load_run
from badit.generation import stream_answer
from badit.runs import RunFolder
from badit.studio.mixing import measure_task_gates, mixed, saved_task_gates
from badit.training.methods import build_method
from badit.training.plan import encoded, make_plan

MAX_CHARACTERS = 20_000
MAX_NEW_TOKENS = 512
_EXAMPLES = 6
_SHOWN_TASKS = 5
_DIGITS = 5

Side = Literal["router", "hand", "base"]
# Shows an event by its name: what the page is told of an answer that is being written.
Show = Callable[[str, Mapping[str, Any]], None]


class Question(BaseModel):
    """What the page asks: a prompt, or an input for one of the run's tasks, and the sides that are to answer.

    ``gates`` are those of the side "hand", one for each expert, on the scale on which 1 is neutral.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS)]
    task: str | None = None
    sides: Annotated[list[Side], Field(min_length=1, max_length=3)]
    gates: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] = 64


class Session:
    """A loaded run. Its model is switched from side to side, so it answers one question at a time; others wait."""

    def __init__(self, path: str | Path, *, trust_remote_code: bool = False) -> None:
        """Loads the run. Where its tasks' mixtures are not known yet, :meth:`measure` finds them out.

        Raises:
            BaditError: no such run, one without an adapter, or a damaged one.
        """
        self.run = RunFolder.existing(path)
        self.recipe = self.run.recipe(trust_remote_code=trust_remote_code)
        method = build_method(self.recipe.method)
        config = getattr(method, "config", None)
        if config is None:
            raise BaditError(
                f"{self.run.path}: its method, {method.name}, has no adapter to try; "
                "name a run of a method that has one, such as badit or lora"
            )
        self.method = method.name
        self.needs_task = method.needs_tasks
        self.tasks, self.remark = self._tasks()
        model, self.tokenizer = load_run(self.run, self.recipe)
        assert isinstance(model, PeftModel)
        self.model = model
        self.experts: list[Experts] = active_experts(model) if has_experts(model) else []
        self.task_gates = saved_task_gates(self.run, list(self.tasks), self.experts) if self.experts else None
        self._free = threading.Lock()

    def _tasks(self) -> tuple[dict[str, Task], str]:
        """The run's tasks by name; where its data is not at hand, none, and why."""
        try:
            return {task.name: task for task in make_plan(self.recipe).tasks}, ""
        except BaditError as error:
            if self.needs_task:
                raise
            return {}, f"The run's tasks cannot be chosen: {error}"

    @property
    def unmeasured(self) -> bool:
        """Whether the tasks' mixtures can be known and are not yet."""
        return bool(self.experts) and self.task_gates is None and any(task.train for task in self.tasks.values())

    def measure(self) -> None:
        """Finds out the tasks' mixtures. Questions may be asked meanwhile, from other threads."""
        if self.unmeasured:
            tasks = list(self.tasks.values())
            self.task_gates = measure_task_gates(self.run, self.model, self.tokenizer, self.recipe, tasks, self._free)

    @property
    def number_of_experts(self) -> int:
        """K; 0 for a method that mixes none."""
        return self.experts[0].number if self.experts else 0

    def about(self) -> dict[str, Any]:
        """What the page shows of the run before anything is asked."""
        return {
            "run": self.run.path.resolve().name,
            "method": self.method,
            "model": self.recipe.model.name,
            "tasks": list(self.tasks),
            "remark": self.remark,
            "needs_task": self.needs_task,
            "experts": self.number_of_experts,
            "abilities": self._abilities(),
            "modules": [one.place for one in self.experts],
            "max_characters": MAX_CHARACTERS,
            "max_new_tokens": MAX_NEW_TOKENS,
            "new_tokens": min(self.recipe.evaluation.max_new_tokens, MAX_NEW_TOKENS),
        }

    def _abilities(self) -> list[str]:
        """What the run's analysis says of every expert; empty where there is none."""
        path = self.run.analysis / "abilities.json"
        if not path.is_file():
            return []
        records = TidyTable.load(path).records()
        said = {record.get("expert"): str(record.get("summary", "")) for record in records}
        return [said.get(expert, "") for expert in range(self.number_of_experts)]

    def task(self, name: str) -> dict[str, Any]:
        """A task's instruction and a few of its instances, those that were not trained on if there are any.

        Raises:
            BaditError: the run has no such task.
        """
        task = self._task(name)
        instances = task.test or task.validation or task.train
        fitting = [instance for instance in instances if len(instance.input) <= MAX_CHARACTERS]
        examples = [{"input": one.input, "references": list(one.outputs)} for one in fitting[:_EXAMPLES]]
        return {"name": task.name, "instruction": task.definition, "examples": examples}

    def _task(self, name: str) -> Task:
        if name not in self.tasks:
            raise BaditError(f"task: the run has no task {name!r:.130}{nearest(name, self.tasks)}")
        return self.tasks[name]

    def check(self, question: Question) -> None:
        """Refuses what the run cannot answer.

        Raises:
            BaditError: an unknown task or none where one is needed, an empty prompt, or gates that do not go with it.
        """
        if not question.text.strip():
            raise BaditError("text: the prompt is empty")
        if question.task is not None:
            self._task(question.task)
        elif self.needs_task:
            raise BaditError(f"task: {self.method} must know the prompt's task; choose one")
        if "hand" not in question.sides:
            return
        experts = self.number_of_experts
        if not experts:
            raise BaditError(f"gates: {self.method} has none to set by hand")
        if question.gates is None or len(question.gates) != experts or max(question.gates) > experts:
            raise BaditError(f"gates: must be {experts} numbers from 0 to {experts}, one for each expert")

    def answer(self, question: Question, show: Show) -> None:
        """Answers on every side that is asked for, one after another.

        Shows "prompt" once, and then of every side "gates" (where there are experts), "text" as it grows, and "end".
        What ``show`` raises ends the answer.

        Raises:
            BaditError: as :meth:`check`.
        """
        self.check(question)
        with self._free:
            ids = self._encoded(question)
            show("prompt", {"text": self.tokenizer.decode(ids), "tokens": len(ids)})
            for side in question.sides:
                self._answer(side, question, ids, show)

    def _answer(self, side: Side, question: Question, ids: list[int], show: Show) -> None:
        began = time.monotonic()
        with self._side(side, question) as used:
            untold = bool(self.experts) and side != "base"

            def grown(text: str) -> None:
                nonlocal untold
                if untold:  # the prompt's pass, which the first token comes of, has had its gates
                    show("gates", {"side": side, **self._described(used)})
                    untold = False
                show("text", {"side": side, "text": text})

            answer = stream_answer(
                self.model,
                self.tokenizer,
                ids,
                show=grown,
                max_new_tokens=question.max_new_tokens,
                task=question.task,
            )
        seconds = round(time.monotonic() - began, 2)
        show("end", {"side": side, **answer._asdict(), "seconds": seconds})

    @contextmanager
    def _side(self, side: Side, question: Question) -> Iterator[Mapping[str, torch.Tensor]]:
        if side == "base":
            with self.model.disable_adapter():
                yield {}
            return
        with mixed(self.experts, question.gates if side == "hand" else None) as used:
            yield used

    def _described(self, used: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        gates_MK = np.stack([used[one.layer.name].numpy() for one in self.experts])
        tasks = self.task_gates.nearest(gates_MK)[:_SHOWN_TASKS] if self.task_gates is not None else []
        return {
            "gates": [[round(float(gate), _DIGITS) for gate in gates_K] for gates_K in gates_MK],
            "nearest": [{"task": task, "difference": difference} for task, difference in tasks],
            "unmeasured": self.unmeasured,
        }

    def _encoded(self, question: Question) -> list[int]:
        """The prompt in the recipe's format, as the run was trained on it."""
        if question.task is None:
            section = self.recipe.prompt
            return encode_prompt(
                self.tokenizer,
                question.text,
                max_source_tokens=section.max_source_tokens,
                chat_template=section.chat_template,
            )
        instance = Instance(id="studio", input=question.text, outputs=("",))
        return encoded(self.tokenizer, self.recipe, self._task(question.task), instance, answer=False)["input_ids"]

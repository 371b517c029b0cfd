"""A loaded run that answers questions of the studio's page, side by side.

A prompt is answered by up to three variants of the model, called sides: "router" is the trained
adapter, "hand" the adapter with other gates, "base" the base model. Gates are on the scale of
:mod:`badit.analysis.gates`.

Shape suffixes: M = adapted modules, K = experts, P = prompts.
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
from badit.analysis.gates import clusters_of, task_gates
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
from badit.tuner.experts import AdaptedLayer, active_experts, changed_gates

MAX_CHARACTERS = 20_000
MAX_NEW_TOKENS = 512
_EXAMPLES = 6
_SHOWN_TASKS = 5
_DIGITS = 5
# Seconds for which the measuring thread releases the model, so that a waiting question gets it.
_PAUSE = 0.01

Side = Literal["router", "hand", "base"]
#: Sends an event (name, data) of the running answer to the page.
Show = Callable[[str, Mapping[str, Any]], None]


class Question(BaseModel, extra="forbid", frozen=True):
    """A request of the page.

    It has a prompt or a task's input, the sides that answer, and the gates of the side "hand": one
    for each expert, or those of a task.
    """

    text: Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS)]
    task: str | None = None
    sides: Annotated[list[Side], Field(min_length=1, max_length=3)]
    gates: list[Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = None
    gates_of: str | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] = 64


class Session:
    """A loaded run.

    Its model is switched between the sides, so it answers one question at a time; others wait.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        resolved = open_run(run)
        self.recipe = resolved.recipe
        self.method = resolved.method
        if self.method.config is None:
            raise BaditError(
                f"{run.path}: its method, {self.method.name}, trains no adapter; use another run"
            )
        self.tasks: dict[str, Task] = {}
        self.remark = ""
        try:
            self.tasks = {task.name: task for task in resolved.tasks}
        except BaditError as error:
            # Prompts can be answered without the data, unless the method needs their task.
            if self.method.needs_tasks:
                raise
            self.remark = f"The run's tasks cannot be loaded: {error}"

        self.model, self.tokenizer = load_run(resolved)
        self.base: Any = self.model
        if getattr(self.method.config, "init_lora_weights", True) not in KEEPS_BASE:
            # Initialisations such as PiSSA's change the base weights, also for a disabled adapter.
            self.base = load_base(self.recipe)[0]
        # Empty for methods without gates.
        self.experts = active_experts(self.model)
        self.modules = [layer.name for layer, _ in self.experts]
        self.number_of_experts = self.experts[0].num_experts if self.experts else 0
        # Empty for methods without clusters of prompts.
        self.clusters = clusters_of(self.experts)
        self._free = threading.Lock()  # held while the model is used
        self._stopped = threading.Event()
        #: The mean gates (M, K) of each task; None until they are measured.
        self.task_gates: dict[str, np.ndarray] | None = None
        #: The share of each task's prompts by cluster, for every item of ``clusters``.
        self.task_clusters: dict[str, Sequence[Sequence[float]]] = {}

    @property
    def can_set_gates(self) -> bool:
        """Whether other gates than a prompt's own can be used.

        With extensions they cannot: the gates of experts that a prompt's part does not use would
        have no effect.
        """
        extended = any(layer.badit_config[adapter].extensions for layer, adapter in self.experts)
        return bool(self.experts) and not extended

    @property
    def unmeasured(self) -> bool:
        """Whether the tasks' gates are not known yet but can be measured."""
        can_be_measured = self.experts and any(task.train for task in self.tasks.values())
        return self.task_gates is None and bool(can_be_measured)

    def measure(self) -> None:
        """Measures the tasks' gates, or reads them from the run's folder.

        Questions can be answered meanwhile. :meth:`stop` ends it after the current task.
        """
        if not self.unmeasured:
            return
        names = [name for name, task in self.tasks.items() if task.train]
        measured = task_gates(self.run, self.model, self.tokenizer, self.recipe, self.tasks, names)
        by_task: dict[str, np.ndarray] = {}
        try:
            for name in names:
                if self._stopped.wait(_PAUSE):
                    return
                # Held for one task at a time, so that questions are answered in between.
                with self._free:
                    _, gates = next(measured)
                gates_MK = np.array([gates.means[module] for module in self.modules])
                self.task_clusters[name] = gates.clusters
                # On the scale of the analysis: 1 is neutral.
                by_task[name] = gates_MK / gates_MK.mean(axis=1, keepdims=True)
        except BaditError as error:
            # The page works without them: it then shows no nearest tasks.
            say(f"badit: the tasks' gates cannot be measured: {error}")
        self.task_gates = by_task

    def stop(self) -> None:
        """Ends :meth:`measure`, in another thread, after the current task."""
        self._stopped.set()

    def about(self) -> dict[str, Any]:
        """Returns what the page shows about the run before the first question."""
        abilities_path = self.run.analysis_path / f"{ABILITIES.name}.json"
        abilities = []
        if abilities_path.is_file():
            abilities = load_frame(abilities_path)["tasks"].tolist()
        return {
            "run": self.run.path.resolve().name,
            "method": self.method.title,
            "model": self.recipe.model.name,
            "tasks": list(self.tasks),
            "remark": self.remark,
            "needs_task": self.method.needs_tasks,
            "experts": self.number_of_experts,
            "clusters": len(self.clusters[0].codes_CK) if self.clusters else 0,
            "can_set_gates": self.can_set_gates,
            "abilities": abilities,
            "places": self._places(),
            "max_characters": MAX_CHARACTERS,
            "max_new_tokens": MAX_NEW_TOKENS,
            "new_tokens": min(self.recipe.evaluation.max_new_tokens, MAX_NEW_TOKENS),
        }

    def _places(self) -> list[tuple[int, str]]:
        """Returns layer and module of every map of :meth:`mixtures`."""
        if self.clusters:
            return [of_place.place for of_place in self.clusters]
        return [layer_and_module(module) for module in self.modules]

    def mixtures(self) -> dict[str, Any]:
        """Returns each task's shares by cluster or, without clusters, its mean gates, by place.

        They are complete if nothing is left to measure.
        """
        by_task: dict[str, Any] = {}
        if not self.unmeasured:
            by_task = dict(self.task_clusters)
            if not self.clusters:
                gates_of_tasks = (self.task_gates or {}).items()
                by_task = {task: gates.round(_DIGITS).tolist() for task, gates in gates_of_tasks}
        return {"unmeasured": self.unmeasured, "tasks": by_task}

    def task(self, name: str) -> dict[str, Any]:
        """Returns a task's instruction and a few of its instances, preferably held-out ones."""
        refuse_unknown("task", name, self.tasks)
        task = self.tasks[name]
        # A question has no own instruction and no history.
        fitting = (
            instance
            for instance in task.test or task.validation or task.train
            if not (instance.instruction or instance.history)
            and len(instance.input) <= MAX_CHARACTERS
        )
        examples = [
            {"input": instance.input, "references": list(instance.outputs)}
            for instance in islice(fitting, _EXAMPLES)
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
        if "hand" not in question.sides:
            return
        experts, gates = self.number_of_experts, question.gates or []
        if not experts:
            raise BaditError(f"gates: {self.method.name} has no gates to set by hand")
        if not self.can_set_gates:
            raise BaditError("gates: the gates of an extended run cannot be set by hand")
        if question.gates_of is not None:
            refuse_unknown("gates_of", question.gates_of, self.task_gates or {})
            return
        # On the page's scale, K is the gate of an expert that is used alone.
        if len(gates) != experts or max(gates) > experts:
            raise BaditError(
                f"gates: must be {experts} numbers from 0 to {experts}, one for each expert"
            )

    def answer(self, question: Question, show: Show) -> None:
        """Answers on every requested side, one after another; stops when ``show`` raises.

        Shows "prompt" once, then per side "gates" (not for "base" or without experts), "text" as it
        grows, and "end".
        """
        with self._free:
            task = None if question.task is None else self.tasks[question.task]
            (ids,) = encoded_texts(self.tokenizer, self.recipe, [question.text], task)
            refuse_long_prompts([ids], self.model, question.max_new_tokens)
            show("prompt", {"text": self.tokenizer.decode(ids), "tokens": len(ids)})
            for side in question.sides:
                self._answer(side, question, ids, show)

    def _answer(self, side: Side, question: Question, ids: list[int], show: Show) -> None:
        start = time.monotonic()
        if side == "base":
            model = self.base
            switched: Any = self.model.disable_adapter()
        else:
            model = self.model
            switched = mixed(self.experts, self._gates_by_hand(question, side))
        shows_gates = side != "base" and bool(self.experts)

        def show_text(text: str) -> None:
            nonlocal shows_gates
            if shows_gates:  # the prompt's forward pass has set the gates before the first token
                gates_MK = np.stack([gates[module] for module in self.modules])
                show("gates", {"side": side, **self._compared(gates_MK)})
                shows_gates = False
            show("text", {"side": side, "text": text})

        options = question.model_dump(include={"max_new_tokens", "task"})
        with switched as gates:
            answer = stream_answer(model, self.tokenizer, ids, show=show_text, **options)
        seconds = round(time.monotonic() - start, 2)
        show("end", {"side": side, **answer._asdict(), "seconds": seconds})

    def _gates_by_hand(self, question: Question, side: Side) -> np.ndarray | None:
        """Returns the gates (M, K) of the side "hand", None for others."""
        if side != "hand":
            return None
        if question.gates_of is not None and self.task_gates is not None:
            return self.task_gates[question.gates_of]
        return np.tile(np.array(question.gates), (len(self.experts), 1))

    def _compared(self, gates_MK: np.ndarray) -> dict[str, Any]:
        """Returns a prompt's gates, and the tasks with the nearest mean gates."""
        differences = sorted(
            (float(np.abs(task_MK - gates_MK).mean()), task)
            for task, task_MK in (self.task_gates or {}).items()
        )
        return {
            "gates": gates_MK.round(_DIGITS).tolist(),
            "clusters": [int(of_place.nearest(gates_MK[None])[0]) for of_place in self.clusters],
            "nearest": [
                {"task": task, "difference": difference}
                for difference, task in differences[:_SHOWN_TASKS]
            ],
            "unmeasured": self.unmeasured,
        }


@contextmanager
def mixed(
    experts: Sequence[AdaptedLayer], by_hand_MK: np.ndarray | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """A context in which prompts are answered with their own gates, or with gates set by hand.

    Yields, by adapted module, the gates (K) of the
    first forward pass (the prompt), averaged over its positions.
    """
    gates_of_prompt: dict[str, np.ndarray] = {}
    by_hand = {}
    if by_hand_MK is not None:
        names = [adapted.layer.name for adapted in experts]
        by_hand = dict(zip(names, torch.tensor(by_hand_MK), strict=True))

    def mixing(adapted: AdaptedLayer, gates: torch.Tensor) -> torch.Tensor:
        # The neutral gate depends on the method: 1, or 1/K if its gates sum to 1. The sum of a
        # softmax has rounding errors, which must not be multiplied into gates set by hand.
        neutral = gates.mean(dim=-1, keepdim=True).round(decimals=6)
        module = adapted.layer.name
        if module in by_hand:
            gates = neutral * by_hand[module].to(gates)
        if module not in gates_of_prompt:
            mean_K = (gates / neutral).flatten(0, -2).mean(dim=0)
            gates_of_prompt[module] = mean_K.double().cpu().numpy()
        return gates

    with changed_gates(experts, mixing):
        yield gates_of_prompt

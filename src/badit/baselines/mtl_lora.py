"""MTL-LoRA: shared A and B's, and a matrix between them for each task (Yang et al. 2024, "MTL-LoRA: Low-Rank Adaptation
for Multi-Task Learning", arXiv 2410.09437).

    y = W x + s · Σ_k softmax(w_t / τ)_k B_k Λ_t A x,      t the task of the row that x is in

Every adapted layer has one A and K B's for all tasks, and Λ_t (r × r) and w_t (K) for each of them. There is no router:
the task of every row must be given, in generation as in training, by :meth:`MtlLoraModel.rows_of`.

A starts as LoRA's does, B_k at zero and Λ_t as the identity. w_t starts at random, within ±1/√K: from w_t = 0 all B_k
would get the same gradient at every step, and stay copies of one another.

From the paper: the equation. From the authors' code: s, how everything starts, 3 B's, τ 0.1, r 8. Assumption: alpha 64,
which keeps s = 8 as the other rivals have it here (the authors' example has alpha 16).

Shape suffixes: B = rows of the batch, I/O = in/out features, R = rank, K = B's, N = K·R components, M = tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from badit.errors import BaditError, nearest
from badit.method import expert_gates
from badit.tuner.base_config import ExpertConfig, is_number
from badit.tuner.base_layer import ExpertLayer
from badit.tuner.model import ExpertModel
from badit.tuner.prompt import ForwardPass, RoutingContext, inside_backward


@dataclass
class MtlLoraConfig(ExpertConfig):
    """MTL-LoRA (arXiv 2410.09437): several B's over one shared A, weighed by the row's task."""

    method: ClassVar[str] = "BADIT_MTL_LORA"
    needs_tasks: ClassVar[bool] = True

    num_experts: int = field(default=3, metadata={"help": "Number of B's."})
    r: int = field(default=8, metadata={"help": "Rank of A and of every B."})
    lora_alpha: float = field(default=64, metadata={"help": "LoRA's alpha; the scaling is lora_alpha / r."})
    temperature: float = field(default=0.1, metadata={"help": "Of the softmax that weighs the B's; low is sharp."})
    tasks: list[str] | None = field(
        default=None, metadata={"help": "Names of the tasks. Must be there when the adapter is made."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.temperature) or not self.temperature > 0:
            raise BaditError(f"temperature must be a positive number, got {self.temperature!r}")
        if self.tasks is not None:
            self.refuse_bad_tasks()

    @property
    def rows_of_A(self) -> int:
        return self.r

    @property
    def routes_in_layer(self) -> bool:
        return False

    @property
    def has_fixed_gates(self) -> bool:
        return False

    def refuse_bad_tasks(self) -> None:
        """Raises BaditError unless ``tasks`` lists at least one name, and none twice."""
        tasks = self.tasks
        if not isinstance(tasks, list) or not tasks or not all(isinstance(name, str) for name in tasks):
            raise BaditError(f"method.tasks: must list the names of the tasks to be trained on, got {tasks!r:.60}")
        if len(set(tasks)) < len(tasks):
            twice = next(name for name in tasks if tasks.count(name) > 1)
            raise BaditError(f"method.tasks: {twice!r} is listed more than once")

    def task_indices(self, names: Sequence[str]) -> list[int]:
        """Where each of the names stands in ``tasks``; BaditError for a name that is not there."""
        index_of = {name: index for index, name in enumerate(self.tasks or ())}
        for name in names:
            if name not in index_of:
                raise BaditError(
                    f"the adapter has learnt no task {name!r}{nearest(name, index_of)}: see its config's tasks"
                )
        return [index_of[name] for name in names]


class BatchTasks:
    """The tasks of the rows that are running: for each adapter, indices (B) into its tasks. One for all layers."""

    def __init__(self, routing: RoutingContext) -> None:
        self._routing = routing
        self._given: Mapping[str, torch.Tensor] = {}
        # Gradient checkpointing runs layers again in the backward pass, when other rows may have been given since.
        self._of_pass: WeakKeyDictionary[ForwardPass, Mapping[str, torch.Tensor]] = WeakKeyDictionary()

    @contextmanager
    def giving(self, indices: Mapping[str, torch.Tensor]) -> Iterator[None]:
        outer, self._given = self._given, indices
        try:
            yield
        finally:
            self._given = outer

    def of_rows(self, adapter_name: str) -> torch.Tensor | None:
        """The indices (B) of the pass that the calling layer belongs to; None where none were given."""
        indices, forward_pass = self._given, self._routing.forward_pass()
        if forward_pass is not None and inside_backward():
            indices = self._of_pass.get(forward_pass, {})
        elif forward_pass is not None:
            self._of_pass[forward_pass] = indices
        return indices.get(adapter_name)


class MtlLoraLinear(nn.Module, ExpertLayer):
    """MTL-LoRA on ``nn.Linear`` or transformers' ``Conv1D``.

    Trained are badit_A (R, I), badit_B (O, N), badit_lambda (M, R, R) and badit_task_logits (M, K).
    """

    adapter_layer_names = ("badit_A", "badit_B", "badit_lambda", "badit_task_logits")

    def __init__(
        self, base_layer: nn.Module, name: str, batch_tasks: BatchTasks, adapter_name: str, config: MtlLoraConfig
    ) -> None:
        super().__init__()
        ExpertLayer.__init__(self, base_layer, name)
        self.batch_tasks = batch_tasks
        self.badit_lambda = nn.ParameterDict()
        self.badit_task_logits = nn.ParameterDict()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: MtlLoraConfig, inference_mode: bool = False) -> None:
        tasks = len(config.tasks or ())
        self.badit_lambda[adapter_name] = nn.Parameter(torch.eye(config.r).repeat(tasks, 1, 1))
        self.badit_task_logits[adapter_name] = nn.Parameter(torch.zeros(tasks, config.num_experts))
        super().update_layer(adapter_name, config, inference_mode)

    @torch.no_grad()
    def _initialise(self, adapter_name: str, config: MtlLoraConfig) -> None:
        super()._initialise(adapter_name, config)
        nn.init.kaiming_uniform_(self.badit_task_logits[adapter_name], a=math.sqrt(5))

    def _component_gates(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        config: MtlLoraConfig = self.badit_config[adapter_name]
        logits_MK = self.badit_task_logits[adapter_name].float() / config.temperature
        gates_MN = expert_gates(logits_MK, kind="softmax").repeat_interleave(config.r, dim=-1)
        gates_BN = gates_MN[self._tasks_of_rows(adapter_name, x)]
        return gates_BN.unflatten(0, (-1, *[1] * (x.ndim - 2)))  # alike at all positions of a row

    def _hidden(self, adapter_name: str, x: torch.Tensor, a_RI: torch.Tensor) -> torch.Tensor:
        """Λ_t A x, (B, …, R)."""
        lambda_BRR = self.badit_lambda[adapter_name][self._tasks_of_rows(adapter_name, x)]
        return torch.einsum("b...i,boi->b...o", super()._hidden(adapter_name, x, a_RI), lambda_BRR)

    def frozen_factors(
        self, adapter_name: str, gates_N: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A' = Λ_t A (R, I) and B' (O, R), of the one task that :meth:`MtlLoraModel.rows_of` is given."""
        a_RI, b_OR = super().frozen_factors(adapter_name, gates_N)
        (task,) = self._tasks_of_rows(adapter_name, a_RI[:1])
        return self.badit_lambda[adapter_name][task].to(a_RI) @ a_RI, b_OR

    def _tasks_of_rows(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """The indices (B) of the tasks of x (B, …, I)."""
        tasks_B = self.batch_tasks.of_rows(adapter_name)
        if tasks_B is None:
            raise BaditError(
                "MTL-LoRA must know each row's task: run it within badit.tuner.hooks_of(model).rows_of(names)"
            )
        if len(tasks_B) != len(x):
            raise BaditError(
                f"{self.name} sees {len(x)} rows, but {len(tasks_B)} tasks are given: name one for every row (each "
                "beam and returned sequence is a row), or leave the layer out of target_modules"
            )
        return tasks_B.to(x.device)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._adapted(x, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise BaditError(
            "MTL-LoRA adds something else for every task and so has no single weight to merge into; "
            "keep it as an adapter (unload() gives the base model back)"
        )

    def __repr__(self) -> str:
        return "badit." + super().__repr__()


class MtlLoraModel(ExpertModel):
    """A base model with MTL-LoRA in its target modules. Run it within :meth:`rows_of`."""

    tuner_layer_cls = MtlLoraLinear
    needs_tasks = True

    @cached_property
    def batch_tasks(self) -> BatchTasks:
        return BatchTasks(RoutingContext.of(self.model))

    def _refuse_unsuitable(self, config: MtlLoraConfig) -> None:
        config.refuse_bad_tasks()  # again: the tasks may have been set since the configuration was made

    def _new_layer(self, target: nn.Module, name: str, adapter_name: str, config: MtlLoraConfig) -> MtlLoraLinear:
        return MtlLoraLinear(target, name, self.batch_tasks, adapter_name, config)

    def unload(self) -> nn.Module:
        """The base model, without the adapters."""
        RoutingContext.of(self.model).detach(self.model)
        return super().unload()

    @contextmanager
    def rows_of(self, tasks: Sequence[str] | None) -> Iterator[None]:
        """Tells the active adapters the task of every row.

        Raises:
            BaditError: a task that an active adapter has not learnt, or None.
        """
        layers = [module for module in self.model.modules() if isinstance(module, MtlLoraLinear)]
        running = {adapter_name: layer for layer in layers for adapter_name in layer._running_adapters}
        if not running:
            yield
            return
        if tasks is None:
            raise BaditError(
                "MTL-LoRA must know each row's task, and this batch does not say: give rows_of(names) the names"
            )
        indices = {
            adapter_name: torch.tensor(
                layer.badit_config[adapter_name].task_indices(tasks), dtype=torch.long, device=layer.device
            )
            for adapter_name, layer in running.items()
        }
        with self.batch_tasks.giving(indices):
            yield

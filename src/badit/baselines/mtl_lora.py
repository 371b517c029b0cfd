"""MTL-LoRA: A and B's shared by all tasks, with one matrix per task between them.

Yang et al. 2024, "MTL-LoRA: Low-Rank Adaptation for Multi-Task Learning", arXiv 2410.09437.

    y = W x + s · Σ_k softmax(w_t / τ)_k B_k Λ_t A x,      t is the task of x's row

Every adapted layer has one A and K B's for all tasks, and Λ_t (r × r) and w_t (K) for each task.
There is no router: the task of every row must be set with :meth:`MtlLoraModel.rows_of`, in training
and in generation.

A is initialised as in LoRA, B_k with zeros, Λ_t with the identity and w_t with random values within
±1/√K. With w_t = 0, all B_k would get the same gradient at every step and remain equal.

From the paper: the equation. From the authors' code: s, the initialisation, 3 B's, τ 0.1, r 8.
Assumption: alpha 64, so that s = 8 as in the other baselines here (the authors' example has alpha
16).

Shape suffixes: B = rows of the batch, I/O = in/out features, R = rank, K = B's, N = K·R components,
M = tasks.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from badit.baselines import baseline
from badit.method import expert_gates
from badit.support.errors import BaditError, nearest
from badit.tuner.config import Count, ExpertConfig, Positive, option
from badit.tuner.context import RoutingContext
from badit.tuner.layer import ExpertLinear, Pair
from badit.tuner.model import ExpertModel


class MtlLoraLinear(ExpertLinear):
    """Trains badit_A (R, I), badit_B (O, N), badit_lambda (M, R, R), badit_task_logits (M, K)."""

    adapter_layer_names = (*ExpertLinear.adapter_layer_names, "badit_lambda", "badit_task_logits")

    badit_lambda: nn.ParameterDict
    badit_task_logits: nn.ParameterDict

    def update_layer(self, adapter_name: str, config: "MtlLoraConfig") -> None:
        tasks = len(config.tasks or ())
        # Λ_t is the identity, so that all tasks begin with the same adapter.
        lambda_MRR = torch.eye(config.r).repeat(tasks, 1, 1)
        self.badit_lambda[adapter_name] = nn.Parameter(lambda_MRR)
        logits_MK = torch.zeros(tasks, config.num_experts)
        self.badit_task_logits[adapter_name] = nn.Parameter(logits_MK)
        super().update_layer(adapter_name, config)

    @torch.no_grad()
    def initialise(self, adapter_name: str) -> None:
        super().initialise(adapter_name)
        # Uniform within ±1/√K: equal logits would keep all B_k equal.
        nn.init.kaiming_uniform_(self.badit_task_logits[adapter_name], a=math.sqrt(5))

    def gates(self, adapter_name: str, x: Tensor) -> Tensor:
        """Returns the gates (B, 1, …, K): the same at all positions of a row."""
        config: MtlLoraConfig = self.badit_config[adapter_name]
        # softmax(w_t / τ) of all tasks, then the row of each row's task.
        logits_MK = self.badit_task_logits[adapter_name].float() / config.temperature
        gates_MK = expert_gates(logits_MK, kind="softmax")
        gates_BK = gates_MK[self._tasks_of_rows(adapter_name, x)]
        # Dimensions of size 1 for the positions between row and expert.
        return gates_BK.unflatten(0, (-1, *[1] * (x.ndim - 2)))

    def hidden(self, adapter_name: str, x: Tensor, a_PI: Tensor) -> Tensor:
        """Returns Λ_t A x (B, …, R)."""
        lambda_BRR = self.badit_lambda[adapter_name][self._tasks_of_rows(adapter_name, x)]
        return torch.einsum("b...i,boi->b...o", super().hidden(adapter_name, x, a_PI), lambda_BRR)

    def frozen_factors(self, adapter_name: str, gates_K: Tensor | None = None) -> Pair:
        """Returns A' = Λ_t A (R, I) and B' (O, R) for the task set with MtlLoraModel.rows_of."""
        a_RI, b_OR = super().frozen_factors(adapter_name, gates_K)
        # As for an input of one row, so a single task must be set.
        (task,) = self._tasks_of_rows(adapter_name, a_RI[:1])
        return self.badit_lambda[adapter_name][task].to(a_RI) @ a_RI, b_OR

    def _tasks_of_rows(self, adapter_name: str, x: Tensor) -> Tensor:
        tasks_B = self.routing.forward_pass().row_tasks.get(adapter_name)
        if tasks_B is None:
            raise BaditError(
                "MTL-LoRA needs each row's task: run it within "
                "badit.tuner.hooks_of(model).rows_of(names)"
            )
        if len(tasks_B) != len(x):
            raise BaditError(
                f"{self.name}: sees {len(x)} rows, but {len(tasks_B)} tasks are given; name one "
                "task per row (each beam and each returned sequence is a row), or leave the layer "
                "out of target_modules"
            )
        return tasks_B.to(x.device)


class MtlLoraModel(ExpertModel):
    """A base model with MTL-LoRA in its target modules. Run it within :meth:`rows_of`."""

    tuner_layer_cls = MtlLoraLinear

    def _refuse_unsuitable(self, config: "MtlLoraConfig") -> None:
        tasks = config.tasks
        if not tasks or len(set(tasks)) < len(tasks):
            raise BaditError(
                "method.tasks: must list every task to be trained on once, by name, got "
                f"{tasks!r:.60}"
            )

    @contextmanager
    def rows_of(self, tasks: Sequence[str] | None) -> Iterator[None]:
        """Sets the task of every row for the active adapters.

        BaditError if an adapter does not have a task.
        """
        names = tasks or ()  # without names, the layers raise BaditError
        row_tasks = {}
        for layer in self.expert_layers():
            for adapter_name in layer.running_adapters:
                if adapter_name not in row_tasks:
                    # Adapters may list their tasks in different orders.
                    indices = _indices(names, self.peft_config[adapter_name].tasks)
                    row_tasks[adapter_name] = indices.to(layer.device)
        routing = RoutingContext.of(self.model)
        outer = routing.row_tasks  # contexts may be nested
        routing.row_tasks = row_tasks
        try:
            yield
        finally:
            routing.row_tasks = outer


def _indices(names: Sequence[str], tasks: list[str]) -> Tensor:
    """Returns the index of each name in an adapter's tasks."""
    for name in names:
        if name not in tasks:
            raise BaditError(
                f"the adapter has no task {name!r}{nearest(name, tasks)}; its config lists its "
                "tasks"
            )
    return torch.tensor([tasks.index(name) for name in names], dtype=torch.long)


@baseline("mtl-lora", MtlLoraModel)
@dataclass
class MtlLoraConfig(ExpertConfig):
    """MTL-LoRA (arXiv 2410.09437): several B's and one shared A, weighted by the row's task."""

    method: ClassVar[str] = "BADIT_MTL_LORA"
    needs_tasks: ClassVar[bool] = True
    shares_A: ClassVar[bool] = True

    num_experts: Count = option(3, "Number of B's.")
    r: Count = option(8, "Rank of A and of each B.")
    lora_alpha: Positive = option(64, "LoRA's alpha; the scaling is lora_alpha / r.")
    temperature: Positive = option(
        0.1, "Temperature of the softmax that weights the B's; lower is sharper."
    )
    tasks: list[str] | None = option(None, "Names of the tasks; required to create an adapter.")

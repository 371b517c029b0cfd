"""Every task's gradient, taken one parameter at a time from the backward pass and kept as a sketch.

A task's gradient is the mean over its instances of the gradient of the instance's own loss, the mean cross-entropy of
its answer tokens; each instance has a pass of its own, so that batches and padding make no difference. A parameter's
gradient is there only until it has been added to its sketch: no more than one whole gradient is ever held.

Measured parameters: "weights", the weight matrices of the linear layers inside the transformer's layers (the base
layer's where an adapter wraps it; no embeddings, output layer, norms or biases), frozen or not; "adapter", all
parameters of a PEFT adapter that the loss depends on.

With halves h of n_h instances, the even and the odd ones in the order given, and G the inner products of the halves'
sums, everything follows from G (:class:`Agreement`).

Shape suffixes: T = tasks, R = 2T halves, task after task, U = output features (rows) of a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import dropwhile

import torch
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from badit.analysis.sketch import SketchedSums

Place = tuple[str, int, str]  # "weights" or "adapter", the layer, the module's name below the layer


@dataclass(frozen=True)
class MeasuredParameter:
    """A parameter and where it belongs; ``in_dim`` is the dimension of a weight's input features."""

    place: Place
    parameter: nn.Parameter
    in_dim: int | None = None


def layer_and_module(name: str, prefix: str | None = None) -> tuple[int, str]:
    """The index of the transformer layer, −1 outside of the layers, and the name below it.

    Args:
        name: of a module, or of an adapter's parameter, such as ``model.layers.12.mlp.gate_proj``.
        prefix: how the names of the adapter's own parts begin; what follows is left out, and "adapter" put there.
    """
    parts = [part for part in name.split(".") if part != "base_layer"]
    own = next((i for i, part in enumerate(parts) if prefix and part.startswith(prefix)), None)
    if own is not None:
        parts = [*parts[:own], "adapter"]
    layer = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if layer is None:
        return -1, ".".join(dropwhile(lambda part: part in ("base_model", "model"), parts))
    return int(parts[layer]), ".".join(parts[layer + 1 :])


def measured_parameters(model: nn.Module) -> list[MeasuredParameter]:
    """The weights of the linear layers, then the adapter's parameters, each in the model's order."""
    # PEFT names an adapter's own parts so, and itself tells by the name what to train.
    prefix = getattr(model.base_model, "prefix", None) if isinstance(model, PeftModel) else None

    def is_own(name: str) -> bool:
        return prefix is not None and any(part.startswith(prefix) for part in name.split("."))

    found = []
    for name, module in model.named_modules():
        layer, below = layer_and_module(name)
        if layer < 0 or is_own(name) or not isinstance(module, (nn.Linear, Conv1D)):
            continue
        weight = module.weight
        if isinstance(weight, nn.Parameter) and weight.is_floating_point():  # a quantised one has no gradient
            found.append(MeasuredParameter(("weights", layer, below), weight, 0 if isinstance(module, Conv1D) else 1))
    for name, parameter in model.named_parameters():
        if is_own(name):
            found.append(MeasuredParameter(("adapter", *layer_and_module(name, prefix)), parameter))
    return found


class TaskGradients:
    """Sums of the instances' gradients by task and half, and of the squares of "weights" by task and row.

    Args:
        model: whose gradients are taken.
        tasks: their number, T.
        sketch_size: numbers that are kept for a parameter, a task and a half.
        seed: of the sketches.
    """

    def __init__(self, model: nn.Module, tasks: int, sketch_size: int, seed: int) -> None:
        self._model = model
        self._measured = measured_parameters(model)
        self.counts_T2 = torch.zeros(tasks, 2, dtype=torch.float64)
        self._row = 0
        generator = torch.Generator().manual_seed(seed)
        self._sketches: list[SketchedSums] = []
        self._squares: list[torch.Tensor] = []
        for item in self._measured:
            parameter = item.parameter
            sketch = SketchedSums(parameter.numel(), 2 * tasks, sketch_size, generator, parameter.device)
            self._sketches.append(sketch)
            rows = 0 if item.in_dim is None else parameter.shape[1 - item.in_dim]
            self._squares.append(torch.zeros(tasks, rows, device=parameter.device))

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Within, a backward pass hands its gradients over and leaves none behind; dropout is off.

        Afterwards the model is as it was: modes, ``requires_grad`` and ``grad``.
        """
        modes = [(module, module.training) for module in self._model.modules()]
        before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in self._model.parameters()]
        handles = []
        try:
            self._model.eval()
            for parameter, _, _ in before:
                parameter.requires_grad_(False)
                parameter.grad = None
            for i, item in enumerate(self._measured):
                item.parameter.requires_grad_(True)
                handles.append(item.parameter.register_post_accumulate_grad_hook(partial(self._take, i)))
            with torch.enable_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter, requires_grad, gradient in before:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient
            for module, training in modes:
                module.training = training

    def begin_instance(self, task: int) -> None:
        """The next backward pass is an instance of this task, numbered from 0. Instances fall to the halves in turn."""
        half = int(self.counts_T2[task].sum()) % 2
        self.counts_T2[task, half] += 1
        self._row = 2 * task + half

    @torch.no_grad()
    def _take(self, index: int, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad.float(), None
        self._sketches[index].add(self._row, gradient.flatten())
        in_dim = self._measured[index].in_dim
        if in_dim is not None:
            self._squares[index][self._row // 2] += gradient.square().mean(dim=in_dim)

    def grams(self) -> dict[Place, torch.Tensor]:
        """By place, the inner products G (R, R) of the halves' sums; places without any gradient are left out."""
        grams: dict[Place, torch.Tensor] = {}
        for item, sketch in zip(self._measured, self._sketches, strict=True):
            gram_RR = sketch.gram()
            grams[item.place] = grams[item.place] + gram_RR if item.place in grams else gram_RR
        return {place: gram_RR for place, gram_RR in grams.items() if gram_RR.any()}

    def row_scores(self, task: int) -> list[torch.Tensor]:
        """For each layer, the mean squared gradient of every row of its weights (U,), on the CPU.

        The mean is taken over the row's entries and over the task's instances, each squared by itself.
        """
        layers: dict[int, list[torch.Tensor]] = {}
        for item, squares_TU in zip(self._measured, self._squares, strict=True):
            if item.in_dim is not None:
                layers.setdefault(item.place[1], []).append(squares_TU[task].cpu())
        return [torch.cat(layers[layer]) / self.counts_T2[task].sum().float() for layer in sorted(layers)]


class Agreement:
    """What the inner products of the halves' sums say of the tasks' gradients; NaN where a number is not defined.

    Args:
        gram_RR: of the halves' sums.
        counts_T2: instances in each half.

    Attributes:
        cosine_TT: cos(g_a, g_b) of the mean gradients.
        corrected_TT: ⟨g_a, g_b⟩ / √(⟨a_1, a_2⟩ ⟨b_1, b_2⟩), with the halves' means a_1 and a_2. Independent noise in
            the halves makes |g|² too large and cosines too small, and cancels in ⟨a_1, a_2⟩: Spearman's correction for
            attenuation. Clipped to [−1, 1]; undefined where one of the two is not positive.
        magnitude_TT: 2 |g_a| |g_b| / (|g_a|² + |g_b|²), 1 for equal norms (Yu et al. 2020, arXiv 2001.06782).
        norm_T: |g|.
        reliability_T: cos(a_1, a_2).
    """

    def __init__(self, gram_RR: torch.Tensor, counts_T2: torch.Tensor) -> None:
        tasks = len(counts_T2)
        # Of an empty half all inner products are 0, and its mean's 0 / 0 = NaN.
        halves_T2T2 = (gram_RR / counts_T2.flatten()[:, None] / counts_T2.flatten()).view(tasks, 2, tasks, 2)
        means_TT = gram_RR.view(tasks, 2, tasks, 2).sum(dim=(1, 3)) / (counts_T2.sum(1)[:, None] * counts_T2.sum(1))
        within_T22 = torch.einsum("ahak->ahk", halves_T2T2)
        between_T = within_T22[:, 0, 1]
        squared_T = means_TT.diagonal()
        self.norm_T = squared_T.sqrt()
        norms_TT = self.norm_T[:, None] * self.norm_T
        self.cosine_TT = (means_TT / norms_TT).clamp(-1, 1)
        self.magnitude_TT = 2 * norms_TT / (squared_T[:, None] + squared_T)
        self.reliability_T = (between_T / (within_T22[:, 0, 0] * within_T22[:, 1, 1]).sqrt()).clamp(-1, 1)
        noiseless_T = torch.where(between_T > 0, between_T, torch.nan).sqrt()
        self.corrected_TT = (means_TT / noiseless_T[:, None] / noiseless_T).clamp(-1, 1)

    def pairs(self, values_TT: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
        """The values of all pairs of tasks, in the order of the numbers of the tasks given."""
        ordered_TT = values_TT[list(order)][:, list(order)]
        rows, columns = torch.triu_indices(len(order), len(order), offset=1)
        return ordered_TT[rows, columns]

"""Optimizers for adapters (BADIT, the baselines, PEFT's LoRA): AdamW, LoRA+, orthogonal updates.

    optimizer = badit.OrthogonalUpdates(model, lr=2e-3)  # Trainer(…, optimizers=(optimizer, None))

Factors are found by name: ``badit_A`` and ``badit_B``, or PEFT's ``lora_A`` and ``lora_B``. All
other trainable parameters (routers, biases, modules_to_save, the LoRA of embeddings and
convolutions) are updated by AdamW.

PEFT's ``create_riemannian_optimizer`` and ``create_loraplus_optimizer`` differ: the first passes
the scaled gradient to Adam's elementwise moments, the second uses B's learning rate for every
vector and recognises only ``lora_B``.

Shape suffixes: L = layers, N = components (rows of A), I/O = in/out features, D = I or O, K = B's
that share one A.
"""

import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from badit.method import Moments, no_moments, orthogonal_updates
from badit.support.errors import BaditError, check
from badit.tuner.config import NotNegative, Positive
from badit.tuner.distributed import (
    by_shape,
    dtensor,
    is_divided_by_zero3,
    over_shards,
    placements_along,
    stacked,
)

Pair = tuple[nn.Parameter, nn.Parameter]

# The second form is that of the experts of added tasks, such as badit_extensions.default.A_1.
_ADDED = r"\bbadit_extensions\.[^.]+\."
_FACTOR = re.compile(rf"\b(?:badit|lora|lora_embedding)_([AB])\b|{_ADDED}([AB])_\d+$")
# Without lora_embedding_A: AdamW updates the LoRA of embeddings.
_FACTOR_A = re.compile(rf"(\b(?:badit|lora)_|{_ADDED})A(?=\b|_\d+$)")
# The moments with the factor's feature dimension, sharded as it is.
_OF_FEATURES = ("basis", "first", "features")

_FLATTENED = (
    "orthogonal updates need matrices, but DeepSpeed and FSDP1 flatten them; use FSDP2 or DDP, "
    "adamw or lora+"
)


def lora_plus_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, *, other_lr: float | None = None
) -> list[dict[str, Any]]:
    """Returns the parameter groups of LoRA+ (Hayou et al. 2024, arXiv 2402.12354).

    The groups are A with the learning rate ``lr``, B with ``lr`` times ``ratio``, and all other
    trainable parameters with ``other_lr`` (default: ``lr``), in this order. A group without
    parameters is left out.

    Raises:
        BaditError: if a learning rate or the ratio is not positive, or nothing is trainable.
    """
    if other_lr is None:
        other_lr = lr
    check("lr", lr, Positive)
    check("ratio", ratio, Positive)
    check("other_lr", other_lr, Positive)

    groups: dict[str, dict[str, Any]] = {
        "A": {"params": [], "lr": lr},
        "B": {"params": [], "lr": lr * ratio},
        "other": {"params": [], "lr": other_lr},
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = _FACTOR.search(name)
            kind = "other" if factor is None else factor[1] or factor[2]
            groups[kind]["params"].append(parameter)

    used_groups = [group for group in groups.values() if group["params"]]
    if not used_groups:
        raise BaditError("the model has no trainable parameters; add an adapter to it")
    return used_groups


def factor_pairs(model: nn.Module) -> list[Pair]:
    """Returns (A, B) of every layer and adapter in which both are trainable, in the model's order.

    A is (N, I), B is (O, K·N).
    """
    trained = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.ndim == 2
    }
    pairs = []
    for name, a in trained.items():
        b = trained.get(_FACTOR_A.sub(r"\1B", name))
        if b is None or b is a:  # the parameter has no B, or is not an A
            continue
        components, in_features = a.shape
        out_features, columns = b.shape
        # B's columns are no multiple of A's rows, or there are no N orthogonal directions.
        if columns % components or components > min(in_features, out_features):
            continue
        layer_name, *_ = _FACTOR_A.split(name)
        layer = model.get_submodule(layer_name.rstrip("."))
        # PEFT's LoRA on a fused weight of several experts orders A and B differently.
        if getattr(layer, "num_experts", 1) == 1:
            pairs.append((a, b))
    return pairs


class OrthogonalUpdates(torch.optim.Optimizer):
    """Orthogonal updates (:mod:`badit.method.orthogonal`) of adapter factors, AdamW for the others.

    If experts share one A (HydraLoRA, MTL-LoRA), their B's are treated as one B with K·O out
    features. Otherwise all experts of a layer are one pair of factors. AdamW updates an A or B
    whose partner is not trainable, pairs with more components than the weight has inputs or
    outputs, and PEFT's LoRA on fused weights of several experts. A layer in which a factor has no
    gradient is skipped in that step.

    Args:
        model: a model with adapters, optionally wrapped by DDP or sharded by FSDP2.
        lr: learning rate of the factors. In trials 2e-3 was best for BADIT's defaults, 5e-4 for
            LoRA.
        other_lr: learning rate of all other trainable parameters (default: ``lr``).
        betas: decay rates of the factors' moments.
        weight_decay: decoupled weight decay of all trainable parameters.

    Raises:
        BaditError: if the model has no trainable factors, a number is out of range, or DeepSpeed is
        used.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        *,
        other_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.0,
    ) -> None:
        # ZeRO-1 and -2 flatten the weights only later; accelerate's variable tells of them now.
        if is_divided_by_zero3(model) or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            raise BaditError(_FLATTENED)
        pairs = factor_pairs(model)
        if not pairs:
            names = "badit_A and badit_B, or lora_A and lora_B"
            raise BaditError(
                f"the model has no pair of trainable factors ({names}) whose rank fits its weights"
            )
        if not all(0 <= beta < 1 for beta in betas):
            raise BaditError(f"betas must be at least 0 and below 1, got {betas!r}")
        if other_lr is None:
            other_lr = lr
        check("weight_decay", weight_decay, NotNegative)
        check("lr", lr, Positive)
        check("other_lr", other_lr, Positive)

        factors = [factor for pair in pairs for factor in pair]
        are_factors = set(factors)
        others = [p for p in model.parameters() if p.requires_grad and p not in are_factors]
        groups: list[dict[str, Any]] = [{"params": factors, "lr": lr, "betas": betas}]
        if others:
            groups.append({"params": others, "lr": other_lr})
        super().__init__(groups, {"lr": lr, "betas": (0.9, 0.999), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Takes one step; ``closure`` (optional) recomputes the loss and returns it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        factors, *others = self.param_groups
        if any(factor.ndim != 2 for factor in factors["params"]):
            raise BaditError(_FLATTENED)
        # The group lists A and B of each layer in turn.
        a_factors = factors["params"][::2]
        b_factors = factors["params"][1::2]
        pairs = list(zip(a_factors, b_factors, strict=True))
        # Only layers that all have moments, or all have none yet, can be stacked.
        for has_moments in (True, False):
            alike = [pair for pair in pairs if bool(self.state.get(pair[0])) == has_moments]
            # by_shape leaves out layers in which a factor has no gradient.
            for indices in by_shape([(a.grad, b.grad) for a, b in alike]):
                self._update([alike[index] for index in indices], factors)

        for group in others:
            # A copy, because AdamW adds its other options to the group.
            adamw = torch.optim.AdamW([dict(group)])
            adamw.state = self.state  # an AdamW keeps nothing else between steps
            adamw.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, except that the factors' moments keep their dtype.

        In torch they would take the parameters' dtype.
        """
        super().load_state_dict(state_dict)
        factors = self.param_groups[0]["params"]
        indices = state_dict["param_groups"][0]["params"]
        for index, factor in zip(indices, factors, strict=True):
            moments = state_dict["state"].get(index, {})
            for name, moment in moments.items():
                self.state[factor][name] = moment.to(factor.device)

    def _update(self, pairs: Sequence[Pair], group: dict[str, Any]) -> None:
        """Takes one step of layers of equal shape."""
        lr = group["lr"]
        a_factors, b_factors = zip(*pairs, strict=True)
        # Global sizes, also of DTensors; a shard has fewer features.
        components, in_features = a_factors[0].shape
        out_features, columns = b_factors[0].shape
        b_per_a = columns // components
        a = _Side(a_factors, features=1, b_per_a=1)
        b = _Side(b_factors, features=0, b_per_a=b_per_a)

        updates, moments = orthogonal_updates(
            (a.rows(a_factors), b.rows(b_factors)),
            (
                a.rows([factor.grad for factor in a_factors]),
                b.rows([factor.grad for factor in b_factors]),
            ),
            (a.moments(self.state), b.moments(self.state)),
            lr=lr,
            betas=group["betas"],
            lengths=(in_features, b_per_a * out_features),
            over_shards=over_shards(a_factors[0]),
        )
        for index, side in enumerate((a, b)):
            side.store(moments[index], self.state)
            update = lr * side.as_rows(updates[index])
            side.subtract(update, shrink=1 - lr * group["weight_decay"])


@dataclass
class _Side:
    """The A's (N, I), or the B's (O, K·N), of several layers of equal shape.

    FSDP2 shards A and B by rows. A is redistributed into column shards, so that a product over
    features is the sum of the shards' products. The moments keep that sharding.

    ``features`` is the dimension of the in or out features, the only one that can be sharded.
    ``b_per_a`` is K, the number of B's that share one A; 1 for the A's.
    """

    factors: Sequence[nn.Parameter]
    features: int
    b_per_a: int

    def rows(self, tensors: Sequence[Any]) -> torch.Tensor:
        """Stacks tensors of the factors' shapes to rows (L, N, D) in at least float32."""
        x = stacked(tensors, self.features)
        return self.as_rows(x.to(torch.promote_types(x.dtype, torch.float32)))

    def as_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Converts B's (L, O, K·N) to rows (L, N, K·O), joining the K B's of one A, or back.

        A's are rows already.
        """
        if self.features == 1:
            return x
        return x.unflatten(-1, (self.b_per_a, -1)).permute(0, 3, 2, 1).flatten(-2)

    def moments(self, state: Mapping[Any, Any]) -> Moments:
        """Returns the stacked moments of the optimizer's state; zeros before the first step."""
        of_layers = [state[factor] for factor in self.factors]
        if not of_layers[0]:
            return no_moments(self.rows(self.factors))
        moments = {}
        for name in of_layers[0]:
            values = [of_layer[name] for of_layer in of_layers]
            stack = self.rows if name in _OF_FEATURES else torch.stack
            moments[name] = stack(values)
        return moments

    def store(self, moments: Moments, state: MutableMapping[Any, Any]) -> None:
        """Stores the stacked moments in the optimizer's state."""
        of_layers = {}
        for name, moment in moments.items():
            if name in _OF_FEATURES:
                of_layers[name] = self._split(self.as_rows(moment))
            else:
                of_layers[name] = moment.unbind()
        for index, factor in enumerate(self.factors):
            state[factor] = {name: layers[index] for name, layers in of_layers.items()}

    def _split(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Splits a stacked tensor into its layers, each sharded along the features."""
        layers = x.contiguous().unbind()
        first = self.factors[0]
        if not isinstance(first, DTensor):
            return layers
        # The layer's global shape: only the features are divided.
        shape = list(layers[0].shape)
        shape[self.features] = first.shape[self.features]
        placements = placements_along(self.features, first)
        return [dtensor(layer, first, placements, shape) for layer in layers]

    def subtract(self, update: torch.Tensor, shrink: float) -> None:
        """Multiplies the factors by ``shrink`` and subtracts the update (L, …)."""
        first = self.factors[0]
        local = list[torch.Tensor](self.factors)
        if isinstance(first, DTensor):
            # From shards along the features to the factors' own.
            placements = placements_along(self.features + 1, first)
            sharded_update = dtensor(update, first, placements, (len(self.factors), *first.shape))
            of_factors = [
                Shard(place.dim + 1) if isinstance(place, Shard) else place
                for place in first.placements
            ]
            update = sharded_update.redistribute(placements=of_factors).to_local()
            local = [factor.to_local() for factor in self.factors]  # pyright: ignore[reportAttributeAccessIssue]
        # One operation for all layers.
        torch._foreach_mul_(local, shrink)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_sub_(local, list(update.unbind()))  # pyright: ignore[reportPrivateImportUsage]

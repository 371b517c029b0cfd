"""Optimizers for adapters: AdamW, LoRA+ and orthogonal updates, for BADIT, the baselines and PEFT's LoRA.

    optimizer = badit.OrthogonalUpdates(model, lr=2e-3)    # Trainer(..., optimizers=(optimizer, None))

Factors are found by name: ``badit_A`` and ``badit_B``, or PEFT's ``lora_A`` and ``lora_B``. All other trainable
parameters (routers, biases, modules_to_save, the LoRA of embeddings and convolutions) are updated by AdamW.

PEFT's ``create_riemannian_optimizer`` and ``create_loraplus_optimizer`` differ: the first passes the scaled gradient to
Adam's elementwise moments, the second uses B's learning rate for every vector and recognises only ``lora_B``.

Shape suffixes: L = layers, N = components (rows of A), I/O = in/out features, D = I or O, K = B's that share one A.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from badit.method import Moments, no_moments, orthogonal_updates
from badit.support.errors import BaditError
from badit.tuner.config import NotNegative, Positive, check
from badit.tuner.distributed import (
    by_shape,
    dtensor,
    is_divided_by_zero3,
    over_shards,
    placements_along,
    stacked,
)

Pair = tuple[nn.Parameter, nn.Parameter]

_FACTOR = re.compile(r"\b(?:badit|lora|lora_embedding)_([AB])\b")
_FACTOR_A = re.compile(r"\b(badit|lora)_A\b")
_OF_FEATURES = (
    "basis",
    "first",
    "features",
)  # the moments with the factor's feature dimension, sharded as it is

_FLATTENED = "orthogonal updates need matrices, but DeepSpeed and FSDP1 flatten them; use FSDP2 or DDP, adamw or lora+"


def lora_plus_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, *, other_lr: float | None = None
) -> list[dict[str, Any]]:
    """Returns the parameter groups of LoRA+ (Hayou et al. 2024, arXiv 2402.12354), for AdamW or another optimizer.

    The groups are A with the learning rate ``lr``, B with ``lr`` times ``ratio``, and all other trainable parameters
    with ``other_lr`` (default: ``lr``), in this order. A group without parameters is left out.

    Raises:
        BaditError: if a learning rate or the ratio is not positive, or nothing is trainable.
    """
    other_lr = lr if other_lr is None else other_lr
    for name, value in (("lr", lr), ("ratio", ratio), ("other_lr", other_lr)):
        check(name, value, Positive)
    rates = {"A": lr, "B": lr * ratio, "other": other_lr}
    groups: dict[str, dict[str, Any]] = {
        kind: {"params": [], "lr": rate} for kind, rate in rates.items()
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found = _FACTOR.search(name)
            groups[found[1] if found else "other"]["params"].append(parameter)
    if used := [group for group in groups.values() if group["params"]]:
        return used
    raise BaditError("the model has no trainable parameters; add an adapter to it")


def factor_pairs(model: nn.Module) -> list[Pair]:
    """Returns A (N, I) and B (O, K·N) of every layer and adapter in which both are trainable, in the model's order."""
    pairs, trained = (
        [],
        {name: p for name, p in model.named_parameters() if p.requires_grad and p.ndim == 2},
    )
    for name, a in trained.items():
        b = trained.get(_FACTOR_A.sub(r"\1_B", name))
        if b is None or b is a or b.shape[1] % a.shape[0] or len(a) > min(a.shape[1], len(b)):
            continue
        layer = model.get_submodule(_FACTOR_A.split(name)[0].rstrip("."))
        if (
            getattr(layer, "num_experts", 1) == 1
        ):  # PEFT's LoRA on a fused weight orders A and B differently
            pairs.append((a, b))
    return pairs


class OrthogonalUpdates(torch.optim.Optimizer):
    """Applies orthogonal updates (:mod:`badit.method.orthogonal`) to adapter factors and AdamW to other parameters.

    If experts share one A (HydraLoRA, MTL-LoRA), their B's are treated as one B with K·O out features. Otherwise all
    experts of a layer are one pair of factors. AdamW updates an A or B whose partner is not trainable, pairs with more
    components than the weight has inputs or outputs, and PEFT's LoRA on fused weights of several experts. A layer in
    which a factor has no gradient is skipped in that step.

    Args:
        model: a model with adapters, optionally wrapped by DDP or sharded by FSDP2.
        lr: learning rate of the factors. In trials 2e-3 was best for BADIT's defaults, 5e-4 for LoRA.
        other_lr: learning rate of all other trainable parameters (default: ``lr``).
        betas: decay rates of the factors' moments.
        weight_decay: decoupled weight decay of all trainable parameters.

    Raises:
        BaditError: if the model has no trainable factors, a number is out of range, or DeepSpeed is used.
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
        other_lr = lr if other_lr is None else other_lr
        check("weight_decay", weight_decay, NotNegative)
        check("lr", lr, Positive)
        check("other_lr", other_lr, Positive)
        factors = [factor for pair in pairs for factor in pair]
        known = set(factors)
        others = [p for p in model.parameters() if p.requires_grad and p not in known]
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
        pairs = list(zip(factors["params"][::2], factors["params"][1::2], strict=True))
        for has_moments in (True, False):
            some = [pair for pair in pairs if bool(self.state.get(pair[0])) == has_moments]
            for indices in by_shape([(a.grad, b.grad) for a, b in some]):
                self._move([some[index] for index in indices], factors)
        for group in others:
            adamw = torch.optim.AdamW([dict(group)])
            adamw.state = self.state  # an AdamW keeps nothing else between steps
            adamw.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, except that the factors' moments keep their dtype instead of taking the parameters' dtype."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        for index, factor in zip(
            state_dict["param_groups"][0]["params"], self.param_groups[0]["params"], strict=True
        ):
            if index in saved:
                self.state[factor] = {
                    name: value.to(factor.device) for name, value in saved[index].items()
                }

    def _move(self, pairs: Sequence[Pair], group: dict[str, Any]) -> None:
        """Takes one step of layers of equal shape."""
        sides = list(zip(*pairs, strict=True))  # the A's (N, I) and the B's (O, K·N)
        (components, in_features), (out_features, columns) = (factors[0].shape for factors in sides)
        share, lr = columns // components, group["lr"]

        def as_rows(x: torch.Tensor, side: int) -> torch.Tensor:
            """Converts B (L, O, K·N) to rows (L, N, K·O), joining the K B's of one A, or back; A is unchanged."""
            return (
                x.unflatten(-1, (share, x.shape[-1] // share)).permute(0, 3, 2, 1).flatten(-2)
                if side
                else x
            )

        def rows(tensors: Sequence[Any], side: int) -> torch.Tensor:
            x = stacked(
                tensors, 1 - side
            )  # the feature dimension, which can be sharded: 1 of A, 0 of B
            return as_rows(x.to(torch.promote_types(x.dtype, torch.float32)), side)

        def last_moments(side: int) -> Moments:
            states = [self.state[factor] for factor in sides[side]]
            if not states[0]:
                return no_moments(rows(sides[side], side))
            values = {name: [state[name] for state in states] for name in states[0]}
            return {
                name: rows(of, side) if name in _OF_FEATURES else torch.stack(of)
                for name, of in values.items()
            }

        updates, moments = orthogonal_updates(
            (rows(sides[0], 0), rows(sides[1], 1)),
            (rows([a.grad for a in sides[0]], 0), rows([b.grad for b in sides[1]], 1)),
            (last_moments(0), last_moments(1)),
            lr=lr,
            betas=group["betas"],
            lengths=(in_features, share * out_features),
            over_shards=over_shards(sides[0][0]),
        )
        for side, factors in enumerate(sides):
            kept = {}
            for name, moment in moments[side].items():
                of_features = name in _OF_FEATURES
                kept[name] = (
                    _shard(as_rows(moment, side), factors, 1 - side)
                    if of_features
                    else moment.unbind()
                )
            for index, factor in enumerate(factors):
                self.state[factor] = {name: parts[index] for name, parts in kept.items()}
            _subtract(
                factors, lr * as_rows(updates[side], side), 1 - side, 1 - lr * group["weight_decay"]
            )


# FSDP2 shards A and B by rows. A is redistributed into column shards, so that a product over features is the sum of the
# shards' products. The moments keep that sharding.


def _shard(x: torch.Tensor, like: Sequence[torch.Tensor], features: int) -> Sequence[torch.Tensor]:
    """Splits a tensor of :func:`badit.tuner.distributed.stacked` into its layers, each sharded along ``features``."""
    layers = x.contiguous().unbind()
    first = like[0]
    if not isinstance(first, DTensor):
        return layers
    shape = [
        first.shape[dim] if dim == features else size for dim, size in enumerate(layers[0].shape)
    ]
    return [dtensor(layer, first, placements_along(features, first), shape) for layer in layers]


def _subtract(
    factors: Sequence[nn.Parameter], update: torch.Tensor, features: int, shrink: float
) -> None:
    """Multiplies the factors by ``shrink`` and subtracts the update (L, …), which is sharded along ``features``."""
    first, parts = factors[0], list[torch.Tensor](factors)
    if isinstance(first, DTensor):
        whole = dtensor(
            update, first, placements_along(features + 1, first), (len(factors), *first.shape)
        )
        along_factors = [
            Shard(place.dim + 1) if isinstance(place, Shard) else place
            for place in first.placements
        ]
        update = whole.redistribute(placements=along_factors).to_local()
        parts = [factor.to_local() for factor in factors]  # pyright: ignore[reportAttributeAccessIssue]
    torch._foreach_mul_(parts, shrink)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_sub_(parts, list(update.unbind()))  # pyright: ignore[reportPrivateImportUsage]

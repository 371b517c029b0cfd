"""Optimizers for adapters: AdamW, LoRA+ and orthogonal updates, for BADIT, the baselines and PEFT's LoRA alike.

    optimizer = badit.OrthogonalUpdates(model, lr=2e-3)    # Trainer(..., optimizers=(optimizer, None)), or a loop

Factors are found by their names: ``badit_A`` and ``badit_B``, or PEFT's ``lora_A`` and ``lora_B``. Everything else that
is trained (routers, biases, modules_to_save, the LoRA of embeddings and convolutions) goes to AdamW.

PEFT's ``create_riemannian_optimizer`` and ``create_loraplus_optimizer`` are something else: the first leaves the scaled
gradient to Adam's elementwise moments, the second gives B's rate to every vector and knows ``lora_B`` alone.

Shape suffixes: L = layers, N = components (rows of A), I/O = in/out features, K = B's that share one A, P = K·N.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from badit.arguments import OptimizerName
from badit.errors import BaditError, refuse_unknown
from badit.gradients import alike, along, dtensor, of_stack, over_shards, stacked
from badit.method import Moments, no_moments, orthogonal_updates

OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)

Pair = tuple[nn.Parameter, nn.Parameter]

_PAIRED = (("badit_A", "badit_B"), ("lora_A", "lora_B"))
_NAMES_OF_A = {"badit_A", "lora_A", "lora_embedding_A"}
_NAMES_OF_B = {"badit_B", "lora_B", "lora_embedding_B"}
_MOMENTS = ("basis", "first", "features", "second", "weights")  # a factor's state, as badit.method.Moments has it

# Which dimension of A and of B is a feature's, and so may be divided among processes.
_FEATURES_OF_A, _FEATURES_OF_B = 1, 0

# Layers that are copied side by side for one product hold at most so many numbers, 32 MB of them; a
# step needs about ten times that for a moment.
_NUMBERS_AT_A_TIME = 2**23

_FLAT = (
    "orthogonal updates need factors as matrices, which DeepSpeed and FSDP's first version flatten: "
    "use FSDP2 or DDP, or the optimizer adamw or lora+"
)


def build_optimizer(
    name: str,
    model: nn.Module,
    lr: float,
    *,
    other_lr: float | None = None,
    ratio: float = 16.0,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """An optimizer for all that is trained in a model.

    Args:
        name: ``adamw``, ``lora+`` or ``orthogonal``.
        model: with trainable parameters, perhaps wrapped for data parallelism.
        lr: the learning rate of the factors; for LoRA+ that of A.
        other_lr: that of everything else that is trained (default: ``lr``).
        ratio: B's learning rate over A's, for LoRA+.
        weight_decay: decoupled, as AdamW's.

    Raises:
        BaditError: an unknown name, a rate or ratio that is not positive, nothing to train; for orthogonal updates, no
            factors, or DeepSpeed.
    """
    refuse_unknown("optimizer", name, OPTIMIZERS)
    if name == "orthogonal":
        return OrthogonalUpdates(model, lr, other_lr=other_lr, weight_decay=weight_decay)
    groups = lora_plus_groups(model, lr, ratio if name == "lora+" else 1.0, other_lr=other_lr)
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)


def lora_plus_groups(
    model: nn.Module, lr: float, ratio: float = 16.0, *, other_lr: float | None = None
) -> list[dict[str, Any]]:
    """The parameter groups of LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns ``ratio`` times as fast as A.

    They go to AdamW or any other optimizer. The first group is A's, with ``lr``, then comes B's, then everything else
    that is trained, with ``other_lr`` (default: ``lr``). A group without parameters is left out.

    Raises:
        BaditError: a rate or ratio that is not positive, or nothing to train.
    """
    rates = {"A": lr, "B": lr * _positive("ratio", ratio), "other": lr if other_lr is None else other_lr}
    members: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = set(name.split("."))
            members["A" if parts & _NAMES_OF_A else "B" if parts & _NAMES_OF_B else "other"].append(parameter)
    if not any(members.values()):
        raise BaditError("the model has no trainable parameters: add an adapter to it")
    return [{"params": members[kind], "lr": _positive("lr", rates[kind])} for kind in rates if members[kind]]


def factor_pairs(model: nn.Module) -> list[Pair]:
    """A (N, I) and B (O, K·N) of every layer and adapter of which both are trained, in the model's order."""
    pairs, taken = [], set()
    for module in model.modules():
        for name_of_A, name_of_B in _PAIRED:
            holders: list[Any] = [getattr(module, name, None) for name in (name_of_A, name_of_B)]
            if not all(isinstance(holder, (nn.ModuleDict, nn.ParameterDict)) for holder in holders):
                continue
            for adapter in (name for name in holders[0] if name in holders[1]):
                # PEFT's LoRA holds linear layers, other tuners the parameters themselves.
                a, b = (getattr(holder[adapter], "weight", holder[adapter]) for holder in holders)
                if _are_factors(a, b) and not {id(a), id(b)} & taken:
                    taken |= {id(a), id(b)}
                    pairs.append((a, b))
    return pairs


def _are_factors(a: Any, b: Any) -> bool:
    return (
        all(isinstance(factor, nn.Parameter) and factor.requires_grad and factor.ndim == 2 for factor in (a, b))
        and b.shape[1] % a.shape[0] == 0
    )


class OrthogonalUpdates(torch.optim.Optimizer):
    """Moves the components of adapters in orthogonal directions (:mod:`badit.method.orthogonal`), the rest by AdamW.

    Where experts share one A (HydraLoRA, MTL-LoRA), their B's are one B of K·O out features. Elsewhere all experts of a
    layer are one pair of factors. An A or B whose partner is not trained goes to AdamW, and a layer of which either
    factor has no gradient keeps still for that step.

    Args:
        model: with adapters, perhaps wrapped for data parallelism (DDP) or divided (FSDP2).
        lr: learning rate of the factors. An update's entries are about as large as Adam's.
        other_lr: learning rate of everything else that is trained (default: ``lr``).
        betas: decays of the factors' moments.
        other_betas, eps: AdamW's.
        weight_decay: decoupled, for both.
        floor: relative floor of the eigenvalues in inverse roots.

    Raises:
        BaditError: a model without factors to train, a number out of its range, or DeepSpeed.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 2e-3,
        *,
        other_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.98),
        other_betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        floor: float = 1e-6,
    ) -> None:
        if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("true", "1") or any(
            hasattr(parameter, "ds_id") for parameter in model.parameters()
        ):
            raise BaditError(_FLAT)
        pairs = factor_pairs(model)
        if not pairs:
            raise BaditError(
                "the model has no pair of trainable factors (badit_A and badit_B, or lora_A and lora_B): "
                "add an adapter to it, or use another optimizer"
            )
        for name, beta in zip(("betas", "other_betas"), (betas, other_betas), strict=True):
            if not all(0 <= value < 1 for value in beta):
                raise BaditError(f"{name} must be at least 0 and below 1, got {beta!r}")
        if not weight_decay >= 0:
            raise BaditError(f"weight_decay must be at least 0, got {weight_decay!r}")
        paired = [factor for pair in pairs for factor in pair]
        known = {id(factor) for factor in paired}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        groups: list[dict[str, Any]] = [
            {"params": paired, "lr": _positive("lr", lr), "betas": betas, "orthogonal": True},
        ]
        if others:
            groups.append({"params": others, "lr": _positive("other_lr", lr if other_lr is None else other_lr)})
        defaults = {"lr": lr, "betas": other_betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(groups, {**defaults, "floor": _positive("floor", floor), "orthogonal": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; ``closure``, if there is one, computes the loss again and returns it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if not group["orthogonal"]:
                self._adamw(group)
                continue
            factors = group["params"]
            if any(factor.ndim != 2 for factor in factors):
                raise BaditError(_FLAT)
            pairs = list(zip(factors[::2], factors[1::2], strict=True))
            for has_moments in (True, False):
                some = [pair for pair in pairs if bool(self.state.get(pair[0])) == has_moments]
                for indices in alike([(a.grad, b.grad) for a, b in some], _NUMBERS_AT_A_TIME):
                    self._move([some[index] for index in indices], group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but for the moments of factors, which stay in their own type whatever the parameters' is."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if name in _MOMENTS:
                    self.state[parameter][name] = value.to(parameter.device)

    def _move(self, pairs: Sequence[Pair], group: dict[str, Any]) -> None:
        """One step of layers of one shape."""
        factors_A, factors_B = ([pair[side] for pair in pairs] for side in (0, 1))
        (components, in_features), (out_features, columns) = factors_A[0].shape, factors_B[0].shape
        share, lr = columns // components, group["lr"]

        def of_A(tensors: Sequence[Any]) -> torch.Tensor:
            return _precise(stacked(tensors, _FEATURES_OF_A))

        def of_B(tensors: Sequence[Any]) -> torch.Tensor:
            return _rows(_precise(stacked(tensors, _FEATURES_OF_B)), share)

        a_LNI, b_LNO = of_A(factors_A), of_B(factors_B)
        updates, moments = orthogonal_updates(
            (a_LNI, b_LNO),
            (of_A([a.grad for a in factors_A]), of_B([b.grad for b in factors_B])),
            (self._moments(factors_A, a_LNI, of_A), self._moments(factors_B, b_LNO, of_B)),
            lr=lr,
            betas=group["betas"],
            floor=group["floor"],
            lengths=(in_features, share * out_features),
            over_shards=over_shards(factors_A[0]),
        )
        self._keep(factors_A, moments[0], lambda x: _divided(x, factors_A, _FEATURES_OF_A))
        self._keep(factors_B, moments[1], lambda x: _divided(_columns(x, share), factors_B, _FEATURES_OF_B))
        shrink = 1 - lr * group["weight_decay"] if group["weight_decay"] else None
        _subtract(factors_A, lr * updates[0], _FEATURES_OF_A, shrink)
        _subtract(factors_B, lr * _columns(updates[1], share), _FEATURES_OF_B, shrink)

    def _moments(
        self, factors: Sequence[nn.Parameter], x_LND: torch.Tensor, rows_of: Callable[..., torch.Tensor]
    ) -> Moments:
        states = [self.state[factor] for factor in factors]
        if not states[0]:
            return no_moments(x_LND)
        basis_LND, first_LND, features_L1D = (rows_of([state[name] for state in states]) for name in _MOMENTS[:3])
        second_LNN, weights_L2 = (torch.stack([state[name] for state in states]) for name in _MOMENTS[3:])
        return Moments(basis_LND, first_LND, features_L1D, second_LNN, weights_L2)

    def _keep(
        self, factors: Sequence[nn.Parameter], moments: Moments, divided: Callable[..., Sequence[torch.Tensor]]
    ) -> None:
        kept = [divided(moment) for moment in moments[:3]] + [moment.unbind() for moment in moments[3:]]
        for factor, *values in zip(factors, *kept, strict=True):
            self.state[factor] = dict(zip(_MOMENTS, values, strict=True))

    def _adamw(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), device="cpu")
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _rows(b_LOP: torch.Tensor, share: int) -> torch.Tensor:
    """Bᵀ (L, N, K·O): the K B's of one A below one another, as rows."""
    b_LOKN = b_LOP.unflatten(-1, (share, b_LOP.shape[-1] // share))
    return b_LOKN.permute(0, 3, 2, 1).flatten(-2)


def _columns(b_LNO: torch.Tensor, share: int) -> torch.Tensor:
    """The inverse of :func:`_rows`."""
    b_LNKO = b_LNO.unflatten(-1, (share, b_LNO.shape[-1] // share))
    return b_LNKO.permute(0, 3, 2, 1).flatten(-2)


# Of FSDP2's shards, which are rows of A and of B, those of A are exchanged for columns: a product over features then is
# the sum of the shards' products. Moments are kept so divided.


def _divided(x: torch.Tensor, like: Sequence[torch.Tensor], features: int) -> Sequence[torch.Tensor]:
    """The layers of what :func:`badit.gradients.stacked` has made, each divided along ``features``."""
    layers = x.contiguous().unbind()
    first = like[0]
    if not isinstance(first, DTensor):
        return layers
    shape = [first.shape[dim] if dim == features else size for dim, size in enumerate(layers[0].shape)]
    return [dtensor(layer, first, along(features, first), shape) for layer in layers]


def _subtract(factors: Sequence[nn.Parameter], update: torch.Tensor, features: int, shrink: float | None) -> None:
    """Multiplies the factors by ``shrink`` and subtracts the update (L, …), divided along ``features``."""
    first, parts = factors[0], list[torch.Tensor](factors)
    if isinstance(first, DTensor):
        whole = dtensor(update, first, along(features + 1, first), (len(factors), *first.shape))
        update = whole.redistribute(placements=of_stack(first)).to_local()
        parts = [factor.to_local() for factor in factors]  # pyright: ignore[reportAttributeAccessIssue]
    if shrink is not None:
        torch._foreach_mul_(parts, shrink)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_sub_(parts, list(update.unbind()))  # pyright: ignore[reportPrivateImportUsage]


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise BaditError(f"{name} must be a positive number, got {value!r}")
    return value

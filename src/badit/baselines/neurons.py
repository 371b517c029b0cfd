"""Task neurons: only the FFN neurons with the highest scores are trained.

Leng & Xiong 2025, "Towards Understanding Multi-Task Learning (Generalization) of LLMs via Detecting
and Exploring Task-Specific Neurons", arXiv 2407.06488.

A neuron's output ω_j is an input of the MLP's last projection: act(gate)·up, or act(c_fc). Its
score on a task is |∂L/∂ω_j · ω_j|. The top share of all neurons is trained: their rows of the first
projections, columns of the last.

From the paper: the score, the selection by share, masked gradients. Assumptions: L is an example's
mean cross-entropy over its answer tokens; absolute values are averaged over all attended positions
of all examples; neurons of all layers are ranked together; the last projection's bias is frozen.
Omitted: the weighting of neurons in continual fine-tuning.

Shape suffixes: B = rows, T = positions, F = neurons of a layer, L = labels that are predicted, V =
vocabulary.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from badit.data.encoding import IGNORED_LABEL
from badit.support.errors import BaditError
from badit.tuner.config import Count, Share, check_options, option

# Names of an MLP's first projections, whose outputs are the neurons, and of its last, whose inputs
# they are.
_PROJECTIONS = ((("gate_proj", "up_proj"), "down_proj"), (("c_fc",), "c_proj"))


@dataclass(frozen=True)
class NeuronOptions:
    """Options of task neurons."""

    needs_whole_weights: ClassVar[bool] = True  # not for sharded weights (FSDP, DeepSpeed)

    share: Share = option(0.1, "Share of all FFN neurons to train for each task.")
    score_batches: Count = option(4, "Number of batches per task on which the neurons are scored.")

    def __post_init__(self) -> None:
        check_options(self)


class Mlp(NamedTuple):
    """The MLP of a layer: its last projection and its neurons' parameters by name.

    Each parameter comes with whether the neurons are its rows (otherwise its columns or entries).
    """

    last: nn.Module
    parameters: dict[str, tuple[nn.Parameter, bool]]


def neuron_scores(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Returns the mean of |∂L/∂ω_j · ω_j| (F,), in float32 on the CPU, by the name of each MLP.

    ``batches`` have ``input_ids``, ``attention_mask`` and ``labels`` (−100 except on the answers),
    each (B, T). The model must have no adapters. The gradients of its parameters are not changed.
    """
    mlps = _mlps(model)
    totals: dict[str, Any] = dict.fromkeys(mlps, 0)
    outputs: dict[str, Tensor] = {}
    positions = 0

    def keep(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # In a frozen model, the first one would not require a gradient.
        outputs[name] = args[0].requires_grad_()

    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        # Without dropout, and without gradient checkpointing, which would run the hooks twice.
        model.eval()
        for name, mlp in mlps.items():
            stack.callback(mlp.last.register_forward_pre_hook(partial(keep, name)).remove)
        for batch in batches:
            loss = _sum_of_losses(model, batch)
            gradients = torch.autograd.grad(loss, list(outputs.values()))
            for name, gradient_BTF in zip(outputs, gradients, strict=True):  # that of padding is 0
                product_BTF = gradient_BTF.float() * outputs[name].detach().float()
                totals[name] += product_BTF.abs().sum(dim=(0, 1)).cpu()
            outputs.clear()
            positions += int(batch["attention_mask"].sum())
    return {name: total_F / positions for name, total_F in totals.items()}


def _sum_of_losses(model: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor:
    """Returns the sum of the examples' mean cross-entropies.

    An example's activations affect only its own loss.
    """
    texts = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    targets_BT = batch["labels"].to(model.device)[:, 1:]
    labelled_BT = targets_BT != IGNORED_LABEL
    logits_LV = model(**texts, use_cache=False).logits[:, :-1][labelled_BT].float()
    losses_L = F.cross_entropy(logits_LV, targets_BT[labelled_BT], reduction="none")
    # The example of each label: each loss is divided by its example's number of labels.
    rows_L = labelled_BT.nonzero()[:, 0]
    return (losses_L / labelled_BT.sum(dim=1)[rows_L]).sum()


def top_neurons(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Returns masks (F,) of the ``share`` of all neurons with the highest scores, at least one.

    The share is above 0 and at most 1.
    """
    all_scores = torch.cat(list(scores.values()))
    count = max(1, round(share * len(all_scores)))
    chosen = torch.zeros(len(all_scores), dtype=torch.bool)
    chosen[all_scores.argsort(descending=True, stable=True)[:count]] = True
    masks = chosen.split([len(scores_F) for scores_F in scores.values()])
    return dict(zip(scores, masks, strict=True))


def train_only(model: PreTrainedModel, masks: Mapping[str, Tensor]) -> None:
    """Freezes all parameters except the masks' (F,) neurons.

    Hooks set the gradients of other rows and columns to zero. The optimizer must have
    ``weight_decay=0``, because weight decay changes weights whose gradient is zero.
    """
    model.requires_grad_(False)
    for name, mlp in _mlps(model).items():
        for parameter, has_rows in mlp.parameters.values():
            frozen = ~masks[name]
            if has_rows:
                frozen = frozen[:, None]
            # The whole parameter gets a gradient, of which a hook keeps the neurons' part.
            parameter.requires_grad_(True)
            parameter.register_hook(partial(_without, frozen))


def _without(frozen: Tensor, gradient: Tensor) -> Tensor:
    # The model may be moved to another device after the hook is set.
    return gradient.masked_fill(frozen.to(gradient.device), 0)


def trained_parameters(
    model: PreTrainedModel, masks: Mapping[str, Tensor] | None = None
) -> dict[str, int]:
    """Returns how many entries of each parameter :func:`train_only` trains, by name.

    Without masks, all of them.
    """
    counts = {}
    for name, mlp in _mlps(model).items():
        for key, (parameter, _) in mlp.parameters.items():
            counts[key] = parameter.numel()
            # All neurons of an MLP have equally many entries.
            if masks is not None:
                counts[key] = parameter.numel() // len(masks[name]) * int(masks[name].sum())
    return counts


def _mlps(model: PreTrainedModel) -> dict[str, Mlp]:
    """Returns the MLPs by name; BaditError unless every layer has one of a supported kind."""
    mlps = {}
    for name, module in model.named_modules():
        children: dict[str, Any] = dict(module.named_children())
        for first, last in _PROJECTIONS:
            projections = [children.get(child) for child in (*first, last)]
            if not all(isinstance(projection, (nn.Linear, Conv1D)) for projection in projections):
                continue
            # nn.Linear keeps its weight as (out, in), Conv1D as (in, out).
            rows = {f"{child}.weight": isinstance(children[child], nn.Linear) for child in first}
            biased = [child for child in first if children[child].bias is not None]
            rows |= dict.fromkeys([f"{child}.bias" for child in biased], False)
            rows[f"{last}.weight"] = isinstance(children[last], Conv1D)
            parameters = {
                f"{name}.{key}": (module.get_parameter(key), has_rows)
                for key, has_rows in rows.items()
            }
            mlps[name] = Mlp(children[last], parameters)
    # Otherwise layers of another kind would stay frozen without notice.
    if len(mlps) != getattr(model.config.get_text_config(), "num_hidden_layers", None):
        raise BaditError(
            f"task neurons do not support this model of type {model.config.model_type}; every "
            "layer needs an MLP of gate_proj, up_proj and down_proj, or of c_fc and c_proj, "
            "without adapters"
        )
    return mlps

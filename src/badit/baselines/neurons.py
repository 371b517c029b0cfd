"""Task neurons: only the FFN neurons with the highest scores are trained (Leng & Xiong 2025, "Towards Understanding
Multi-Task Learning (Generalization) of LLMs via Detecting and Exploring Task-Specific Neurons", arXiv 2407.06488).

A neuron's output ω_j is an input of the MLP's last projection: act(gate)·up, or act(c_fc). Its score on a task is
|∂L/∂ω_j · ω_j|. The top share of all neurons is trained: their rows of the first projections, columns of the last.

From the paper: the score, the selection by share, masked gradients. Assumptions: L is an example's mean cross-entropy
over its answer tokens; absolute values are averaged over all attended positions of all examples; neurons of all layers
are ranked together; the last projection's bias is frozen. Omitted: the weighting of neurons in continual fine-tuning.

Shape suffixes: B = rows, T = positions, F = neurons of a layer, L = labels that are predicted, V = vocabulary.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from badit.data.encoding import IGNORED_LABEL
from badit.support.errors import BaditError
from badit.tuner.config import Count, Share, check_options, option

# Names of an MLP's first projections, whose outputs are the neurons, and of its last, whose inputs they are.
_PROJECTIONS = ((("gate_proj", "up_proj"), "down_proj"), (("c_fc",), "c_proj"))


@dataclass(frozen=True)
class NeuronOptions:
    """Options of task neurons."""

    needs_whole_weights: ClassVar[bool] = (
        True  # does not work with sharded weights (FSDP, DeepSpeed)
    )

    share: Share = option(0.1, "Share of all FFN neurons to train for each task.")
    score_batches: Count = option(4, "Number of batches per task on which the neurons are scored.")

    def __post_init__(self) -> None:
        check_options(self)


def neuron_scores(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]
) -> dict[str, torch.Tensor]:
    """Returns the mean of |∂L/∂ω_j · ω_j| (F,), in float32 on the CPU, by the name of each layer's MLP.

    ``batches`` have ``input_ids``, ``attention_mask`` and ``labels`` (−100 except on the answers), each (B, T). The
    model must have no adapters. The gradients of its parameters are not changed.
    """
    mlps = _mlps(model)
    totals: dict[str, Any] = dict.fromkeys(mlps, 0)
    outputs: dict[str, torch.Tensor] = {}
    positions = 0

    def keep(name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        outputs[name] = args[
            0
        ].requires_grad_()  # in a frozen model, the first would not require a gradient

    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        model.eval()  # without dropout, and without gradient checkpointing, which would run the hooks twice
        for name, (last, _) in mlps.items():
            stack.callback(last.register_forward_pre_hook(partial(keep, name)).remove)
        for batch in batches:
            texts = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
            targets_BT = batch["labels"].to(model.device)[:, 1:]
            labelled_BT = targets_BT != IGNORED_LABEL
            logits_LV = model(**texts, use_cache=False).logits[:, :-1][labelled_BT].float()
            losses_L = F.cross_entropy(logits_LV, targets_BT[labelled_BT], reduction="none")
            # The sum of the examples' mean cross-entropies: an example's activations affect only its own loss.
            loss = (losses_L / labelled_BT.sum(dim=1)[labelled_BT.nonzero()[:, 0]]).sum()
            gradients = zip(
                outputs.items(), torch.autograd.grad(loss, list(outputs.values())), strict=True
            )
            for (name, output_BTF), gradient_BTF in gradients:  # that of padding is 0
                totals[name] += (
                    (gradient_BTF.float() * output_BTF.detach().float()).abs().sum(dim=(0, 1)).cpu()
                )
            outputs.clear()
            positions += int(batch["attention_mask"].sum())
    return {name: total_F / positions for name, total_F in totals.items()}


def top_neurons(scores: Mapping[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """Returns masks (F,) of the ``share`` (above 0, at most 1) of all neurons with the highest scores, at least one."""
    flat = torch.cat(list(scores.values()))
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[: max(1, round(share * len(flat)))]] = True
    return dict(
        zip(scores, chosen.split([len(scores_F) for scores_F in scores.values()]), strict=True)
    )


def train_only(model: PreTrainedModel, masks: Mapping[str, torch.Tensor]) -> None:
    """Freezes all parameters except the masks' (F,) neurons: hooks set the gradients of other rows and columns to zero.

    The optimizer must have ``weight_decay=0``, because weight decay changes weights whose gradient is zero.
    """
    model.requires_grad_(False)
    for name, (_, parameters) in _mlps(model).items():
        for parameter, has_rows in parameters.values():
            frozen = ~masks[name][:, None] if has_rows else ~masks[name]
            parameter.requires_grad_(True)
            # The model may be moved to another device later.
            parameter.register_hook(
                lambda grad, frozen=frozen: grad.masked_fill(frozen.to(grad.device), 0)
            )


def trained_parameters(
    model: PreTrainedModel, masks: Mapping[str, torch.Tensor] | None = None
) -> dict[str, int]:
    """Returns how many entries of each parameter :func:`train_only` trains, by name; without masks, all of them."""
    return {
        key: parameter.numel()
        if masks is None
        else parameter.numel() // len(masks[name]) * int(masks[name].sum())
        for name, (_, parameters) in _mlps(model).items()
        for key, (parameter, _) in parameters.items()
    }


def _mlps(
    model: PreTrainedModel,
) -> dict[str, tuple[nn.Module, dict[str, tuple[nn.Parameter, bool]]]]:
    """Returns each MLP's last projection, and its neurons' parameters by name, and whether the neurons are its rows."""
    found = {}
    for name, module in model.named_modules():
        children: dict[str, Any] = dict(module.named_children())
        for first, last in _PROJECTIONS:
            if not all(
                isinstance(children.get(child), (nn.Linear, Conv1D)) for child in (*first, last)
            ):
                continue
            # nn.Linear keeps its weight as (out, in), Conv1D as (in, out).
            are_rows = {
                f"{child}.weight": isinstance(children[child], nn.Linear) for child in first
            }
            are_rows |= {
                f"{child}.bias": False for child in first if children[child].bias is not None
            }
            are_rows[f"{last}.weight"] = isinstance(children[last], Conv1D)
            parameters = {
                f"{name}.{key}": (module.get_parameter(key), rows) for key, rows in are_rows.items()
            }
            found[name] = (children[last], parameters)
    if len(found) != getattr(model.config.get_text_config(), "num_hidden_layers", None):
        fix = "every layer needs an MLP of gate_proj, up_proj and down_proj, or of c_fc and c_proj, without adapters"
        raise BaditError(
            f"task neurons do not support this model of type {model.config.model_type}; {fix}"
        )
    return found

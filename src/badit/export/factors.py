"""The factors of an adapter as a plain LoRA, and merging them into the base weights.

Shape suffixes: O/I = out/in features, P = rank, K = experts.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from badit.analysis.gates import Gates
from badit.method.decomposition import compress
from badit.runs.resolved import ResolvedRun
from badit.support.errors import BaditError, explained
from badit.training.loading import load_base
from badit.training.methods import training_method
from badit.tuner import ExpertConfig, hooks_of
from badit.tuner.experts import adapted_layers
from badit.tuner.targets import base_layer

#: The values of vLLM's ``--max-lora-rank``. An adapter needs the smallest one that is not below
#: its rank.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: By module name in the base model, A (P, I) and B (O, P): float32, on the CPU. The adapted weight
#: is W + B A.
Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]

NOT_A_LORA = "makes the adapter more than a plain LoRA"
_MORE_THAN_EXPERTS = ("modules_to_save", "bias")
_MORE_THAN_LORA = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "bias",
)
# These change the base weight to W − s·B0 A0. PEFT repeats this change whenever such an adapter is
# loaded.
_CHANGES_BASE = ("pissa", "olora")
KEEPS_BASE = (True, False, "gaussian", "orthogonal")  # the change of others is not known


def beyond_lora(config: Any) -> list[str]:
    """Returns the options of an adapter that a plain LoRA cannot represent."""
    is_of_experts = isinstance(config, ExpertConfig)
    names = _MORE_THAN_EXPERTS if is_of_experts else _MORE_THAN_LORA
    options = [
        name for name in names if getattr(config, name, None) not in (None, False, [], "none")
    ]
    initial = getattr(config, "init_lora_weights", True)
    if initial not in (*KEEPS_BASE, *_CHANGES_BASE):
        options.append("init_lora_weights")
    return options


def mixture_factors(model: PeftModel, gates: Gates | None, task: str | None = None) -> Factors:
    """Returns the active adapter's factors for ``task`` with fixed ``gates``.

    None: the method's own gates.
    """
    factors = {}
    # MTL-LoRA's factors depend on the task.
    with hooks_of(model).rows_of(None if task is None else [task]):
        for layer, adapter in adapted_layers(model):
            gates_K = None
            if gates is not None:
                gates_K = torch.tensor(gates[layer.name], dtype=torch.float32)
            a_PI, b_OP = layer.frozen_factors(adapter, gates_K)
            factors[layer.name] = (a_PI.cpu(), b_OP.cpu())
    return _of_one_rank(factors)


def lora_factors(model: PeftModel, run: ResolvedRun) -> Factors:
    """Returns the factors of a PEFT LoRA adapter.

    Those of PiSSA and OLoRA are minus those of the untrained adapter, and so have twice the rank.
    """
    factors = _factors_of_peft(model)
    # W − s·B0 A0 + s·B A is, for the unchanged base W, the LoRA [s·B, −s·B0] [A; A0].
    if run.method.config.init_lora_weights in _CHANGES_BASE:
        base, _ = load_base(run.recipe)
        # They are not saved, but depend only on the base weights.
        initial = _factors_of_peft(training_method(run.method).apply(base))
        for name, (a_PI, b_OP) in factors.items():
            a0_PI, b0_OP = initial[name]
            factors[name] = torch.cat([a_PI, a0_PI]), torch.cat([b_OP, -b0_OP], dim=1)
    return _of_one_rank(factors)


def _of_one_rank(factors: Factors) -> Factors:
    """Pads factors with zeros: servers read one rank and one alpha for all modules."""
    rank = max(len(a_PI) for a_PI, _ in factors.values())
    padded = {}
    for name, (a_PI, b_OP) in factors.items():
        missing = rank - len(a_PI)
        padded[name] = F.pad(a_PI, (0, 0, 0, missing)), F.pad(b_OP, (0, missing))
    return padded


def _factors_of_peft(model: PeftModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Returns A (P, I) and s·B (O, P) of every adapted layer."""
    factors = {}
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if "default" not in layer.lora_A:
            problem = "is an embedding, which a plain LoRA cannot adapt"
            raise BaditError(f"{name}: {problem}; export with --merged")
        linear_A: Any = layer.lora_A["default"]
        linear_B: Any = layer.lora_B["default"]
        a_PI = linear_A.weight.detach().to("cpu", torch.float32)
        b_OP = linear_B.weight.detach().to("cpu", torch.float32)
        factors[name] = a_PI, b_OP * layer.scaling["default"]
    return factors


def compressed(factors: Factors, rank: int | None) -> tuple[Factors, dict[str, Any]]:
    """Returns factors of at most this rank (default: the exact one), and the ranks and errors."""
    exact_rank = len(next(iter(factors.values()))[0])
    rank = min(rank or exact_rank, exact_rank, VLLM_RANKS[-1])
    if rank == exact_rank:
        return factors, {"rank": rank, "exact_rank": exact_rank}
    smaller = {}
    errors = {}
    losses = []
    norms = []
    for name, (a_PI, b_OP) in factors.items():
        a_PI, b_OP, loss, norm = compress(a_PI, b_OP, rank)
        smaller[name] = a_PI, b_OP
        # An adapter that did not learn is zero, and exact at any rank.
        errors[name] = loss / norm if norm else 0.0
        losses.append(loss)
        norms.append(norm)
    # Squared Frobenius norms add up over modules.
    total_norm = math.hypot(*norms)
    total = math.hypot(*losses) / total_norm if total_norm else 0.0
    error = {"total": total, "modules": errors}
    return smaller, {"rank": rank, "exact_rank": exact_rank, "relative_error": error}


def merged_model(model: Any, factors: Factors) -> Any:
    """Returns the model without its adapter, which is added to the base weights.

    Without ``factors``, PEFT adds it.
    """
    if isinstance(model, PeftModel) and not factors:
        layers = {}
        for name, module in model.get_base_model().named_modules():
            if isinstance(module, BaseTunerLayer):
                layers[name] = module.get_base_layer()
        _refuse_shared(model, layers)
        with explained("the adapter", action="merged", any_error=True):  # NaN in a merged weight
            return model.merge_and_unload(safe_merge=True)

    # Without factors here, the base weights themselves were trained.
    base = model.unload() if factors else model
    merge(base, factors)
    output_head = base.get_output_embeddings()
    input_head = base.get_input_embeddings()
    # modules_to_save may have trained one of them.
    if output_head is not None and output_head.weight is not input_head.weight:
        base.config.tie_word_embeddings = False
        base.config.get_text_config().tie_word_embeddings = False
    return base


@torch.no_grad()
def merge(base: nn.Module, factors: Factors) -> None:
    """Adds B A to every weight in float32 and rounds once to the weight's dtype."""
    layers = {name: base_layer(base, name) for name in factors}
    _refuse_shared(base, layers)
    for name, layer in layers.items():
        a_PI, b_OP = factors[name]
        delta_OI = (b_OP @ a_PI).to(layer.weight.device)
        if isinstance(layer, Conv1D):
            delta_OI = delta_OI.T
        layer.weight.copy_(layer.weight.float() + delta_OI)


def _refuse_shared(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Raises BaditError if a layer shares its weight, such as tied embeddings."""
    # With duplicates, a shared parameter is listed once per owner.
    parameters = model.named_parameters(remove_duplicate=False)
    owners = Counter(id(parameter) for _, parameter in parameters)
    for name, layer in layers.items():
        if owners[id(getattr(layer, "weight", None))] > 1:  # both would be changed
            problem = "shares its weight with another module"
            raise BaditError(f"{name}: {problem}; export without --merged")

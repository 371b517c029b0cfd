"""Chooses or writes a LoRA for the gates of each prompt.

The distance between gates is that of the weights that they produce:

    ‖ΔW(g) − ΔW(m)‖² = Σ (g − m)ᵀ G (g − m),   G = s² (BᵀB) ∘ (AAᵀ)

G is summed over the components of every two experts. If the gates scale the change of the factors,
B and A are those of the change, [B − B0, B0] and [A; A − A0].

Shape suffixes: T = exports, K = experts, N = components; M = adapted modules, and in G the columns
of B and B0.
"""

import shlex
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import one_hot

from badit.analysis.gates import GATES_FILE, mean_gates, read_gates
from badit.data.encoding import IGNORED_LABEL
from badit.export.adapter import write_adapter
from badit.export.factors import NOT_A_LORA, beyond_lora, mixture_factors
from badit.hub.upload import refuse_other_weights
from badit.recipe.method import ResolvedMethod
from badit.runs.folder import RECORD, RunFolder
from badit.runs.resolved import open_run
from badit.support.errors import BaditError
from badit.support.files import read_json, refuse_links
from badit.training.loading import load_run
from badit.tuner.experts import adapted_layers
from badit.tuner.extension import ability_gram
from badit.tuner.layer import ExpertLinear

_MAX_TOKENS = 1024 * 1024  # of a prompt, for models without a limit of positions


class Router:
    """A loaded run that computes a prompt's gates and chooses or writes the LoRA for them.

    Args:
        run: the run.
        exports: the folder written by ``badit export --all-tasks``; None to write a LoRA for
            every prompt.

    Raises:
        BaditError: the run's gates do not depend on the prompt, or the folder has no exports of
            its tasks and weights.
    """

    def __init__(self, run: RunFolder, exports: str | Path | None) -> None:
        resolved = open_run(run)
        _refuse_unroutable(run, resolved.method)
        self.run = run
        self.base = resolved.recipe.model.name
        self.model: Any = load_run(resolved)[0]
        self.layers = adapted_layers(self.model)
        self.modules = [layer.name for layer, _ in self.layers]
        self.exports: list[str] = []
        if exports is not None:
            self._read_exports(Path(exports))

    def _read_exports(self, folder: Path) -> None:
        refuse_links(folder)  # the folder may be untrusted
        files = sorted(folder.glob(f"*/{GATES_FILE}"))
        if not files:
            run = str(self.run.path)
            command = shlex.join(["badit", "export", run, "--all-tasks", "-o", str(folder)])
            raise BaditError(f"{folder}: has no task LoRAs; run {command}")
        records = {file.parent: read_json(file.with_name(RECORD)) for file in files}
        refuse_other_weights(self.run, records)
        self.exports = [export.name for export in records]
        gates_of_exports = [read_gates(file, self.model) for file in files]
        self.gates_TMK = torch.tensor(
            [[gates[module] for module in self.modules] for gates in gates_of_exports]
        )
        # Computed once, because G depends on the factors only.
        self.gram_MKK = torch.stack([_gram(layer, adapter) for layer, adapter in self.layers])

    def gates(self, ids: Any) -> torch.Tensor:
        """Returns the gates (M, K) of a prompt's token ids, averaged over its positions.

        BaditError for invalid ids.
        """
        vocabulary = range(self.model.get_input_embeddings().num_embeddings)
        if not isinstance(ids, list) or not all(
            type(token) is int and token in vocabulary  # bool is a subclass of int
            for token in ids
        ):
            raise BaditError(
                "prompt: must be one text or the token ids of one; "
                "name a model to send several prompts"
            )
        config = self.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or _MAX_TOKENS
        if not 0 < len(ids) <= limit:
            raise BaditError(f"prompt: must have 1 to {limit} tokens, not {len(ids)}")

        input_ids = torch.tensor([ids])
        batch = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "labels": torch.full_like(input_ids, IGNORED_LABEL),  # no answer
        }
        gates = mean_gates(self.model, [batch])
        return torch.tensor([gates[module] for module in self.modules])

    def nearest(self, gates_MK: torch.Tensor) -> str:
        """Returns the export whose weights are nearest to those of the gates."""
        # Σ (g − m)ᵀ G (g − m) over modules.
        difference_TMK = self.gates_TMK - gates_MK
        distances_T = torch.einsum("tmk,mkl,tml->t", difference_TMK, self.gram_MKK, difference_TMK)
        return self.exports[int(distances_T.argmin())]

    def write(self, gates_MK: torch.Tensor, folder: Path) -> None:
        """Writes the LoRA for these gates."""
        gates = dict(zip(self.modules, gates_MK.tolist(), strict=True))
        factors = mixture_factors(self.model, gates)
        write_adapter(folder, factors, self.model.get_base_model(), self.base)


def _refuse_unroutable(run: RunFolder, method: ResolvedMethod) -> None:
    if method.needs_tasks or getattr(method.config, "has_fixed_gates", True):
        raise BaditError(
            f"{run.path}: the gates of {method.name} do not depend on the prompt; serve its export"
        )
    options = beyond_lora(method.config)
    if options:
        raise BaditError(f"{run.path}: method.{options[0]}: {NOT_A_LORA}, which vLLM cannot load")


@torch.no_grad()
def _gram(layer: ExpertLinear, adapter: str) -> torch.Tensor:
    """Returns G (K, K) of a layer."""
    if layer.badit_config[adapter].extensions:
        return ability_gram(layer, adapter).cpu()
    expert_N = layer.expert_of(adapter)
    gates_N = torch.ones(len(expert_N), device=expert_N.device)
    a_PI, b_OM, scale_M = layer.gated_factors(adapter, gates_N)
    # Zero for initial factors that no gate scales.
    scale_M = scale_M - layer.gated_factors(adapter, 0 * gates_N)[2]
    b_OM = b_OM.float() * scale_M
    components = len(scale_M)
    # Experts that share A have one A for several blocks of B.
    a_MI = a_PI.float().repeat(components // len(a_PI), 1)
    gram_MM = (b_OM.T @ b_OM) * (a_MI @ a_MI.T)
    of_expert_MK = one_hot(expert_N.repeat(components // len(expert_N))).float()
    return (of_expert_MK.T @ gram_MM @ of_expert_MK).cpu()

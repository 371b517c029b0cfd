"""GainLoRA: one gate per branch, near 0 on the prompts of earlier tasks (Liang and Li 2025, "Gated Integration of
Low-Rank Adaptation for Continual Learning of Language Models", arXiv 2505.15424).

    y = W x + s · Σ_{i≤t} a_i B_i A_i x,    a_i = |2σ(4 cos(z_i, k_i)) − 1|,    z_i = SiLU(G2_i SiLU(G1_i p0))

p0 is the mean of the token embeddings over the prompt; a_i is the same in all layers. A new task starts with the
previous task's G1 and G2 and a new key, orthogonal to the earlier tasks' z, so that its gate is near 0 on these tasks.
Training keeps it there: an update Δ of G1, G2 or k becomes Δ (I − P), where P is the projector onto the inputs of this
matrix in the earlier tasks. After each task t = 1, 2, … P is extended as in gradient projection memory (Saha et al.
2021, arXiv 2103.09762): by the leading singular directions of the inputs' part outside of its span, until P holds the
share 0.995 + 0.005 · (t − 1)/15 of the energy, the sum of the squared singular values of the inputs X (the paper) or of
XᵀX (the released code, and the default here).

From the paper: gates, projections, shares and hidden size 100. From its authors' code: the task count (t − 1, at most
15), and the new key: the leading singular direction of the new task's z after projecting out the earlier tasks' z.
(With a random key, the new gate is nearly 0 on its own task.) Omitted: the authors' rescaling of projected rows to
their previous norm, since it changes the gate on earlier prompts. A_t and B_t are trained as in LoRA, not projected.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from badit.baselines import baseline
from badit.baselines.branches import BranchGate, BranchModel, GatedBranchConfig, mean_embedding
from badit.support.errors import BaditError
from badit.tuner.config import option
from badit.tuner.model import TaskBatches
from badit.tuner.prompt import before_first_label

_SHARE_OF_ENERGY = 0.995
_TASKS_TO_FULL_SHARE = 15  # the share reaches 1 after this number of tasks
_NEGLIGIBLE = (
    1e-5  # relative to the norm of all inputs: smaller values are float32's rounding errors
)


class GainLoraGate(BranchGate):
    """One network and one key per task; ``down`` is G1, ``up`` is G2."""

    kept: ClassVar[dict[str, str]] = {"key": "past_keys", "down": "past_down", "up": "past_up"}

    seen_by_down: torch.Tensor  # the projector P of G1, (D, D)
    seen_by_up: torch.Tensor  # of G2, (H, H)
    seen_by_key: torch.Tensor  # of the key, (D, D)

    def __init__(self, width: int, config: "GainLoraConfig", device: torch.device) -> None:
        super().__init__(width, config, device)
        for name, size in (("down", width), ("up", config.gate_hidden_size), ("key", width)):
            self.register_buffer(f"seen_by_{name}", torch.zeros(size, size, device=device))
        self.of_covariance = config.energy == "covariance"
        self.start_key()

    def forward(self, prompt_BD: torch.Tensor) -> torch.Tensor:
        hidden_BKH = F.silu(torch.einsum("bd,khd->bkh", prompt_BD, self.of_all_tasks("down")))
        z_BKD = F.silu(torch.einsum("bkh,kdh->bkd", hidden_BKH, self.of_all_tasks("up")))
        cosine_BK = F.cosine_similarity(z_BKD, self.of_all_tasks("key"), dim=-1)
        return (2 * torch.sigmoid(4 * cosine_BK) - 1).abs()

    @torch.no_grad()
    def start_key(self) -> None:
        """Sets the key to a random unit vector orthogonal to the earlier tasks' z; :meth:`start_task` replaces it."""
        if self.key.is_meta:  # its value will be loaded
            return
        size = len(self.key)
        if self.seen_by_key.trace() > size - 0.5:  # a projector's trace is its rank
            problem = (
                f"the earlier tasks' prompts take up all {size} dimensions of GainLoRA's gates"
            )
            raise BaditError(f"{problem}, so there is none for another task; train on fewer tasks")
        random_D = torch.randn_like(self.key)
        self.key.copy_(F.normalize(random_D - random_D @ self.seen_by_key, dim=0))

    @torch.no_grad()
    def start_task(self, prompt_ND: torch.Tensor) -> None:
        """Sets the key to the leading direction of the task's z among those orthogonal to the earlier tasks' z."""
        z_ND = self._inputs(prompt_ND)["key"]
        _, _, vh = torch.linalg.svd((z_ND - z_ND @ self.seen_by_key).double(), full_matrices=False)
        # Projected a second time, because rounding leaves a part along the earlier tasks' z.
        self.key.copy_(
            F.normalize(vh[0].to(self.key) - vh[0].to(self.key) @ self.seen_by_key, dim=0)
        )

    @torch.no_grad()
    def end_task(self, prompt_ND: torch.Tensor) -> None:
        """Extends the projectors by the inputs of G1, G2 and the key for the finished task's prompts."""
        earlier = min(len(self.get_buffer("past_keys")), _TASKS_TO_FULL_SHARE)
        share = _SHARE_OF_ENERGY + (1 - _SHARE_OF_ENERGY) * (earlier / _TASKS_TO_FULL_SHARE)
        for name, inputs in self._inputs(prompt_ND).items():
            inputs = inputs.double().T @ inputs.double() if self.of_covariance else inputs
            setattr(
                self,
                f"seen_by_{name}",
                grown_projector(self.get_buffer(f"seen_by_{name}"), inputs, share),
            )

    def _inputs(self, prompt_ND: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the inputs of the current task's G1, G2 and key: p0 (N, D), SiLU(G1 p0) (N, H) and z (N, D)."""
        hidden_NH = F.silu(prompt_ND @ self.down.T)
        return {"down": prompt_ND, "up": hidden_NH, "key": F.silu(hidden_NH @ self.up.T)}

    @torch.no_grad()
    def project_update(self, before: Mapping[str, torch.Tensor]) -> None:
        """Subtracts from each tensor the part of its update since ``before`` that acts on the earlier tasks' inputs."""
        for name, tensor in self.named_parameters():
            tensor.sub_((tensor - before[name]) @ self.get_buffer(f"seen_by_{name}"))


def grown_projector(
    projector_DD: torch.Tensor, inputs_ND: torch.Tensor, share: float
) -> torch.Tensor:
    """Returns the projector P = M Mᵀ (D, D) with the fewest new columns in M that make it hold the share of ‖inputs‖².

    They are leading right singular vectors of inputs (I − P); energy already in P counts (arXiv 2103.09762, eq. 8, 9).
    """
    projector, inputs = projector_DD.double(), inputs_ND.double()
    _, s, vh = torch.linalg.svd(inputs - inputs @ projector, full_matrices=False)
    energy, total = s.square(), inputs.square().sum()
    held_before = total - energy.sum() + energy.cumsum(dim=0) - energy
    new = (held_before < share * total) & (s > _NEGLIGIBLE * total.sqrt())
    return (projector + vh[new].T @ vh[new]).to(projector_DD.dtype)


class GainLoraModel(BranchModel):
    """Branches whose gates read each task's prompts and project the update of each optimizer step."""

    def _prompts_of(self, batches: TaskBatches) -> torch.Tensor:
        embeddings, rows = self.model.get_input_embeddings(), []
        for batch in itertools.chain(*batches.values()):
            prompt_mask_BT = before_first_label(batch["labels"], batch["attention_mask"])
            rows.append(
                mean_embedding(embeddings(batch["input_ids"].to(self.device)), prompt_mask_BT)
            )
        return torch.cat(rows)

    def start_task(self, batches: TaskBatches) -> None:
        for gate in self._active_gates():
            gate.start_task(self._prompts_of(batches).to(gate.key))

    def end_task(self, batches: TaskBatches) -> None:
        for gate in self._active_gates():
            gate.end_task(self._prompts_of(batches).to(gate.key))

    def before_update(self) -> None:
        self._before = [
            {name: p.detach().clone() for name, p in g.named_parameters()}
            for g in self._active_gates()
        ]

    def after_update(self) -> None:
        for gate, before in zip(self._active_gates(), self._before, strict=True):
            gate.project_update(before)


@baseline("gainlora", GainLoraModel)
@dataclass
class GainLoraConfig(GatedBranchConfig):
    """GainLoRA (arXiv 2505.15424): one LoRA branch per task, each with its own gate."""

    method: ClassVar[str] = "BADIT_GAINLORA"
    gate_cls: ClassVar[Any] = GainLoraGate

    energy: Literal["covariance", "inputs"] = option(
        "covariance",
        "The matrix whose energy (squared singular values) the projectors hold a share of: 'covariance', XᵀX of the "
        "inputs X, as in the released code; or 'inputs', X, as in the paper, which needs many more directions.",
    )

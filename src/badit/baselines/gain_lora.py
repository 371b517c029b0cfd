"""GainLoRA: one gate per branch, near 0 on the prompts of earlier tasks.

Liang and Li 2025, "Gated Integration of Low-Rank Adaptation for Continual Learning of Language
Models", arXiv 2505.15424.

    y = W x + s · Σ_{i≤t} a_i B_i A_i x,    a_i = |2σ(4 cos(z_i, k_i)) − 1|,
                                            z_i = SiLU(G2_i SiLU(G1_i p0))

p0 is the mean of the token embeddings over the prompt; a_i is the same in all layers. A new task
starts with the previous task's G1 and G2 and a new key, orthogonal to the earlier tasks' z, so that
its gate is near 0 on these tasks. Training keeps it there: an update Δ of G1, G2 or k becomes Δ (I
− P), where P is the projector onto the inputs of this matrix in the earlier tasks. After each task
t = 1, 2, … P is extended as in gradient projection memory (Saha et al. 2021, arXiv 2103.09762): by
the leading singular directions of the inputs' part outside of its span, until P holds the share
0.995 + 0.005 · (t − 1)/15 of the energy, the sum of the squared singular values of the inputs X
(the paper) or of XᵀX (the released code, and the default here). After the first task, the released
code leaves out the direction with which this share would be reached, unless it is the only one.

From the paper: gates, projections, shares and hidden size 100. From its authors' code: the task
count (t − 1, at most 15), and the new key: the leading singular direction of the new task's z after
projecting out the earlier tasks' z. (With a random key, the new gate is nearly 0 on its own task.)
Omitted: the authors' rescaling of projected rows to their previous norm, since it changes the gate
on earlier prompts. A_t and B_t are trained as in LoRA, not projected.
"""

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from badit.baselines import baseline
from badit.baselines.branches import BranchGate, BranchModel, GatedBranchConfig, mean_embedding
from badit.support.errors import BaditError
from badit.tuner.config import option
from badit.tuner.model import TaskBatches
from badit.tuner.prompt import before_first_label

_SHARE_OF_ENERGY = 0.995
_TASKS_TO_FULL_SHARE = 15  # the share reaches 1 after this number of tasks
# Relative to the norm of all inputs: smaller values are float32's rounding errors.
_NEGLIGIBLE = 1e-5


class GainLoraGate(BranchGate):
    """One network and one key per task; ``down`` is G1, ``up`` is G2."""

    of_each_task: ClassVar[dict[str, str]] = {
        "key": "past_keys",
        "down": "past_down",
        "up": "past_up",
    }

    seen_by_down: Tensor  # the projector P of G1, (D, D)
    seen_by_up: Tensor  # of G2, (H, H)
    seen_by_key: Tensor  # of the key, (D, D)

    def __init__(self, width: int, config: "GainLoraConfig", device: torch.device) -> None:
        super().__init__(width, config, device)
        for name, size in (("down", width), ("up", config.gate_hidden_size), ("key", width)):
            self.register_buffer(f"seen_by_{name}", torch.zeros(size, size, device=device))
        self.of_covariance = config.energy == "covariance"
        self.start_key()

    def forward(self, prompt_BD: Tensor) -> Tensor:
        hidden_BKH = F.silu(torch.einsum("bd,khd->bkh", prompt_BD, self.of_all_tasks("down")))
        z_BKD = F.silu(torch.einsum("bkh,kdh->bkd", hidden_BKH, self.of_all_tasks("up")))
        # An absolute value, so that an opposite z also opens the gate; 0 if z and key are
        # orthogonal.
        cosine_BK = F.cosine_similarity(z_BKD, self.of_all_tasks("key"), dim=-1)
        return (2 * torch.sigmoid(4 * cosine_BK) - 1).abs()

    @torch.no_grad()
    def start_key(self) -> None:
        """Sets the key to a random unit vector orthogonal to the earlier tasks' z.

        :meth:`start_task` replaces it.
        """
        if self.key.is_meta:  # its value will be loaded
            return
        size = len(self.key)
        if self.seen_by_key.trace() > size - 0.5:  # a projector's trace is its rank
            raise BaditError(
                f"the earlier tasks' prompts take up all {size} dimensions of GainLoRA's gates, so "
                "there is none for another task; train on fewer tasks"
            )
        self._set_key(torch.randn_like(self.key))

    @torch.no_grad()
    def start_task(self, prompt_ND: Tensor) -> None:
        """Sets the key to the leading direction of z orthogonal to the earlier tasks' z."""
        z_ND = self._inputs(prompt_ND)["key"]
        new_ND = z_ND - z_ND @ self.seen_by_key
        _, _, vh = torch.linalg.svd(new_ND.double(), full_matrices=False)
        # Projected a second time, because rounding leaves a part along the earlier tasks' z.
        self._set_key(vh[0].to(self.key))

    def _set_key(self, direction_D: Tensor) -> None:
        projected_D = direction_D - direction_D @ self.seen_by_key
        self.key.copy_(F.normalize(projected_D, dim=0))

    @torch.no_grad()
    def end_task(self, prompt_ND: Tensor) -> None:
        """Extends the projectors by the inputs of G1, G2 and the key for this task's prompts."""
        earlier_tasks = min(len(self.get_buffer("past_keys")), _TASKS_TO_FULL_SHARE)
        missing_share = (1 - _SHARE_OF_ENERGY) * (earlier_tasks / _TASKS_TO_FULL_SHARE)
        for name, inputs in self._inputs(prompt_ND).items():
            if self.of_covariance:
                inputs = inputs.double().T @ inputs.double()
            grown = grown_projector(
                self.get_buffer(f"seen_by_{name}"),
                inputs,
                _SHARE_OF_ENERGY + missing_share,
                stop_below=self.of_covariance and earlier_tasks == 0,  # the released code's rule
            )
            setattr(self, f"seen_by_{name}", grown)

    def _inputs(self, prompt_ND: Tensor) -> dict[str, Tensor]:
        """Returns the inputs of the current task's G1, G2 and key.

        They are p0 (N, D), SiLU(G1 p0) (N, H) and z (N, D).
        """
        hidden_NH = F.silu(prompt_ND @ self.down.T)
        return {"down": prompt_ND, "up": hidden_NH, "key": F.silu(hidden_NH @ self.up.T)}

    @torch.no_grad()
    def project_update(self, before: Mapping[str, Tensor]) -> None:
        """Subtracts the part of each update since ``before`` that acts on earlier tasks' inputs."""
        for name, tensor in self.named_parameters():
            # Δ ← Δ (I − P): the rows of a matrix act on its inputs, so P is on the right.
            tensor.sub_((tensor - before[name]) @ self.get_buffer(f"seen_by_{name}"))


def grown_projector(
    projector_DD: Tensor, inputs_ND: Tensor, share: float, *, stop_below: bool = False
) -> Tensor:
    """Returns the projector P = M Mᵀ (D, D) that holds the share of ‖inputs‖².

    It has the fewest possible new columns in M. They are leading right singular vectors of
    inputs (I − P); energy already in P counts (arXiv 2103.09762, eq. 8, 9). With ``stop_below``,
    the last of these columns is left out if there are several.
    """
    projector = projector_DD.double()
    inputs = inputs_ND.double()
    _, s, vh = torch.linalg.svd(inputs - inputs @ projector, full_matrices=False)
    # The part of the inputs within P counts as held before the first new direction.
    energy = s.square()
    total = inputs.square().sum()
    held_before = total - energy.sum() + energy.cumsum(dim=0) - energy
    is_new = (held_before < share * total) & (s > _NEGLIGIBLE * total.sqrt())
    if stop_below and is_new.sum() > 1:
        is_new[is_new.sum() - 1] = False
    return (projector + vh[is_new].T @ vh[is_new]).to(projector_DD.dtype)


class GainLoraModel(BranchModel):
    """Branches whose gates read each task's prompts and project each optimizer step's update."""

    def _prompts_of(self, batches: TaskBatches) -> Tensor:
        embeddings = self.model.get_input_embeddings()
        prompts = []
        for batch in itertools.chain(*batches.values()):
            prompt_mask_BT = before_first_label(batch["labels"], batch["attention_mask"])
            embedded_BTD = embeddings(batch["input_ids"].to(self.device))
            prompts.append(mean_embedding(embedded_BTD, prompt_mask_BT))
        return torch.cat(prompts)

    def start_task(self, batches: TaskBatches) -> None:
        for gate in self._active_gates():
            gate.start_task(self._prompts_of(batches).to(gate.key))

    def end_task(self, batches: TaskBatches) -> None:
        for gate in self._active_gates():
            gate.end_task(self._prompts_of(batches).to(gate.key))

    def before_update(self) -> None:
        gates = self._active_gates()
        # Copies, because the optimizer changes the parameters in place.
        self._before = [copy.deepcopy(dict(gate.named_parameters())) for gate in gates]

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
        "The matrix whose energy (squared singular values) the projectors hold a share of: "
        "'covariance', XᵀX of the inputs X, as in the released code; or 'inputs', X, as in the "
        "paper, which needs many more directions.",
    )

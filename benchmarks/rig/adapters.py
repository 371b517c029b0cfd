"""The adapters of the rig, with all kinds of gates.

Shapes: A (N, I), B (O, N), a gate g per component, B rows, T tokens, K experts.
"""

import math
from argparse import Namespace
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from badit.method import cosine_gram, group_components, grouping_objective


@dataclass
class Batch:
    """The current batch, which the gates read."""

    prompt_BT: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    task_B: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class Moments:
    """Running mean and variance of the prompts, to standardise a router's input."""

    def __init__(self, inputs: int) -> None:
        self.batches = 0
        self.mean_I = torch.zeros(inputs)
        self.variance_I = torch.zeros(inputs)

    def update(self, prompts_BI: torch.Tensor) -> None:
        self.batches += 1
        weight = max(1 / self.batches, 0.02)
        mean_I = prompts_BI.mean(0)
        within = (1 - weight) * self.variance_I + weight * prompts_BI.var(0, unbiased=False)
        self.variance_I = within + weight * (1 - weight) * (mean_I - self.mean_I) ** 2
        self.mean_I = torch.lerp(self.mean_I, mean_I, weight)

    def standardised(self, prompts_BI: torch.Tensor) -> torch.Tensor:
        """Returns prompts with a norm of about 8."""
        factor = 8 / math.sqrt(prompts_BI.shape[-1])
        return factor * (prompts_BI - self.mean_I) * (self.variance_I + 1e-12).rsqrt()


class Adapted(nn.Module):
    """y = W x + s · B (g ∘ A x), minus s · B0 A0 x with ``--init bad``."""

    def __init__(self, base: nn.Linear, options: Namespace, tasks: int, batch: Batch) -> None:
        super().__init__()
        self.base = base
        self.options = options
        self.batch = batch
        A, B = initial_factors(base.weight, options)
        # In dictionaries, as in PEFT: OrthogonalUpdates finds pairs of factors by these names.
        self.lora_A = nn.ParameterDict({"rig": A})
        self.lora_B = nn.ParameterDict({"rig": B})
        self.start = (A.clone(), B.clone()) if options.init == "bad" else None

        # Of each component: its expert now and before the last regrouping.
        self.label_N = torch.arange(options.N) // (options.N // options.K)
        self.former_label_N: torch.Tensor | None = None
        self.gram_NN: torch.Tensor | None = None
        self.moved = 0

        inputs = base.in_features
        self.router: nn.Parameter | None = None
        self.projection: nn.Parameter | None = None
        self.moments = Moments(inputs)
        if options.gate == "expert":
            self.router = nn.Parameter(torch.zeros(options.K, inputs))
        elif options.gate == "component":
            is_trained = not options.fixed_projection
            start = 0.35 * torch.randn(options.rank, inputs)
            self.projection = nn.Parameter(start, requires_grad=is_trained)
            self.router = nn.Parameter(torch.zeros(options.N, options.rank))
        elif options.gate == "oracle":
            self.router = nn.Parameter(torch.zeros(tasks, options.N))

    @property
    def A(self) -> torch.Tensor:
        return self.lora_A["rig"]

    @property
    def B(self) -> torch.Tensor:
        return self.lora_B["rig"]

    @property
    def router_parameters(self) -> list[nn.Parameter]:
        parameters = (self.router, self.projection)
        return [weight for weight in parameters if weight is not None and weight.requires_grad]

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        dtype = x_BTI.dtype
        hidden_BTN = F.linear(x_BTI, self.A.to(dtype))
        if self.router is not None:
            self.gates_B1N = self.gates(self.logits(x_BTI))
            hidden_BTN = hidden_BTN * self.gates_B1N.to(dtype)
        change = F.linear(hidden_BTN, self.B.to(dtype))
        if self.start is not None:
            A0, B0 = self.start
            change = change - F.linear(F.linear(x_BTI, A0.to(dtype)), B0.to(dtype))
        return self.base(x_BTI) + self.options.scale * change

    def logits(self, x_BTI: torch.Tensor) -> torch.Tensor:
        """Returns the router's logits of the prompts, or those of the tasks for oracle gates."""
        assert self.router is not None
        if self.options.gate == "oracle":
            return self.router[self.batch.task_B]
        mask_BT1 = self.batch.prompt_BT[..., None]
        prompts_BI = (x_BTI.float() * mask_BT1).sum(1) / mask_BT1.sum(1)
        if self.training:
            self.moments.update(prompts_BI.detach())
        embedding = self.moments.standardised(prompts_BI)
        if self.projection is not None:
            embedding = embedding @ self.projection.T
        return embedding @ self.router.T

    def gates(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns the gate of each component (B, 1, N)."""
        shared_experts = self.options.K // 2
        if self.options.shared:
            logits = logits[:, shared_experts:]
        if self.options.act == "softmax":
            gates = logits.softmax(-1) * logits.shape[-1]
        else:
            gates = logits.clamp(-1.5, 1.5).exp()
        if self.options.shared:
            gates = torch.cat([torch.ones(len(gates), shared_experts), gates], dim=1)
        if self.options.gate == "expert":
            gates = gates[:, self.label_N]
        return gates[:, None]

    def add_gradients_to_gram(self) -> None:
        """Adds the cosines between the gradients of the components to the window's Gram matrix."""
        assert self.A.grad is not None
        assert self.B.grad is not None
        gram_NN = cosine_gram(self.A.grad, self.B.grad)
        self.gram_NN = gram_NN if self.gram_NN is None else self.gram_NN + gram_NN

    def regroup(self, seed: int) -> None:
        """Regroups the components with DOG, on the Gram matrix of the window.

        With ``--must-pay``, a grouping that this window does not favour is first undone.
        """
        assert self.gram_NN is not None
        gram = self.gram_NN.double().numpy()
        if self.options.must_pay and self.former_label_N is not None:
            former = grouping_objective(gram, self.former_label_N.numpy())
            if grouping_objective(gram, self.label_N.numpy()) < former:
                self.label_N = self.former_label_N
        self.former_label_N = self.label_N
        self.label_N = torch.from_numpy(group_components(gram, self.label_N.numpy(), seed=seed))
        self.moved += int((self.label_N != self.former_label_N).sum())
        self.gram_NN = None


def initial_factors(weight: torch.Tensor, options: Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns A and B: LoRA's, the singular directions with B = 0, or the paper's factors."""
    outputs, inputs = weight.shape
    if options.init == "lora":
        A = nn.init.kaiming_uniform_(torch.empty(options.N, inputs), a=math.sqrt(5))
        return A, torch.zeros(outputs, options.N)
    U, S, V = torch.linalg.svd(weight.float(), full_matrices=False)
    if options.init == "dirs":
        return (V[: options.N] / math.sqrt(3)).contiguous(), torch.zeros(outputs, options.N)
    root = (S[: options.N] / options.scale).sqrt()
    return (root[:, None] * V[: options.N]).contiguous(), (U[:, : options.N] * root).contiguous()

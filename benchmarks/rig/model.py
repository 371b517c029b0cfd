"""SmolLM2 with frozen lower layers, computed once, and adapters in the upper layers."""

import os
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from adapters import Adapted, Batch
from tasks import Example
from torch import nn
from transformers import AutoModelForCausalLM

from badit.tuner.prompt import IGNORED_LABEL

pad = nn.utils.rnn.pad_sequence


class TokenLosses(NamedTuple):
    """Of every answer token (L): NLL, whether it was the most likely token, and its row."""

    nll_L: torch.Tensor
    is_right_L: torch.Tensor
    row_L: torch.Tensor


class RigModel:
    """The model; ``adapters`` are on gate_proj of the upper layers."""

    def __init__(self, options: Namespace, tasks: int) -> None:
        self.options = options
        model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
        self.model = model.requires_grad_(False)
        layers = self.model.model.layers
        self.lower = layers[: len(layers) - options.layers]
        self.upper = layers[len(layers) - options.layers :]
        self.batch = Batch()
        self.adapters: list[Adapted] = []
        for layer in self.upper:
            layer.mlp.gate_proj = Adapted(layer.mlp.gate_proj, options, tasks, self.batch)
            self.adapters.append(layer.mlp.gate_proj)

    @torch.no_grad()
    def lower_output(self, examples: Sequence[Example], split: str) -> list[torch.Tensor]:
        """Returns the lower layers' output for every example (T, D), if possible from the cache."""
        options = self.options
        tasks = options.tasks.replace(",", ".")
        seed = options.data_seed if split == "train" else ""
        sizes = f"{options.layers}-{options.train}-{options.held}-{options.max_tokens}"
        file = f"{options.out}/cache/{split}-{sizes}-{tasks}-{seed}.pt"
        if os.path.exists(file):
            return torch.load(file)

        hidden: Any = [None] * len(examples)
        order = sorted(range(len(examples)), key=lambda i: examples[i].length)
        for start in range(0, len(order), 16):
            indices = order[start : start + 16]
            rows = [torch.tensor(examples[i].prompt + examples[i].answer) for i in indices]
            embedded_BTD = self.model.model.embed_tokens(pad(rows, batch_first=True))
            output_BTD = self.through(self.lower, embedded_BTD)
            for i, row, states_TD in zip(indices, rows, output_BTD, strict=True):
                hidden[i] = states_TD[: len(row)].clone()

        os.makedirs(f"{options.out}/cache", exist_ok=True)
        partial = f"{file}.{os.getpid()}"
        torch.save(hidden, partial)
        os.replace(partial, file)
        return hidden

    def through(self, layers: Any, hidden_BTD: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(hidden_BTD.shape[1])[None]
        rope = self.model.model.rotary_emb(hidden_BTD, positions)
        for layer in layers:
            output = layer(hidden_BTD, position_embeddings=rope)
            hidden_BTD = output[0] if isinstance(output, tuple) else output
        return hidden_BTD

    def losses(self, examples: Sequence[Example], hidden: Sequence[torch.Tensor]) -> TokenLosses:
        """Returns the losses of the answers' tokens, from the lower layers' output."""
        hidden_BTD = pad(list(hidden), batch_first=True)
        labels_BT = torch.full(hidden_BTD.shape[:2], IGNORED_LABEL)
        prompt_BT = torch.zeros(hidden_BTD.shape[:2])
        for row, example in enumerate(examples):
            length = len(example.prompt)
            # The state before a token predicts it.
            labels_BT[row, length - 1 : example.length - 1] = torch.tensor(example.answer)
            prompt_BT[row, :length] = 1
        self.batch.prompt_BT = prompt_BT
        self.batch.task_B = torch.tensor([example.task for example in examples])

        hidden_BTD = self.through(self.upper, hidden_BTD)
        is_answer_BT = labels_BT != IGNORED_LABEL
        labels_L = labels_BT[is_answer_BT]
        final_LD = self.model.model.norm(hidden_BTD[is_answer_BT])
        logits = self.model.lm_head(final_LD).float()
        nll_L = F.cross_entropy(logits, labels_L, reduction="none")
        is_right_L = logits.argmax(-1) == labels_L
        return TokenLosses(nll_L, is_right_L, is_answer_BT.nonzero()[:, 0])

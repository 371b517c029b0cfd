"""Helpers of the tuner tests: adapting a tiny model, random adapter weights, decoding by hand."""

import inspect

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import OPTConfig, OPTForCausalLM
from transformers.pytorch_utils import Conv1D

from badit.tuner import BaditConfig, ExpertLinear

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "mistral", "gpt2")
SMALL = {"num_experts": 3, "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
SMALL |= {"init_weights": "bad", "gated": "factors", "router_input": "mean", "gates": "mean_one"}
SMALL |= {"codes": "random"}
CLUSTERS = {"gates": "clusters", "router_input": "standardised", "num_clusters": 4}
# The paper's parts with gates that scale the change, and one key for all layers.
CHANGE = {**CLUSTERS, "gated": "change", "key": "embedding", "codes": "grouped"}
NEW = 6  # default number of tokens that `generate` adds
KINDS = ("linear", "linear without bias", "conv1d")


def config(**options):
    """Returns a small configuration: K = 3, r = 2, scaling 2, no dropout, BAD, a router."""
    return BaditConfig(**{**SMALL, **options})


def adapt(model, **options):
    """Returns the model with a small adapter at step 0, in eval mode."""
    return get_peft_model(model, config(**options)).eval()


def opt():
    """Returns a random OPT, whose MLP flattens the positions of a batch into rows."""
    sizes = {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "vocab_size": 100,
    }
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "init_std": 0.2}
    return OPTForCausalLM(
        OPTConfig(**sizes, **ends, num_attention_heads=4, max_position_embeddings=64)
    ).eval()


def layers(model):
    """Returns the adapted layers, from first to last."""
    return [module for module in model.modules() if isinstance(module, ExpertLinear)]


@torch.no_grad()
def randomise(model, adapter="default", seed=0):
    """Gives an adapter weights as after training: factors, router, moments, clusters, grouping."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor, size):
        return (size * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)

    for layer in (layer for layer in layers(model) if adapter in layer.badit_A):
        by_adapter = {name: getattr(layer, name) for name in layer.adapter_layer_names}
        tensors = {name: of[adapter] for name, of in by_adapter.items() if adapter in of}
        for name, size in (("badit_A", 0.1), ("badit_B", 0.1), ("badit_lambda", 0.5)):
            if name in tensors:
                tensors[name].add_(noise(tensors[name], size))
        if "badit_router" in tensors:
            tensors["badit_router"].copy_(
                noise(tensors["badit_router"], 2.0 / layer.in_features**0.5)
            )
        _randomise_prompts(layer, adapter, noise)
        if adapter in getattr(layer, "badit_expert_of", ()):
            labels = layer.expert_of(adapter)
            labels.copy_(labels[torch.randperm(len(labels), generator=generator)])
    gates = getattr(getattr(model, "base_model", None), "badit_gate", {})
    for parameter in gates[adapter].parameters() if adapter in gates else ():
        parameter.add_(noise(parameter, 0.1))
    return model


def _randomise_prompts(layer, adapter, noise):
    """Gives a layer moments, clusters, a key and codes as after training."""
    if adapter in getattr(layer, "badit_moments", ()):
        layer.badit_moments[adapter].copy_(noise(layer.badit_moments[adapter], 1.0).abs() + 0.5)
    if adapter in getattr(layer, "badit_batches", ()):
        layer.badit_batches[adapter].fill_(3)
    if adapter in getattr(layer, "badit_key", ()):
        layer.badit_key[adapter].copy_(noise(layer.badit_key[adapter], 1.0))
    if adapter in getattr(layer, "badit_codes", ()):
        if adapter in layer.badit_centroids:
            # As in training, prompts differ in their direction from the mean.
            layer.badit_moments[adapter][0] = 0.0
            layer.badit_centroids[adapter].copy_(noise(layer.badit_centroids[adapter], 1.0))
        layer.badit_codes[adapter].copy_(noise(layer.badit_codes[adapter], 2.0).softmax(dim=1))


def adapted(model, **options):
    """Returns the model with an adapter as after training: gates differ clearly between prompts."""
    return randomise(adapt(model, **options))


def cache_name(model):
    """Returns the name of the forward argument for a cache, which differs within transformers 5."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return "cache" if "cache" in inspect.signature(inner.forward).parameters else "past_key_values"


def forward(model, ids, mask, cache=None, **options):
    """Calls the model on the newest tokens of a batch.

    Positions skip padding; ``mask`` includes cached tokens.
    """
    if cache is not None:
        options[cache_name(model)] = cache
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, **options)


def generate(model, ids, mask, new_tokens=NEW, **options):
    """Decodes greedily with the model's ``generate``."""
    if "cache" in options:
        options[cache_name(model)] = options.pop("cache")
    options |= {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=ids, attention_mask=mask, **options)


@torch.no_grad()
def teacher_forced(model, ids, mask, prompt_length):
    """Returns the logits of a forward pass as in training, with labels on the answer."""
    labels = ids.masked_fill((mask == 0) | (torch.arange(ids.shape[1]) < prompt_length), -100)
    return forward(model, ids, mask, labels=labels).logits


@torch.no_grad()
def cached_steps(model, ids, mask, prompt_length, cache):
    """Returns the logits from the prompt's last position on.

    The prompt is passed in one call, then one token at a time.
    """
    bounds = [
        (0, prompt_length),
        *((end - 1, end) for end in range(prompt_length + 1, ids.shape[1] + 1)),
    ]
    steps = (
        forward(model, ids[:, i:end], mask[:, :end], cache, use_cache=True).logits[:, -1:]
        for i, end in bounds
    )
    return torch.cat(list(steps), dim=1)


@torch.no_grad()
def greedy_by_hand(model, ids, mask, new_tokens):
    """Decodes greedily without a cache: each token comes from a full teacher-forced pass."""
    prompt_length = ids.shape[1]
    for _ in range(new_tokens):
        # A placeholder at the newest position gets a label, so that the prompt ends at the same
        # position.
        ids = nn.functional.pad(ids, (0, 1), value=3)
        mask = nn.functional.pad(mask, (0, 1), value=1)
        ids[:, -1] = teacher_forced(model, ids, mask, prompt_length)[:, -2].argmax(dim=-1)
    return ids


def padded(rows, side="left"):
    """Returns rows of tokens as one padded batch and its mask."""
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where] = torch.tensor(row)
        mask[i, where] = 1
    return ids, mask


def random_rows(*lengths, seed=0):
    """Returns rows of random tokens, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 100, (length,), generator=generator).tolist() for length in lengths]


def clear_batches(seed=0, rows=24):
    """Returns two tasks' batches, whose gradients agree: prompts of five tokens and four of answer.

    The tasks' prompts are from different parts of a vocabulary.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = {}
    for task, first in (("first", 4), ("second", 50)):
        ids = torch.randint(first, first + 8, (rows, 9), generator=generator)
        ids[:, 5:] = first  # a task has one answer
        labels = ids.where(torch.arange(9) > 4, -100)
        batches[task] = [
            {"input_ids": ids[i : i + 4], "labels": labels[i : i + 4]} for i in range(0, rows, 4)
        ]
    return batches


def packed_logits(model, ids, labels):
    """Returns the logits (rows, positions, V) of rows that are packed into a single one."""
    rows, length = ids.shape
    positions = torch.arange(length).repeat(rows)[None]
    packed = {"input_ids": ids.view(1, -1), "labels": labels.view(1, -1)}
    return model(**packed, position_ids=positions, use_cache=False).logits.view(rows, length, -1)


def enable_checkpointing(model, reentrant):
    """Enables gradient checkpointing, whose method transformers renames within version 5."""
    inner = model.get_base_model()
    enable = (
        getattr(inner, "activation_checkpointing_enable", None)
        or inner.gradient_checkpointing_enable
    )
    enable({"use_reentrant": reentrant})


IDS, MASK = padded(random_rows(6, 11, 9))


@torch.no_grad()
def logits(model, ids=IDS, mask=MASK):
    """Returns the logits at the attended positions."""
    return forward(model, ids, mask).logits[mask.bool()].float()


def take_steps(optimizer, steps, loss, before=lambda: None, after=lambda: None):
    """Takes steps and returns their losses; calls ``before`` and ``after`` around each update."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        step_loss = loss()
        step_loss.backward()
        losses.append(step_loss.item())
        before()
        optimizer.step()
        after()
    return losses


def gradients(model):
    """Returns the gradients by name and clears the model's own."""
    copies = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return copies


def base_layer(kind, in_features, out_features):
    """Returns a frozen layer of one of the adaptable KINDS."""
    if kind != "conv1d":
        return nn.Linear(in_features, out_features, bias=kind == "linear").requires_grad_(False)
    layer = Conv1D(out_features, in_features)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.requires_grad_(False)

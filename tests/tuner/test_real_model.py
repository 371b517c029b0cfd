"""The tuner on SmolLM2-135M-Instruct: real weights, real text, the published setting."""

import torch
from peft import PeftModel, get_peft_model
from transformers import DynamicCache, StaticCache

from badit.tuner import BaditConfig
from tuner.helpers import cached_steps, forward, greedy_by_hand, layers, logits, teacher_forced

TEXTS = [
    "Classify the sentiment of the sentence as positive or negative.\nSentence: The soup was cold, and so was he.",
    "What is the capital of France?",
    "Rewrite the following sentence in the past tense: She walks to the market every morning and buys three apples.",
]
ANSWERS = [" Answer: negative, of course.", " Answer: Paris, on the Seine.", " Answer: She walked there daily."]
FEW = {"layers_to_transform": [0, 10, 20, 29], "target_modules": ["gate_proj"]}  # where not every layer is needed


def prompts(tokenizer):
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    return encoded.input_ids, encoded.attention_mask


def with_answers(tokenizer):
    ids, mask = prompts(tokenizer)
    answers = tokenizer(ANSWERS, return_tensors="pt", padding=False, truncation=True, max_length=6).input_ids
    return torch.cat([ids, answers], dim=1), torch.cat([mask, torch.ones_like(answers)], dim=1), ids.shape[1]


def published(model, **options):
    return get_peft_model(model, BaditConfig(task_type="CAUSAL_LM", **options)).eval()


@torch.no_grad()
def trained(model):
    """A, B and the router moved by a few per cent of their size, the router decisive, the grouping shuffled."""
    generator = torch.Generator().manual_seed(0)
    for layer in layers(model):
        for parameter in (layer.badit_A["default"], layer.badit_B["default"]):
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator))
        layer.badit_router["default"].copy_(torch.randn(layer.badit_router["default"].shape, generator=generator))
        labels = layer.expert_of("default")
        labels.copy_(labels[torch.randperm(len(labels), generator=generator)])
    return model


def test_step_0_equals_the_base_model(smollm2):
    base, tokenizer = smollm2
    ids, mask = prompts(tokenizer)
    assert 0 < mask.sum() < mask.numel()
    expected = logits(base, ids, mask)
    model = published(base)
    assert len(layers(model)) == 30
    assert (logits(model, ids, mask) - expected).abs().max() <= 1e-4
    with model.disable_adapter():
        assert torch.equal(logits(model, ids, mask), expected)


def test_what_is_learnt_routes_alike_in_training_and_generation(smollm2, tmp_path):
    base, tokenizer = smollm2
    model = trained(published(base, **FEW))
    ids, mask, length = with_answers(tokenizer)
    forced = teacher_forced(model, ids, mask, length)[:, length - 1 :]
    for cache in (DynamicCache(), StaticCache(config=base.config, max_cache_len=ids.shape[1])):
        steps = cached_steps(model, ids, mask, length, cache)
        torch.testing.assert_close(steps, forced, atol=2e-3, rtol=1e-3)
    assert (forward(model, ids, mask).logits[:, length - 1 :] - forced).abs().max() > 0.05

    row = mask[1].bool()
    own = int(row[:length].sum())
    alone = teacher_forced(model, ids[1:2, row], mask[1:2, row], own)[0]
    torch.testing.assert_close(alone[own - 1 :], forced[1], atol=2e-3, rtol=1e-3)

    options = {"input_ids": ids[:, :length], "attention_mask": mask[:, :length], "max_new_tokens": 5}
    expected = greedy_by_hand(model, ids[:, :length], mask[:, :length], 5)
    for use_cache in (True, False):
        assert torch.equal(model.generate(**options, use_cache=use_cache, do_sample=False), expected)

    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(model.unload(), tmp_path).eval()
    torch.testing.assert_close(teacher_forced(reloaded, ids, mask, length)[:, length - 1 :], forced)

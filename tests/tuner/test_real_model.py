"""The tuner on SmolLM2-135M-Instruct: real weights, real text, the published setting."""

import torch
from peft import get_peft_model

from badit.tuner import BaditConfig
from tuner.helpers import generate, greedy_by_hand, layers, logits

TEXTS = [
    "Classify the sentiment of the sentence as positive or negative.\nSentence: The soup was cold, and so was he.",
    "What is the capital of France?",
    "Rewrite the following sentence in the past tense: She walks to the market every morning and buys three apples.",
]


def test_step_0_equals_the_base_model_and_what_is_learnt_routes_alike_in_generation(smollm2):
    base, tokenizer = smollm2
    ids, mask = tokenizer(TEXTS, padding=True, return_tensors="pt").values()
    expected = logits(base, ids, mask)
    model = get_peft_model(base, BaditConfig(task_type="CAUSAL_LM")).eval()
    assert len(layers(model)) == 30
    assert (logits(model, ids, mask) - expected).abs().max() <= 1e-4
    with torch.no_grad():
        for layer in layers(model):
            for parameter in (layer.badit_A["default"], layer.badit_B["default"]):
                parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
            torch.nn.init.normal_(layer.badit_router["default"])
    assert torch.equal(generate(model, ids, mask, 5), greedy_by_hand(model, ids, mask, 5))
    with model.disable_adapter():
        assert torch.equal(logits(model, ids, mask), expected)

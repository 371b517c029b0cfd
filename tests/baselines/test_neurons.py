"""Task neurons: scores against autograd on single examples, selection, trained parameters."""

import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from badit.baselines.neurons import neuron_scores, top_neurons, train_only
from badit.data import AnswerCollator
from baselines.naive import adapted
from refusals import refuses
from training.trainers import assert_same, examples
from tuner.helpers import take_steps

WIDTH = 48


def naive_scores(model, data):
    """Returns scores from single examples without padding.

    They come from the gradients of zeros that are added to the neurons' outputs.
    """
    # The name of an MLP, and of its last projection.
    last = re.compile(r"(.*\.mlp)\.(c_proj|down_proj)")
    matches = {module: last.fullmatch(name) for name, module in model.named_modules()}
    lasts = {match[1]: module for module, match in matches.items() if match}
    added = {}
    outputs = {}
    totals = {name: torch.zeros(WIDTH) for name in lasts}
    positions = sum(len(example["input_ids"]) for example in data)

    def probe(name, module, args):
        outputs[name] = args[0].detach()
        added[name] = torch.zeros_like(args[0], requires_grad=True)
        return args[0] + added[name]

    handles = [
        module.register_forward_pre_hook(partial(probe, name)) for name, module in lasts.items()
    ]
    for example in data:
        ids = torch.tensor([example["input_ids"]])
        labels = example["labels"]
        logs = F.log_softmax(model(input_ids=ids).logits[0].float(), dim=-1)
        answer = [t for t in range(1, len(labels)) if labels[t] != -100]
        (-sum(logs[t - 1, labels[t]] for t in answer) / len(answer)).backward()
        for name in totals:
            totals[name] += (added[name].grad * outputs[name]).abs().sum(dim=(0, 1)) / positions
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return totals


@pytest.mark.parametrize(  # left padding would shift GPT-2's absolute positions
    ("family", "side"),
    [("llama", "right"), ("llama", "left"), ("gemma2", "right"), ("gpt2", "right")],
)
def test_scores_match_naive_scores_for_any_batching(tiny_model, family, side):
    model = tiny_model(family, attention_dropout=0.5)
    data = examples(5)
    collate = AnswerCollator(0, side)
    expected = naive_scores(model.eval(), data)
    for batches in ([data], [data[:2], data[2:]]):
        scores = neuron_scores(model.train(), [collate(batch) for batch in batches])
        assert model.training
        torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-7)
        assert all(scores_F.min() < scores_F.max() / 2 for scores_F in scores.values()), (
            "the scores must differ"
        )


def test_scoring_sets_no_gradients_and_works_on_a_frozen_model(tiny_model):
    model = tiny_model("llama")
    batch = AnswerCollator(0)(examples(4))
    scores = neuron_scores(model, [batch])
    assert all(p.grad is None for p in model.parameters())
    assert_same(neuron_scores(model.requires_grad_(False), [batch]), scores)
    assert not any(p.requires_grad for p in model.parameters())


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4), st.floats(0.01, 1), st.integers(0, 1000)
)
def test_top_share_is_taken_over_all_layers_together(widths, share, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {
        f"layer {i}": torch.rand(width, generator=generator) for i, width in enumerate(widths)
    }
    masks = top_neurons(scores, share)
    assert {name: len(mask) for name, mask in masks.items()} == {
        name: len(s) for name, s in scores.items()
    }
    chosen = [float(s) for name in scores for s in scores[name][masks[name]]]
    others = [float(s) for name in scores for s in scores[name][~masks[name]]]
    assert len(chosen) == max(1, round(share * sum(widths)))
    assert min(chosen) >= max(others, default=-torch.inf)


@pytest.mark.parametrize("family", ["llama", "gpt2", "llama with biases"])
def test_step_changes_only_the_selected_neurons(tiny_model, family):
    model = tiny_model(
        family.split()[0], **({"mlp_bias": True} if "biases" in family else {})
    ).train()
    batch = AnswerCollator(0)(examples(6))
    masks = top_neurons(neuron_scores(model, [batch]), 0.25)
    assert all(mask.any() and not mask.all() for mask in masks.values())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_only(model, masks)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    take_steps(optimizer, 2, lambda: model(**batch).loss)
    for name, parameter in model.named_parameters():
        mask = next((mask for layer, mask in masks.items() if name.startswith(f"{layer}.")), None)
        moved = parameter != before[name]
        # The last projection's bias belongs to no neuron.
        if mask is None or WIDTH not in moved.shape:
            assert not moved.any(), name
            assert not parameter.requires_grad, name
        else:
            by_neuron = moved if moved.shape[0] == WIDTH else moved.T
            assert torch.equal(by_neuron.reshape(WIDTH, -1).any(dim=1), mask), name


def test_model_with_adapter_is_refused(tiny_model):
    model = adapted(tiny_model("llama"), "loramoe")
    batches = [AnswerCollator(0)(examples(2))]
    refuses("task neurons do not support this model of type llama", neuron_scores, model, batches)

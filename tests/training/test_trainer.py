"""The answer-only loss against a naive implementation, and the order of the examples."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from badit.data import AnswerCollator
from badit.training.sampler import EpochSampler
from training.trainers import adapted, examples, make_trainer
from tuner.helpers import randomise


def naive_loss(model, batch, items):
    """Adds the answer tokens' negative log-likelihoods from all logits; divides by ``items``."""
    logs = F.log_softmax(model(**batch).logits.float(), dim=-1)
    answers = (batch["labels"] != -100).nonzero().tolist()
    return (
        -sum(logs[row, position - 1, batch["labels"][row, position]] for row, position in answers)
        / items
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_loss_and_gradients_match_the_naive_loss(tiny_model, tmp_path, family, side):
    model = randomise(adapted(tiny_model(family), lora_dropout=0.0)).eval()
    trainer = make_trainer(model, tmp_path, [])
    batch = dict(AnswerCollator(0, side=side)(examples(5)))
    items = int((batch["labels"] != -100).sum())
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = naive_loss(model, batch, items)
    loss = trainer.compute_loss(model, batch, num_items_in_batch=items)
    gradients = torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    again, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) == again.item()
    assert outputs.logits.shape[:2] == (1, items), "logits only for labels"
    assert model(input_ids=batch["input_ids"]).logits.shape[:2] == batch["input_ids"].shape, (
        "the hook is removed"
    )


def order_of(lengths, per_step, seed=0, epoch=0, tasks=(), quotas=None):
    return list(EpochSampler(lengths, per_step, seed, lambda: epoch, tasks, quotas))


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=300),
    st.integers(1, 9),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_epoch_has_each_example_once_in_steps_sorted_longest_first(lengths, per_step, seed, epoch):
    order = order_of(lengths, per_step, seed, epoch)
    assert sorted(order) == list(range(len(lengths)))
    assert order == order_of(lengths, per_step, seed, epoch)
    steps = [
        [lengths[index] for index in order[i : i + per_step]]
        for i in range(0, len(order), per_step)
    ]
    assert all(step == sorted(step, reverse=True) for step in steps)
    if len(lengths) % per_step == 0:
        assert steps[0][0] == max(lengths)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 4), st.integers(0, 5))
def test_balanced_epochs_have_equal_task_shares_and_cover_all_examples(sizes, per_step, seed):
    tasks = [f"task-{i}" for i, size in enumerate(sizes) for _ in range(size)]
    share = round(len(tasks) / len(sizes))
    seen = set()
    for epoch in range(60):
        drawn = ([5] * len(tasks), per_step, seed, epoch, tasks, dict.fromkeys(tasks, share))
        order = order_of(*drawn)
        assert order == order_of(*drawn)
        assert Counter(tasks[index] for index in order) == dict.fromkeys(tasks, share)
        uses = Counter(order)
        for task in set(tasks):
            counts = [uses[index] for index, name in enumerate(tasks) if name == task]
            assert max(counts) - min(counts) <= 1
        seen |= set(order)
    assert share / max(sizes) < 0.2 or seen == set(range(len(tasks))), (
        "each epoch draws a new subset of large tasks"
    )


def test_order_depends_on_seed_and_epoch_saves_padding_and_mixes_tasks():
    lengths = torch.randint(10, 500, (512,), generator=torch.Generator().manual_seed(0)).tolist()
    assert (
        len({tuple(order_of(lengths, 8, seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0))})
        == 3
    )

    def padding(micro_batch, accumulated):
        order, size = order_of(lengths, micro_batch * accumulated), micro_batch
        widths = [
            max(lengths[i] for i in order[start : start + size]) for start in range(0, 512, size)
        ]
        return size * sum(widths) - sum(lengths)

    assert padding(2, 4) < 0.25 * padding(8, 1)
    # Four consecutive tasks with different lengths.
    order = order_of([100 * (index // 64) + index % 10 + 1 for index in range(256)], 8)
    kinds = [len({index // 64 for index in order[start : start + 8]}) for start in range(0, 256, 8)]
    assert sum(kinds) / len(kinds) > 3


def test_one_process_uses_one_of_several_gpus_and_says_so_once(
    tiny_model, tmp_path, monkeypatch, capsys
):
    models = [adapted(tiny_model("llama")) for _ in range(2)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for model in models:
        trainer = make_trainer(model, tmp_path, [], use_cpu=False, max_steps=1, save_strategy="no")
        assert trainer.args.train_batch_size == 4
        trainer.train()
    launch = "accelerate launch --multi_gpu --num_processes 2 -m badit train RECIPE"
    assert (
        capsys.readouterr().err.count(
            f"badit: training on one of 2 GPUs; to use all of them: {launch}"
        )
        == 1
    )

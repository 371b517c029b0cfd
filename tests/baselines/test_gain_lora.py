"""GainLoRA: gates, projectors, and that a new gate stays near 0 on the prompts of earlier tasks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from badit.baselines.gain_lora import GainLoraGate, grown_projector
from baselines.naive import FIRST, SECOND, adapt, batches, config, logits, projector
from refusals import refuses
from tuner.helpers import take_steps

WIDTH = 16


def new_gate(**options):
    return GainLoraGate(WIDTH, config("gainlora", **options), torch.device("cpu"))


def gate_of_second_task(prompts, monkeypatch):
    """Returns the gate of a second task; the projectors hold all energy of the first's prompts."""
    monkeypatch.setattr("badit.baselines.gain_lora._SHARE_OF_ENERGY", 1.0)
    made = new_gate(energy="inputs")
    made.end_task(prompts)
    made.next_task()
    return made


def test_covariance_energy_needs_fewer_directions():
    """The squared singular values of XᵀX are the fourth powers of the singular values of X."""
    prompts = torch.randn(200, WIDTH) * torch.logspace(0, -2, WIDTH)
    ranks = []
    for energy, exponent in (("covariance", 4), ("inputs", 2)):
        made = new_gate(energy=energy)
        made.end_task(prompts)
        ranks.append(round(made.seen_by_down.trace().item()))
        powers = np.linalg.svd(prompts.double().numpy(), compute_uv=False) ** exponent
        below = int((np.cumsum(powers) / powers.sum() < 0.995).sum())
        # The released code leaves out the direction that reaches the share, after the first task.
        assert ranks[-1] == below + (energy == "inputs")
    assert ranks[0] < ranks[1]


@pytest.mark.parametrize("energy", ["covariance", "inputs"])
def test_projectors_hold_the_share_after_every_task_but_stop_below_it_after_the_first(energy):
    """Stopping below the share, with at least one direction, is the released code's rule."""
    made = new_gate(energy=energy)
    P = np.zeros((WIDTH, WIDTH))
    for task in range(3):
        prompts = torch.randn(50, WIDTH) * torch.logspace(0, -2, WIDTH).roll(5 * task)
        inputs = prompts.double().numpy()
        if energy == "covariance":
            inputs = inputs.T @ inputs
        stop_below = energy == "covariance" and task == 0
        P = projector(P, inputs, 0.995 + 0.005 * task / 15, stop_below)
        made.end_task(prompts)
        np.testing.assert_allclose(made.seen_by_down, P, atol=1e-4)
        made.next_task()


def test_a_single_direction_is_kept_after_the_first_task():
    made = new_gate()
    made.end_task(torch.randn(5, 1) @ torch.randn(1, WIDTH))
    assert made.seen_by_down.trace().item() == pytest.approx(1, abs=1e-5)


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.5, 0.9999), st.integers(0, 2**32 - 1))
def test_projector_grows_by_the_fewest_directions_that_hold_the_share(first, second, share, seed):
    generator = torch.Generator().manual_seed(seed)
    P = torch.zeros(8, 8, dtype=torch.float64)
    for count in (first, second):
        inputs = torch.randn(count, 8, generator=generator, dtype=torch.float64)
        before = P
        for stop_below in (True, False):
            P = grown_projector(before, inputs, share, stop_below=stop_below)
            expected = projector(before.numpy(), inputs.numpy(), share, stop_below)
            np.testing.assert_allclose(P, expected, atol=1e-6)
            torch.testing.assert_close(P @ P, P)
    torch.testing.assert_close(grown_projector(P, inputs, share), P)


def test_projector_ignores_rounding_errors():
    inputs = torch.randn(30, 3) @ torch.randn(3, 8)
    P = grown_projector(torch.zeros(8, 8), inputs, 1.0)
    assert P.trace().item() == pytest.approx(3, abs=1e-4)
    for nothing in (inputs * 5, torch.zeros(4, 8), torch.zeros(0, 8)):
        torch.testing.assert_close(grown_projector(P, nothing, 1.0), P, atol=1e-5, rtol=0)


@pytest.mark.parametrize("past", [0, 3, 15, 40])
def test_share_of_energy_grows_with_the_number_of_tasks(monkeypatch, past):
    shares = []
    monkeypatch.setattr(
        "badit.baselines.gain_lora.grown_projector",
        lambda P, inputs, share, stop_below: shares.append(share) or P,
    )
    new_gate(past_branches=past).end_task(torch.randn(4, WIDTH))
    assert shares == pytest.approx(3 * [0.995 + 0.005 * min(past, 15) / 15])


@given(st.integers(1, 5), st.floats(1e-3, 1.0), st.integers(0, 2**32 - 1))
def test_updates_keep_the_new_gate_near_zero_on_earlier_prompts(count, size, seed):
    generator = torch.Generator().manual_seed(seed)
    prompts, others = torch.randn(2, count, WIDTH, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        made = gate_of_second_task(prompts, patch)
    earlier = made(prompts)[:, 0].detach()
    torch.testing.assert_close(made(prompts)[:, 1], torch.zeros(count), atol=1e-5, rtol=0)
    assert (made.key.norm() - 1).abs() < 1e-5
    before = made(others).detach()
    for _ in range(3):
        start = {name: parameter.detach().clone() for name, parameter in made.named_parameters()}
        for parameter in made.parameters():
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
        made.project_update(start)
    torch.testing.assert_close(made(prompts)[:, 1], torch.zeros(count), atol=1e-4, rtol=0)
    assert torch.equal(made(prompts)[:, 0], earlier)
    assert not torch.equal(made(others)[:, 1], before[:, 1])


def test_start_task_opens_the_gate_on_new_prompts_but_not_on_earlier_ones(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    prompts, new_prompts = torch.randn(2, 5, WIDTH, generator=generator)
    made = gate_of_second_task(prompts, monkeypatch)
    with torch.no_grad():
        before = made(new_prompts)[:, -1].mean()
        made.start_task(new_prompts)
        assert made(new_prompts)[:, -1].mean() > before
        assert made(prompts)[:, -1].abs().max() < 1e-4
        z = (
            torch.nn.functional.silu(
                torch.nn.functional.silu(new_prompts @ made.down.T) @ made.up.T
            )
            .double()
            .numpy()
        )
    remainder = z - z @ made.seen_by_key.double().numpy()
    assert (
        abs(np.linalg.eigh(remainder.T @ remainder)[1][:, -1] @ made.key.detach().double().numpy())
        > 1 - 1e-5
    )


def test_next_task_is_refused_if_no_direction_is_left():
    made = new_gate()
    made.seen_by_key.copy_(torch.eye(WIDTH))
    refuses("take up all 16 dimensions", made.next_task)


def train(model, ids, mask, *, projected, steps=40):
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(torch.arange(5) < 3, -100),
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    hooks = (model.base_model.before_update, model.base_model.after_update) if projected else ()
    take_steps(optimizer, steps, lambda: model(**batch).loss, *hooks)


@pytest.mark.parametrize("projected", [True, False])
def test_only_projected_training_keeps_the_first_tasks_outputs(tiny_model, monkeypatch, projected):
    monkeypatch.setattr("badit.baselines.gain_lora._SHARE_OF_ENERGY", 1.0)
    model = adapt(tiny_model("llama"), "gainlora", gate_hidden_size=20, energy="inputs")
    train(model, *FIRST, projected=projected, steps=5)
    prompt_mask = (torch.arange(5) < 3).expand(4, -1)
    model.base_model.end_task(batches(FIRST[0], prompt_mask))

    def of_first():
        with torch.no_grad():
            return model(input_ids=FIRST[0], prompt_mask=prompt_mask).logits

    before = of_first()
    model.base_model.next_task()
    train(model, *SECOND, projected=projected)
    change = (of_first() - before).abs().max()
    assert change < 1e-3 if projected else change > 0.05
    assert (logits(model, *SECOND) - logits(tiny_model("llama"), *SECOND)).abs().max() > 0.1

"""Reliability of gradients: Spearman–Brown, and which pairs of tasks are decided."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analysis import naive_interference as naive
from badit.analysis.gradients import agreement, cosine_errors, cosine_intervals
from badit.analysis.reliability import RELIABLE, instances_needed, spearman_brown

_POSITIVE = st.floats(1e-3, 0.999)


def measured(gradients_TND):
    """Returns :func:`agreement` of tasks' gradients: values of all pairs, and of the tasks."""
    tasks, instances, _ = gradients_TND.shape
    sums_RD = torch.stack([of[half::2].sum(dim=0) for of in gradients_TND for half in (0, 1)])
    counts_T2 = torch.full((tasks, 2), instances / 2, dtype=torch.float64)
    pairs_2E = torch.triu_indices(tasks, tasks, offset=1)
    of_pairs, of_tasks = agreement((sums_RD @ sums_RD.T)[None], counts_T2, pairs_2E)
    return (
        {name: values[0].numpy() for name, values in of_pairs.items()},
        {name: values[0].numpy() for name, values in of_tasks.items()},
    )


def noisy_gradients(means_TD, signal, instances, seed):
    """Returns instances' gradients (T, N, D) whose means have this share of signal."""
    means_TD = means_TD / means_TD.norm(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    size = means_TD.shape[1]
    noise_TND = torch.randn(len(means_TD), instances, size, generator=generator).double()
    scale = 0 if signal == 1 else (instances / size * (1 - signal) / signal) ** 0.5
    return means_TD[:, None] + scale * noise_TND


@given(st.floats(-1, 1), st.floats(0.1, 100))
def test_spearman_brown_equals_signal_and_noise_of_a_longer_mean(reliability, factor):
    found = spearman_brown(torch.tensor(reliability, dtype=torch.float64), factor)
    assert float(found) == pytest.approx(naive.longer_reliability(reliability, factor), abs=1e-9)
    assert 0 <= float(found) <= 1


@given(_POSITIVE, st.floats(0.1, 10), st.floats(0.1, 10))
def test_spearman_brown_composes_and_grows_with_the_instances(reliability, first, second):
    r = torch.tensor(reliability, dtype=torch.float64)
    both = spearman_brown(spearman_brown(r, first), second)
    torch.testing.assert_close(both, spearman_brown(r, first * second))
    assert spearman_brown(r, 1 + first) > r
    torch.testing.assert_close(spearman_brown(r, 1), r)


@given(_POSITIVE, st.integers(2, 64))
def test_the_predicted_number_of_instances_is_the_first_that_is_reliable(reliability, instances):
    known = torch.tensor([reliability], dtype=torch.float64)
    found = instances_needed(known, torch.tensor(instances)).item()
    assert found == naive.needed(reliability, instances)


def test_nothing_is_predicted_without_signal():
    unknown = torch.tensor([0.0, -0.3, torch.nan])
    assert instances_needed(unknown, torch.tensor(8)).isnan().all()
    assert spearman_brown(unknown, 2).tolist()[:2] == [0, 0]


def test_pure_noise_decides_no_pair_although_half_of_its_cosines_are_negative():
    generator = torch.Generator().manual_seed(0)
    values, _ = measured(torch.randn(30, 8, 200, generator=generator).double())
    assert np.mean(values["cosine"] < 0) == pytest.approx(0.5, abs=0.1)
    assert np.isnan(values["conflict"]).all()


@given(st.integers(0, 2**32 - 1))
def test_gradients_without_noise_decide_every_pair_by_the_sign_of_its_cosine(seed):
    means_TD = torch.randn(6, 20, generator=torch.Generator().manual_seed(seed)).double()
    values, _ = measured(noisy_gradients(means_TD, 1, 4, seed))
    assert (values["signal"] > 0.999).all()
    a, b = np.triu_indices(6, 1)
    assert np.array_equal(values["conflict"], ((means_TD @ means_TD.T).numpy()[a, b] < 0))


def test_signal_and_prediction_are_those_of_simulated_gradients():
    generator = torch.Generator().manual_seed(1)
    means_TD = torch.randn(60, 400, generator=generator).double()
    few, of_tasks = measured(noisy_gradients(means_TD, 0.4, 8, 2))
    assert np.median(of_tasks["signal"]) == pytest.approx(0.4, abs=0.05)
    # 0.7 · 0.6 / (0.4 · 0.3) is 3.5 times as many instances.
    assert np.median(of_tasks["instances_needed"]) == pytest.approx(28, rel=0.2)
    assert np.isnan(few["conflict"]).all()
    many, _ = measured(noisy_gradients(means_TD, naive.longer_reliability(0.4, 5), 40, 3))
    assert np.mean(~np.isnan(many["conflict"])) > 0.9


def test_the_limit_is_that_of_the_documentation():
    assert RELIABLE == 0.7


@given(st.integers(0, 1000), st.lists(st.integers(1, 6), min_size=2, max_size=4))
def test_standard_errors_of_cosines_match_naive_loops(seed, counts):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(count, 5, generator=generator).double() + 0.5 for count in counts]
    pairs_2E = torch.triu_indices(len(counts), len(counts), offset=1)
    errors = cosine_errors(torch.cat(rows), counts, pairs_2E)
    expected = [naive.cosine_error(rows[a], rows[b]) for a, b in pairs_2E.T.tolist()]
    assert errors.tolist() == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(("cosine", "signal"), [(0.0, 0.3), (0.0, 0.9), (-0.4, 0.8)])
def test_intervals_of_cosines_cover_the_true_sign_in_95_percent(cosine, signal):
    """Eight instances per task; the noise has 200 dimensions."""
    direction_D = torch.zeros(200).double()
    direction_D[0] = 1
    other_D = torch.zeros(200).double()
    other_D[0], other_D[1] = cosine, (1 - cosine**2) ** 0.5
    pairs_2E = torch.tensor([[0], [1]])
    below = above = 0
    for seed in range(400):
        rows = noisy_gradients(torch.stack([direction_D, other_D]), signal, 8, seed)
        means = [of_task.mean(dim=0) for of_task in rows]
        middle = torch.tensor([naive.cosine(*means)]).double()
        error = cosine_errors(rows.flatten(0, 1), [8, 8], pairs_2E)
        ends = cosine_intervals(middle, error, [8, 8], pairs_2E)
        below += float(ends["high"]) < 0
        above += float(ends["low"]) > 0
    if cosine == 0:
        assert below + above <= 400 * 0.08, "at most 5 % of intervals, and some noise"
    else:
        assert above <= 4
        assert below > 200, "a clear conflict is found"

"""DOG: solvers on the Gram matrix against the loops in ``reference``, which work on gradients."""

import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from badit.method import cosine_gram, expert_angles, group_components, grouping, grouping_objective
from refusals import refuses

_SEED = st.integers(0, 2**32 - 1)
_NUM_EXPERTS = st.integers(1, 5)
_SIZE = st.integers(1, 4)
_DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])

# Gradients (components, dimensions): random ones, and ones whose clustering is degenerate.
_GRADIENTS = {
    "random": lambda rng, n: rng.standard_normal((n, 7)),
    "few dimensions": lambda rng, n: rng.standard_normal((n, 2)),
    "zero": lambda rng, n: np.zeros((n, 3)),
    "some zero": lambda rng, n: rng.standard_normal((n, 5)) * (rng.random((n, 1)) < 0.5),
    "all equal": lambda rng, n: np.ones((n, 1)) * rng.standard_normal((1, 6)),
    "duplicate": lambda rng, n: rng.standard_normal((3, 5))[rng.integers(0, 3, n)],
    "antipodal": lambda rng, n: (
        rng.choice([-1.0, 1.0], (n, 1)) * rng.standard_normal((2, 4))[rng.integers(0, 2, n)]
    ),
    "rank one": lambda rng, n: rng.choice([-1.0, 1.0], (n, 1)) * rng.standard_normal((1, 4)),
    "orthogonal": lambda rng, n: np.eye(n),
}
_KIND = st.sampled_from(sorted(_GRADIENTS))


def unit_gradients(kind, components, seed):
    gradients = _GRADIENTS[kind](np.random.default_rng(seed), components)
    return reference.unit_gradients(gradients, np.zeros((0, components)))


def contiguous(num_experts, size):
    return np.repeat(np.arange(num_experts), size)


def planted_gradients(seed, num_experts=8, size=4, dimensions=200, noise=0.06):
    """Returns noisy copies of orthogonal directions in shuffled order, and the true labels."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.standard_normal((dimensions, num_experts)))[0].T
    labels = rng.permutation(contiguous(num_experts, size))
    gradients = directions[labels] + noise * rng.standard_normal((len(labels), dimensions))
    return gradients / np.linalg.norm(gradients, axis=1, keepdims=True), labels


def gradient_pair(seed, components=6, in_features=9, out_features=5):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(size, generator=generator)
        for size in ((components, in_features), (out_features, components))
    )


@given(
    st.integers(1, 8),
    st.integers(1, 6),
    st.integers(1, 6),
    _DTYPES,
    st.sampled_from([0, 30]),
    _SEED,
)
def test_cosine_gram_equals_pairwise_cosines(
    components, in_features, out_features, dtype, exponent, seed
):
    """For gradients of any norm."""
    grad_A, grad_B = gradient_pair(seed, components, in_features, out_features)
    scale = (
        10.0
        ** torch.from_numpy(
            np.random.default_rng(seed).integers(-exponent, exponent + 1, components)
        ).float()
    )
    grad_A = (grad_A * scale[:, None]).to(dtype)
    grad_B = (grad_B * scale).to(dtype)
    gram = cosine_gram(grad_A.requires_grad_(), grad_B)
    assert (gram.dtype, gram.requires_grad) == (torch.float32, False)
    np.testing.assert_allclose(gram, reference.cosine_gram(grad_A, grad_B), atol=2e-6)


@pytest.mark.parametrize("poison", [0.0, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["A", "B"])
def test_zero_or_non_finite_gradients_have_zero_rows_in_the_gram(poison, side):
    grad_A, grad_B = gradient_pair(3)
    if poison == 0.0:
        grad_A[2] = 0.0
        grad_B[:, 2] = 0.0
    else:
        (grad_A if side == "A" else grad_B.T)[2, 4] = poison
    gram = cosine_gram(grad_A, grad_B)
    np.testing.assert_allclose(gram, reference.cosine_gram(grad_A, grad_B), atol=2e-6)
    np.testing.assert_allclose(gram.diagonal(), [1, 1, 0, 1, 1, 1], atol=2e-6)


@given(_NUM_EXPERTS, _SIZE, _KIND, _SEED)
def test_objective_and_angles_from_the_gram_equal_those_from_gradients(
    num_experts, size, kind, seed
):
    gradients = unit_gradients(kind, num_experts * size, seed)
    labels = np.random.default_rng(seed).permutation(contiguous(num_experts, size))
    gram = gradients @ gradients.T
    assert grouping_objective(gram, labels) == pytest.approx(
        reference.objective(gradients, labels), abs=1e-9
    )
    angles = expert_angles(0.7 * gram, labels)
    expected = reference.angles(gradients, labels)
    # Near ±1, arccos turns 1e-16 into 1e-6 degrees.
    np.testing.assert_allclose(angles[:2], expected[:2], atol=1e-4)
    np.testing.assert_allclose(angles[2:], expected[2:], atol=1e-9)


@given(_NUM_EXPERTS, _SIZE, _KIND, st.sampled_from(["swap", "paper"]), _SEED)
def test_grouping_is_balanced_never_worse_and_deterministic(num_experts, size, kind, solver, seed):
    gradients = unit_gradients(kind, num_experts * size, seed)
    gram = gradients @ gradients.T
    current = np.random.default_rng(seed).permutation(contiguous(num_experts, size))
    original = current.copy()
    labels = group_components(gram, current, solver=solver, restarts=3, seed=seed)
    assert np.issubdtype(labels.dtype, np.integer)
    assert np.bincount(labels, minlength=num_experts).tolist() == [size] * num_experts
    assert np.array_equal(current, original)
    before = reference.objective(gradients, current)
    after = reference.objective(gradients, labels)
    assert after > before or np.array_equal(labels, current)
    np.random.seed(seed)  # the global generator must have no effect
    assert np.array_equal(
        group_components(gram.copy(), current, solver=solver, restarts=3, seed=seed), labels
    )


def test_restarts_of_the_paper_solver_find_better_groupings():
    objectives = np.zeros(2)
    for seed in range(10):
        gradients = unit_gradients("random", 12, seed)
        gram = gradients @ gradients.T
        for index, restarts in enumerate((1, 10)):
            labels = group_components(
                gram, contiguous(3, 4), solver="paper", restarts=restarts, seed=seed
            )
            objectives[index] += reference.objective(gradients, labels)
    assert objectives[1] > 1.01 * objectives[0]


@pytest.mark.parametrize("solver", ["swap", "paper"])
@pytest.mark.parametrize(
    ("kind", "noise"), [("zero", 0), ("all equal", 0), ("orthogonal", 0), ("all equal", 1e-9)]
)
def test_labels_are_kept_if_all_groupings_are_equally_good(kind, noise, solver):
    gradients = unit_gradients(kind, 12, 0)
    rng = np.random.default_rng(2)
    gram = gradients @ gradients.T + noise * rng.standard_normal((12, 12))
    current = rng.permutation(contiguous(3, 4))
    assert np.array_equal(group_components(gram, current, solver=solver), current)


def test_invalid_gram_labels_and_solver_are_refused():
    for gram, labels, message in (
        (np.eye(4), [0, 0, 1, 1, 1, 0], r"shape \(4, 4\), but there are 6 labels"),
        (np.ones((4, 3)), [0, 0, 1, 1], r"shape \(4, 3\)"),
        (np.diag([1.0, np.inf, 1.0, 1.0]), [0, 0, 1, 1], "NaN or infinite"),
        (np.eye(4), [0, 0, 0, 1], r"same number of components, got sizes \[3, 1\]"),
        (np.eye(4), [-1, -1, 0, 0], "same number of components"),
        (np.zeros((0, 0)), [], "same number of components"),
    ):
        refuses(message, group_components, gram, np.array(labels, dtype=np.int64))
    refuses(
        r"solver: unknown 'greedy'.*swap, paper",
        group_components,
        np.eye(4),
        contiguous(2, 2),
        solver="greedy",
    )


@pytest.mark.parametrize(("components", "num_experts"), [(6, 3), (8, 2), (8, 4), (9, 3), (10, 2)])
def test_swap_solver_finds_the_optimum_in_nearly_all_small_cases(components, num_experts):
    current = contiguous(num_experts, components // num_experts)
    optima = 0
    for seed in range(30):
        gradients = unit_gradients("random" if seed % 2 else "few dimensions", components, seed)
        labels = group_components(gradients @ gradients.T, current, seed=seed)
        objective = reference.objective(gradients, labels)
        best = reference.best_objective(gradients, num_experts)
        assert objective >= 0.97 * best
        optima += objective >= best - 1e-5
    assert optima >= 29


@given(st.sampled_from([(2, 4), (3, 3), (4, 2), (4, 3)]), _KIND, st.integers(0, 3), _SEED)
def test_no_single_swap_improves_the_result_of_the_swap_solver(shape, kind, restarts, seed):
    num_experts, size = shape
    gradients = unit_gradients(kind, num_experts * size, seed)
    labels = group_components(
        gradients @ gradients.T, contiguous(num_experts, size), restarts=restarts, seed=seed
    )
    assert reference.best_exchange(gradients, labels) <= 1e-6 * max(
        1.0, reference.objective(gradients, labels)
    )


def test_swap_solver_finds_planted_groups_where_the_papers_loop_is_stuck():
    stuck = 0
    bad = contiguous(8, 4)
    for seed in range(12):
        gradients, planted = planted_gradients(seed)
        gram = gradients @ gradients.T
        best = reference.objective(gradients, planted)
        assert reference.objective(gradients, bad) < 0.6 * best
        assert reference.objective(
            gradients, group_components(gram, bad, seed=seed)
        ) == pytest.approx(best)
        stuck += np.array_equal(
            grouping._until_stable(gram, bad, 8, grouping._polar_similarity), bad
        )
    assert stuck >= 4, (
        "expected the initial grouping to be a fixed point of the paper's loop for at least 4 seeds"
    )


@pytest.mark.parametrize("solver", ["swap", "paper"])
def test_both_solvers_find_planted_groups_of_noisy_gradients(solver):
    """At a cosine of about 0.2 within a group: nearly as little as in training."""
    current = contiguous(8, 4)
    for seed in range(12):
        gradients, planted = planted_gradients(seed, dimensions=500, noise=0.0894)
        best = reference.objective(gradients, planted)
        assert reference.objective(gradients, current) < 0.7 * best
        labels = group_components(gradients @ gradients.T, current, solver=solver, seed=seed)
        assert reference.objective(gradients, labels) >= 0.999 * best


@given(_NUM_EXPERTS, _SIZE, _KIND, _SEED)
def test_k_means_plus_plus_on_the_gram_equals_that_on_gradients(num_experts, size, kind, seed):
    gradients = unit_gradients(kind, num_experts * size, seed)
    # Exact distances: rounding of equal ones would lead to other draws.
    gradients = np.round(gradients * 64) / 64
    labels = grouping._k_means_plus_plus(
        gradients @ gradients.T, num_experts, np.random.default_rng(seed)
    )
    expected = reference.k_means_plus_plus(gradients, num_experts, np.random.default_rng(seed))
    assert np.array_equal(labels, expected)


@given(st.integers(1, 8), _SIZE, _SEED)
def test_k_means_plus_plus_has_a_seed_in_every_group_of_equal_gradients(num_experts, size, seed):
    gradients, planted = planted_gradients(seed, num_experts, size, noise=0)
    labels = grouping._k_means_plus_plus(
        gradients @ gradients.T, num_experts, np.random.default_rng(seed)
    )
    assert len(set(zip(labels, planted, strict=True))) == num_experts


@pytest.mark.parametrize(
    ("seed", "num_experts", "size", "scale"),
    [(32, 5, 1, 1e9), (85, 4, 1, 1e11), (336, 2, 4, 1e10), (360, 5, 4, 1e8)],
)
def test_swaps_terminate_on_ties_between_large_values(seed, num_experts, size, scale):
    rng = np.random.default_rng(seed)
    matrix = scale * rng.choice([-1.0, 1.0, 0.5, rng.standard_normal()], (num_experts * size,) * 2)
    # In a thread, so that an endless loop of swaps fails the test instead of blocking it.
    arguments = (matrix + matrix.T, contiguous(num_experts, size))
    thread = threading.Thread(
        target=group_components, args=arguments, kwargs={"seed": seed}, daemon=True
    )
    thread.start()
    thread.join(timeout=30)
    assert not thread.is_alive()


@pytest.mark.parametrize("seed", range(8))
def test_papers_loop_on_the_gram_equals_the_loop_on_gradients(seed):
    gradients, planted = planted_gradients(seed, num_experts=4, size=5, dimensions=30, noise=0.3)
    start = np.roll(planted, seed)
    start[:2] = start[2]  # k-means returns groups of unequal sizes
    labels = grouping._until_stable(gradients @ gradients.T, start, 4, grouping._polar_similarity)
    assert np.array_equal(labels, reference.polar_grouping(gradients, start, 4, 5))


@given(st.integers(1, 4), _SIZE, _SEED)
def test_matching_keeps_the_groups_and_maximises_the_overlap(num_experts, size, seed):
    rng = np.random.default_rng(seed)
    labels, current = (rng.permutation(contiguous(num_experts, size)) for _ in range(2))
    matched = grouping.match_labels(labels, current)
    assert np.array_equal(matched[:, None] == matched[None, :], labels[:, None] == labels[None, :])
    largest = max(
        sum(int(names[label] == present) for label, present in zip(labels, current, strict=True))
        for names in itertools.permutations(range(num_experts))
    )
    assert int((matched == current).sum()) == largest


def test_cosines_rounded_above_1_give_angles_of_0_and_180_degrees():
    over = np.float32(1.0 + 2e-7)
    gram = np.array(
        [[over, over, -over], [over, over, -over], [-over, -over, over]], dtype=np.float32
    )
    assert expert_angles(gram, np.array([0, 0, 1])) == (0.0, 180.0, 1.0, 1.0)


@given(_NUM_EXPERTS, _SIZE, _SEED)
def test_groups_in_order_do_not_depend_on_their_numbers(num_experts, size, seed):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(contiguous(num_experts, size))
    renamed = rng.permutation(num_experts)[labels]
    ordered = grouping.in_order(labels)
    assert (grouping.in_order(renamed) == ordered).all()
    assert ((ordered[:, None] == ordered) == (labels[:, None] == labels)).all()
    assert [*dict.fromkeys(ordered.tolist())] == [*range(num_experts)]

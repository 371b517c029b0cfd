"""Orthogonal updates against the formulas in ``reference``, and their guarantees for ΔW = B A."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from badit.method import inverse_root, no_moments, orthogonal_updates
from method.shards import in_processes

BETAS = (0.9, 0.98)
LR = 0.02

_SEED = st.integers(0, 2**32 - 1)
# N, I, O. With N as large as I or O, a step from B = 0 can make A almost zero; see the test of
# extreme problems.
_SHAPE = st.tuples(st.integers(1, 4), st.integers(7, 10), st.integers(7, 10))

# The initial B, from a random one: (O, N) -> (O, N).
_STARTS = {
    "random": lambda B: B,
    "zero": torch.zeros_like,
    "one component": lambda B: B * (torch.arange(B.shape[1]) == 0),
    "equal components": lambda B: B[:, :1].expand_as(B).clone(),
    "small": lambda B: B * 1e-12,
}
_GRADIENTS = {
    "random": lambda W, step: W,
    "zero": lambda W, step: torch.zeros_like(W),
    "zero at first": lambda W, step: W * (step > 1),
    "rank one": lambda W, step: W[:1] * torch.ones(len(W), 1, dtype=W.dtype),
    "huge": lambda W, step: W * 1e8,
    "tiny": lambda W, step: W * 1e-8,
}
_START = st.sampled_from(sorted(_STARTS))
_KIND = st.sampled_from(sorted(_GRADIENTS))


def problem(shape, seed, dtype=torch.float64, start="random", kind="random"):
    """Returns A (N, I), B (O, N) and the gradients (O, I) of ΔW at four steps."""
    components, in_features, out_features = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = (components, in_features), (out_features, components), (4, out_features, in_features)
    A, B, gradients = (
        torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes
    )
    steps = [_GRADIENTS[kind](gradient, step) for step, gradient in enumerate(gradients)]
    return A, _STARTS[start](B), torch.stack(steps)


def train(A, B, gradients, **options):
    """Returns A and B after every step.

    ``gradients`` are gradients of ΔW, or functions of A and B that return them.
    """
    moments = no_moments(A), no_moments(B.mT)
    steps = []
    for gradient in gradients:
        gradient = gradient(A, B) if callable(gradient) else gradient
        of_A = B.mT @ gradient
        of_B = (gradient @ A.mT).mT
        (up_A, up_B), moments = orthogonal_updates(
            (A, B.mT), (of_A, of_B), moments, lr=LR, betas=BETAS, **options
        )
        A = A - LR * up_A
        B = B - LR * up_B.mT
        steps.append((A, B))
    return steps


@given(_SHAPE, _SEED, _START, _KIND)
def test_steps_equal_the_reference(shape, seed, start, kind):
    A, B, gradients = problem(shape, seed, start=start, kind=kind)
    reference_factors = reference.OrthogonalFactor(), reference.OrthogonalFactor()
    a = reference.float64(A)
    b = reference.float64(B)
    for gradient, (found_A, found_B) in zip(gradients, train(A, B, gradients), strict=True):
        gradient = gradient.numpy()
        a, b = reference.orthogonal_step(
            a, b, b.T @ gradient, gradient @ a.T, *reference_factors, LR, BETAS
        )
        # If B is nearly singular, A moves far, and rounding errors are relative to its size.
        np.testing.assert_allclose(found_A, a, rtol=1e-5, atol=1e-6 * max(1.0, np.abs(a).max()))
        np.testing.assert_allclose(found_B, b, rtol=1e-5, atol=1e-6 * max(1.0, np.abs(b).max()))


@given(
    st.tuples(*[st.integers(1, 6)] * 3),
    _SEED,
    st.sampled_from([torch.float32, torch.float64]),
    _START,
    _KIND,
)
def test_factors_of_extreme_problems_stay_finite(shape, seed, dtype, start, kind):
    """More components than features, factors near zero, gradients of rank one."""
    trained = train(*problem(shape, seed, dtype, start, kind))
    assert all(factor.isfinite().all() for factors in trained for factor in factors)


def test_stacked_float32_layers_equal_separate_float64_layers():
    problems = [problem((4, 9, 7), seed, torch.float32) for seed in range(3)]
    A, B, gradients = (torch.stack(tensors) for tensors in zip(*problems, strict=True))
    B[1] = 0
    together = train(A, B, gradients.transpose(0, 1))
    for layer in range(3):
        alone = train(A[layer].double(), B[layer].double(), gradients[layer].double())
        for (a, b), expected in zip(together, alone, strict=True):
            assert a.dtype == b.dtype == torch.float32
            torch.testing.assert_close(
                (a[layer].double(), b[layer].double()), expected, rtol=0, atol=2e-5
            )


@given(_SHAPE, _SEED, st.booleans(), st.floats(0, 1), st.booleans())
def test_products_do_not_depend_on_the_factorisation(
    shape, seed, starts_at_zero, spread, has_default_floor
):
    components = shape[0]
    A, B, targets = problem(shape, seed)
    B = B * (not starts_at_zero)
    generator = torch.Generator().manual_seed(seed)
    left_factor, right = torch.linalg.qr(
        torch.randn(2, components, components, generator=generator, dtype=torch.float64)
    ).Q
    floor, spread, error = (1e-6, spread / 2, 1e-3) if has_default_floor else (1e-14, spread, 1e-5)
    R = (
        left_factor
        @ torch.diag(torch.logspace(-spread, spread, components, dtype=torch.float64))
        @ right
    )
    # Gradients of losses that depend on the product only: ‖ΔW − T‖² / 2.
    losses = [lambda A, B, target=target: B @ A - target for target in targets]
    starts = (A, B), (R @ A, B @ torch.linalg.inv(R))
    products = ([b @ a for a, b in train(*start, losses, floor=floor)] for start in starts)
    for product, other in zip(*products, strict=True):
        torch.testing.assert_close(
            other, product, rtol=0, atol=error * (float(product.abs().max()) + 1)
        )


@given(st.integers(1, 5), _SEED, st.floats(0, 1))
def test_components_move_in_orthogonal_directions_of_limited_length(components, seed, lr):
    A, B, (gradient, *_) = problem((components, 12, 15), seed)
    moments = no_moments(A), no_moments(B.mT)

    def updates(sizes=1.0, **options):
        return orthogonal_updates(
            (A, B.mT), (B.mT @ gradient * sizes, A @ gradient.mT), moments, **options
        )[0]

    # In the other factor's frame, updates are orthogonal and as long as Adam's: √D for D entries of
    # about 1.
    for other, update in zip((B.mT, A), updates(lr=1e-4, floor=1e-12), strict=True):
        frame = torch.linalg.solve_triangular(
            torch.linalg.cholesky(other @ other.mT), other, upper=False
        )
        # From the change of ΔW, or of its transpose.
        in_frame = frame @ other.mT @ update
        length = update.shape[-1]
        expected = length * torch.eye(components, dtype=A.dtype)
        torch.testing.assert_close(in_frame @ in_frame.mT, expected, rtol=0, atol=1e-4 * length)
    # The scale of a feature's gradients does not change A's update.
    sizes = torch.logspace(-2, 2, 12, dtype=torch.float64)
    torch.testing.assert_close(updates(sizes, lr=LR)[0], updates(lr=LR)[0], rtol=1e-5, atol=1e-6)
    # A's update changes the product by at most a tenth.
    assert lr * (B @ updates(lr=lr, floor=1e-12)[0]).norm() <= 0.101 * (B @ A).norm()


def test_zero_b_delays_a_by_one_step_and_zero_a_stays_zero():
    A, B, gradients = problem((3, 6, 5), 0, start="zero")
    torch.testing.assert_close(train(A, B, 0 * gradients)[-1], (A, B), rtol=0, atol=0)
    after_one, after_two = train(A, B, gradients[:2])
    assert torch.equal(after_one[0], A), "A must not move while B = 0 gives no frame"
    assert after_one[1].abs().max() > 0
    assert not torch.equal(after_two[0], A)
    dead = torch.zeros_like(A)
    torch.testing.assert_close(train(dead, B, gradients)[-1], (dead, B), rtol=0, atol=0)


@given(
    st.integers(1, 8),
    st.integers(0, 8),
    _SEED,
    st.integers(-25, 25),
    st.sampled_from([1e-9, 1e-6, 1e-3]),
)
def test_inverse_root_equals_the_eigendecomposition(size, rank, seed, exponent, floor):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, size, rank, generator=generator, dtype=torch.float64)
    grams = 10.0**exponent * (x @ x.mT)
    for gram, root in zip(grams, inverse_root(grams, floor), strict=True):
        expected = reference.power(gram, -0.5, floor)
        np.testing.assert_allclose(
            root, expected, rtol=0, atol=1e-5 * max(np.abs(expected).max(), 1e-30)
        )
    # A matrix without a root is treated as its norm times 1.
    negative = torch.diag(torch.tensor([3.0, -4.0], dtype=torch.float64))
    torch.testing.assert_close(
        inverse_root(negative), torch.eye(2).double() / 5**0.5, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1.0, 1e12])
def test_steps_do_not_depend_on_the_scale_of_the_loss(scale):
    A, B, gradients = problem((4, 30, 20), 0, torch.float32)
    for scaled, expected in zip(
        train(A, B, gradients * scale), train(A, B, gradients), strict=True
    ):
        torch.testing.assert_close(scaled, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("count", [2, 3])
def test_sharded_updates_equal_unsharded_updates(count):
    A, B, gradients = problem((4, 7, 9), 0)
    steps = [(B.mT @ gradient, A @ gradient.mT) for gradient in gradients[:3]]

    def trained(count=1, rank=0, **options):
        def part(rows):
            return rows.tensor_split(count, dim=-1)[rank]

        rows = part(A), part(B.mT)
        moments = tuple(map(no_moments, rows))
        for step in steps:
            updates, moments = orthogonal_updates(
                rows, tuple(map(part, step)), moments, lr=LR, betas=BETAS, **options
            )
            rows = tuple(factor - LR * update for factor, update in zip(rows, updates, strict=True))
        return rows

    sharded = in_processes(
        count, lambda rank, sums: trained(count, rank, lengths=(7, 9), over_shards=sums)
    )
    gathered = tuple(torch.cat(shards, dim=-1) for shards in zip(*sharded, strict=True))
    torch.testing.assert_close(gathered, trained(), rtol=0, atol=1e-9)

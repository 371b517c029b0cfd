"""BAD: triples, factors and compression against numpy's SVD; the randomised method's tolerance."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from badit.method import decomposition, expert_factors, top_singular_triples
from badit.method.decomposition import compress
from refusals import refuses

_SEED = st.integers(0, 2**32 - 1)
_EPS = torch.finfo(torch.float32).eps

# n singular values in descending order.
_SPECTRA = {
    "flat": lambda n: np.ones(n),
    "nearly flat": lambda n: np.linspace(1.0, 0.9, n),
    "slow": lambda n: 1 / np.sqrt(np.arange(1, n + 1)),
    "steep": lambda n: 2.0 ** -np.arange(n),
    "clustered": lambda n: 0.8 ** (np.arange(n) // 6),
    "outlier": lambda n: np.concatenate([[1e4], np.linspace(1.0, 0.8, n - 1)]),
    "rank deficient": lambda n: np.where(np.arange(n) < 9, 1.0 - np.arange(n) / 20, 0.0),
    "rank one": lambda n: np.where(np.arange(n) < 1, 1.0, 0.0),
    "zero": lambda n: np.zeros(n),
}


def weight_of(singular_values, shape):
    """Returns a float32 weight with these singular values and random singular vectors."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((size, min(shape))))[0] for size in shape)
    return torch.tensor((u * singular_values) @ v.T, dtype=torch.float32)


def gaussian(shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def residuals(weight, triples):
    """Returns ‖W v − σ u‖ and ‖Wᵀ u − σ v‖ of every triple, in float64."""
    W, u, s, vh = (reference.float64(tensor) for tensor in (weight, *triples))
    return np.linalg.norm(W @ vh.T - u * s, axis=0), np.linalg.norm(W.T @ u - vh.T * s, axis=0)


def assert_orthonormal(triples):
    identity = np.eye(len(triples.s_N))
    np.testing.assert_allclose(triples.u_ON.T @ triples.u_ON, identity, atol=1e-5)
    np.testing.assert_allclose(triples.vh_NI @ triples.vh_NI.T, identity, atol=1e-5)


@given(st.integers(1, 20), st.integers(1, 20), st.data())
def test_exact_triples_equal_numpys_svd(rows, columns, data):
    rank = data.draw(st.integers(1, min(rows, columns)))
    seed = data.draw(_SEED)
    weight = gaussian((rows, columns), seed)
    triples = top_singular_triples(weight, rank, method="exact")
    u, s, vh = reference.singular_triples(weight, rank)
    assert (triples.u_ON.shape, triples.vh_NI.shape) == (u.shape, vh.shape)
    np.testing.assert_allclose(triples.s_N, s, atol=1e-5 * s[0])
    assert_orthonormal(triples)
    np.testing.assert_allclose(residuals(weight, triples), 0.0, atol=1e-5 * s[0])


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (70, 70)])
@pytest.mark.parametrize("smallest", [1.0, 2e-4, 5e-5, 0.0])
def test_exact_triples_are_accurate_for_small_singular_values(shape, smallest):
    spectrum = np.append(
        np.geomspace(1.0, max(smallest, 1e-3), 7), [smallest] + [smallest / 2] * (min(shape) - 8)
    )
    weight = weight_of(spectrum, shape)
    triples = top_singular_triples(weight, 8, method="exact")
    # Rounding the weight to float32 already changes its singular values by about this much.
    np.testing.assert_allclose(triples.s_N, spectrum[:8], atol=5e-7)
    assert_orthonormal(triples)
    np.testing.assert_allclose(residuals(weight, triples), 0.0, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
@pytest.mark.parametrize("shape", [(150, 230), (230, 150)])
@pytest.mark.parametrize("spectrum", sorted(_SPECTRA))
def test_every_randomised_triple_is_within_the_tolerance(spectrum, shape, scale):
    weight = weight_of(_SPECTRA[spectrum](min(shape)), shape) * scale
    rank = 16
    tolerance = 1e-3
    triples = top_singular_triples(weight, rank, method="randomized", tolerance=tolerance)
    (residual, _) = residuals(weight, triples)
    s = reference.float64(triples.s_N)
    # Below float32's resolution of the largest σ, directions are noise and relative residuals are
    # meaningless.
    noise = 2 * _EPS * max(shape) ** 0.5 * s[0]
    assert (residual <= np.maximum(1.001 * tolerance * s, noise)).all()
    assert_orthonormal(triples)
    assert (np.diff(s) <= 0).all()
    np.testing.assert_allclose(
        s, scale * _SPECTRA[spectrum](min(shape))[:rank], rtol=2 * tolerance, atol=noise
    )


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_restarted_iteration_converges_to_the_exact_singular_values(monkeypatch, blocks):
    weight = gaussian((200, 300), seed=3)
    monkeypatch.setattr(decomposition, "_MAX_BLOCKS", blocks)
    monkeypatch.setattr(decomposition, "_exact_svd", lambda *_: pytest.fail("gave up"))
    triples = top_singular_triples(weight, 12, method="randomized", tolerance=1e-4)
    assert (residuals(weight, triples)[0] / reference.float64(triples.s_N)).max() <= 1.01e-4
    np.testing.assert_allclose(triples.s_N, reference.singular_triples(weight, 12)[1], rtol=1e-5)
    assert_orthonormal(triples)


@pytest.mark.parametrize("scale", [2.0**-100, 1.0, 2.0**100])
def test_exact_triples_are_returned_when_the_passes_run_out(monkeypatch, scale):
    monkeypatch.setattr(decomposition, "_MAX_PASSES", 1)
    weight = gaussian((80, 100))
    triples = top_singular_triples(weight * scale, 5, method="randomized")
    exact = top_singular_triples(weight, 5, method="exact")
    torch.testing.assert_close(triples, exact._replace(s_N=exact.s_N * scale))


def test_randomised_triples_depend_on_the_seed_argument_only():
    weight = gaussian((120, 160))
    state = torch.get_rng_state()
    first, again, other = (
        top_singular_triples(weight, 8, method="randomized", seed=seed) for seed in (5, 5, 6)
    )
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert not torch.equal(first.u_ON, other.u_ON)
    torch.testing.assert_close(first.s_N, other.s_N, rtol=1e-3, atol=0)


def test_auto_iterates_only_if_both_dimensions_are_large(monkeypatch):
    monkeypatch.setattr(decomposition, "_EXACT_UP_TO", 32)
    options = [{"method": option, "tolerance": 1e-1} for option in ("auto", "exact", "randomized")]
    cases = [
        (32, 90, 4, "exact"),
        (90, 32, 4, "exact"),
        (80, 90, 20, "exact"),
        (80, 90, 4, "randomized"),
    ]
    for *shape, rank, method in cases:
        auto, exact, iterated = (
            top_singular_triples(gaussian(shape), rank, **option).u_ON for option in options
        )
        assert not torch.equal(exact, iterated)
        assert torch.equal(auto, exact if method == "exact" else iterated)


@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_triples_are_float32_for_any_weight_dtype(dtype, method):
    weight = gaussian((50, 40)).to(dtype).requires_grad_()
    triples = top_singular_triples(weight, 6, method=method)
    assert {(tensor.dtype, tensor.requires_grad) for tensor in triples} == {(torch.float32, False)}
    torch.testing.assert_close(
        triples, top_singular_triples(weight.detach().float(), 6, method=method), rtol=0, atol=0
    )


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_largest_entry_of_every_u_is_positive(method):
    weight = weight_of(_SPECTRA["slow"](50), (50, 70))
    triples = top_singular_triples(weight, 8, method=method, tolerance=1e-5)
    assert (triples.u_ON.gather(0, triples.u_ON.abs().argmax(dim=0, keepdim=True)) > 0).all()
    mirrored = top_singular_triples(-weight, 8, method=method, tolerance=1e-5)
    torch.testing.assert_close(mirrored.u_ON, triples.u_ON, rtol=0, atol=1e-4)
    torch.testing.assert_close(mirrored.vh_NI, -triples.vh_NI, rtol=0, atol=1e-4)


def test_invalid_weights_ranks_and_methods_are_refused():
    for weight, options, message in (
        (torch.ones(4), {}, r"only a 2-D weight can be decomposed, got one of shape \(4,\)"),
        (
            torch.ones(4, 9),
            {"rank": 5},
            r"num_experts × r = 5 .* \(4, 9\): at most 4 exist; lower num_experts or r",
        ),
        (torch.ones(4, 9), {"rank": 0}, "num_experts × r = 0"),
        (
            torch.ones(40, 90).masked_fill(torch.arange(90) == 50, float("nan")),
            {},
            "NaN or infinite",
        ),
        (torch.diag(torch.tensor([1.0, float("inf")])), {"rank": 1}, "NaN or infinite"),
        (
            torch.ones(4, 9),
            {"method": "lanczos"},
            "svd_method: unknown 'lanczos'; known: auto, exact, randomized",
        ),
    ):
        refuses(message, top_singular_triples, weight, **{"rank": 2, **options})


@given(st.integers(1, 4), st.integers(1, 3), st.floats(1e-3, 1e3), _SEED)
def test_factors_split_the_singular_values_as_in_the_paper(num_experts, r, scaling, seed):
    weight = gaussian((14, 17), seed)
    rank = num_experts * r
    factor_A, factor_B = expert_factors(top_singular_triples(weight, rank), scaling)
    u, s, vh = reference.singular_triples(weight, rank)
    np.testing.assert_allclose(scaling * (factor_B @ factor_A), (u * s) @ vh, atol=2e-5 * s[0])
    np.testing.assert_allclose(factor_A.norm(dim=1), np.sqrt(s / scaling), rtol=1e-4)
    np.testing.assert_allclose(factor_B.norm(dim=0), np.sqrt(s / scaling), rtol=1e-4)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 6), st.integers(1, 9), _SEED)
def test_compress_returns_the_closest_product_and_the_error_norm(
    rows, columns, rank, smaller, seed
):
    a = gaussian((rank, columns), seed).double()
    b = gaussian((rows, rank), seed + 1).double() * (seed % 9 > 0)
    a_PI, b_OP, lost, norm = compress(a, b, smaller)
    assert (a_PI.shape, b_OP.shape) == ((smaller, columns), (rows, smaller))
    product = reference.float64(b @ a)
    expected = reference.closest_of_rank(b @ a, smaller)
    np.testing.assert_allclose(b_OP.double() @ a_PI.double(), expected, atol=1e-5)
    np.testing.assert_allclose(lost, np.linalg.norm(product - expected), atol=1e-9)
    np.testing.assert_allclose(norm, np.linalg.norm(product), atol=1e-9)

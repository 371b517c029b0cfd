"""Inner products of long vectors from short sketches of them: a count sketch (Charikar et al. 2002, "Finding Frequent
Items in Data Streams"; for inner products, Weinberger et al. 2009, arXiv 0902.2206).

Coordinate i goes with a sign σ(i) to the bucket h(i) of M:

    (S a)_b = Σ_{h(i) = b} σ(i) a_i,    E⟨S a, S b⟩ = ⟨a, b⟩,    Var⟨S a, S b⟩ ≲ (‖a‖² ‖b‖² + ⟨a, b⟩²) / M;

sketches of sums are sums of sketches, and the cosine of two sketches has a standard error of about (1 − cos²) / √M. An
h and σ drawn for each coordinate would take more memory than the vector. Here it is cut into runs c of M coordinates p:

    h(c, p) = (p + shift_c) mod M,    σ(c, p) = s_p t_c,

with random signs s and t and random shifts, all different. Within a run nothing meets; what meets between two runs has
the signs t_c t_d, which make the estimate unbiased, and s_p s_q with p ≠ q, under which no two meetings are correlated
(but for a shift of M / 2). So coordinates of two runs meet as rarely and cancel as well as under independent hashing,
whatever structure the vector has; without the shifts, strong columns of a matrix could share a few buckets.

Shape suffixes: N = coordinates, R = vectors, M = buckets.
"""

from __future__ import annotations

import torch


class SketchedSums:
    """Sums of vectors (N), kept as sketches; a vector of at most ``size`` coordinates is kept as it is.

    Args:
        length: N.
        sums: how many sums are kept apart, R.
        size: M.
        generator: on the CPU, where h and σ come from; they are the same for all sums.
        device: where the vectors are.
    """

    def __init__(
        self, length: int, sums: int, size: int, generator: torch.Generator, device: torch.device | None = None
    ) -> None:
        self.sums_RM = torch.zeros(sums, min(length, size), device=device)
        self._exact = length <= size
        if not self._exact:
            runs = -(-length // size)
            # Past M runs, shifts repeat; a vector has as many from some 268 million coordinates on, at M = 16384.
            self._shifts = torch.randperm(size, generator=generator).repeat(-(-runs // size))[:runs].tolist()
            self._run_signs = _signs(runs, generator).tolist()
            self._signs_M = _signs(size, generator).to(self.sums_RM)

    def add(self, index: int, vector_N: torch.Tensor) -> None:
        """Adds a vector, of any floating type, to one of the sums."""
        vector_N = vector_N.float()
        if self._exact:
            self.sums_RM[index] += vector_N
            return
        # Two rounds of buckets, so that a shifted run lies in one piece; then the second is laid upon the first.
        size = len(self._signs_M)
        buckets = self._signs_M.new_zeros(2 * size)
        for run, shift, sign in zip(vector_N.split(size), self._shifts, self._run_signs, strict=True):
            buckets[shift : shift + len(run)].addcmul_(run, self._signs_M[: len(run)], value=sign)
        self.sums_RM[index] += buckets[:size] + buckets[size:]

    def gram(self) -> torch.Tensor:
        """Estimates (R, R) of the sums' inner products, in float64 on the CPU."""
        sums_RM = self.sums_RM.cpu().double()
        return sums_RM @ sums_RM.T


def _signs(count: int, generator: torch.Generator) -> torch.Tensor:
    return 2 * torch.randint(2, (count,), generator=generator) - 1

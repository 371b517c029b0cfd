"""Count sketches of gradients (Charikar et al. 2002, "Finding Frequent Items in Data Streams").

For inner products, see Weinberger et al. 2009, arXiv 0902.2206. Coordinate i is added, with sign
σ(i), to bucket h(i) of M buckets:

    (S a)_b = Σ_{h(i) = b} σ(i) a_i,    E⟨S a, S b⟩ = ⟨a, b⟩,
    Var⟨S a, S b⟩ ≲ (‖a‖² ‖b‖² + ⟨a, b⟩²) / M.

To save memory, the vector is cut into runs c of M coordinates p, with random signs s and t and
random shifts: h(c, p) = (p + shift_c) mod M, σ(c, p) = s_p t_c. Coordinates of one run never share
a bucket. Those of two runs share one as rarely as with independent hashing, and the signs make the
estimate unbiased.

Shape suffixes: N = coordinates, M = buckets, R = sums.
"""

from typing import Any

import torch


class SketchedSums:
    """Sums of vectors (N = length), each a sketch of at most M = size numbers.

    If N is at most M, they are exact.
    """

    def __init__(
        self, length: int, sums: int, size: int, generator: torch.Generator, device: Any = None
    ) -> None:
        self.sums_RM = torch.zeros(sums, min(length, size), device=device)
        self._signs_M = torch.ones_like(self.sums_RM[0])
        self._shifts = [0]
        self._run_signs = [1]
        if length > size:
            runs = -(-length // size)
            # The shifts repeat after M runs, which are 268 million coordinates for M = 16384.
            repeats = -(-runs // size)
            shifts = torch.randperm(size, generator=generator).repeat(repeats)
            self._shifts = shifts[:runs].tolist()
            self._run_signs = random_signs(runs, generator).tolist()
            self._signs_M = random_signs(size, generator).to(self.sums_RM)

    def add(self, index: int, vector_N: torch.Tensor) -> torch.Tensor:
        """Adds a float32 vector to the sum with this index, and returns the vector's sketch (M)."""
        size = len(self._signs_M)
        # 2 M buckets, so that a shifted run is contiguous. Then the second half is added to the
        # first.
        buckets = self._signs_M.new_zeros(2 * size)
        runs = zip(vector_N.split(size), self._shifts, self._run_signs, strict=True)
        for run, shift, sign in runs:
            buckets[shift : shift + len(run)].addcmul_(run, self._signs_M[: len(run)], value=sign)
        sketch_M = buckets[:size] + buckets[size:]
        self.sums_RM[index] += sketch_M
        return sketch_M

    def gram(self) -> torch.Tensor:
        """Returns estimates (R, R) of the sums' inner products, in float64 on the CPU."""
        sums_RM = self.sums_RM.cpu().double()
        return sums_RM @ sums_RM.T


def random_signs(count: int, generator: torch.Generator) -> torch.Tensor:
    """Returns random numbers of 1 and −1."""
    return 2 * torch.randint(2, (count,), generator=generator) - 1

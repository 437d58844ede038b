"""``tucker2``: a k x k convolution as 1x1 C -> r_in, k x k r_in -> r_out, 1x1 r_out -> T (Kim et al. 2016, 1511.06530).

W ≈ G x_out U x_in A. Plain: truncated HOSVD, then HOOI. With the covariance S of the input patches: U starts from the
principal components of the layer's output, A from the Kronecker approximation of S in ``tdcompile.inputmap``, and the
core G is their least-squares fit in the metric of S. Then A (by conjugate gradients), G and U (in closed form) take
turns, each step a descent of ‖(W−W̃)S^½‖_F. A is gauged orthonormal, and what that changes goes into G (this project's
completion).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tdcompile.core.decomposition import Decomposition, Kernel
from tdcompile.core.rank_space import grid
from tdcompile.ir.layer import Layer, Ranks
from tdcompile.numerics.covariance import Covariance
from tdcompile.numerics.input_basis import core_of, input_map, refine, regress, residuals
from tdcompile.numerics.low_rank import balance, leading, left_vectors, operands, unfold
from tdcompile.passes.decompose._chain_layers import point_in, point_out

# Candidates for each of the two ranks: their product is what selectors have to look through.
LEVELS = 20
# Conjugate-gradient steps on the input map in one sweep: the core changes next, so more would chase a moving target.
STEPS = 3


@dataclass(frozen=True)
class Tucker2(Decomposition):
    """1x1 to r_in, k x k to r_out, 1x1 to T; ranks (r_out, r_in).

    Attributes:
        sweeps: alternations after the closed-form start.
    """

    name: ClassVar[str] = "tucker2"
    kernels: ClassVar[Kernel] = Kernel.SEVERAL_TAPS
    transposed: ClassVar[bool] = True
    modes: ClassVar[tuple[str, ...]] = ("out", "in")
    sweeps: int = 3

    def exact_ranks(self, layer: Layer) -> Ranks:
        """The ranks of the two unfoldings, min(T, CK) and min(C, TK)."""
        inputs, outputs, taps = layer.in_channels, layer.out_channels, layer.taps
        return min(outputs, inputs * taps), min(inputs, outputs * taps)

    def rank_space(self, layer: Layer, grain: int) -> Sequence[Ranks]:
        """Pairs on the grain, at most ``LEVELS`` a mode, that are cheaper than the layer, and the exact pair.

        A rank above K times the other one is never reached by the core's own unfolding, so such pairs are left out.
        """
        exact = self.exact_ranks(layer)
        outs, ins = (grid(full, grain * math.ceil(full / grain / LEVELS)) for full in exact)
        pairs = [(o, i) for o in outs for i in ins if o <= layer.taps * i and i <= layer.taps * o and (o, i) != exact]
        priced = sorted((self.macs(layer, pair), pair) for pair in pairs)
        return [*(pair for macs, pair in priced if macs < layer.macs), exact]

    def blueprint(self, layer: Layer, ranks: Ranks) -> tuple[Layer, ...]:
        """The 1x1 on the input, the layer between the ranks, the 1x1 on its output."""
        rank_out, rank_in = ranks
        core = replace(layer, in_channels=rank_in, out_channels=rank_out, bias=False)
        return point_in(layer, rank_in), core, point_out(layer, rank_out)

    def factorize(self, layer: Layer, weight: Tensor, ranks: Ranks, covariance: Covariance) -> tuple[Tensor, ...]:
        """``(r_in, C, 1, ...)``, ``(r_out, r_in, *kernel)``, ``(T, r_out, 1, ...)``; the outer two orthonormal."""
        flat, covariance = operands(weight, covariance, weight[0].numel())
        rank_out, rank_in = ranks
        left = leading(flat, covariance, rank_out)
        basis = input_map(left.T @ flat, covariance, layer.taps, rank_in)
        for _ in range(0 if ranks == self.exact_ranks(layer) else self.sweeps):
            explained, equations = regress(flat, covariance, basis)
            left = left_vectors(explained, rank_out)
            rows = left.T @ flat
            if covariance.is_identity:
                basis = input_map(rows, covariance, layer.taps, rank_in)
            else:
                basis = refine(rows, covariance, equations.settle(left.T @ explained), basis, STEPS)
        factors = balance((basis.T, core_of(left.T @ flat, covariance, basis), left))
        return self.shaped(layer, ranks, factors, weight.dtype)

    def reconstruct(self, layer: Layer, factors: Sequence[Tensor]) -> Tensor:
        """The core between the two maps."""
        first, core, last = factors
        product = torch.einsum("ic,oik,to->tck", first.flatten(1), core.flatten(2), last.flatten(1))
        return product.reshape(layer.weight_shape)

    def errors(self, layer: Layer, weight: Tensor, space: Sequence[Ranks], covariance: Covariance) -> Sequence[float]:
        """Those of the closed-form start, all pairs from nested bases and one core; 0 at the exact ranks.

        What the sweeps gain is not in it: a bound from above, by 0.005 as a rule, by up to 0.04 at the lowest ranks.
        """
        flat, covariance = operands(weight, covariance, weight[0].numel())
        exact = self.exact_ranks(layer)
        rows = leading(flat, covariance, exact[0]).T @ flat
        outs, ins = (sorted(set(levels)) for levels in zip(*space, strict=True))
        if covariance.is_identity:
            gained = _captured(rows.reshape(len(rows), layer.in_channels, -1), outs, ins)
            whole = rows.square().sum().double()
        else:
            lost = residuals(rows, covariance, input_map(flat, covariance, layer.taps, ins[-1]), [0, *ins]).double()
            gained, whole = (lost[:, :1] - lost[:, 1:]).cumsum(0)[[rank - 1 for rank in outs]], lost[:, 0].sum()
        if not whole > 0:  # an output that is always zero is lost by no rank
            return [0.0] * len(space)
        table = (1 - gained / whole).clamp(min=0).sqrt()
        known: dict[Ranks, float] = {
            (o, i): float(table[row, column]) for row, o in enumerate(outs) for column, i in enumerate(ins)
        }
        return [0.0 if ranks == exact else known[ranks] for ranks in space]


def _captured(rows: Tensor, outs: Sequence[int], ins: Sequence[int]) -> Tensor:
    """Energy that the best r_in inputs keep of the first r_out rows, ``(outs, ins)``; ``rows`` is ``(T, C, K)``."""
    gram, start, found = rows.new_zeros(rows.shape[1], rows.shape[1]), 0, []
    for stop in outs:
        block = unfold(rows[start:stop], 1)
        gram, start = gram + block @ block.T, stop
        spectrum: Tensor = torch.linalg.eigvalsh(gram)
        found.append(spectrum.flip(0).cumsum(0)[[rank - 1 for rank in ins]])
    return torch.stack(found).double()

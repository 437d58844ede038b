"""``tucker2``: a k x k convolution as 1x1 C -> r_in, k x k r_in -> r_out, 1x1 r_out -> T (Kim et al. 2016, 1511.06530).

W ≈ G x_out U x_in A. Without data: truncated HOSVD, then HOOI. With the covariance S of the input patches, U starts
from the principal components of the layer's output and A from the Kronecker approximation of S
(``numerics.input_basis``); the core G is their least-squares fit in the metric of S. Then A (by conjugate gradients), G
and U (in closed form) are updated in alternation; each step decreases ‖(W−W̃)S^½‖_F. A is kept orthonormal, and G
absorbs the change of basis (this project's completion).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tdcompile.core.decomposition import Decomposition, Kernel
from tdcompile.core.rank_space import grid
from tdcompile.ir.layer import Layer, Ranks
from tdcompile.numerics.covariance import Covariance
from tdcompile.numerics.input_basis import core_of, input_map, refine, regress, residuals
from tdcompile.numerics.low_rank import balance, leading, left_vectors, operands, unfold
from tdcompile.passes.decompose._chain_layers import point_in, point_out

LEVELS = 20  # candidates for each of the two ranks; a selector searches their product
STEPS = 3  # of conjugate gradients on the input map in one sweep; few, because the core changes next


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
    sweeps: Annotated[int, Field(ge=0)] = 3

    def exact_ranks(self, layer: Layer) -> Ranks:
        """Return the ranks of the two unfoldings, min(T, CK) and min(C, TK)."""
        inputs, outputs, taps = layer.in_channels, layer.out_channels, layer.taps
        return min(outputs, inputs * taps), min(inputs, outputs * taps)

    def rank_space(self, layer: Layer, grain: int) -> Sequence[Ranks]:
        """Return pairs on the grain, at most ``LEVELS`` a mode, that save MACs, and the exact pair.

        The unfoldings of the core cannot have a rank above K times the other one, so such pairs are left out.
        """
        exact = self.exact_ranks(layer)
        outs, ins = (grid(full, grain * math.ceil(full / grain / LEVELS)) for full in exact)
        pairs = [(o, i) for o in outs for i in ins if o <= layer.taps * i and i <= layer.taps * o and (o, i) != exact]
        priced = sorted((self.macs(layer, pair), pair) for pair in pairs)
        return [*(pair for macs, pair in priced if macs < layer.macs), exact]

    def blueprint(self, layer: Layer, ranks: Ranks) -> tuple[Layer, ...]:
        """Return the 1x1 on the input, the layer between the ranks, the 1x1 on its output."""
        rank_out, rank_in = ranks
        core = replace(layer, in_channels=rank_in, out_channels=rank_out, bias=False)
        return point_in(layer, rank_in), core, point_out(layer, rank_out)

    def factorize(self, layer: Layer, weight: Tensor, ranks: Ranks, covariance: Covariance) -> tuple[Tensor, ...]:
        """Return ``(r_in, C, 1, ...)``, ``(r_out, r_in, *kernel)``, ``(T, r_out, 1, ...)``; both ends orthonormal."""
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
        """Return the product of the core and the two maps."""
        first, core, last = factors
        product = torch.einsum("ic,oik,to->tck", first.flatten(1), core.flatten(2), last.flatten(1))
        return product.reshape(layer.weight_shape)

    def errors(self, layer: Layer, weight: Tensor, space: Sequence[Ranks], covariance: Covariance) -> Sequence[float]:
        """Return the errors of the closed-form start, for all pairs from nested bases and one core; 0 if exact.

        They do not include the gain of the sweeps: an upper bound, by 0.005 as a rule, by up to 0.04 at the lowest
        ranks.
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
        if not whole > 0:  # the output is always zero: no rank has an error
            return [0.0] * len(space)
        table = (1 - gained / whole).clamp(min=0).sqrt()
        known: dict[Ranks, float] = {
            (o, i): float(table[row, column]) for row, o in enumerate(outs) for column, i in enumerate(ins)
        }
        return [0.0 if ranks == exact else known[ranks] for ranks in space]


def _captured(rows: Tensor, outs: Sequence[int], ins: Sequence[int]) -> Tensor:
    """Return the energy of the first r_out rows ``(T, C, K)`` in their best r_in inputs, as ``(outs, ins)``."""
    gram, start, found = rows.new_zeros(rows.shape[1], rows.shape[1]), 0, []
    for stop in outs:
        block = unfold(rows[start:stop], 1)
        gram, start = gram + block @ block.T, stop
        spectrum: Tensor = torch.linalg.eigvalsh(gram)
        found.append(spectrum.flip(0).cumsum(0)[[rank - 1 for rank in ins]])
    return torch.stack(found).double()

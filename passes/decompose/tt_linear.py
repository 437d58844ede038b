"""``tt-linear``: a linear layer as a chain of small ones over its features split into modes (a TT-matrix)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from tdcompile.core.decomposition import Decomposition
from tdcompile.ir.diagnostics import Reason, ReasonCode
from tdcompile.ir.layer import Layer, LayerKind, Ranks
from tdcompile.ir.saved_classes import saved_as
from tdcompile.numerics.cholesky import cholesky, ridge
from tdcompile.numerics.covariance import Covariance
from tdcompile.numerics.low_rank import energy
from tdcompile.numerics.output_error import OutputMetric
from tdcompile.numerics.tensor_train import precise_in, share_bond, tt_compose, tt_svd
from tdcompile.passes.decompose._error_estimates import anchored, spread, train_bounds
from tdcompile.planning.rank_grid import train_space

MEMBERS = 12  # proposed ranks beside the exact ones
ANCHORS = 4  # ranks that are factorised for an estimate
UNSURE = 0.1  # share by which an error corrected at one rank may be too high at another


@dataclass(frozen=True)
class TTLinear(Decomposition):
    """TT-matrix of a linear layer, ``cores`` small matrices (Novikov et al. 2015, eq. 4).

    With t = (t1, ..., td) and c = (c1, ..., cd): W[t, c] ≈ G1[t1, c1, :] G2[:, t2, c2, :] ... Gd[:, td, cd]. The last
    core is applied first. Each step contracts one input mode and one bond, and yields one output mode and one bond.
    """

    name: ClassVar[str] = "tt-linear"
    kinds: ClassVar[frozenset[LayerKind]] = frozenset({"linear"})
    modes: ClassVar[tuple[str, ...]] = ("",)
    cores: Annotated[int, Field(ge=2)] = 2

    def check(self) -> None:
        """Set one mode for each bond; their number depends on the option, so the instance overrides the class."""
        object.__setattr__(self, "modes", ("",) * (self.cores - 1))

    def refuse(self, layer: Layer) -> Reason | None:
        """Refuse layers that are not linear, or whose numbers of features have too few divisors."""
        if (unfit := self.unfit(layer)) is not None:
            return unfit
        for size in (layer.in_channels, layer.out_channels):
            if not modes_of(size, self.cores):
                return Reason(ReasonCode.SHAPE, f"{size} features are not a product of {self.cores} numbers above 1")
        return None

    def exact_ranks(self, layer: Layer) -> Ranks:
        """Return the smaller side of each unfolding of (t1 c1) x ... x (td cd)."""
        sizes = [t * c for t, c in self._modes(layer)]
        return tuple(min(math.prod(sizes[:i]), math.prod(sizes[i:])) for i in range(1, self.cores))

    def rank_space(self, layer: Layer, grain: int) -> Sequence[Ranks]:
        """Return ranks with one value for all bonds (``train_space``), the exact ranks last."""
        return train_space(self, layer, grain, MEMBERS)

    def blueprint(self, layer: Layer, ranks: Ranks) -> tuple[Layer, ...]:
        """Return a layer for each core from the last: c_k r_k to r_{k-1} t_k, over the other modes."""
        modes, bonds = self._modes(layer), (1, *ranks, 1)
        parts: list[Layer] = []
        for k in reversed(range(self.cores)):
            t, c = modes[k]
            ahead, done = math.prod(c for _, c in modes[:k]), math.prod(t for t, _ in modes[k + 1 :])
            extent = (*layer.extent, ahead, done)
            if k:
                parts.append(Layer("linear", c * bonds[k + 1], bonds[k] * t, extent, bias=False))
            else:
                parts.append(LastCore("linear", c * bonds[1], t, extent, bias=layer.bias))
        return tuple(parts)

    @torch.no_grad()
    def factorize(self, layer: Layer, weight: Tensor, ranks: Ranks, covariance: Covariance) -> tuple[Tensor, ...]:
        """Run a TT-SVD and share each bond's scale between its cores; with data, try the whitened weight too.

        Whitening each input mode alone keeps the chain structure. The root of a mode is that of the mean of S's
        diagonal blocks over the other modes, as if S were a Kronecker product (this project's completion).
        """
        if covariance.is_identity:
            cores = tt_svd(self._tensor(layer, weight), ranks)
        else:
            metric = OutputMetric(weight, covariance)
            chains = self._chains(layer, weight, ranks, self._roots(layer, metric))
            cores, _ = self._scaled(layer, chains, metric)
        for k in reversed(range(self.cores - 1)):
            cores[k], cores[k + 1] = share_bond(cores[k], cores[k + 1])
        return self.shaped(layer, ranks, cores[::-1], weight.dtype)

    def reconstruct(self, layer: Layer, factors: Sequence[Tensor]) -> Tensor:
        """Return the product of the cores, with its modes in the order of the weight."""
        cores, bond = [], 1
        for factor, (t, c) in zip(reversed(factors), self._modes(layer), strict=True):
            cores.append(factor.reshape(bond, t * c, -1))
            bond = cores[-1].shape[2]
        return self._weight(layer, cores)

    @torch.no_grad()
    def errors(self, layer: Layer, weight: Tensor, space: Sequence[Ranks], covariance: Covariance) -> Sequence[float]:
        """Return the energy that the unfoldings lose: exact for two cores without data, otherwise corrected."""
        return self._estimates(layer, weight, space, covariance, ANCHORS)

    @torch.no_grad()
    def error_bounds(
        self, layer: Layer, weight: Tensor, space: Sequence[Ranks], covariance: Covariance
    ) -> Sequence[float]:
        """Return bounds of ``errors``: without data from the unfoldings, with data from one fit at the largest ranks.

        Without data the chain cannot be better than the best approximation of any unfolding (Eckart and Young). With
        data no such bound is known: the moments of the two input modes are not separable. The error that one fit
        corrects is then less ``UNSURE``.
        """
        if covariance.is_identity:
            tensor = self._tensor(layer, weight)
            inner = self._inner(layer, space)
            floors = train_bounds(tensor, inner, _energy(tensor), max)
            known = dict(zip(inner, floors, strict=True))
            return [known.get(ranks, 0.0) for ranks in space]
        return [(1 - UNSURE) * error for error in self._estimates(layer, weight, space, covariance, 1)]

    def _estimates(
        self, layer: Layer, weight: Tensor, space: Sequence[Ranks], covariance: Covariance, anchors: int
    ) -> list[float]:
        """Return errors that are corrected by fits at so many of the ranks; by one at the largest, if only one."""
        inner = self._inner(layer, space)
        if not inner:
            return [0.0] * len(space)
        metric = None if covariance.is_identity else OutputMetric(weight, covariance)
        roots = self._roots(layer, metric) if metric is not None else []
        tensor = self._tensor(layer, weight, roots)
        total = _energy(tensor)
        bounds = train_bounds(tensor, inner, total, sum)
        nested: list[list[Tensor]] = []
        if metric is not None:
            tensor = tensor.new_empty(0)  # each fit makes its own copy, and memory holds only one
            if self.cores == 2:  # the chain of a lower rank is the head of this one
                nested = self._chains(layer, weight, inner[-1], roots)

        def truth(index: int) -> float:
            ranks = inner[index]
            if metric is None:
                return math.sqrt(max(1 - energy(tt_svd(tensor, ranks)[-1].flatten(1)) / total, 0.0))
            chains = [[first[..., : ranks[0]], last[: ranks[0]]] for first, last in nested]
            return self._scaled(layer, chains or self._chains(layer, weight, ranks, roots), metric)[1]

        places = spread([1.0] * len(inner), 0.0, anchors) if anchors > 1 else [len(inner) - 1]
        found = anchored(
            [sum(ranks) for ranks in inner], bounds, places if metric is not None or self.cores > 2 else [], truth
        )
        known = dict(zip(inner, found, strict=True))
        return [known.get(ranks, 0.0) for ranks in space]

    def _inner(self, layer: Layer, space: Sequence[Ranks]) -> list[Ranks]:
        """Return the ranks below the exact ones, in rising order."""
        return sorted({ranks for ranks in space if ranks != self.exact_ranks(layer)})

    def build(self, layer: Layer, ranks: Ranks, factors: Sequence[Tensor], bias: Tensor | None) -> nn.Module:
        """Return a module of matrix products and reshapes, for any axes before the features."""
        return TTChain([c for _, c in self._modes(layer)], [1, *ranks], factors, bias)

    def _chains(self, layer: Layer, weight: Tensor, ranks: Ranks, roots: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return the cores of the plain and of the whitened chain."""
        found: list[list[Tensor]] = []
        for turned in ([], roots):
            cores = tt_svd(self._tensor(layer, weight, turned), ranks)
            for k, root in enumerate(turned):
                t, c = self._modes(layer)[k]
                paired = cores[k].reshape(-1, t, c, cores[k].shape[2]).movedim(2, -1)
                back = torch.linalg.solve_triangular(root.to(paired), paired.reshape(-1, c), upper=False, left=False)
                cores[k] = back.reshape(paired.shape).movedim(-1, 2).reshape(cores[k].shape)
            found.append(cores)
        return found

    def _scaled(self, layer: Layer, chains: Sequence[list[Tensor]], metric: OutputMetric) -> tuple[list[Tensor], float]:
        """Return the better chain, scaled: cores and relative error."""
        found: list[tuple[list[Tensor], float]] = []
        for cores in chains:
            scale, error = metric.scale(self._rows(layer, cores))
            found.append(([cores[0] * scale, *cores[1:]], error))
        return min(found, key=lambda fit: fit[1])

    def _roots(self, layer: Layer, metric: OutputMetric) -> list[Tensor]:
        """Return lower triangular L_k, ``(c_k, c_k)``, with L_k L_kᵀ the second moment of an input mode."""
        sizes, roots = [c for _, c in self._modes(layer)], []
        for k, size in enumerate(sizes):
            block = metric.covariance.between(math.prod(sizes[:k]), size, math.prod(sizes[k + 1 :])).double()
            roots.append(cholesky(block, ridge(block.diagonal())))
        return roots

    def _modes(self, layer: Layer) -> list[tuple[int, int]]:
        """Return (t_k, c_k): output modes in falling and input modes in rising order, which saves activation memory."""
        outputs, inputs = (modes_of(size, self.cores) for size in (layer.out_channels, layer.in_channels))
        return list(zip(reversed(outputs), inputs, strict=True))

    def _tensor(self, layer: Layer, weight: Tensor, roots: Sequence[Tensor] = ()) -> Tensor:
        """Return the weight as ``(t1 c1, ..., td cd)``, times L_k along each input mode, in one copy."""
        modes, d = self._modes(layer), self.cores
        paired = torch.empty([size for mode in modes for size in mode], dtype=precise_in(weight), device=weight.device)
        split = paired.permute(*range(0, 2 * d, 2), *range(1, 2 * d, 2))
        for place, rows in zip(split, weight.detach().chunk(modes[0][0]), strict=True):  # one t1 at a time
            part = rows.to(paired.dtype)
            for k, root in enumerate(roots):
                ahead, c = math.prod(c for _, c in modes[:k]), modes[k][1]
                part = torch.einsum("acb,cd->adb", part.reshape(len(rows) * ahead, c, -1), root.to(part))
            place.copy_(part.reshape(place.shape))
        return paired.reshape([t * c for t, c in modes])

    def _rows(self, layer: Layer, cores: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the weight that the cores represent, the consecutive rows of one t1 at a time."""
        modes, d, first = self._modes(layer), self.cores, cores[0]
        shape = [1, modes[0][1], *(size for mode in modes[1:] for size in mode)]
        for part in first.chunk(modes[0][0], dim=1):
            paired = tt_compose([part, *cores[1:]]).reshape(shape)
            yield paired.permute(*range(0, 2 * d, 2), *range(1, 2 * d, 2)).reshape(-1, layer.in_channels)

    def _weight(self, layer: Layer, cores: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(self._rows(layer, cores)))


class LastCore(Layer):
    """The last small layer: its bias has one number for each output feature of the whole layer."""

    @property
    def params(self) -> int:
        """Weights and T biases; a plain linear layer of this shape has t1 biases."""
        return math.prod(self.weight_shape) + (self.out_channels * self.extent[-1] if self.bias else 0)


@saved_as("tt-chain", "tdcompile.passes.decompose.tt_linear:TTChain")
class TTChain(nn.Module):
    """Applies the cores of a TT-matrix to ``(..., C)``, the last core first; the parameters are in that order."""

    def __init__(
        self, inputs: Sequence[int], bonds: Sequence[int], factors: Sequence[Tensor], bias: Tensor | None
    ) -> None:
        super().__init__()
        self.inputs, self.bonds = tuple(inputs), tuple(bonds)
        self.factors = nn.ParameterList(nn.Parameter(factor.detach().clone()) for factor in factors)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        """Map ``(..., C)`` to ``(..., T)``."""
        x = _split(input, -1, (-1, 1, self.inputs[-1]))
        for factor, bond, ahead in zip(self.factors, reversed(self.bonds), (*self.inputs[-2::-1], 1), strict=True):
            # (..., c_1 ... c_{k-1}, t_{k+1} ... t_d, c_k r_k) to (..., c_1 ... c_{k-2}, t_k ... t_d, c_{k-1} r_{k-1})
            x = _split(_split(nn.functional.linear(x, factor), -1, (bond, -1)), -4, (-1, ahead))
            x = x.movedim((-1, -3, -4, -2), (-4, -3, -2, -1)).flatten(-2).flatten(-3, -2)
        x = x.flatten(-3)
        return x if self.bias is None else x + self.bias


def _energy(tensor: Tensor) -> float:
    return energy(tensor.flatten(1)) + torch.finfo(tensor.dtype).tiny


def _split(x: Tensor, axis: int, sizes: tuple[int, ...]) -> Tensor:
    split: Tensor = torch.unflatten(x, axis, sizes)
    return split


def modes_of(size: int, count: int) -> tuple[int, ...]:
    """Return ``count`` numbers above 1 with the size as product and the least sum, in rising order, or ``()``.

    >>> modes_of(768, 2), modes_of(512, 3), modes_of(7, 2)
    ((24, 32), (8, 8, 8), ())
    """
    if count == 1:
        return (size,) if size > 1 else ()
    splits = [(d, *modes_of(size // d, count - 1)) for d in range(2, math.isqrt(size) + 1) if size % d == 0]
    return min((tuple(sorted(s)) for s in splits if len(s) == count), key=sum, default=())

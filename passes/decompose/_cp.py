"""The base of the CP forms of a convolution: a 1x1 to r channels, depthwise layers on them, a 1x1 to the output."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tdcompile.core.decomposition import Decomposition, Kernel
from tdcompile.ir.diagnostics import Reason
from tdcompile.ir.layer import Layer, LayerKind, Ranks
from tdcompile.numerics.covariance import Covariance
from tdcompile.numerics.cp import (
    DEGENERATE,
    balanced,
    columns_product,
    component_norm,
    cp_als,
    cp_compose,
    cp_exact,
    slice_start,
)
from tdcompile.numerics.cp_correction import CYCLES, allowed, correct, mode_weights, sensitivity
from tdcompile.numerics.output_error import OutputMetric
from tdcompile.passes.decompose._error_estimates import anchored, spread

MEMBERS = 12  # proposed ranks, including the exact one
ANCHORS = 4  # least number of ranks that are factorised for an estimate
# Limits of alternating least squares: sweeps, operations of a factorisation (for each chosen layer), and operations of
# all anchors of an estimate (for every layer of the network).
SWEEPS, FACTORIZE, ESTIMATE = 30, 3e10, 3e9


@dataclass(frozen=True)
class Polyadic(Decomposition):
    """W[t, c, k...] ≈ Σ_r A[t, r] B[c, r] D[k, r]...: a CP of the weight in the shape of ``tensor_shape``.

    Attributes:
        correct: the ratio by which the error may grow for factors that are less sensitive to noise and to training
            (error-preserving correction); 1 skips the correction.
    """

    kinds: ClassVar[frozenset[LayerKind]] = frozenset({"conv"})
    kernels: ClassVar[Kernel] = Kernel.SEVERAL_TAPS
    modes: ClassVar[tuple[str, ...]] = ("",)
    correct: Annotated[float, Field(ge=1, lt=math.inf)] = 1.01

    @abstractmethod
    def tensor_shape(self, layer: Layer) -> tuple[int, ...]:
        """Return ``(T, C, ...)``, then one mode for each depthwise layer."""

    def refuse(self, layer: Layer) -> Reason | None:
        """Return only a mismatch of the kind: a layer too small to gain keeps its exact rank as a candidate."""
        return self.unfit(layer)

    def exact_ranks(self, layer: Layer) -> Ranks:
        """Return the product of all modes but the longest."""
        shape = self.tensor_shape(layer)
        return (math.prod(shape) // max(shape),)

    def rank_space(self, layer: Layer, grain: int) -> Sequence[Ranks]:
        """Return a geometric series from the grain to the last rank that saves MACs, then the exact rank."""
        (exact,) = self.exact_ranks(layer)
        each = self.macs(layer, (1,))
        top = min((layer.macs - 1) // each, exact - 1) // grain
        steps = MEMBERS - 2
        multiples = {int(top ** (i / steps) + 1e-9) for i in range(steps + 1)} if top else set()
        return [*((grain * multiple,) for multiple in sorted(multiples)), (exact,)]

    def factorize(self, layer: Layer, weight: Tensor, ranks: Ranks, covariance: Covariance) -> tuple[Tensor, ...]:
        """Run alternating least squares, then the error-preserving correction; with data, on the whitened weight.

        With data, refit the last factor in the metric of the output. At the exact rank the factors have a closed form.
        """
        tensor = self._tensor(layer, weight)
        if ranks >= self.exact_ranks(layer):
            last, *others = cp_exact(tensor, ranks[0])
        else:
            metric = None if covariance.is_identity else OutputMetric(weight, covariance)
            last, *others = self._factors(tensor, ranks[0], metric)
        return self.shaped(layer, ranks, [*(factor.T for factor in others), last], weight.dtype)

    def reconstruct(self, layer: Layer, factors: Sequence[Tensor]) -> Tensor:
        """Return the sum of the components."""
        return cp_compose(mode_matrices(factors)).reshape(layer.weight_shape)

    @torch.no_grad()
    def caution(self, layer: Layer, weight: Tensor, factors: Sequence[Tensor]) -> str | None:
        """Warn of components that cancel each other, in spite of the ridges of ``cp_als`` and the correction."""
        found = [matrix.detach().double() for matrix in mode_matrices(factors)]
        size, times = float(weight.norm()), component_norm(found)
        if times <= DEGENERATE * size:
            return None
        times /= max(size, torch.finfo(weight.dtype).tiny)
        return (
            f"its {self.name} of rank {found[0].shape[1]} is degenerate: components {times:.0f} times the weight "
            "cancel; training may diverge, and another rank or form may suit it"
        )

    @torch.no_grad()
    def errors(self, layer: Layer, weight: Tensor, space: Sequence[Ranks], covariance: Covariance) -> Sequence[float]:
        """Estimate from the SVDs of the slices, corrected by a factorisation at a few ranks.

        An estimate skips the correction for sensitivity and assumes that it uses all of the allowed error.
        """
        tensor = self._tensor(layer, weight)
        metric = None if covariance.is_identity else OutputMetric(weight, covariance)
        root = metric.channel_root(tensor.shape[1]) if metric is not None else None
        whitened = tensor if root is None else _whiten(tensor, root)
        left, start = slice_start(whitened)
        inner = sorted({rank for (rank,) in space if (rank,) < self.exact_ranks(layer)})

        def truth(index: int) -> float:
            factors = _fit(whitened, start, inner[index], ESTIMATE / ANCHORS)
            if metric is None or root is None:
                return float((tensor - cp_compose(factors)).norm() / tensor.norm().clamp_min(torch.finfo().tiny))
            return _refit(_unwhiten(factors, root), metric)[1]

        costs = [(_sweeps(tensor, rank, ESTIMATE / ANCHORS), _operations(tensor, rank)) for rank in inner]
        anchors = spread([sweeps * each for sweeps, each in costs if sweeps > 1], ESTIMATE, ANCHORS)
        found = anchored(inner, [float(left[rank]) for rank in inner], anchors, truth)
        known = dict(zip(inner, (allowed(error, self.correct) for error in found), strict=True))
        return [known.get(rank, 0.0) for (rank,) in space]

    def _tensor(self, layer: Layer, weight: Tensor) -> Tensor:
        return weight.detach().double().reshape(self.tensor_shape(layer))

    def _factors(self, tensor: Tensor, rank: int, metric: OutputMetric | None) -> list[Tensor]:
        if metric is not None:
            return self._fit_output(tensor, rank, metric)
        return self._corrected(tensor, _fit(tensor, slice_start(tensor)[1], rank, FACTORIZE))

    @torch.no_grad()
    def _corrected(self, tensor: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
        """Return less sensitive factors whose error is at most the allowed one."""
        size, found = float(tensor.norm()), list(factors)
        if self.correct > 1 and size > 0:
            bound = allowed(float((tensor - cp_compose(found)).norm()) / size, self.correct)
            # A cycle multiplies the tensor once for each mode; an eigendecomposition takes the place of a solve.
            affordable = int(FACTORIZE / (4 * _operations(tensor, found[0].shape[1])))
            found = correct(tensor, found, bound, min(max(affordable, 1), CYCLES))
        return found

    @torch.no_grad()
    def _fit_output(self, tensor: Tensor, rank: int, metric: OutputMetric) -> list[Tensor]:
        """Return the better of two refitted CPs: of the plain weight, and of the weight whitened by channel.

        Correct the better one in the space of its fit, then refit its last factor in the metric of the output. Accept
        the correction if the output's error is within the allowed one and below the plain CP's before its refit.
        """
        root = metric.channel_root(tensor.shape[1])
        whitened = _whiten(tensor, root)
        plain = _fit(tensor, slice_start(tensor)[1], rank, FACTORIZE)
        aware = _fit(whitened, slice_start(whitened)[1], rank, FACTORIZE)
        found, error = _refit(_unwhiten(aware, root), metric)
        other, above = _refit(plain, metric)
        found, error = (other, above) if above < error else (found, error)
        if self.correct == 1:
            return found
        corrected = self._corrected(tensor, plain) if found is other else self._corrected(whitened, aware)
        calmer = corrected if found is other else _unwhiten(corrected, root)
        bound = min(allowed(error, self.correct), metric.error(cp_compose(plain)))
        _, *others = calmer
        last = metric.refit_within(columns_product(others).T, mode_weights(calmer, 0), bound)
        if last is None:
            return found
        calmer = balanced([last, *others])
        return calmer if sensitivity(calmer) < sensitivity(found) else found


def mode_matrices(factors: Sequence[Tensor]) -> list[Tensor]:
    """Return the factors ``(I_n, rank)`` of a CP, outputs first, from the weights of its chain of layers."""
    *others, last = (factor.flatten(1) for factor in factors)
    return [last, *(factor.T for factor in others)]


def _fit(tensor: Tensor, start: Sequence[Tensor], rank: int, operations: float) -> list[Tensor]:
    return cp_als(tensor, [factor[:, :rank] for factor in start], max(_sweeps(tensor, rank, operations), 1))


def _sweeps(tensor: Tensor, rank: int, operations: float) -> int:
    return int(min(SWEEPS, operations / _operations(tensor, rank)))


def _operations(tensor: Tensor, rank: int) -> float:
    """Return the operations of one sweep: two products with the tensor, and a Cholesky solve for each mode."""
    return 4 * tensor.numel() * rank + tensor.ndim * rank**3 / 3 + 2 * rank**2 * sum(tensor.shape)


def _refit(factors: Sequence[Tensor], metric: OutputMetric) -> tuple[list[Tensor], float]:
    last, *others = factors
    last, error = metric.refit(last, columns_product(others).T)
    return balanced([last, *others]), error


def _whiten(tensor: Tensor, root: Tensor) -> Tensor:
    """Apply Lᵀ to the channels of ``(T, C, ...)``."""
    return torch.einsum("tc...,cd->td...", tensor, root)


def _unwhiten(factors: Sequence[Tensor], root: Tensor) -> list[Tensor]:
    last, first, *others = factors
    return [last, torch.linalg.solve_triangular(root.T, first, upper=True), *others]

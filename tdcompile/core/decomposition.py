"""The contract of decompositions: a layer becomes a chain of small layers whose composition approximates it."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from tdcompile.core.plugin import Plugin
from tdcompile.ir.diagnostics import Reason
from tdcompile.ir.layer import Layer, Ranks, owner
from tdcompile.numerics.covariance import Covariance
from tdcompile.numerics.low_rank import blocks


class Decomposition(Plugin):
    """Replaces one layer by smaller ones; exact at ``exact_ranks``, for every stride, padding and dilation it accepts.

    Attributes:
        modes: for each rank, the unfolding of the weight that it truncates: ``out`` (T x CK), ``in`` (C x TK), or
            ``""`` for another one.
    """

    modes: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def refuse(self, layer: Layer) -> Reason | None:
        """Why this form does not apply to the layer, or None where it does."""

    @abstractmethod
    def exact_ranks(self, layer: Layer) -> Ranks:
        """Ranks at which any weight of this shape is reproduced."""

    @abstractmethod
    def rank_space(self, layer: Layer, grain: int) -> Sequence[Ranks]:
        """Candidate ranks: multiples of the grain (see ``grid``), cheapest first in MACs, the exact ranks last."""

    @abstractmethod
    def blueprint(self, layer: Layer, ranks: Ranks) -> tuple[Layer, ...]:
        """The small layers in order: pure arithmetic. Only the last has a bias, and only where the layer has one."""

    @abstractmethod
    def factorize(self, layer: Layer, weight: Tensor, ranks: Ranks, covariance: Covariance) -> tuple[Tensor, ...]:
        """One factor for each layer of the blueprint, of its ``weight_shape`` and the weight's dtype, balanced.

        Args:
            weight: ``(T, C / groups, *kernel)``.
            covariance: of the layer's input; minimise the error of the layer's output in its metric. Without data it is
                the identity. ``flat @ covariance`` works for any size, ``covariance.dense()`` up to 16,384 inputs.
        """

    @abstractmethod
    def reconstruct(self, layer: Layer, factors: Sequence[Tensor]) -> Tensor:
        """The weight ``(T, C / groups, *kernel)`` that the factors compute together."""

    def errors(self, layer: Layer, weight: Tensor, space: Sequence[Ranks], covariance: Covariance) -> Sequence[float]:
        """For all ranks of a space the relative error of ``factorize``, in one go where a spectrum gives it.

        Here the slow way, one factorisation for each; a form with a closed expression overrides it.
        """
        made = (self.factorize(layer, weight, ranks, covariance) for ranks in space)
        return [relative_error(weight, self.reconstruct(layer, factors), covariance) for factors in made]

    def caution(self, layer: Layer, weight: Tensor, factors: Sequence[Tensor]) -> str | None:
        """What is to be known of these factors before they are trained, in a sentence; None where there is nothing."""
        return None

    def build(self, layer: Layer, ranks: Ranks, factors: Sequence[Tensor], bias: Tensor | None) -> nn.Module:
        """The module that computes the layer from its factors: by default the blueprint's layers in a row.

        Args:
            factors: what ``factorize`` gave; copied.
            bias: of the layer, ``(T,)``; copied into the last small layer.
        """
        modules = [part.build() for part in self.blueprint(layer, ranks)]
        for module, factor in zip(modules, factors, strict=True):
            part = owner(module)
            part.weight = nn.Parameter(factor.detach().clone().reshape(part.weight.shape))
        if bias is not None:
            owner(modules[-1]).bias = nn.Parameter(bias.detach().clone())
        return nn.Sequential(*flatten(modules))


def flatten(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules with sequences opened, so that a pad stands beside its convolution."""
    return [part for m in modules for part in (flatten(list(m)) if isinstance(m, nn.Sequential) else [m])]


def relative_error(weight: Tensor, approximation: Tensor, covariance: Covariance) -> float:
    """Return ‖(W−W̃)S^½‖_F / ‖W S^½‖_F with W as T x CK and S the covariance, in float64."""
    lost, whole, tiny = 0.0, 0.0, torch.finfo(torch.float64).tiny  # round-off may leave an energy below zero
    if covariance.groups > 1:
        own, other = (each.detach().flatten(1).double() for each in (weight, approximation))
        return math.sqrt(max(covariance.energy(own - other), 0.0) / max(covariance.energy(own), tiny))
    ours, theirs = (blocks(each.detach().flatten(1), torch.float64) for each in (weight, approximation))
    for own, other in zip(ours, theirs, strict=True):
        lost, whole = lost + covariance.energy(own - other), whole + covariance.energy(own)
    return math.sqrt(max(lost, 0.0) / max(whole, tiny))

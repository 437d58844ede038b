"""``grouped``: decompose each group of a convolution by another form; the chain has convolutions in groups.

Each group is a convolution C/G -> T/G with its own weight and covariance (this project's completion: the published
forms are for one group). All groups have the same ranks, so the i-th small layers of all groups form one layer in
groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tdcompile.core.decomposition import Decomposition, several_groups
from tdcompile.core.registry import find, make
from tdcompile.errors import InputError
from tdcompile.ir.diagnostics import Reason, ReasonCode
from tdcompile.ir.layer import Layer, Ranks
from tdcompile.numerics.covariance import Covariance
from tdcompile.support.spec import parse_spec


@dataclass(frozen=True)
class Grouped(Decomposition):
    """A convolution in groups, each group by another form, all at the same ranks.

    Attributes:
        form: the form for kernels of more than one tap.
        pointwise: the form for 1x1 convolutions.
    """

    name: ClassVar[str] = "grouped"
    transposed: ClassVar[bool] = True
    grouped: ClassVar[bool] = True
    form: str = "channel"
    pointwise: str = "svd"

    def check(self) -> None:
        """Require forms that are registered and not in groups themselves."""
        known = find(Decomposition)
        for option, text in (("form", self.form), ("pointwise", self.pointwise)):
            named = parse_spec(text).name
            if named not in known or named == self.name:
                others = ", ".join(form for form in known if form != self.name)
                raise InputError(f"grouped: {option}={text} must be one of {others}")

    def refuse(self, layer: Layer) -> Reason | None:
        """Refuse layers of one group, depthwise layers, and layers whose groups the form refuses."""
        if layer.groups == 1:
            return Reason(ReasonCode.UNGROUPED, "its channels are in one group")
        if layer.depthwise:
            return several_groups(layer, self.name)
        refused = self._form(layer).refuse(_one(layer))
        if refused is None:
            return None
        return Reason(refused.code, f"in each of its {layer.groups} groups: {refused.text}")

    def exact_ranks(self, layer: Layer) -> Ranks:
        """Return the exact ranks of one group."""
        return self._form(layer).exact_ranks(_one(layer))

    def rank_space(self, layer: Layer, grain: int) -> Sequence[Ranks]:
        """Return the rank space of one group."""
        return self._form(layer).rank_space(_one(layer), grain)

    def blueprint(self, layer: Layer, ranks: Ranks) -> tuple[Layer, ...]:
        """Return the blueprint of one group with the channels of all groups side by side."""
        return tuple(
            replace(
                part,
                in_channels=part.in_channels * layer.groups,
                out_channels=part.out_channels * layer.groups,
                groups=part.groups * layer.groups,
            )
            for part in self._form(layer).blueprint(_one(layer), ranks)
        )

    def factorize(self, layer: Layer, weight: Tensor, ranks: Ranks, covariance: Covariance) -> tuple[Tensor, ...]:
        """Return the factors of all groups, concatenated in order."""
        one, form = _one(layer), self._form(layer)
        made = [form.factorize(one, own, ranks, seen) for own, seen in _groups(layer, weight, covariance)]
        return tuple(torch.cat(factors) for factors in zip(*made, strict=True))

    def reconstruct(self, layer: Layer, factors: Sequence[Tensor]) -> Tensor:
        """Return the weights of all groups, concatenated in order."""
        one, form = _one(layer), self._form(layer)
        parts = zip(*(factor.chunk(layer.groups) for factor in factors), strict=True)
        return torch.cat([form.reconstruct(one, own) for own in parts])

    def errors(self, layer: Layer, weight: Tensor, space: Sequence[Ranks], covariance: Covariance) -> Sequence[float]:
        """Return the errors of the groups, weighted by their share of the output's energy."""
        one, form = _one(layer), self._form(layer)
        lost, whole = [0.0] * len(space), torch.finfo(torch.float64).tiny
        for own, seen in _groups(layer, weight, covariance):
            amount = max(seen.energy(own.detach().flatten(1).double()), 0.0)  # round-off may make it negative
            whole += amount
            found = form.errors(one, own, space, seen)
            lost = [sum_ + amount * error**2 for sum_, error in zip(lost, found, strict=True)]
        return [math.sqrt(each / whole) for each in lost]

    def _form(self, layer: Layer) -> Decomposition:
        return make(Decomposition, self.pointwise if layer.pointwise else self.form)


def _one(layer: Layer) -> Layer:
    """Return one group as a layer."""
    return replace(
        layer,
        in_channels=layer.in_channels // layer.groups,
        out_channels=layer.out_channels // layer.groups,
        groups=1,
    )


def _groups(layer: Layer, weight: Tensor, covariance: Covariance) -> Iterator[tuple[Tensor, Covariance]]:
    """Yield the weight of each group and the covariance of its inputs."""
    for place, own in enumerate(weight.chunk(layer.groups)):
        yield own, covariance.of_group(place)

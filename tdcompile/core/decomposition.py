"""The contract of decompositions: replace a layer by a chain of small layers that approximates it."""

from __future__ import annotations

import enum
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tdcompile.core.plugin import Plugin
from tdcompile.core.rank_space import grid, tied
from tdcompile.errors import TdcompileError
from tdcompile.ir.diagnostics import Reason, ReasonCode
from tdcompile.ir.layer import Layer, LayerKind, Ranks, owner
from tdcompile.numerics.covariance import Covariance
from tdcompile.numerics.low_rank import blocks

_IMPULSES = 1024  # input channels that the default ``reconstruct`` probes at a time; bounds the memory use
_NUMBERS = {2: "two", 3: "three", 4: "four"}


class Kernel(enum.Enum):
    """Kernels that a decomposition takes. A linear layer counts as a kernel of one tap."""

    ANY = enum.auto()
    ONE_TAP = enum.auto()
    SEVERAL_TAPS = enum.auto()
    TWO_AXES = enum.auto()  # two-dimensional, longer than 1 along both axes


class Decomposition(Plugin):
    """Replace one layer by a chain of smaller ones that is exact at ``exact_ranks``.

    A subclass defines ``exact_ranks``, ``blueprint`` and ``factorize``, and declares which layers it takes. The other
    methods have defaults. Override them if there is a faster way. The chain must hold for every stride, padding and
    dilation of a layer that the form takes.

    Attributes:
        kinds: the kinds of layer that the form takes.
        kernels: the kernels that it takes.
        transposed: whether it takes transposed convolutions.
        grouped: whether it takes layers in several groups.
        modes: for each rank, the unfolding of the weight that it truncates: ``out`` (T x CK), ``in`` (C x TK), or
            ``""`` for another one. Empty if the number of ranks depends on the layer.
    """

    kinds: ClassVar[frozenset[LayerKind]] = frozenset({"conv", "linear"})
    kernels: ClassVar[Kernel] = Kernel.ANY
    transposed: ClassVar[bool] = False
    grouped: ClassVar[bool] = False
    modes: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def exact_ranks(self, layer: Layer) -> Ranks:
        """Return ranks at which the form reproduces any weight of this shape."""

    @abstractmethod
    def blueprint(self, layer: Layer, ranks: Ranks) -> tuple[Layer, ...]:
        """Return the small layers in order, by arithmetic alone. Only the last has a bias, if the layer has one."""

    @abstractmethod
    def factorize(self, layer: Layer, weight: Tensor, ranks: Ranks, covariance: Covariance) -> tuple[Tensor, ...]:
        """Return one balanced factor for each layer of the blueprint, in its ``weight_shape`` and the weight's dtype.

        Args:
            weight: ``(T, C / groups, *kernel)``.
            covariance: of the layer's input. Minimise the error of the layer's output in its metric; without data it
                is the identity. ``flat @ covariance`` works for any size, ``covariance.dense()`` up to 16,384 inputs.
        """

    def refuse(self, layer: Layer) -> Reason | None:
        """Return why the form does not apply to the layer, or None if it does.

        The default compares the layer with the declarations of the class, then its MACs with those at ranks of 1.
        """
        if (unfit := self.unfit(layer)) is not None:
            return unfit
        least = (1,) * len(self.exact_ranks(layer))
        if self.macs(layer, least) < layer.macs:
            return None
        count = len(self.blueprint(layer, least))
        channels = f"{layer.in_channels} -> {layer.out_channels}"
        return Reason(ReasonCode.SMALL, f"{channels} costs less than {_NUMBERS.get(count, count)} factors do")

    def unfit(self, layer: Layer) -> Reason | None:
        """Return which declaration of the class rules the layer out, or None if none does."""
        if layer.transposed and not self.transposed and layer.kind in self.kinds:
            return Reason(ReasonCode.TRANSPOSED, f"it is a transposed convolution, which {self.name} does not take")
        if layer.groups > 1 and not self.grouped:  # before the kind: all forms then give the same reason
            return several_groups(layer, self.name)
        if layer.kind not in self.kinds:
            taken = "convolutions" if layer.kind == "linear" else "linear layers"
            return Reason(ReasonCode.KIND, f"{self.name} is a form of {taken}")
        return self._unfit_kernel(layer)

    def _unfit_kernel(self, layer: Layer) -> Reason | None:
        if self.kernels is Kernel.ANY:
            return None
        if self.kernels is Kernel.ONE_TAP:
            if layer.pointwise:
                return None
            size = "x".join(map(str, layer.kernel))
            return Reason(ReasonCode.KERNEL, f"its kernel {size} has more than one tap; {self.name} takes one")
        if layer.pointwise and layer.transposed:
            return Reason(
                ReasonCode.NO_FORM, f"it is a transposed convolution of one tap, which {self.name} does not take"
            )
        if layer.pointwise:
            return Reason(ReasonCode.POINTWISE, f"{self.name} needs a kernel of more than one tap")
        if self.kernels is Kernel.TWO_AXES and (len(layer.kernel) != 2 or 1 in layer.kernel):
            size = "x".join(map(str, layer.kernel))
            reason = f"{self.name} separates the two axes of a kernel; {size} does not have two axes longer than 1"
            return Reason(ReasonCode.KERNEL, reason)
        return None

    def rank_space(self, layer: Layer, grain: int) -> Sequence[Ranks]:
        """Return candidate ranks: multiples of the grain (see ``grid``), in order of MACs, the exact ranks last.

        The default gives all ranks one value, limited to the exact ranks, and leaves out what saves no MACs.
        """
        exact = self.exact_ranks(layer)
        space = dict.fromkeys(tied(exact, rank) for rank in grid(max(exact), grain))
        return [*(ranks for ranks in space if ranks != exact and self.macs(layer, ranks) < layer.macs), exact]

    def reconstruct(self, layer: Layer, factors: Sequence[Tensor]) -> Tensor:
        """Return the weight ``(T, C / groups, *kernel)`` that the factors compute together. Gradients flow through it.

        The default applies the built chain to unit impulses in float64. A form that overrides ``build`` so that the
        parameters of the module are not the factors in order overrides this method too.
        """
        probe = _probe(layer)
        module = self.build(probe, self.ranks_of(probe, factors), factors, None)
        names = (name for name, _ in module.named_parameters())
        weights = {name: factor.double() for name, factor in zip(names, factors, strict=True)}
        answers = [functional_call(module, weights, x.to(factors[0].device)) for x in _impulses(probe)]
        weight: Tensor = torch.cat(answers).transpose(0, 1).to(factors[0].dtype)
        # A convolution correlates: its response to an impulse is the kernel in reverse order.
        return weight if layer.transposed else weight.flip(tuple(range(2, weight.ndim)))

    def errors(self, layer: Layer, weight: Tensor, space: Sequence[Ranks], covariance: Covariance) -> Sequence[float]:
        """Return the relative error of ``factorize`` for each of the ranks.

        The default factorises once for each of them. A form whose spectrum gives all errors at once overrides it.
        """
        made = (self.factorize(layer, weight, ranks, covariance) for ranks in space)
        return [relative_error(weight, self.reconstruct(layer, factors), covariance) for factors in made]

    def error_bounds(
        self, layer: Layer, weight: Tensor, space: Sequence[Ranks], covariance: Covariance
    ) -> Sequence[float]:
        """Return a lower bound of ``errors`` for each of the ranks, much faster; 0 bounds nothing.

        ``propose`` does not compute errors of ranks whose bound another form already beats at no higher cost. Override
        it if ``errors`` takes long.
        """
        return [0.0] * len(space)

    def caution(self, layer: Layer, weight: Tensor, factors: Sequence[Tensor]) -> str | None:
        """Return a warning about training these factors, as a sentence, or None."""
        return None

    def build(self, layer: Layer, ranks: Ranks, factors: Sequence[Tensor], bias: Tensor | None) -> nn.Module:
        """Return the module that computes the layer from its factors: by default the blueprint's layers in a row.

        Args:
            factors: the result of ``factorize``; copied.
            bias: bias of the layer, ``(T,)``; copied into the last small layer.
        """
        modules = [part.build() for part in self.blueprint(layer, ranks)]
        for module, factor in zip(modules, factors, strict=True):
            part = owner(module)
            part.weight = nn.Parameter(factor.detach().clone().reshape(part.weight.shape))
        if bias is not None:
            owner(modules[-1]).bias = nn.Parameter(bias.detach().clone())
        return nn.Sequential(*flatten(modules))

    def macs(self, layer: Layer, ranks: Ranks) -> int:
        """Return the multiply-accumulates of the blueprint for one sample."""
        return sum(part.macs for part in self.blueprint(layer, ranks))

    def ranks_of(self, layer: Layer, factors: Sequence[Tensor]) -> Ranks:
        """Return the ranks at which the blueprint's weights have the shapes of these factors.

        Raises:
            TdcompileError: no ranks do.
        """
        sizes = [size for factor in factors for size in factor.shape]
        count = len(self.exact_ranks(layer))
        once, ranks = self._sizes(layer, (1,) * count), []
        for place in range(count):
            twice = self._sizes(layer, tuple(2 if other == place else 1 for other in range(count)))
            # A size that depends on several ranks overstates this one, so the smallest estimate is right.
            steps = zip(sizes, once, twice, strict=False)
            ranks.append(min((1 + (size - one) // (two - one) for size, one, two in steps if two != one), default=1))
        if self._sizes(layer, tuple(ranks)) != sizes:
            shapes = ", ".join(str(tuple(factor.shape)) for factor in factors)
            raise TdcompileError(
                f"no ranks give '{self.name}' factors of the shapes {shapes} for a weight {layer.weight_shape}: "
                "return factors in the shapes of the blueprint, or override 'reconstruct'"
            )
        return tuple(ranks)

    def _sizes(self, layer: Layer, ranks: Ranks) -> list[int]:
        return [size for part in self.blueprint(layer, ranks) for size in part.weight_shape]

    def shaped(self, layer: Layer, ranks: Ranks, factors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return factors in the shapes of the blueprint and a dtype: the last step of most ``factorize``."""
        parts = self.blueprint(layer, ranks)
        return tuple(f.reshape(part.weight_shape).to(dtype) for f, part in zip(factors, parts, strict=True))


@contextmanager
def reading(form: Decomposition, weight: Tensor) -> Iterator[None]:
    """Require that a decomposition only reads the weight that it is given in this context.

    The weight is that of the user's network: a form that writes into it would damage the network, and the comparison
    with it, without a word.

    Raises:
        TdcompileError: the weight was written into.
    """
    before = None if weight.is_inference() else weight._version
    yield
    if before is not None and weight._version != before:
        raise TdcompileError(
            f"the decomposition {form.told()} wrote into the weight of a layer: let it work on weight.clone(); "
            "load the network again, for its weight has changed"
        )


def several_groups(layer: Layer, form: str) -> Reason:
    """Return why a form of one group does not apply to a layer in several."""
    if layer.depthwise:
        reason = f"each of its {layer.groups} groups has one input channel: there is nothing to decompose"
        return Reason(ReasonCode.DEPTHWISE, reason)
    return Reason(ReasonCode.GROUPED, f"its {layer.groups} groups each see other channels; {form} takes one group")


def flatten(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the modules with nested sequences opened, so that a pad stands beside its convolution."""
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


def _probe(layer: Layer) -> Layer:
    """Return a layer of the same weight whose response to an impulse on one position is a whole kernel."""
    axes = len(layer.kernel)
    margins = [0 if layer.transposed else size - 1 for size in layer.kernel]
    return replace(
        layer,
        extent=(1,) * axes,
        stride=(1,) * axes,
        padding=tuple((margin, margin) for margin in margins),
        dilation=(1,) * axes,
        padding_mode="zeros",
        output_padding=(0,) * len(layer.output_padding),
        bias=False,
    )


def _impulses(layer: Layer) -> Iterator[Tensor]:
    """Yield batches ``(n, C, 1, ...)``: one impulse for each input channel of a group, on all groups at once."""
    width = layer.in_channels // layer.groups
    for start in range(0, width, _IMPULSES):
        channels = torch.arange(start, min(start + _IMPULSES, width))
        rows = nn.functional.one_hot(channels, width).double().repeat(1, layer.groups)
        yield rows.reshape(len(rows), layer.in_channels, *layer.extent)

"""``Parallel``: a layer's dense weight beside its low-rank adapter, and a share that moves from one to the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdcompile.decomposition import Decomposition
from tdcompile.layer import Layer
from tdcompile.linalg import unfold
from tdcompile.ranks import Ranks
from tdcompile.registry import make


class Parallel(nn.Module):
    """y = layer(x; a (W₀ − T(θ₀)) + T(θ)), W₀ and θ₀ frozen: the dense layer at a = 1 and θ = θ₀, low rank at a = 0.

    Args:
        layer: the layer's shape.
        form: the text form of its decomposition.
        ranks: of the adapter.
        weight: W₀.
        factors: θ, the adapter's factors; their composition is what is taken off the dense weight.
        bias: of the layer; it trains.
        zero: the adapter starts from nothing instead, beside the whole dense weight, and is as exact at the start.
    """

    def __init__(
        self,
        layer: Layer,
        form: str,
        ranks: Ranks,
        weight: Tensor,
        factors: Sequence[Tensor],
        bias: Tensor | None,
        zero: bool = False,
    ) -> None:
        super().__init__()
        self.layer, self.form, self.ranks, self.share = layer, form, ranks, 1.0
        self.shell = layer.build()  # knows strides and padding; the weight is computed
        self.shell.register_parameter("weight", None)
        self.shell.register_parameter("bias", None)
        self.factors = nn.ParameterList(nn.Parameter(factor.detach().clone()) for factor in factors)
        if zero:
            with torch.no_grad():
                self.factors[-1].zero_()
        self.register_buffer("gap", weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        with torch.no_grad():
            self.gap: Tensor = self.gap - self.adapter()

    @property
    def decomposition(self) -> Decomposition:
        """The form, made from its text."""
        return make(Decomposition, self.form)

    def adapter(self) -> Tensor:
        """T(θ), of the weight's shape."""
        return self.decomposition.reconstruct(self.layer, [*self.factors.parameters()])

    def effective(self) -> Tensor:
        """The weight that is computed with."""
        adapter = self.adapter()
        return adapter if self.share == 0 else self.share * self.gap + adapter

    def forward(self, input: Tensor) -> Tensor:
        """As the layer's, which is called by that name too."""
        if isinstance(self.shell, nn.Linear):
            return F.linear(input, self.effective(), self.bias)
        out: Tensor = self.shell._conv_forward(input, self.effective(), self.bias)  # type: ignore[operator]
        return out

    @torch.no_grad()
    def shrink(self, ranks: Ranks) -> None:
        """Truncate the adapter in place: its own best approximation at fewer ranks, so that nothing else is lost.

        The parameters stay the same objects with less in them. What is cut off does not go into the dense part.
        """
        adapter = self.adapter()
        factors = self.decomposition.factorize(self.layer, adapter, ranks, None)
        for parameter, factor in zip(self.factors.parameters(), factors, strict=True):
            parameter.grad, parameter.data = None, factor.to(parameter)
        self.ranks = ranks

    def energies(self) -> tuple[Tensor, ...]:
        """For each rank the energy in the leading singular values of the effective weight's unfolding, cumulated."""
        weight, found = self.effective().detach().double(), []
        for mode in self.decomposition.modes:
            matrix = unfold(weight, 0 if mode == "out" else 1)
            squares = torch.linalg.eigvalsh(matrix @ matrix.T).flip(0).clamp_min(0)
            found.append(squares.cumsum(0) / squares.sum().clamp_min(1e-300))
        return tuple(found)


def parallels(module: nn.Module) -> Mapping[str, Parallel]:
    """The parallel layers of a network by name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, Parallel)}


def energy_ranks(energies: Sequence[Tensor], threshold: float, most: Ranks) -> Ranks:
    """For each unfolding the smallest rank that holds a share of its energy, at most the one there is."""
    return tuple(
        min(int((cumulated < threshold).sum()) + 1, top) for cumulated, top in zip(energies, most, strict=True)
    )

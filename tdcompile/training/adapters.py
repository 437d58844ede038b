"""``Parallel``: a layer's dense weight beside its low-rank adapter, and a share that moves from one to the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tdcompile.core.decomposition import Decomposition
from tdcompile.core.registry import make
from tdcompile.ir.layer import Layer, owner
from tdcompile.ir.plan import Ranks
from tdcompile.ir.saved_classes import saved_as
from tdcompile.numerics.low_rank import unfold


@saved_as("parallel", "tdcompile.progressive:Parallel")
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

    Attributes:
        stays: the layer stays dense, with the weight that it is computed with: its adapter costs no less.
    """

    stays = False

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
        self.shell = layer.build()  # knows strides and padding; the weight is computed, and there while it is needed
        for name in ("weight", "bias"):
            del owner(self.shell)._parameters[name]
            owner(self.shell).__dict__[name] = None
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
        held = owner(self.shell).__dict__  # past ``Module.__setattr__``, which would take the bias for the shell's own
        held["weight"], held["bias"] = self.effective(), self.bias
        try:
            for part in self.shell if isinstance(self.shell, nn.Sequential) else (self.shell,):
                input = part.forward(input)  # not called: hooks find no layer of the network here
        finally:
            held["weight"] = held["bias"] = None
        return input

    @torch.no_grad()
    def shrink(self, ranks: Ranks) -> None:
        """Truncate the adapter in place: its own best approximation at fewer ranks, so that nothing else is lost.

        The parameters keep their shapes, with zeros behind the ranks that are left: there both neighbours of every zero
        are zero, and no gradient reaches it. What is cut off does not go into the dense part.
        """
        factors = self.decomposition.factorize(self.layer, self.adapter(), ranks, None)
        for parameter, factor in zip(self.factors.parameters(), factors, strict=True):
            parameter.grad = None
            parameter.zero_()
            parameter[_corner(factor.shape)] = factor.to(parameter)
        self.ranks = ranks

    def truncated(self) -> list[Tensor]:
        """θ at the ranks that are left, detached."""
        parts = self.decomposition.blueprint(self.layer, self.ranks)
        pairs = zip(self.factors.parameters(), parts, strict=True)
        return [factor.detach()[_corner(part.weight_shape)].clone() for factor, part in pairs]

    def get_extra_state(self) -> Tensor:
        """The share and the ranks, so that training can go on from a state dict."""
        return torch.tensor([self.share, *self.ranks], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Share and ranks as they were."""
        share, *ranks = state.tolist()
        self.share, self.ranks = share, tuple(map(int, ranks))

    def energies(self) -> tuple[Tensor, ...]:
        """For each rank the energy in the leading singular values of the effective weight's unfolding, cumulated."""
        weight, found = self.effective().detach().double(), []
        for mode in self.decomposition.modes:
            matrix = unfold(weight, 0 if mode == "out" else 1)
            squares = torch.linalg.eigvalsh(matrix @ matrix.T).flip(0).clamp_min(0)
            found.append(squares.cumsum(0) / squares.sum().clamp_min(1e-300))
        return tuple(found)


def _corner(shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)


def parallel_layers(module: nn.Module) -> Mapping[str, Parallel]:
    """The parallel layers of a network by name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, Parallel)}


def energy_ranks(energies: Sequence[Tensor], threshold: float, most: Ranks) -> Ranks:
    """For each unfolding the smallest rank that holds a share of its energy, at most the one there is."""
    return tuple(
        min(int((cumulated < threshold).sum()) + 1, top) for cumulated, top in zip(energies, most, strict=True)
    )

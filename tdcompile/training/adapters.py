"""``Parallel``: a dense weight beside its low-rank adapter, blended by a share that training anneals to the adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tdcompile.core.decomposition import Decomposition
from tdcompile.core.registry import make
from tdcompile.ir.layer import Layer, Ranks, owner
from tdcompile.ir.saved_classes import saved_as
from tdcompile.numerics.covariance import Identity
from tdcompile.numerics.low_rank import unfold


@saved_as("parallel", "tdcompile.progressive:Parallel")
class Parallel(nn.Module):
    """Layer with the weight a (W₀ − T(θ₀)) + T(θ): the dense layer at a = 1 and θ = θ₀, low rank at a = 0.

    The share a falls during training; W₀ and θ₀ are frozen.

    Args:
        layer: the layer's shape.
        form: text form of its decomposition.
        ranks: ranks of the adapter.
        weight: W₀, in the layer's weight shape.
        factors: θ₀, the adapter's initial factors; their composition is subtracted from W₀.
        bias: the layer's bias, which is trained.
        zero: start from a zero adapter beside the whole W₀; the layer equals the dense layer in both cases.

    Attributes:
        stays: keep the layer dense at the end, with its effective weight, because its adapter is not cheaper.
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
        self.shell = layer.build()  # knows strides and padding; holds the computed weight only during ``forward``
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
        """Return the decomposition, made from its text form."""
        return make(Decomposition, self.form)

    def adapter(self) -> Tensor:
        """Return T(θ), in the shape of the weight."""
        return self.decomposition.reconstruct(self.layer, [*self.factors.parameters()])

    def effective(self) -> Tensor:
        """Return the weight that ``forward`` uses."""
        adapter = self.adapter()
        return adapter if self.share == 0 else self.share * self.gap + adapter

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer with its effective weight.

        The argument is named as in torch's layers, which callers may pass by keyword.
        """
        held = owner(self.shell).__dict__  # bypasses ``Module.__setattr__``, which would register the bias in the shell
        held["weight"], held["bias"] = self.effective(), self.bias
        try:
            for part in self.shell if isinstance(self.shell, nn.Sequential) else (self.shell,):
                input = part.forward(input)  # not ``part(...)``: hooks must not see the shell
        finally:
            held["weight"] = held["bias"] = None
        return input

    @torch.no_grad()
    def shrink(self, ranks: Ranks) -> None:
        """Truncate the adapter in place to its own best approximation at fewer ranks.

        The parameters keep their shapes, with zeros beyond the new ranks. Both factors are zero there, so that no
        gradient reaches them. The dense part does not take over the truncated components.
        """
        weight = self.adapter()
        factors = self.decomposition.factorize(self.layer, weight, ranks, Identity.of(weight))
        for parameter, factor in zip(self.factors.parameters(), factors, strict=True):
            parameter.grad = None
            parameter.zero_()
            parameter[_corner(factor.shape)] = factor.to(parameter)
        self.ranks = ranks

    def truncated(self) -> list[Tensor]:
        """Return θ at the current ranks, detached."""
        parts = self.decomposition.blueprint(self.layer, self.ranks)
        pairs = zip(self.factors.parameters(), parts, strict=True)
        return [factor.detach()[_corner(part.weight_shape)].clone() for factor, part in pairs]

    def get_extra_state(self) -> Tensor:
        """Return the share and the ranks, so that training can resume from a state dict."""
        return torch.tensor([self.share, *self.ranks], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the share and the ranks."""
        share, *ranks = state.tolist()
        self.share, self.ranks = share, tuple(map(int, ranks))

    def energies(self) -> tuple[Tensor, ...]:
        """Return, for each rank, the cumulated energy shares of the effective weight's unfolding, largest first."""
        weight, found = self.effective().detach().double(), []
        for mode in self.decomposition.modes:
            matrix = unfold(weight, 0 if mode == "out" else 1)
            squares = torch.linalg.eigvalsh(matrix @ matrix.T).flip(0).clamp_min(0)
            found.append(squares.cumsum(0) / squares.sum().clamp_min(1e-300))
        return tuple(found)


def _corner(shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)


def parallel_layers(module: nn.Module) -> Mapping[str, Parallel]:
    """Return the ``Parallel`` layers of a network by name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, Parallel)}


def energy_ranks(energies: Sequence[Tensor], threshold: float, most: Ranks) -> Ranks:
    """Return, for each unfolding, the smallest rank whose energy share reaches the threshold, at most ``most``."""
    return tuple(
        min(int((cumulated < threshold).sum()) + 1, top) for cumulated, top in zip(energies, most, strict=True)
    )

"""``cp``: the three-layer CP of a convolution."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.core.decomposition import Decomposition, relative_error
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import Candidate, RankPlan
from tdcompile.core.registry import make
from tdcompile.errors import InputError
from tdcompile.ir.diagnostics import Diagnostic
from tdcompile.ir.layer import Layer
from tdcompile.ir.target import Cost
from tdcompile.numerics.covariance import Covariance, Full, Identity
from tdcompile.numerics.cp_correction import sensitivity
from tdcompile.passes.decompose import _cp as polyadic
from tdcompile.passes.decompose.cp import CP


def layer_of(*channels: int, kernel: tuple[int, ...] = (3, 3), bias: bool = True) -> Layer:
    ones = (1,) * len(kernel)
    padding = tuple((k // 2, k // 2) for k in kernel)
    return Layer("conv", channels[0], channels[1], (14,) * len(kernel), kernel, ones, padding, ones, bias=bias)


def weight_of(layer: Layer) -> torch.Tensor:
    """With a decaying spectrum, as trained weights have."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(layer.weight_shape, generator=generator)
    for axis in (0, 1):
        size = weight.shape[axis]
        mix = torch.randn(size, size, generator=generator) * torch.arange(1, size + 1) ** -0.7
        weight = torch.tensordot(weight, mix, dims=([axis], [1])).movedim(-1, axis)
    return weight


def moments_of(layer: Layer) -> Covariance:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1000, layer.in_channels, layer.taps, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(0.05, 2, layer.in_channels)[:, None] + 0.5 * x.roll(1, 2)
    return Full(x.flatten(1).T @ x.flatten(1) / 1000, 1000)


def test_the_spatial_settings_are_the_depthwise_layers() -> None:
    module = nn.Conv2d(6, 10, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2), padding_mode="circular")
    layer = Layer.of(module, (9, 8))
    assert layer is not None
    first, depthwise, last = CP().blueprint(layer, (5,))
    assert (first.in_channels, first.out_channels, first.extent, first.taps, first.bias) == (6, 5, (9, 8), 1, False)
    assert (depthwise.groups, depthwise.kernel, depthwise.stride) == (5, (3, 3), (2, 1))
    assert (depthwise.padding, depthwise.dilation) == (((1, 1), (2, 2)), (1, 2))
    assert (depthwise.padding_mode, depthwise.bias) == ("circular", False)
    assert (last.in_channels, last.out_channels, last.extent, last.bias) == (5, 10, layer.out_extent, True)
    assert sum(part.params for part in (first, depthwise, last)) == 5 * (6 + 10 + 9) + 10


@pytest.mark.parametrize(
    ("module", "extent", "code"),
    [
        (nn.Linear(8, 8), (), "kind"),
        (nn.Conv2d(8, 8, 1), (5, 5), "pointwise"),
        (nn.Conv2d(8, 8, 3, groups=2), (5, 5), "grouped"),
        (nn.Conv2d(8, 8, 3, groups=8), (5, 5), "depthwise"),
    ],
)
def test_what_it_cannot_do_it_refuses(module: nn.Module, extent: tuple[int, ...], code: str) -> None:
    layer = Layer.of(module, extent)
    assert layer is not None
    refusal = CP().refuse(layer)
    assert refusal is not None
    assert refusal.code == code


def test_kernels_of_any_dimension_are_accepted() -> None:
    for kernel in ((5,), (1, 3), (3, 3, 3)):
        assert CP().refuse(layer_of(8, 8, kernel=kernel)) is None


def test_about_a_dozen_ranks_are_proposed_up_to_where_dense_is_cheaper() -> None:
    layer = layer_of(256, 256)
    space = [rank for (rank,) in CP().rank_space(layer, 16)]
    assert 8 <= len(space) <= 12
    assert space == sorted(set(space))
    assert space[0] == 16
    assert space[-1] == 256 * 9
    dearest = 256 * 256 * 9 // (256 + 256 + 9)
    assert dearest - 16 <= space[-2] < dearest
    assert CP().rank_space(layer_of(3, 4), 16) == [(12,)]


@pytest.mark.parametrize("aware", [False, True], ids=["plain", "data"])
def test_the_estimates_are_near_the_errors_and_not_below_them(aware: bool) -> None:
    layer = layer_of(96, 64)
    weight = weight_of(layer)
    moments = moments_of(layer) if aware else Identity.of(weight)
    space = CP().rank_space(layer, 16)
    told = CP().errors(layer, weight, space, moments)
    assert told[-1] == 0.0
    assert all(a > b for a, b in pairwise(told))
    for ranks, estimate in list(zip(space, told, strict=True))[:-1:3]:
        factors = CP().factorize(layer, weight, ranks, moments)
        truth = relative_error(weight, CP().reconstruct(layer, factors), moments)
        assert -0.02 <= estimate - truth <= 0.1


def test_errors_are_told_for_any_ranks_in_any_order() -> None:
    layer = layer_of(16, 12)
    weight = weight_of(layer)
    first = CP().errors(layer, weight, [(8,), (40,)], Identity.of(weight))
    assert CP().errors(layer, weight, [(40,), (108,), (8,)], Identity.of(weight)) == [first[1], 0.0, first[0]]
    assert CP().errors(layer, weight, [], Identity.of(weight)) == []


def test_data_lowers_the_error_of_the_output() -> None:
    layer = layer_of(32, 24)
    weight, moments = weight_of(layer), moments_of(layer)
    plain, aware = (
        relative_error(weight, CP().reconstruct(layer, CP().factorize(layer, weight, (24,), seen)), moments)
        for seen in (Identity.of(weight), moments)
    )
    assert aware < 0.95 * plain


@pytest.mark.parametrize("aware", [False, True], ids=["plain", "data"])
def test_correction_lowers_the_sensitivity_for_a_bounded_error(aware: bool) -> None:
    layer = layer_of(32, 24)
    weight = weight_of(layer)
    moments = moments_of(layer) if aware else Identity.of(weight)
    errors, sensitivities = [], []
    for growth in (1.0, 1.02, 1.1):
        form = CP(correct=growth)
        factors = form.factorize(layer, weight, (40,), moments)
        errors.append(relative_error(weight, form.reconstruct(layer, factors), moments))
        *others, last = (factor.flatten(1) for factor in factors)
        sensitivities.append(sensitivity([last, *(other.T for other in others)]))
        assert errors[-1] <= growth * errors[0] * (1 + 1e-5)
        (told,) = form.errors(layer, weight, [(40,)], moments)
        assert -0.02 <= told - errors[-1] <= 0.1
    assert sensitivities == sorted(sensitivities, reverse=True)
    assert sensitivities[1] < 0.8 * sensitivities[0]


def test_a_cp_that_stays_degenerate_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tdcompile.trace(nn.Sequential(nn.Conv2d(16, 12, 3)).eval(), (torch.randn(2, 16, 6, 6),))
    choice = Candidate(make(Decomposition, "cp"), (20,), 0.0, Cost())
    given = given.with_(facts=given.facts.having(RankPlan({"0": choice}, Cost(), Cost())))
    for limit, told in ((10.0, False), (0.1, True)):
        monkeypatch.setattr(polyadic, "DEGENERATE", limit)
        after = Pipeline.parse("factorize").run(given)
        reasons = [entry.text for entry in after.history if isinstance(entry, Diagnostic)]
        assert len(reasons) == told
        assert all("'0': its cp of rank 20 is degenerate: components" in reason for reason in reasons)
    direct = torch.randn(4, 30), torch.randn(5, 30), torch.randn(9, 30)  # ten thousand times what they add up to
    layer = layer_of(5, 4)
    huge = [direct[1].T, direct[2].T * 1e4, direct[0]]
    shapes = [part.weight_shape for part in CP().blueprint(layer, (30,))]
    factors = [f.reshape(shape) for f, shape in zip(huge, shapes, strict=True)]
    assert "rank 30" in str(CP().caution(layer, torch.randn(layer.weight_shape), factors))


@pytest.mark.parametrize("growth", ["0.9", "inf", "nan"])
def test_an_error_cannot_be_asked_to_shrink(growth: str) -> None:
    with pytest.raises(InputError, match=r"must be a number in \[1, inf\)"):
        CP.from_options({"correct": growth})
    assert CP.from_options({"correct": "1.0"}).correct == 1.0


def test_the_same_weight_gives_the_same_factors_bit_for_bit() -> None:
    layer = layer_of(16, 12)
    weight, moments = weight_of(layer), moments_of(layer)
    for seen in (Identity.of(weight), moments):
        torch.manual_seed(0)
        once = CP().factorize(layer, weight, (20,), seen)
        torch.manual_seed(1)
        again = CP().factorize(layer, weight.clone(), (20,), seen)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))

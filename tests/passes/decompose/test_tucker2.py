"""``tucker2``: the chain, its ranks, HOOI, orthonormal outer factors, and what moments and sweeps gain."""

import pytest
import torch
from torch import Tensor

from tdcompile.core.decomposition import relative_error
from tdcompile.core.plugin import Plugin
from tdcompile.ir.layer import Layer
from tdcompile.numerics.covariance import Covariance, Full, Identity
from tdcompile.passes.decompose.tucker2 import Tucker2

LAYER = Layer("conv", 12, 16, (9, 10), (3, 3), (2, 1), ((1, 1), (0, 1)), (1, 2), padding_mode="replicate")


def error(layer: Layer, weight: Tensor, ranks: tuple[int, int], moments: Covariance, sweeps: int = 3) -> float:
    form = Tucker2(sweeps=sweeps)
    return relative_error(weight, form.reconstruct(layer, form.factorize(layer, weight, ranks, moments)), moments)


def moments_of(layer: Layer) -> Covariance:
    torch.manual_seed(1)
    x = torch.randn(400, layer.in_channels, 6, 6, dtype=torch.float64)
    x = x + x.roll(1, 2) + x.roll(1, 3)
    x = torch.einsum("nchw,cd->ndhw", x, torch.randn(layer.in_channels, layer.in_channels, dtype=torch.float64)).relu()
    patches = torch.nn.functional.unfold(x, layer.kernel).movedim(1, 2).flatten(0, 1)
    return Full(patches.T @ patches / len(patches), len(patches))


def test_the_core_carries_the_geometry() -> None:
    first, core, last = Tucker2().blueprint(LAYER, (6, 4))
    assert [(part.in_channels, part.out_channels) for part in (first, core, last)] == [(12, 4), (4, 6), (6, 16)]
    assert first.extent == first.out_extent == core.extent == LAYER.extent
    assert (core.stride, core.padding, core.dilation) == (LAYER.stride, LAYER.padding, LAYER.dilation)
    assert [part.padding_mode for part in (first, core, last)] == ["zeros", "replicate", "zeros"]
    assert first.pointwise
    assert last.pointwise
    assert last.out_extent == LAYER.out_extent
    assert [part.bias for part in (first, core, last)] == [False, False, True]


@pytest.mark.parametrize(
    ("layer", "code"),
    [
        (Layer("linear", 8, 8), "pointwise"),
        (Layer("conv", 8, 8, (5, 5), (1, 1), (1, 1), ((0, 0),) * 2, (1, 1)), "pointwise"),
        (Layer("conv", 8, 8, (5, 5), (3, 3), (1, 1), ((1, 1),) * 2, (1, 1), groups=2), "grouped"),
        (Layer("conv", 8, 8, (5, 5), (3, 3), (1, 1), ((1, 1),) * 2, (1, 1), groups=8), "depthwise"),
        (Layer("conv", 4, 1, (9, 9), (2, 2), (3, 3), ((0, 0),) * 2, (1, 1)), "small"),
    ],
)
def test_what_it_does_not_fit_is_refused(layer: Layer, code: str) -> None:
    refusal = Tucker2().refuse(layer)
    assert refusal is not None
    assert refusal.code == code
    assert Tucker2().refuse(LAYER) is None


def test_the_rank_space_is_a_grid_of_pairs_that_pay() -> None:
    layer = Layer("conv", 512, 256, (7, 7), (3, 3), (1, 1), ((1, 1),) * 2, (1, 1))
    space = Tucker2().rank_space(layer, 16)
    assert 100 < len(space) <= 400
    assert all(out <= 9 * in_ and in_ <= 9 * out for out, in_ in space)
    assert space[-1] == (256, 512)
    assert {in_ for _, in_ in space} >= {32, 256, 480}


def test_a_first_layer_is_reduced_at_its_output_alone() -> None:
    layer = Layer("conv", 3, 64, (32, 32), (3, 3), (1, 1), ((1, 1),) * 2, (1, 1))
    assert {in_ for _, in_ in Tucker2().rank_space(layer, 16)} == {3}
    assert Tucker2().exact_ranks(layer) == (27, 3)


def test_a_weight_of_low_multilinear_rank_is_found_exactly() -> None:
    torch.manual_seed(0)
    weight = torch.einsum("to,oihw,ci->tchw", torch.randn(16, 5), torch.randn(5, 4, 3, 3), torch.randn(12, 4))
    assert error(LAYER, weight, (5, 4), Identity.of(weight)) < 1e-6
    assert Tucker2().errors(LAYER, weight, [(5, 4)], Identity.of(weight))[0] < 1e-6
    assert error(LAYER, weight, (5, 4), moments_of(LAYER)) < 1e-5
    assert error(LAYER, weight, (4, 4), Identity.of(weight)) > 0.01


@pytest.mark.parametrize("data", [False, True])
def test_sweeps_lower_the_error_and_what_is_told_is_a_bound(data: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(LAYER.weight_shape)
    moments = moments_of(LAYER) if data else Identity.of(weight)
    for ranks in ((4, 4), (8, 6), (12, 4)):
        by_sweeps = [error(LAYER, weight, ranks, moments, sweeps) for sweeps in (0, 1, 3, 6)]
        assert by_sweeps == sorted(by_sweeps, reverse=True)
        told = Tucker2().errors(LAYER, weight, [ranks], moments)[0]
        assert by_sweeps[2] <= told <= by_sweeps[2] + 0.05


def test_data_serve_the_output_better() -> None:
    torch.manual_seed(0)
    weight, moments = torch.randn(LAYER.weight_shape), moments_of(LAYER)
    plain = Tucker2().factorize(LAYER, weight, (8, 6), Identity.of(weight))
    of_plain = relative_error(weight, Tucker2().reconstruct(LAYER, plain), moments)
    assert error(LAYER, weight, (8, 6), moments) < 0.9 * of_plain


def test_moments_that_say_nothing_give_the_plain_factors() -> None:
    torch.manual_seed(0)
    weight = torch.randn(LAYER.weight_shape)
    plain, white = Identity.of(weight), Full(torch.eye(108, dtype=torch.float64), 1000)
    assert error(LAYER, weight, (8, 6), white, 20) == pytest.approx(error(LAYER, weight, (8, 6), plain, 20), abs=2e-3)


@pytest.mark.parametrize("data", [False, True])
def test_the_outer_factors_are_orthonormal_but_for_their_scale(data: bool) -> None:
    first, core, last = Tucker2().factorize(
        LAYER, torch.randn(LAYER.weight_shape), (8, 6), moments_of(LAYER) if data else Identity(108)
    )
    for rows in (first.flatten(1), last.flatten(1).T):
        gram = rows @ rows.T
        assert torch.allclose(gram, gram[0, 0] * torch.eye(len(rows)), atol=1e-4 * float(gram[0, 0]))
    gains = [float(factor.norm()) / len(factor) ** 0.5 for factor in (first, core, last)]
    assert max(gains) == pytest.approx(min(gains), rel=1e-4)


@pytest.mark.parametrize("ranks", [(16, 1), (1, 12)])
def test_a_plan_may_ask_for_ranks_outside_the_space(ranks: tuple[int, int]) -> None:
    weight = torch.randn(LAYER.weight_shape)
    for moments in (Identity.of(weight), moments_of(LAYER)):
        factors = Tucker2().factorize(LAYER, weight, ranks, moments)
        assert [tuple(f.shape) for f in factors] == [p.weight_shape for p in Tucker2().blueprint(LAYER, ranks)]
        assert all(bool(torch.isfinite(f).all()) for f in factors)


def test_an_input_that_is_always_zero_gives_finite_factors() -> None:
    weight, moments = torch.randn(LAYER.weight_shape), Full(torch.zeros(108, 108, dtype=torch.float64), 10)
    assert all(bool(torch.isfinite(f).all()) for f in Tucker2().factorize(LAYER, weight, (8, 6), moments))
    assert Tucker2().errors(LAYER, weight, [(8, 6), (4, 4)], moments) == [0.0, 0.0]


def test_sweeps_are_an_option() -> None:
    assert str(Tucker2(sweeps=5).spec()) == "tucker2{sweeps=5}"
    assert issubclass(Tucker2, Plugin)

"""``spatial``: geometry parts by axis, one SVD where there are no data, and a map that data choose where there are."""

import pytest
import torch

from tdcompile.core.decomposition import relative_error
from tdcompile.ir.layer import Layer
from tdcompile.numerics.covariance import Full, Identity
from tdcompile.passes.decompose.spatial import Spatial

LAYER = Layer("conv", 6, 8, (9, 10), (3, 5), (2, 1), ((1, 2), (2, 3)), (1, 2), padding_mode="circular")


def test_each_factor_has_the_geometry_of_its_axis() -> None:
    vertical, horizontal = Spatial().blueprint(LAYER, (4,))
    assert (vertical.kernel, vertical.stride, vertical.padding) == ((3, 1), (2, 1), ((1, 2), (0, 0)))
    assert (horizontal.kernel, horizontal.stride, horizontal.padding) == ((1, 5), (1, 1), ((0, 0), (2, 3)))
    assert (vertical.dilation, horizontal.dilation) == ((1, 1), (1, 2))
    assert vertical.padding_mode == horizontal.padding_mode == "circular"
    assert horizontal.out_extent == LAYER.out_extent


@pytest.mark.parametrize(
    ("layer", "code"),
    [
        (Layer("linear", 8, 8), "pointwise"),
        (Layer("conv", 8, 8, (5,), (3,), (1,), ((1, 1),), (1,)), "kernel"),
        (Layer("conv", 8, 8, (5, 5), (1, 3), (1, 1), ((0, 0), (1, 1)), (1, 1)), "kernel"),
        (Layer("conv", 8, 8, (5, 5), (3, 3), (1, 1), ((1, 1),) * 2, (1, 1), groups=8), "depthwise"),
        (Layer("conv", 8, 8, (5, 5), (3, 3), (1, 1), ((1, 1),) * 2, (1, 1), groups=2), "grouped"),
        (Layer("conv", 1, 1, (9, 9), (2, 2), (2, 2), ((0, 0),) * 2, (1, 1)), "small"),
    ],
)
def test_what_it_does_not_fit_is_refused(layer: Layer, code: str) -> None:
    refusal = Spatial().refuse(layer)
    assert refusal is not None
    assert refusal.code == code
    assert Spatial().refuse(LAYER) is None


def test_a_separable_kernel_has_rank_one() -> None:
    weight = torch.einsum("tx,cy->tcyx", torch.randn(8, 5), torch.randn(6, 3))
    factors = Spatial().factorize(LAYER, weight, (1,), Identity.of(weight))
    assert relative_error(weight, Spatial().reconstruct(LAYER, factors), Identity.of(weight)) < 1e-6


def test_the_plain_error_is_that_of_one_svd() -> None:
    torch.manual_seed(0)
    weight = torch.randn(LAYER.weight_shape)
    values = torch.linalg.svdvals(weight.double().permute(1, 2, 0, 3).reshape(18, 40))
    space = [(4,), (9,), (18,)]
    for (rank,), told in zip(space, Spatial().errors(LAYER, weight, space, Identity.of(weight)), strict=True):
        factors = Spatial().factorize(LAYER, weight, (rank,), Identity.of(weight))
        truth = relative_error(weight, Spatial().reconstruct(LAYER, factors), Identity.of(weight))
        assert truth == pytest.approx(float(values[rank:].norm() / values.norm()), abs=1e-6)
        assert told == pytest.approx(truth, abs=1e-6)


def test_the_first_factor_is_orthonormal_but_for_its_scale() -> None:
    first, _ = Spatial().factorize(LAYER, torch.randn(LAYER.weight_shape), (4,), Identity(90))
    gram = first.flatten(1) @ first.flatten(1).T
    assert torch.allclose(gram, gram[0, 0] * torch.eye(4), atol=1e-5 * float(gram[0, 0]))


def test_an_input_that_is_always_zero_gives_finite_factors() -> None:
    weight, moments = torch.randn(LAYER.weight_shape), Full(torch.zeros(90, 90, dtype=torch.float64), 10)
    assert all(bool(torch.isfinite(f).all()) for f in Spatial().factorize(LAYER, weight, (4,), moments))
    assert Spatial().errors(LAYER, weight, [(4,), (18,)], moments) == [0.0, 0.0]


def test_moments_that_no_kronecker_product_fits_still_do_no_harm() -> None:
    torch.manual_seed(3)
    for trial in range(10):
        weight = torch.randn(LAYER.weight_shape)
        x = (torch.randn(300, 90, dtype=torch.float64) @ torch.randn(90, 90, dtype=torch.float64)).relu()
        moments = Full(x.T @ x / 300, 300)
        for rank in (2, 7, 13):
            plain, data = (Spatial().factorize(LAYER, weight, (rank,), m) for m in (Identity.of(weight), moments))
            errors = [relative_error(weight, Spatial().reconstruct(LAYER, f), moments) for f in (plain, data)]
            assert errors[1] <= errors[0] + 1e-6, trial
            assert Spatial().errors(LAYER, weight, [(rank,)], moments)[0] == pytest.approx(errors[1], abs=1e-5)

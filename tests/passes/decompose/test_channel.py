"""``channel``: the first factor carries the layer's geometry; with moments it is the output's principal components."""

import pytest
import torch

from tdcompile.core.decomposition import relative_error
from tdcompile.ir.layer import Layer
from tdcompile.numerics.covariance import Full
from tdcompile.passes.decompose.channel import Channel

LAYER = Layer("conv", 8, 12, (9, 10), (3, 5), (2, 1), ((1, 1), (2, 3)), (1, 2), padding_mode="reflect")


def test_the_first_factor_is_the_layer_with_fewer_outputs() -> None:
    first, last = Channel().blueprint(LAYER, (4,))
    assert (first.kernel, first.stride, first.padding, first.dilation) == ((3, 5), (2, 1), ((1, 1), (2, 3)), (1, 2))
    assert (first.padding_mode, last.padding_mode) == ("reflect", "zeros")
    assert (first.out_channels, last.in_channels, last.out_channels) == (4, 4, 12)
    assert last.pointwise
    assert last.out_extent == LAYER.out_extent


@pytest.mark.parametrize(
    ("layer", "code"),
    [
        (Layer("linear", 8, 8), "pointwise"),
        (Layer("conv", 8, 8, (5,), (1,), (1,), ((0, 0),), (1,)), "pointwise"),
        (Layer("conv", 8, 8, (5,), (3,), (1,), ((1, 1),), (1,), groups=4), "grouped"),
        (Layer("conv", 8, 8, (5,), (3,), (1,), ((1, 1),), (1,), groups=8), "depthwise"),
        (Layer("conv", 64, 1, (5,), (3,), (1,), ((1, 1),), (1,)), "small"),
    ],
)
def test_what_it_does_not_fit_is_refused(layer: Layer, code: str) -> None:
    refusal = Channel().refuse(layer)
    assert refusal is not None
    assert refusal.code == code
    assert Channel().refuse(LAYER) is None


def test_the_exact_rank_is_bounded_by_both_sides() -> None:
    assert Channel().exact_ranks(LAYER) == (12,)
    assert Channel().exact_ranks(Layer("conv", 1, 64, (9, 9), (3, 3), (1, 1), ((1, 1),) * 2, (1, 1))) == (9,)


def test_with_moments_the_error_is_the_least_that_the_rank_allows() -> None:
    torch.manual_seed(0)
    weight = torch.randn(LAYER.weight_shape)
    x = torch.randn(600, 120).relu() + 0.3
    moments = Full((x.T @ x / 600).double(), 600)
    flat = weight.double().flatten(1)
    values = torch.linalg.eigvalsh(flat @ moments.dense() @ flat.T).flip(0)
    for rank in (1, 4, 8):
        factors = Channel().factorize(LAYER, weight, (rank,), moments)
        truth = relative_error(weight, Channel().reconstruct(LAYER, factors), moments)
        assert truth == pytest.approx(float((values[rank:].sum() / values.sum()).sqrt()), abs=1e-5)
        assert Channel().errors(LAYER, weight, [(rank,)], moments)[0] == pytest.approx(truth, abs=1e-5)

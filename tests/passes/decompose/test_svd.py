"""``svd``: where the stride goes, what it refuses, the textbook error, and what moments change."""

import pytest
import torch
from torch import nn

from tdcompile.core.decomposition import relative_error
from tdcompile.ir.layer import Layer
from tdcompile.numerics.covariance import Full, Identity
from tdcompile.passes.decompose.svd import SVD

LINEAR = Layer("linear", 24, 16)
POINT = Layer("conv", 24, 16, (8, 9), (1, 1), (2, 3), ((1, 1), (0, 0)), (1, 1), bias=False)


def test_the_stride_goes_on_the_first_factor() -> None:
    first, last = SVD().blueprint(POINT, (5,))
    assert first.stride == (2, 3)
    assert first.padding == ((1, 1), (0, 0))
    assert first.out_extent == last.extent == POINT.out_extent
    assert (last.stride, last.padding) == ((1, 1), ((0, 0), (0, 0)))
    assert first.macs + last.macs == 5 * (24 + 16) * 5 * 3


def test_a_linear_layer_keeps_its_extent() -> None:
    layer = Layer("linear", 24, 16, (7,))
    assert [part.extent for part in SVD().blueprint(layer, (5,))] == [(7,), (7,)]


@pytest.mark.parametrize(
    ("layer", "code"),
    [
        (Layer("conv", 8, 8, (5, 5), (3, 3), (1, 1), ((1, 1),) * 2, (1, 1)), "kernel"),
        (Layer("conv", 8, 8, (5, 5), (1, 1), (1, 1), ((0, 0),) * 2, (1, 1), groups=2), "grouped"),
        (Layer("conv", 8, 8, (5, 5), (1, 1), (1, 1), ((0, 0),) * 2, (1, 1), groups=8), "depthwise"),
        (Layer("linear", 100, 1), "small"),
    ],
)
def test_what_it_does_not_fit_is_refused(layer: Layer, code: str) -> None:
    refusal = SVD().refuse(layer)
    assert refusal is not None
    assert refusal.code == code
    assert SVD().refuse(LINEAR) is None


def test_ranks_stop_at_break_even() -> None:
    space = SVD().rank_space(Layer("linear", 64, 64), 8)
    assert space == [(8,), (16,), (24,), (64,)]  # 32 · (64 + 64) is what the dense layer costs


def test_the_plain_error_is_the_tail_of_the_singular_values() -> None:
    weight = torch.randn(16, 24)
    values = torch.linalg.svdvals(weight.double())
    factors = SVD().factorize(LINEAR, weight, (6,), Identity.of(weight))
    truth = relative_error(weight, SVD().reconstruct(LINEAR, factors), Identity.of(weight))
    assert truth == pytest.approx(float(values[6:].norm() / values.norm()), abs=1e-6)
    assert SVD().errors(LINEAR, weight, [(6,)], Identity.of(weight))[0] == pytest.approx(truth, abs=1e-6)


def test_moments_trade_weights_for_outputs() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 24)
    x = torch.randn(500, 24) * torch.logspace(0, -2, 24)
    moments = Full((x.T @ x / 500).double(), 500)
    plain, data = (SVD().factorize(LINEAR, weight, (6,), m) for m in (Identity.of(weight), moments))
    of_output = [relative_error(weight, SVD().reconstruct(LINEAR, f), moments) for f in (plain, data)]
    of_weight = [relative_error(weight, SVD().reconstruct(LINEAR, f), Identity.of(weight)) for f in (plain, data)]
    assert of_output[1] < 0.5 * of_output[0]
    assert of_weight[0] < of_weight[1]
    dense = x @ weight.T
    through = x @ data[0].T @ data[1].T
    assert float((dense - through).norm() / dense.norm()) == pytest.approx(of_output[1], rel=1e-4)


def test_the_built_module_is_two_linear_layers() -> None:
    weight, bias = torch.randn(16, 24), torch.randn(16)
    built = SVD().build(LINEAR, (6,), SVD().factorize(LINEAR, weight, (6,), Identity.of(weight)), bias)
    assert [type(part) for part in built] == [nn.Linear, nn.Linear]
    assert built[0].bias is None
    assert torch.equal(built[1].bias, bias)


def test_a_layer_whose_gram_matrix_is_worked_in_single_precision() -> None:
    torch.manual_seed(0)
    layer, weight = Layer("linear", 2100, 2080), torch.randn(2080, 40) @ torch.randn(40, 2100)
    factors = SVD().factorize(layer, weight, (40,), Identity.of(weight))
    assert relative_error(weight, SVD().reconstruct(layer, factors), Identity.of(weight)) < 1e-4

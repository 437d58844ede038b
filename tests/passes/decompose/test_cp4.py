"""``cp4``: Lebedev's four layers."""

import pytest
import torch
from torch import nn

from tdcompile.core.decomposition import relative_error
from tdcompile.ir.layer import Layer
from tdcompile.numerics.covariance import Identity
from tdcompile.passes.decompose.cp4 import CP4


def test_each_axis_has_its_own_depthwise_layer() -> None:
    module = nn.Conv2d(6, 10, (3, 5), stride=(2, 3), padding=(1, 2), dilation=(2, 1), padding_mode="reflect")
    layer = Layer.of(module, (11, 13))
    assert layer is not None
    first, rows, columns, last = CP4().blueprint(layer, (7,))
    assert (first.taps, first.extent) == (1, (11, 13))
    assert (rows.kernel, rows.stride, rows.padding, rows.dilation) == ((3, 1), (2, 1), ((1, 1), (0, 0)), (2, 1))
    assert (columns.kernel, columns.stride, columns.padding) == ((1, 5), (1, 3), ((0, 0), (2, 2)))
    assert columns.extent == (layer.out_extent[0], 13)
    assert rows.groups == columns.groups == 7
    assert {part.padding_mode for part in (rows, columns)} == {"reflect"}
    assert (last.extent, last.bias) == (layer.out_extent, True)
    assert sum(part.params for part in (first, rows, columns, last)) == 7 * (6 + 10 + 3 + 5) + 10


@pytest.mark.parametrize(
    ("module", "extent", "code"),
    [
        (nn.Linear(8, 8), (), "kind"),
        (nn.Conv2d(8, 8, 1), (5, 5), "pointwise"),
        (nn.Conv2d(8, 8, (1, 3)), (5, 5), "kernel"),
        (nn.Conv1d(8, 8, 3), (5,), "kernel"),
        (nn.Conv3d(8, 8, 3), (5, 5, 5), "kernel"),
        (nn.Conv2d(8, 8, 3, groups=2), (5, 5), "grouped"),
        (nn.Conv2d(8, 8, 3, groups=8), (5, 5), "depthwise"),
    ],
)
def test_what_it_cannot_do_it_refuses(module: nn.Module, extent: tuple[int, ...], code: str) -> None:
    layer = Layer.of(module, extent)
    assert layer is not None
    refusal = CP4().refuse(layer)
    assert refusal is not None
    assert refusal.code == code


def test_a_separable_kernel_is_found_at_rank_one() -> None:
    module = nn.Conv2d(5, 4, 3)
    layer = Layer.of(module, (8, 8))
    assert layer is not None
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(size, generator=generator) for size in (4, 5, 3, 3)]
    weight = torch.einsum("t,c,y,x->tcyx", *vectors)
    factors = CP4().factorize(layer, weight, (1,), Identity.of(weight))
    assert relative_error(weight, CP4().reconstruct(layer, factors), Identity.of(weight)) < 1e-5
    norms = [float(factor.norm()) for factor in factors]
    assert max(norms) == pytest.approx(min(norms), rel=1e-4)


def test_a_chain_cut_short_still_computes_the_weight_it_reconstructs() -> None:
    module = nn.Conv2d(8, 6, (3, 2), stride=(1, 2), padding="valid")
    layer = Layer.of(module, (9, 8))
    assert layer is not None
    factors = CP4().factorize(layer, module.weight, (5,), Identity.of(module.weight))
    built = CP4().build(layer, (5,), factors, module.bias)
    x = torch.randn(2, 8, 9, 8)
    with torch.no_grad():
        module.weight.copy_(CP4().reconstruct(layer, factors))
        assert torch.allclose(built(x), module(x), atol=1e-5)

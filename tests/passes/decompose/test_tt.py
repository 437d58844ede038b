"""``tt``: the four-core tensor train of a convolution."""

import math

import pytest
import tensorly as tl
import torch
from tensorly.decomposition import tensor_train
from torch import nn

from tdcompile.core.decomposition import relative_error
from tdcompile.ir.layer import Layer
from tdcompile.numerics.covariance import Covariance, Full, Identity
from tdcompile.passes.decompose.tt import TT
from tdcompile.planning.rank_grid import weights_of

MODULE = nn.Conv2d(24, 20, 3, padding=1)
LAYER = Layer("conv", 24, 20, (8, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))


def weight() -> torch.Tensor:
    return torch.randn(LAYER.weight_shape, generator=torch.Generator().manual_seed(0))


def moments() -> Covariance:
    x = torch.randn(800, 24, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = (x * torch.linspace(0.05, 2, 24)[:, None] + 0.5 * x.roll(1, 2)).flatten(1)
    return Full(x.T @ x / 800, 800)


def test_the_middle_layers_are_full_and_take_one_axis_each() -> None:
    module = nn.Conv2d(6, 10, (3, 5), stride=(2, 3), padding=(1, 2), dilation=(2, 1))
    layer = Layer.of(module, (11, 13))
    assert layer is not None
    first, rows, columns, last = TT().blueprint(layer, (4, 7, 5))
    assert [(part.in_channels, part.out_channels) for part in (first, rows, columns, last)] == [
        (6, 4),
        (4, 7),
        (7, 5),
        (5, 10),
    ]
    assert (rows.kernel, rows.stride, rows.padding, rows.dilation) == ((3, 1), (2, 1), ((1, 1), (0, 0)), (2, 1))
    assert (columns.kernel, columns.stride, columns.padding) == ((1, 5), (1, 3), ((0, 0), (2, 2)))
    assert rows.groups == columns.groups == 1
    assert sum(part.params for part in (first, rows, columns, last)) == 6 * 4 + 4 * 3 * 7 + 7 * 5 * 5 + 5 * 10 + 10


@pytest.mark.parametrize(
    ("module", "extent", "code"),
    [
        (nn.Linear(8, 8), (), "kind"),
        (nn.Conv2d(8, 8, 1), (5, 5), "pointwise"),
        (nn.Conv2d(8, 8, (3, 1)), (5, 5), "kernel"),
        (nn.Conv1d(8, 8, 3), (5,), "kernel"),
        (nn.Conv2d(8, 8, 3, groups=2), (5, 5), "grouped"),
        (nn.Conv2d(8, 8, 3, groups=8), (5, 5), "depthwise"),
    ],
)
def test_what_it_cannot_do_it_refuses(module: nn.Module, extent: tuple[int, ...], code: str) -> None:
    layer = Layer.of(module, extent)
    assert layer is not None
    refusal = TT().refuse(layer)
    assert refusal is not None
    assert refusal.code == code


def test_exact_ranks_are_the_short_sides_of_the_unfoldings() -> None:
    assert TT().exact_ranks(LAYER) == (24, min(24 * 3, 3 * 20), 20)


@pytest.mark.parametrize("ranks", [(8, 16, 8), (16, 40, 16)])
def test_the_error_is_that_of_tensorlys_train(ranks: tuple[int, ...]) -> None:
    factors = TT().factorize(LAYER, weight(), ranks, Identity.of(weight()))
    with tl.backend_context("pytorch"):
        train = tl.tt_to_tensor(tensor_train(weight().double().permute(1, 2, 3, 0), [1, *ranks, 1]))
    found = TT().reconstruct(LAYER, factors)
    assert torch.allclose(found.double(), train.permute(3, 0, 1, 2), atol=1e-5)


@pytest.mark.parametrize("kept", [0.35, 0.5, 0.8])
def test_one_rank_for_all_bonds_loses_less_than_ranks_in_proportion(kept: float) -> None:
    def lost(ranks: tuple[int, ...]) -> float:
        plain = Identity.of(weight())
        return relative_error(weight(), TT().reconstruct(LAYER, TT().factorize(LAYER, weight(), ranks, plain)), plain)

    exact = TT().exact_ranks(LAYER)
    proportional = [tuple(math.ceil(rank * i / 24) for rank in exact) for i in range(1, 24)]
    budget = kept * LAYER.params
    tied, other = (
        max((ranks for ranks in space if weights_of(TT(), LAYER, ranks) <= budget), key=sum)
        for space in (TT().rank_space(LAYER, 1), proportional)
    )
    assert len(set(tied)) == 1
    assert lost(tied) < 0.97 * lost(other), (tied, lost(tied), other, lost(other))


@pytest.mark.parametrize("aware", [False, True], ids=["plain", "data"])
def test_the_ends_are_orthogonal_and_the_middle_shares_the_scale(aware: bool) -> None:
    seen = moments() if aware else Identity.of(weight())
    first, rows, columns, last = TT().factorize(LAYER, weight(), (8, 16, 8), seen)
    for gram in (first.flatten(1) @ first.flatten(1).T, last.flatten(1).T @ last.flatten(1)):
        assert torch.allclose(gram, gram[0, 0] * torch.eye(8), atol=1e-5 * float(gram[0, 0]))
    ratio = rows.flatten(1).norm(dim=1) / columns.movedim(1, 0).flatten(1).norm(dim=1)
    assert torch.allclose(ratio, ratio.mean().expand(16), rtol=1e-3)


def test_data_lowers_the_error_of_the_output() -> None:
    seen = moments()
    plain, aware = (
        relative_error(weight(), TT().reconstruct(LAYER, TT().factorize(LAYER, weight(), (16, 32, 16), m)), seen)
        for m in (Identity.of(weight()), seen)
    )
    assert aware < 0.95 * plain


@pytest.mark.parametrize("aware", [False, True], ids=["plain", "data"])
def test_few_factorisations_tell_the_errors_of_all_ranks(aware: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdcompile.passes.decompose.tt.ESTIMATE", 0.0)
    seen = moments() if aware else Identity.of(weight())
    space = TT().rank_space(LAYER, 4)
    assert len(space) > 6
    told = TT().errors(LAYER, weight(), space, seen)
    for ranks, estimate in zip(space, told, strict=True):
        factors = TT().factorize(LAYER, weight(), ranks, seen)
        assert estimate == pytest.approx(relative_error(weight(), TT().reconstruct(LAYER, factors), seen), abs=0.06)
    assert TT().errors(LAYER, weight(), space[-1:], seen) == [0.0]

"""The basis of all ranks is computed once, for the errors and for the factors, and belongs to one weight and data."""

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tdcompile.core.decomposition import Decomposition
from tdcompile.ir.layer import Layer
from tdcompile.numerics import kept_bases
from tdcompile.numerics.covariance import Full
from tdcompile.numerics.kept_bases import keep, take
from tdcompile.passes.decompose.channel import Channel
from tdcompile.passes.decompose.svd import SVD

LINEAR, TALL = Layer("linear", 40, 24), Layer("linear", 24, 40)
CONV = Layer("conv", 8, 12, (5, 5), kernel=(3, 3), stride=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1))


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    kept_bases._kept.clear()
    yield
    kept_bases._kept.clear()


def given(layer: Layer, seed: int = 0) -> tuple[Tensor, Full]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(layer.weight_shape, generator=generator)
    x = torch.randn(200, weight[0].numel(), generator=generator, dtype=torch.float64)
    x = x * torch.linspace(1, 0.01, x.shape[1], dtype=torch.float64)
    return weight, Full(x.T @ x / len(x), len(x))


@pytest.mark.parametrize(
    ("form", "layer"), [(SVD(), LINEAR), (SVD(), TALL), (Channel(), CONV)], ids=["wide", "tall", "channel"]
)
def test_errors_and_factors_take_one_eigendecomposition(
    form: Decomposition, layer: Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, seen = given(layer)
    alone = form.factorize(layer, weight, (5,), seen)
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(matrix.shape) or eigh(matrix))
    errors = form.errors(layer, weight, form.rank_space(layer, 1), seen)
    factors = form.factorize(layer, weight, (5,), seen)
    assert len(calls) == 1
    assert errors == sorted(errors, reverse=True)
    for one, other in zip(alone, factors, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    form.factorize(layer, weight, (5,), seen)  # a basis is used once, so that its memory is free again
    assert len(calls) == 2


def test_a_rank_beyond_the_kept_columns_is_computed() -> None:
    weight, seen = given(LINEAR)
    SVD().errors(LINEAR, weight, [(3,), SVD().exact_ranks(LINEAR)], seen)
    factors = SVD().factorize(LINEAR, weight, (9,), seen)
    assert factors[0].shape == (9, 40)


def test_a_basis_belongs_to_its_weight_and_covariance() -> None:
    weight, seen = given(LINEAR)
    basis = torch.randn(24, 10)
    keep(weight, seen, basis)
    assert take(weight, Full(seen.matrix, 200), 3) is None  # equal, but another object
    keep(weight, seen, basis)
    weight.mul_(2)
    assert take(weight, seen, 3) is None
    keep(weight, seen, basis)
    assert take(weight.detach(), seen, 10) is not None  # the same storage and version
    keep(weight, seen, None)
    assert take(weight, seen, 1) is None


def test_what_is_gone_is_forgotten_and_room_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, seen = given(LINEAR)
    keep(weight, seen, torch.randn(24, 24))
    del seen
    gc.collect()
    other, own = given(LINEAR, seed=1)
    monkeypatch.setattr(kept_bases, "ROOM", 24 * 10 * 4)
    keep(other, own, torch.randn(24, 11))
    assert not kept_bases._kept
    keep(other, own, torch.randn(24, 10))
    assert len(kept_bases._kept) == 1
    second, also = given(LINEAR, seed=2)
    keep(second, also, torch.randn(24, 1))
    assert take(second, also, 1) is None
    with torch.inference_mode():
        keep(torch.randn(24, 40), own, torch.randn(24, 1))
    assert len(kept_bases._kept) == 1

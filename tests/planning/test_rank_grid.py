"""Ranks for a share: the tables of the approximation-error study, and what holds for every form."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdcompile.core.decomposition import Decomposition
from tdcompile.core.registry import find, make
from tdcompile.errors import InputError
from tdcompile.ir.layer import Layer
from tdcompile.numerics.covariance import Identity
from tdcompile.planning.rank_grid import ranks_for, weights_of

KEPT = (0.10, 0.25, 0.50, 0.75, 0.90)


def conv(inputs: int, outputs: int) -> Layer:
    return Layer("conv", inputs, outputs, (8, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))


# arXiv 2305.05318, appendix tables 2 and 3, whose column "compression" is the share kept. 3x3 convolutions.
@pytest.mark.parametrize(
    ("inputs", "outputs", "ranks"),
    [
        (64, 64, (28, 69, 138, 206, 248)),
        (64, 128, (37, 93, 186, 279, 335)),
        (128, 128, (56, 141, 281, 422, 507)),
        (512, 512, (229, 573, 1145, 1718, 2062)),
    ],
)
def test_cp_has_the_published_ranks(inputs: int, outputs: int, ranks: tuple[int, ...]) -> None:
    form = make(Decomposition, "cp4")
    assert [ranks_for(form, conv(inputs, outputs), kept) for kept in KEPT] == [(rank,) for rank in ranks]


@pytest.mark.parametrize(
    ("inputs", "outputs", "ranks"),
    [
        (64, 64, [(r, r) for r in (14, 26, 39, 49, 54)]),
        (64, 128, [(26, 13), (49, 24), (74, 37), (94, 47), (105, 52)]),
        (128, 128, [(r, r) for r in (29, 51, 77, 98, 108)]),
    ],
)
def test_tucker_has_the_published_ranks(inputs: int, outputs: int, ranks: list[tuple[int, int]]) -> None:
    form = make(Decomposition, "tucker2")
    assert [ranks_for(form, conv(inputs, outputs), kept) for kept in KEPT] == ranks


def test_the_published_ranks_keep_what_is_named_and_do_not_remove_it() -> None:
    layer = conv(64, 64)
    shares = {
        name: [weights_of(make(Decomposition, name), layer, r) / 36864 for r in ranks]
        for name, ranks in {"cp4": [(28,), (138,), (248,)], "tucker2": [(14, 14), (39, 39), (54, 54)]}.items()
    }
    assert shares["cp4"] == pytest.approx([0.102, 0.502, 0.901], abs=5e-4)
    assert shares["tucker2"] == pytest.approx([0.097, 0.507, 0.900], abs=1e-3)


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", ["cp", "cp4", "tucker2", "tt"])
def test_every_form_comes_near_the_share(name: str, kept: float) -> None:
    form, layer = make(Decomposition, name), conv(64, 96)
    assert weights_of(form, layer, ranks_for(form, layer, kept)) / (96 * 64 * 9) == pytest.approx(kept, abs=0.01)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 1.0), st.sampled_from(sorted(find(Decomposition))))
def test_any_share_of_any_layer_gives_ranks_that_factorise(inputs: int, outputs: int, kept: float, name: str) -> None:
    form = make(Decomposition, name)
    for layer in (conv(inputs, outputs), Layer("linear", inputs, outputs)):
        if form.refuse(layer) is None:
            ranks = ranks_for(form, layer, kept)
            assert all(1 <= rank <= most for rank, most in zip(ranks, form.exact_ranks(layer), strict=True))
            weight = torch.randn(layer.weight_shape, generator=torch.Generator().manual_seed(0))
            factors = form.factorize(layer, weight, ranks, Identity.of(weight))
            assert form.reconstruct(layer, factors).shape == weight.shape
            assert sum(factor.numel() for factor in factors) == weights_of(form, layer, ranks)


@pytest.mark.parametrize("kept", KEPT)
def test_the_bonds_of_a_train_carry_each_other(kept: float) -> None:
    form = make(Decomposition, "tt")
    for inputs, outputs in ((1, 64), (64, 2), (3, 3)):
        layer = conv(inputs, outputs)
        r1, r2, r3 = ranks_for(form, layer, kept)
        assert r2 <= 3 * r1
        assert r3 <= 3 * r2
        weight = torch.ones(layer.weight_shape)
        assert form.factorize(layer, weight, (r1, r2, r3), Identity.of(weight))


def test_a_smaller_share_never_has_larger_ranks() -> None:
    for name in ("cp4", "tucker2", "tt"):
        form = make(Decomposition, name)
        table = [ranks_for(form, conv(24, 40), step / 50) for step in range(1, 51)]
        assert all(a <= b for low, high in pairwise(table) for a, b in zip(low, high, strict=True))


@pytest.mark.parametrize("kept", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(kept: float) -> None:
    with pytest.raises(InputError, match="no share"):
        ranks_for(make(Decomposition, "tucker2"), conv(8, 8), kept)

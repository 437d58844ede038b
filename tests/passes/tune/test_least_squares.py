"""``Sums`` and im2col rows: the fit is numpy's, and rows times a weight are the layer's output."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tdcompile.ir.im2col import draw_rows, patches_at, values_at
from tdcompile.ir.layer import Layer
from tdcompile.passes.tune._least_squares import Sums


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_the_fit_without_a_ridge_is_least_squares_with_an_intercept(d: int, m: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, t = torch.randn(60, d, generator=generator).double() + 3, torch.randn(60, m, generator=generator).double() - 1
    sums = Sums()
    for part in range(3):
        sums.add(z[part * 20 : part * 20 + 20], t[part * 20 : part * 20 + 20])
    slope = sums.fit(torch.zeros(m, d), 0.0)
    bias = sums.intercept(slope)
    table = np.c_[z.numpy(), np.ones(60)]
    expected, *_ = np.linalg.lstsq(table, t.numpy(), rcond=None)
    np.testing.assert_allclose(torch.cat([slope, bias[:, None]], 1).T, expected, atol=1e-8)
    assert sums.loss(slope, bias) == pytest.approx(float((t - z @ slope.T - bias).square().sum(1).mean()), rel=1e-6)
    assert sums.spread == pytest.approx(float((t - t.mean(0)).square().sum(1).mean()), rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_without_an_intercept_it_is_least_squares_through_the_origin(d: int, m: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, t = torch.randn(60, d, generator=generator).double() + 3, torch.randn(60, m, generator=generator).double() - 1
    sums = Sums(affine=False)
    sums.add(z, t)
    slope = sums.fit(torch.zeros(m, d), 0.0)
    expected, *_ = np.linalg.lstsq(z.numpy(), t.numpy(), rcond=None)
    np.testing.assert_allclose(slope.T, expected, atol=1e-8)
    assert torch.equal(sums.intercept(slope), torch.zeros(m, dtype=torch.float64))
    assert sums.loss(slope, sums.intercept(slope)) == pytest.approx(float((t - z @ slope.T).square().sum(1).mean()))


def test_a_large_ridge_holds_on_to_the_prior() -> None:
    sums, prior = Sums(), torch.randn(2, 3)
    sums.add(torch.randn(50, 3), torch.randn(50, 2))
    torch.testing.assert_close(sums.fit(prior, 1e9).float(), prior, atol=1e-4, rtol=0)


LAYERS = [
    (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (3, 7, 8)),
    (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 5, 5)),
    (nn.Conv2d(2, 3, 2, padding="same"), (2, 5, 5)),
    (nn.Conv1d(3, 2, 3, stride=2), (3, 9)),
    (nn.Conv3d(2, 2, 2), (2, 3, 4, 3)),
    (nn.Linear(5, 3), (5,)),
    (nn.Linear(5, 3), (4, 5)),
]


@pytest.mark.parametrize(("module", "shape"), LAYERS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("most", [2, 10**6])
def test_rows_times_the_weight_are_the_output_at_the_same_places(
    module: nn.Module, shape: tuple[int, ...], most: int
) -> None:
    x = torch.randn(2, *shape)
    layer = Layer.of(module, shape[:-1] if isinstance(module, nn.Linear) else shape[1:])
    assert layer is not None
    rows = draw_rows(layer, x, most, torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = module(x)
        assert len(rows) == len(set(rows.tolist())) == min(most, y.numel() // layer.out_channels)
        made = patches_at(layer, x, rows) @ module.weight.flatten(1).T + module.bias
        torch.testing.assert_close(made, values_at(layer, y, rows), atol=1e-5, rtol=1e-5)

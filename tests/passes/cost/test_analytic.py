from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdcompile.ir.layer import Layer
from tdcompile.ir.target import Cost, Target
from tdcompile.passes.cost.analytic import Analytic

CONV = Layer("conv", 8, 16, (10, 12), (3, 3), (2, 1), ((1, 1), (1, 1)), (1, 1))


def test_a_convolution_by_hand():
    weights, read, written = 16 * 8 * 9 + 16, 8 * 120, 16 * 5 * 12
    assert Analytic().price(CONV, Target()) == Cost(weights, 16 * 8 * 9 * 60, 4 * (weights + read + written), 0.0)


def test_a_linear_layer_over_tokens_by_hand():
    layer = Layer("linear", 32, 64, (7,), bias=False)
    assert Analytic().price(layer, Target()) == Cost(2048, 2048 * 7, 4 * (2048 + 32 * 7 + 64 * 7), 0.0)


def test_half_precision_moves_half_the_bytes_and_computes_the_same():
    full, half = (Analytic().price(CONV, Target(precision=precision)) for precision in ("fp32", "fp16"))
    assert half == replace(full, bytes=full.bytes / 2)


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 32))
def test_a_smaller_layer_never_costs_more(c, t, size):
    layer = Layer("conv", c, t, (size, size), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    smaller = Analytic().price(replace(layer, out_channels=max(1, t - 1)), Target())
    price = Analytic().price(layer, Target())
    assert (smaller.params, smaller.macs, smaller.bytes) <= (price.params, price.macs, price.bytes)


def test_groups_divide_the_price():
    grouped = replace(CONV, groups=8, bias=False)
    assert Analytic().price(grouped, Target()).macs == pytest.approx(
        Analytic().price(replace(CONV, bias=False), Target()).macs / 8
    )

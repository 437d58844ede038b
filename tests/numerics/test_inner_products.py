"""XᵀX from one triangle equals the whole product, and costs fewer multiplications."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tdcompile.numerics.inner_products import inner_products


@pytest.mark.parametrize("shape", [(40, 7), (300, 256), (300, 257), (64, 1000), (3, 50, 300), (0, 300)])
def test_it_equals_the_whole_product(shape):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(inner_products(rows), rows.mT @ rows)


def test_wide_rows_take_fewer_multiplications():
    rows = torch.randn(10, 1200)
    with FlopCounterMode(display=False) as whole:
        rows.mT @ rows
    with FlopCounterMode(display=False) as half:
        inner_products(rows)
    assert half.get_total_flops() < 0.6 * whole.get_total_flops()

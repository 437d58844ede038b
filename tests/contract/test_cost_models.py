"""What every registered cost model promises."""

import math
from dataclasses import fields, replace

import pytest

from tdcompile.core.cost_model import CostModel
from tdcompile.core.registry import find, make
from tdcompile.ir.layer import Layer
from tdcompile.ir.target import Cost, Target

MODELS = sorted(find(CostModel))
CONV = Layer("conv", 16, 32, (14, 14), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
TRANSPOSED = replace(CONV, stride=(2, 2), transposed=True, output_padding=(1, 1))
LAYERS = {
    "conv": CONV,
    "pointwise": replace(CONV, kernel=(1, 1), padding=((0, 0), (0, 0))),
    "strided": replace(CONV, stride=(2, 2)),
    "depthwise": replace(CONV, out_channels=16, groups=16),
    "asymmetric": replace(CONV, padding=((0, 1), (1, 2)), bias=False),
    "grouped": replace(CONV, groups=4),
    "one axis": Layer("conv", 16, 32, (40,), (5,), (1,), ((2, 2),), (1,)),
    "three axes": Layer("conv", 8, 16, (4, 6, 5), (3, 3, 3), (1, 2, 1), ((1, 1),) * 3, (1, 1, 1)),
    "transposed": TRANSPOSED,
    "grouped transposed": replace(TRANSPOSED, groups=4),
    "linear": Layer("linear", 32, 64),
    "tokens": Layer("linear", 32, 64, (7,)),
}


@pytest.fixture(autouse=True)
def _caches_of_its_own(tmp_path, monkeypatch):
    """Whatever a model keeps on disk, it keeps here, not in the folder of whoever runs the tests."""
    monkeypatch.setenv("TDCOMPILE_CACHE", str(tmp_path))


def test_the_analytic_one_is_registered():
    assert "analytic" in MODELS


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_price_is_finite_and_counts_exactly_or_not_at_all(name, kind):
    layer, model, target = LAYERS[kind], make(CostModel, name), Target()
    model.prepare([layer], target)
    price = model.price(layer, target)
    figures = [getattr(price, f.name) for f in fields(Cost)]
    assert all(math.isfinite(figure) and figure >= 0 for figure in figures)
    assert any(figures)
    # A field that a model does not price stays 0, so that the prices of several models add up.
    assert price.params in (0, layer.params)
    assert price.macs in (0, layer.macs)
    assert price.bytes == 0 or price.bytes >= 4 * layer.params


@pytest.mark.parametrize("name", MODELS)
def test_the_same_layer_has_one_price(name):
    model = make(CostModel, name)
    assert model.price(CONV, Target()) == model.price(replace(CONV), Target())


@pytest.mark.parametrize("name", MODELS)
def test_the_text_form_reads_back(name):
    model = make(CostModel, name)
    assert make(CostModel, str(model.spec())) == model

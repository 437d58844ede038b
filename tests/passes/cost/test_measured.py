"""``measured``: interpolation between rungs, and a cache that is used, kept apart by target, and repaired."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdcompile.backend import layer_timing as microbench
from tdcompile.ir.layer import Layer
from tdcompile.ir.target import Target
from tdcompile.passes.cost import measured
from tdcompile.passes.cost.measured import Measured, corners, rungs

CONV = Layer("conv", 20, 40, (6, 6), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))


@given(st.integers(1, 30000))
def test_rungs_enclose_a_count_and_their_weights_give_it_back(channels):
    found = list(rungs(channels))
    assert sum(weight for _, weight in found) == pytest.approx(1.0)
    assert sum(rung * weight for rung, weight in found) == pytest.approx(channels)
    assert all(weight >= 0 for _, weight in found)


def test_corners_of_plain_depthwise_and_grouped_layers():
    assert {(c.in_channels, c.out_channels) for c, _ in corners(CONV)} == {(16, 32), (16, 48), (24, 32), (24, 48)}
    depthwise = Layer("conv", 20, 20, (6, 6), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), groups=20)
    assert [(c.in_channels, c.groups) for c, _ in corners(depthwise)] == [(16, 16), (24, 24)]
    grouped = Layer("conv", 20, 40, (6, 6), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), groups=2)
    assert corners(grouped) == [(grouped, 1.0)]


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """The layers that were really measured, with a cache of their own."""
    monkeypatch.setenv("TDCOMPILE_CACHE", str(tmp_path))
    seen = []

    def measure(layers, target, runs):
        seen.extend(layers)
        yield list(layers), [layer.macs * 1e-9 for layer in layers]

    monkeypatch.setattr(measured, "measure_layers", measure)
    return seen


def test_what_was_measured_is_not_measured_again_not_even_by_another_process(counted, tmp_path):
    first = Measured().price(CONV, Target())
    assert len(counted) == 4
    assert Measured().price(CONV, Target()) == first
    microbench.CostCache._opened.cache_clear()  # what another process starts with
    assert Measured().price(CONV, Target()) == first
    assert len(counted) == 4
    assert first.seconds == pytest.approx(CONV.macs * 1e-9)  # bilinear in the channels, as MACs are


def test_another_number_of_threads_is_another_target(counted):
    Measured().price(CONV, Target(threads=1))
    Measured().price(CONV, Target(threads=2))
    assert len(counted) == 8


def test_a_damaged_cache_is_measured_again(counted, tmp_path):
    Measured().price(CONV, Target())
    (file,) = tmp_path.iterdir()
    file.write_text("{not json")
    microbench.CostCache._opened.cache_clear()
    Measured().price(CONV, Target())
    assert len(counted) == 8


def test_real_layers_take_real_time(tmp_path, monkeypatch):
    monkeypatch.setenv("TDCOMPILE_CACHE", str(tmp_path))
    layers = [CONV, Layer("linear", 24, 8), Layer("linear", 24, 8, (5,))]
    ((batch, seconds),) = microbench.measure_layers(layers, Target(), 3)
    assert sorted(map(repr, batch)) == sorted(map(repr, layers))
    assert all(0 < value < 1 for value in seconds)


@pytest.mark.parametrize(
    ("wall", "own", "told"), [(10.0, 5.0, "50 %"), (10.0, 7.5, "25 %"), (10.0, 9.5, ""), (1.0, 0.1, "")]
)
def test_a_busy_machine_is_told(caplog, wall, own, told):
    microbench.warn_if_busy(wall, own)
    assert bool(caplog.records) == bool(told)
    assert not told or f"took {told} of the time" in caplog.text

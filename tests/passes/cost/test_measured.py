"""``measured``: interpolation between rungs, and a cache that is used, kept apart by target, and repaired."""

import json

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
def machine(monkeypatch):
    """A machine that is quiet, or busy if a test says so."""
    state = {"quiet": True}
    monkeypatch.setattr(measured, "is_quiet", lambda target: state["quiet"])
    return state


@pytest.fixture
def counted(tmp_path, monkeypatch, machine):
    """The layers that were really measured, with a cache of their own."""
    monkeypatch.setenv("TDCOMPILE_CACHE", str(tmp_path))
    seen = []

    def measure(layers, target, runs):
        seen.extend(layers)
        if layers:
            yield microbench.Priced(list(layers), [layer.macs * 1e-9 for layer in layers], machine["quiet"])

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


def another_process():
    microbench.CostCache._opened.cache_clear()


def test_times_measured_under_load_are_told_marked_and_measured_again_when_the_machine_is_quiet(
    counted, machine, tmp_path, caplog
):
    machine["quiet"] = False
    Measured().price(CONV, Target())
    assert "while 4 of 4 layer times were measured" in caplog.text
    (file,) = tmp_path.iterdir()
    assert sum(key.startswith("under load: ") for key in json.loads(file.read_text())) == 4
    another_process()
    Measured().prepare([CONV], Target())  # still busy: nothing would be better
    assert len(counted) == 4
    machine["quiet"] = True
    caplog.clear()
    Measured().prepare([CONV], Target())
    assert len(counted) == 8
    assert not caplog.records
    assert not any(key.startswith("under load: ") for key in json.loads(file.read_text()))
    another_process()
    Measured().prepare([CONV], Target())
    assert len(counted) == 8


def test_a_process_measures_a_time_under_load_again_once(counted, machine, monkeypatch):
    machine["quiet"] = False
    Measured().price(CONV, Target())
    monkeypatch.setattr(measured, "is_quiet", lambda target: True)  # looks quiet; the measurement then is not
    Measured().prepare([CONV], Target())
    assert len(counted) == 4  # this process has measured them itself, moments ago
    another_process()
    Measured().prepare([CONV], Target())
    Measured().prepare([CONV], Target())
    assert len(counted) == 8


def test_a_time_under_load_replaces_no_other(tmp_path):
    file = tmp_path / "layers.json"
    file.write_text(json.dumps({repr(CONV): 1.0}))  # as earlier versions wrote it
    quiet, busy = microbench.CostCache(file), microbench.CostCache(tmp_path / "other.json")
    quiet.add(microbench.Priced([CONV], [3.0], quiet=False))
    assert (quiet[CONV], quiet.under_load(CONV)) == (1.0, False)
    busy.add(microbench.Priced([CONV], [3.0], quiet=False))
    busy._file = file  # another process has written a time in the meantime
    busy.save()
    assert (busy[CONV], busy.under_load(CONV)) == (1.0, False)
    assert json.loads(file.read_text()) == {repr(CONV): 1.0}


def test_real_layers_take_real_time(tmp_path, monkeypatch):
    monkeypatch.setenv("TDCOMPILE_CACHE", str(tmp_path))
    layers = [CONV, Layer("linear", 24, 8), Layer("linear", 24, 8, (5,))]
    (found,) = microbench.measure_layers(layers, Target(), 3)
    assert sorted(map(repr, found.layers)) == sorted(map(repr, layers))
    assert all(0 < value < 1 for value in found.seconds)


@pytest.mark.parametrize(("idle", "threads", "quiet"), [(1.9, 2, True), (1.1, 2, False), (0.9, 1, True)])
def test_a_machine_is_quiet_if_as_many_processors_are_idle_as_the_target_has_threads(monkeypatch, idle, threads, quiet):
    monkeypatch.setattr(microbench, "idle_processors", lambda: idle)
    assert microbench.is_quiet(Target(threads=threads)) == quiet

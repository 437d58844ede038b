"""The benchmark beside busy processes writes each run, and continues from a file of its own runs only."""

import subprocess
import sys
import time
import types

import psutil
import pytest
import torch

from tdcompile.errors import BudgetError
from tests.benchmark_modules import load

results = load("results")
load("common")
busy = load("busy")


@pytest.fixture
def compiled(monkeypatch):
    """Compilations take no time and give these shares; ``compiled.names`` lists what was compiled."""
    asked = types.SimpleNamespace(shares=[0.5, 0.51, 0.54, 0.49], names=[])

    def compile_(module, *rest):
        asked.names.append(module)
        return object()

    def judge(made, sample, seconds, patience):
        return {"share": asked.shares.pop(0), "reported": 0.5, "idle": 2.0}

    monkeypatch.setattr(sys, "argv", ["benchmarks/busy.py"])
    monkeypatch.setattr(busy, "network", lambda name, seed: (name, torch.zeros(1)))
    monkeypatch.setattr(busy, "beside_others", compile_)
    monkeypatch.setattr(busy, "judge", judge)
    return asked


def cells(file, *names):
    return [tuple(record[name] for name in names) for record in results.Table.read(file).records()]


def test_each_run_is_written_and_judged(compiled, tmp_path):
    busy.main("a,b", runs=2, json=tmp_path / "b.json")
    assert cells(tmp_path / "b.json", "network", "run", "share", "within 0.47 and 0.53") == [
        ("a", 1, 0.5, True),
        ("a", 2, 0.51, True),
        ("b", 1, 0.54, False),
        ("b", 2, 0.49, True),
    ]


def test_a_run_that_is_cut_leaves_the_runs_before_it(compiled, tmp_path):
    compiled.shares = [0.5]
    with pytest.raises(IndexError):
        busy.main("a", runs=2, json=tmp_path / "b.json")
    assert cells(tmp_path / "b.json", "network", "run") == [("a", 1)]


def test_runs_in_the_file_are_kept_and_the_others_follow(compiled, tmp_path):
    busy.main("a", runs=2, json=tmp_path / "b.json")
    busy.main("a,b", runs=2, json=tmp_path / "b.json")
    assert compiled.names == ["a", "a", "b", "b"]
    assert cells(tmp_path / "b.json", "network", "share") == [("a", 0.5), ("a", 0.51), ("b", 0.54), ("b", 0.49)]


def test_a_run_without_an_idle_machine_has_no_share_and_is_repeated(compiled, monkeypatch, tmp_path):
    compiled.shares = [None, 0.5, 0.49]
    busy.main("a", runs=2, json=tmp_path / "b.json")
    assert cells(tmp_path / "b.json", "run", "share", "within 0.47 and 0.53") == [(1, None, None), (2, 0.5, True)]
    busy.main("a", runs=2, json=tmp_path / "b.json")
    assert cells(tmp_path / "b.json", "run", "share") == [(2, 0.5), (1, 0.49)]


@pytest.mark.parametrize(("idle", "timed"), [(0.5, False), (1.5, True)])
def test_models_are_timed_on_an_idle_machine_only(monkeypatch, tmp_path, idle, timed):
    ratio = types.SimpleNamespace(latency=2.0)
    made = types.SimpleNamespace(folder=tmp_path, onnx=tmp_path, report=types.SimpleNamespace(ratio=ratio))
    timing = types.SimpleNamespace(speedup=types.SimpleNamespace(value=4.0))
    monkeypatch.setattr(busy, "idle_processors", lambda: idle)
    monkeypatch.setattr(busy, "time_models", lambda *args, **options: [None, timing])
    wanted = {"share": 0.25 if timed else None, "reported": 0.5, "idle": idle}
    assert busy.judge(made, torch.zeros(1), 1.0, 0.0) == wanted


def test_busy_processes_end_with_a_benchmark_that_is_killed():
    start = (
        "import subprocess, sys; w = subprocess.Popen([sys.executable, '-c', sys.argv[1]]);"
        "print(w.pid, flush=True); w.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", start, busy._WORK], stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(parent.stdout.readline()))
    time.sleep(1.0)
    assert worker.is_running()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    psutil.wait_procs([worker], timeout=60)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("other", [{"budget": 0.6}, {"busy": 3}, {"seed": 1}])
def test_a_file_of_other_runs_is_not_continued(compiled, tmp_path, other):
    busy.main("a", runs=1, json=tmp_path / "b.json")
    with pytest.raises(SystemExit, match="name another file"):
        busy.main("a", runs=2, json=tmp_path / "b.json", **other)
    assert cells(tmp_path / "b.json", "run") == [(1,)]


def test_a_file_that_is_no_table_is_refused(compiled, tmp_path):
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(SystemExit, match="error: "):
        busy.main("a", json=tmp_path / "b.json")


def test_a_refused_compilation_counts_as_the_dense_network(monkeypatch, tmp_path):
    def refuse(*args, **options):
        raise BudgetError("no plan")

    monkeypatch.setattr(sys, "argv", ["benchmarks/busy.py"])
    monkeypatch.setattr(busy.tdcompile, "compile", refuse)
    busy.main("digits_net", busy=0, runs=1, json=tmp_path / "b.json")
    assert cells(tmp_path / "b.json", "share", "within 0.47 and 0.53") == [(1.0, False)]

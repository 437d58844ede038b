"""``benchmarks/peers.py``: peers are quantised by onnxruntime, pruned to a latency, and the table says who wins."""

import sys
from types import SimpleNamespace

import onnx
import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.data.task import Task, Tensors
from tdcompile.errors import BudgetError
from tests.benchmark_modules import load

load("results")
load("common")
peers = load("peers")


@pytest.fixture
def bench(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    ).eval()  # fmt: skip
    x = torch.randn(96, 3, 16, 16)
    with torch.no_grad():
        labels = network(x).argmax(1)
    train, test = Tensors(x[:64], labels[:64], 4), Tensors(x[64:], labels[64:], 4)
    program = tdcompile.trace(network, (x[:1],)).with_(task=Task(train, test))
    return peers.Bench(network, program, train, False, tmp_path)


def test_rows_of_all_models_are_measured_together_and_one_is_best(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)  # it is not installed
    asked = {}

    def compiled(module, inputs, **options):
        if not asked:
            asked.update(options)
            raise BudgetError("no plan")
        asked.update(options, before=asked["budget"])
        return SimpleNamespace(onnx=peers.static_int8(peers.exported(module, bench, "ours"), bench))

    monkeypatch.setattr(peers.tdcompile, "compile", compiled)
    rows = list(peers.measured(bench, 1.5, "none", 32))
    assert [row["model"] for row in rows] == [peers.DENSE, peers.INT8, peers.OURS]
    assert rows[0]["accuracy %"] == 100
    assert sum(row["best at tdcompile's latency"] for row in rows) == 1
    assert asked["before"]["latency"] <= asked["budget"]["latency"] <= 1  # int8 alone is what can be reached
    kinds = {node.op_type for node in onnx.load(bench.folder / "dense.int8.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds


def test_the_least_pruned_network_that_is_fast_enough_is_taken():
    seconds = {0.1: 3.0, 0.2: 2.03, 0.3: 1.9, 0.4: 2.1}
    assert peers.least_pruned(seconds, 2.0) == 0.2
    assert peers.least_pruned(seconds, 1.0) == 0.3  # none is, so the fastest


def test_the_most_accurate_model_at_our_latency_wins_and_slower_ones_do_not_count():
    seconds = {peers.DENSE: 3.0, peers.INT8: 1.01, peers.PRUNED: 0.9, peers.OURS: 1.0}
    assert peers.winner(seconds, dict.fromkeys(seconds, 0.5) | {peers.DENSE: 0.9, peers.INT8: 0.6}) == peers.INT8
    assert peers.winner(seconds, dict.fromkeys(seconds, 0.5) | {peers.INT8: 0.4, peers.OURS: 0.55}) == peers.OURS
    assert peers.winner(seconds, dict.fromkeys(seconds, 0.5)) == peers.PRUNED

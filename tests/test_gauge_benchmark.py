"""``benchmarks/gauge.py``: few bits between factors cost less noise in the gauge, and the context leaves no trace."""

import pytest
import torch
import typer
from torch import nn

import tdcompile
from tdcompile.core.pipeline import Pipeline
from tdcompile.data.task import Task, Tensors
from tdcompile.ir.modules import outputs_of
from tests.benchmark_modules import load

for needed in ("results", "common", "real_networks", "tasks"):
    load(needed)
gauge = load("gauge")


def test_the_gauge_lowers_the_noise_of_few_bits_and_only_within_the_context() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1)).eval()
    x = torch.randn(64, 3, 10, 10)
    program = tdcompile.trace(network, (x[:2],))
    program = program.with_(task=Task(Tensors(x)), budget=tdcompile.Budget(macs=0.5))
    program = Pipeline.parse("calibrate,score{by=none},propose{decompose=channel},choose,factorize").run(program)
    assert len(list(gauge.first_factors(program))) >= 1
    before = outputs_of(program.graph, (x,))[0]
    noises = {}
    for gauged in (False, True):
        made = gauge.in_gauge(program) if gauged else program
        for bits in (4, 8):
            with gauge.rounded(made, (x,), bits):
                noises[gauged, bits] = float((outputs_of(made.graph, (x,))[0] - before).square().mean())
        torch.testing.assert_close(outputs_of(made.graph, (x,))[0], before, atol=1e-4, rtol=1e-4)
    assert noises[True, 4] < 0.9 * noises[False, 4]
    assert all(100 < noises[g, 4] / noises[g, 8] < 1000 for g in (False, True))  # (255 / 15)² = 289 in power


def test_a_network_for_images_needs_data_and_weights() -> None:
    with pytest.raises(typer.BadParameter, match="resnet20 needs --data and --weights"):
        gauge.subject("resnet20", None, "parquet:cifar10", 0.5, 100, 0)


def test_the_score_of_embeddings_is_their_mean_cosine_with_the_targets() -> None:
    x = torch.randn(100, 6)
    program = tdcompile.trace(nn.Linear(6, 6).eval(), (x[:2],))
    targets = torch.cat([x[:50], -x[50:]])
    program = program.with_(task=Task(Tensors(x), Tensors(x, targets)))
    assert gauge.cosine(nn.Identity(), program, 1000) == pytest.approx(0.0, abs=1e-6)
    assert gauge.cosine(nn.Identity(), program, 50) == pytest.approx(1.0)

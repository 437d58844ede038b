"""``gauge``: the function of a chain stays, the noise of its 8-bit values falls, and all else is left alone."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.backend.lowering import lower
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.passes import RewritePass
from tdcompile.core.plan import Candidate, RankPlan
from tdcompile.core.registry import make
from tdcompile.data.task import Task, Tensors
from tdcompile.ir.modules import outputs_of
from tdcompile.ir.program import Change, Program
from tdcompile.passes.rewrite import gauge


def compiled(layer, form, ranks, shape, *, precision="int8", samples=64, outlier=1.0) -> Program:
    """Return a program whose layer ``0`` is replaced by factors, with an outlier between them."""
    torch.manual_seed(0)
    network = nn.Sequential(layer, nn.ReLU()).eval()
    x = torch.randn(samples, *shape)
    program = tdcompile.trace(network, (x[:2],)).with_(task=Task(Tensors(x)))
    plan = RankPlan({"0": Candidate(make(Decomposition, form), ranks)}, precision=precision)
    program = program.with_(facts=program.facts.having(plan))
    program = tdcompile.Pipeline.parse("factorize").run(program)
    with torch.no_grad():  # any basis is exact: this is one with an outlier
        parts = [program.graph.get_submodule(f"0.{i}") for i in range(2)]
        parts[0].weight[0] *= outlier
        reads = parts[1].weight
        (reads[:, :1] if reads.shape[1] > 1 else reads[:1]).div_(outlier)
    return program


def gauged(program: Program, **options) -> Program:
    after = make(RewritePass, "gauge").run(program)
    x = next(program.task.train.batches(16)).inputs
    for ours, theirs in zip(outputs_of(after.graph, x), outputs_of(program.graph, x), strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())
    return after


def latent_noise(program: Program, bits: int = 8) -> float:
    """Return the relative error of the layer's output if the values behind each factor are rounded, per tensor."""

    def rounded(_, __, z):
        low, high = float(z.min().clamp(max=0)), float(z.max().clamp(min=0))
        step = (high - low) / (2**bits - 1)
        return torch.fake_quantize_per_tensor_affine(z, step, round(-low / step), 0, 2**bits - 1)

    x = next(program.task.train.batches(64)).inputs
    exact = outputs_of(program.graph, x)[0]
    factors = [m for n, m in program.graph.named_modules() if n.startswith("0.")]
    hooks = [module.register_forward_hook(rounded) for module in factors[:-1]]
    found = outputs_of(program.graph, x)[0]
    for hook in hooks:
        hook.remove()
    return float((found - exact).norm() / exact.norm())


CHAINS = [
    (lambda: nn.Conv2d(16, 24, 3, padding=1), "spatial", (8,), (16, 8, 8)),
    (lambda: nn.Conv2d(16, 24, 3, padding=1), "channel", (12,), (16, 8, 8)),
    (lambda: nn.Conv2d(16, 24, 3, padding=1, stride=2), "tucker2", (8, 10), (16, 8, 8)),
    (lambda: nn.Conv2d(16, 24, 3, padding=1), "cp", (32,), (16, 8, 8)),
    (lambda: nn.Conv2d(16, 24, 3, padding=1), "cp4", (32,), (16, 8, 8)),
    (lambda: nn.Conv2d(16, 24, 3, padding=1, groups=2), "grouped{form=channel}", (6,), (16, 8, 8)),
    (lambda: nn.ConvTranspose2d(16, 24, 3, stride=2), "channel", (7,), (16, 5, 5)),
    (lambda: nn.Conv1d(16, 24, 5), "channel", (9,), (16, 20)),
    (lambda: nn.Linear(32, 24), "svd", (11,), (32,)),
    (lambda: nn.Linear(32, 24), "svd", (12,), (7, 32)),
]


@pytest.mark.parametrize(("layer", "form", "ranks", "shape"), CHAINS)
def test_the_outputs_stay_and_the_noise_of_an_outlier_is_gone(layer, form, ranks, shape):
    before = compiled(layer(), form, ranks, shape, outlier=30.0)
    after = gauged(before)
    assert any(isinstance(entry, Change) and entry.step == "gauge" for entry in after.history)
    assert latent_noise(after) < 0.4 * latent_noise(before)
    assert latent_noise(after, bits=4) < 0.6 * latent_noise(before, bits=4)
    assert [node.target for node in after.graph.graph.nodes] == [node.target for node in before.graph.graph.nodes]


@pytest.mark.parametrize(("layer", "form", "ranks", "shape"), CHAINS)
def test_a_balanced_chain_does_not_get_worse(layer, form, ranks, shape):
    before = compiled(layer(), form, ranks, shape)
    assert latent_noise(gauged(before)) < 1.15 * latent_noise(before)


@pytest.mark.parametrize(("layer", "form", "ranks", "shape"), CHAINS)
def test_values_that_are_not_kept_are_computed_again(layer, form, ranks, shape, monkeypatch):
    before, runs = compiled(layer(), form, ranks, shape), []
    observe = gauge._observe
    monkeypatch.setattr(gauge, "_observe", lambda *given: (runs.append(1), observe(*given)))
    kept = weights(gauged(before).graph)
    monkeypatch.setattr(gauge, "_MEMORY", 1e-4)
    again = weights(gauged(before).graph)
    assert len(runs) == 1 + 2
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def weights(graph) -> list[torch.Tensor]:
    return [value.clone() for value in graph.parameters()]


def unchanged(program: Program) -> bool:
    after = make(RewritePass, "gauge").run(program)
    return all(torch.equal(a, b) for a, b in zip(weights(program.graph), weights(after.graph), strict=True))


def test_only_chains_of_an_int8_plan_with_samples_change():
    chain = (nn.Conv2d(16, 24, 3, padding=1), "channel", (8,), (16, 8, 8))
    program = compiled(*chain)
    assert not unchanged(program)
    assert unchanged(compiled(*chain, precision="fp32"))
    assert unchanged(program.with_(task=Task()))
    assert unchanged(program.with_(graph=program.dense))
    assert unchanged(program.with_(facts=type(program.facts)()))


def test_a_factor_with_a_bias_a_hook_or_a_second_reader_is_left_alone():
    chain = (nn.Conv2d(16, 24, 3, padding=1), "channel", (8,), (16, 8, 8))
    program = compiled(*chain)
    program.graph.get_submodule("0.0").bias = nn.Parameter(torch.zeros(8))
    assert unchanged(program)
    program = compiled(*chain)
    program.graph.get_submodule("0.1").register_forward_hook(lambda *_: None)
    assert unchanged(program)
    program = compiled(*chain)
    first = next(node for node in program.graph.graph.nodes if node.target == "0.0")
    output = next(node for node in program.graph.graph.nodes if node.op == "output")
    output.args = ((output.args[0], first),)
    program.graph.recompile()
    assert unchanged(program)


def test_the_lowering_of_the_compiled_network_has_the_gauge_and_the_dense_network_has_not():
    program = compiled(nn.Conv2d(16, 24, 3, padding=1), "channel", (8,), (16, 8, 8), outlier=30.0)
    lowered = lower(program, program.graph)
    assert latent_noise(program.with_(graph=lowered)) < 0.4 * latent_noise(program)
    plan = replace(program.facts[RankPlan], precision="fp32")
    fp32 = lower(program.with_(facts=program.facts.having(plan)), program.graph)
    assert all(torch.equal(a, b) for a, b in zip(weights(fp32), weights(program.graph), strict=True))
    dense = lower(program, program.dense)
    assert all(torch.equal(a, b) for a, b in zip(weights(dense), weights(program.dense), strict=True))

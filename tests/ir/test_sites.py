"""``sites``: the network runs once for all passes that read its layers, and again after the topology changed."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import Candidates
from tdcompile.ir import program as program_file
from tdcompile.ir.facts import Aspect, Facts
from tdcompile.ir.graph_edits import copy_weights
from tdcompile.ir.program import Program, Sites, sites, sites_of

TOPOLOGY, WEIGHTS = frozenset({Aspect.TOPOLOGY}), frozenset({Aspect.WEIGHTS})


@pytest.fixture
def program() -> Program:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten())
    traced = tdcompile.trace(network.append(nn.Linear(128, 4)).eval(), (torch.randn(2, 3, 8, 8),))
    return traced.with_(budget=tdcompile.Budget(macs=0.9))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The graphs that were run to find their layers."""
    found: list[nn.Module] = []

    def counted(graph: nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[str, program_file.Site]:
        found.append(graph)
        return sites_of(graph, inputs)

    monkeypatch.setattr(program_file, "sites_of", counted)
    return found


def test_the_network_runs_once_for_several_passes_and_again_after_a_rewrite(
    program: Program, runs: list[nn.Module]
) -> None:
    chosen = Pipeline.parse("score{by=relative-error},score{by=none},propose{decompose=svd+channel},choose").run(
        program
    )
    assert runs == [program.graph]
    assert list(sites(chosen)) == list(sites(program))
    after = Pipeline.parse("factorize").run(chosen)
    assert runs == [program.graph]
    assert "3.0" in sites(after)
    Pipeline.parse("score{by=none},fold-batchnorm").run(after)
    assert runs == [program.graph, after.graph]


def test_a_copy_with_other_weights_has_the_same_layers_on_its_own_modules(
    program: Program, runs: list[nn.Module]
) -> None:
    before = sites(program)
    tuned = program.with_(graph=copy_weights(program.graph), facts=program.facts.after(WEIGHTS))
    after = sites(tuned)
    assert len(runs) == 1
    for name, site in before.items():
        assert (site.calls, site.inner) == (after[name].calls, after[name].inner)
        assert after[name].module is tuned.graph.get_submodule(name)
        assert after[name].module is not site.module


def test_another_graph_or_other_inputs_are_run_anew(program: Program, runs: list[nn.Module]) -> None:
    (first, *_) = sites(program).values()
    larger = program.with_(inputs=(torch.randn(2, 3, 8, 8),))
    assert sites(larger)[first.name].layer == first.layer
    assert len(runs) == 2
    other = tdcompile.trace(nn.Sequential(nn.Linear(4, 4)).eval(), (torch.randn(2, 4),))
    assert list(sites(program.with_(graph=other.graph, inputs=other.inputs))) == ["0"]
    assert list(sites(program)) == ["0", "3", "5"]
    assert len(runs) == 3


def test_derived_facts_are_neither_listed_nor_saved_and_fall_with_what_they_read(program: Program) -> None:
    sites(program)
    facts = program.facts
    assert Sites not in facts
    assert Sites not in {type(fact) for fact in facts}
    assert len(facts) == 0
    known = facts.derived(Sites, Sites)
    assert known.calls.keys() == {"0", "3", "5"}
    assert facts.having(Candidates({}, {})).derived(Sites, Sites) is known
    assert facts.after(WEIGHTS).derived(Sites, Sites) is known
    assert facts.after(TOPOLOGY).derived(Sites, Sites) == Sites()
    assert facts.without_derived().derived(Sites, Sites) == Sites()
    copied: Facts = pickle.loads(pickle.dumps(facts))
    assert not [value for value in vars(copied)["_derived"].values() if isinstance(value, nn.Module)]

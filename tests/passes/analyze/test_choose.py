"""``choose`` completes and checks what a rank selector returns; a decomposition only reads the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tdcompile
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import Candidates, Importances, RankPlan
from tdcompile.errors import TdcompileError
from tdcompile.ir.layer import Layer, Ranks
from tdcompile.ir.program import Program, sites
from tdcompile.numerics.covariance import Covariance, Identity
from tdcompile.passes.analyze import choose, propose
from tdcompile.passes.rewrite import factorize


@pytest.fixture(scope="module")
def program() -> Program:
    network = nn.Sequential(nn.Flatten(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    program = tdcompile.trace(network, (torch.randn(2, 32),)).with_(budget=tdcompile.Budget(macs=0.5))
    return Pipeline.parse("score{by=none},propose{decompose=svd}").run(program)


@pytest.fixture
def chosen(program: Program, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], RankPlan]:
    """What the pass makes of the plan of a selector."""

    class Stub:
        def __init__(self, plan: Any) -> None:
            self.plan = plan

        def told(self) -> str:
            return "'stub'"

        def select(self, candidates: Candidates, importances: Importances, budget: tdcompile.Budget) -> Any:
            return self.plan

    def run(plan: Any) -> RankPlan:
        monkeypatch.setattr(choose, "make", lambda kind, text: Stub(plan))
        return choose.Choose().run(program).facts[RankPlan]

    return run


def test_a_plan_gets_the_layers_and_costs_that_its_selector_left_out(
    program: Program, chosen: Callable[[Any], RankPlan]
) -> None:
    candidates = program.facts[Candidates]
    option = candidates.layers["1"][1]
    plan = chosen(RankPlan({"1": option}))
    assert plan.choices["1"] == option
    assert plan.choices["3"].is_dense
    assert (plan.dense, plan.predicted) == (candidates.dense, candidates.cost({"1": option}))
    own = RankPlan({**plan.choices}, predicted=option.cost, dense=option.cost)
    assert chosen(own).predicted == own.predicted


def test_a_plan_that_cannot_be_is_told_with_the_selector(program: Program, chosen: Callable[[Any], RankPlan]) -> None:
    option = program.facts[Candidates].layers["1"][1]
    for plan, said in (
        (None, "gave NoneType, expected a RankPlan"),
        (RankPlan([option]), "gave choices as list, expected a mapping"),  # type: ignore[arg-type]
        (RankPlan({"fc": option}), "chose for 'fc', which is no layer; known: 1, 3"),
        (RankPlan({"1": ("svd", (3,))}), "expected a Candidate whose ranks are int"),  # type: ignore[dict-item]
        (RankPlan({"1": replace(option, ranks=(2.0,))}), "expected a Candidate whose ranks are int"),  # type: ignore[arg-type]
    ):
        with pytest.raises(TdcompileError, match=f"the rank selector 'stub' .*{said}"):
            chosen(plan)


@dataclass(frozen=True)
class Careless(Decomposition):
    """Subtracts the mean of the weight in place, if asked."""

    writes: bool = True

    def exact_ranks(self, layer: Layer) -> Ranks:
        return (min(layer.in_channels, layer.out_channels),)

    def blueprint(self, layer: Layer, ranks: Ranks) -> tuple[Layer, ...]:
        return (replace(layer, out_channels=ranks[0], bias=False), replace(layer, in_channels=ranks[0]))

    def factorize(self, layer: Layer, weight: Tensor, ranks: Ranks, covariance: Covariance) -> tuple[Tensor, ...]:
        weight = weight if self.writes else weight.clone()
        weight -= weight.mean()
        return weight[: ranks[0]].clone(), torch.zeros(layer.out_channels, ranks[0])


def test_a_decomposition_that_writes_into_a_weight_is_told(program: Program) -> None:
    site = sites(program)["1"]
    weight = site.weight.clone()
    covariance = Identity.of(weight)
    for form in (Careless(writes=False), Careless()):
        works: list[Callable[[], Any]] = [
            lambda form=form: propose._errors((form, site.layer, weight, [(1,)], covariance)),  # type: ignore[misc]
            lambda form=form: factorize._factors((form, site.layer, weight, (1,), covariance)),  # type: ignore[misc]
        ]
        for work in works:
            if not form.writes:
                assert len(work()) > 0
                continue
            with pytest.raises(TdcompileError, match=r"wrote into the weight of a layer: let it work on weight.clone"):
                work()

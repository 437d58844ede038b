"""Candidates are priced by the models that are asked for: counts by one, seconds by the other."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import tdcompile
from tdcompile.core import registry
from tdcompile.core.cost_model import CostModel
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import Candidates, FloatCandidates, RankPlan
from tdcompile.core.plugin import Plugin
from tdcompile.data.task import Tensors
from tdcompile.errors import InputError, TdcompileError
from tdcompile.ir.layer import Layer, Ranks
from tdcompile.ir.target import Cost, Target
from tdcompile.numerics.covariance import Covariance
from tdcompile.passes.analyze.propose import Propose
from tdcompile.passes.decompose.svd import SVD
from tdcompile.passes.decompose.tt_linear import TTLinear


@dataclass(frozen=True)
class PerWeight(CostModel):
    """Everything by the number of weights."""

    name: ClassVar[str] = ""
    params: float = 1.0
    macs: float = 1.0
    seconds: float = 1.0

    def price(self, layer: Layer, target: Target) -> Cost:
        """The same number three times."""
        size = float(torch.Size(layer.weight_shape).numel())
        return Cost(params=self.params * size, macs=self.macs * size, seconds=self.seconds * size)


@dataclass(frozen=True)
class Wrong(SVD):
    """``svd``, but for what it tells of the ranks after the first."""

    name: ClassVar[str] = ""
    later: ClassVar[tuple[float, ...]] = ()

    def errors(self, layer: Layer, weight: Tensor, space: Sequence[Ranks], moments: Covariance) -> Sequence[float]:
        """One, and then what the test has put there."""
        return [1.0, *self.later]


@dataclass(frozen=True)
class Bounded(SVD):
    """``svd`` with more error, whose bounds the test sets; ``searched`` has the ranks whose errors were computed."""

    name: ClassVar[str] = ""
    worse: ClassVar[float] = 0.05
    surely: ClassVar[float] = 0.04
    searched: ClassVar[list[Ranks]] = []

    def errors(self, layer: Layer, weight: Tensor, space: Sequence[Ranks], moments: Covariance) -> Sequence[float]:
        """Those of ``svd``, and more."""
        self.searched.extend(space)
        return [error + self.worse for error in super().errors(layer, weight, space, moments)]

    def error_bounds(
        self, layer: Layer, weight: Tensor, space: Sequence[Ranks], moments: Covariance
    ) -> Sequence[float]:
        """Those of ``svd``, and a little more."""
        return [error + self.surely for error in super().errors(layer, weight, space, moments)]


@contextmanager
def listed(plug_in: type[Plugin], name: str) -> Iterator[None]:
    """A plug-in for one test alone: what has a name is listed from then on."""
    plug_in.name = name
    registry.refresh()
    try:
        yield
    finally:
        plug_in.name = ""
        registry.refresh()


@pytest.fixture
def wrong() -> Iterator[None]:
    with listed(Wrong, "wrong"):
        yield


@pytest.fixture
def priced() -> Iterator[None]:
    with listed(PerWeight, "per-weight"):
        yield


def candidates(budget: tdcompile.Budget) -> Candidates:
    network = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 4, 5)).eval()
    program = tdcompile.trace(network, (torch.randn(2, 4, 4, 4),)).with_(budget=budget)
    pipeline = Pipeline.parse("propose{cost=per-weight{macs=7},timer=per-weight{macs=99,seconds=3}}")
    return pipeline.run(program).facts[Candidates]


@pytest.mark.usefixtures("priced")
def test_counts_are_those_of_one_model_and_seconds_those_of_the_other() -> None:
    for budget, seconds in ((tdcompile.Budget(latency=0.5), 3), (tdcompile.Budget(macs=0.5), 1)):
        table = candidates(budget)
        for options in table.layers.values():
            assert options[0].is_dense
            for option in options:
                assert (option.cost.macs, option.cost.seconds) == (7 * option.cost.params, seconds * option.cost.params)


@pytest.mark.usefixtures("wrong")
@pytest.mark.parametrize(
    ("later", "told"),
    [
        ((0.5, math.nan, 0.0), r"the decomposition 'wrong' gave nan for '1' at ranks \(3,\)"),
        ((-0.5, 0.1, 0.0), r"the decomposition 'wrong' gave -0.5 for '1' at ranks \(2,\)"),
        ((0.5, 0.0), r"the decomposition 'wrong' gave 3 errors for '1': expected 4"),
    ],
)
def test_errors_that_cannot_be_are_told_with_the_form_and_the_layer(
    later: tuple[float, ...], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tdcompile.trace(nn.Sequential(nn.Flatten(), nn.Linear(8, 8)).eval(), (torch.randn(2, 8),))
    pipeline = Pipeline.parse("propose{decompose=wrong}")
    program = program.with_(budget=tdcompile.Budget(macs=0.9))
    monkeypatch.setattr(Wrong, "later", (0.5, math.inf, 0.0))
    assert [option.error for option in pipeline.run(program).facts[Candidates].layers["1"][1:]] == [1, 0.5, math.inf, 0]
    monkeypatch.setattr(Wrong, "later", later)
    with pytest.raises(TdcompileError, match=told) as raised:
        pipeline.run(program)
    assert not isinstance(raised.value, InputError)


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Bounded, "searched", [])
    with listed(Bounded, "bounded"):
        yield


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize(
    ("forms", "surely", "searched"), [("svd+bounded", 0.04, 0), ("svd+bounded", 0.0, 7), ("bounded", 0.04, 7)]
)
def test_ranks_that_another_form_surely_beats_are_not_searched_and_have_their_bound(
    forms: str, surely: float, searched: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    program = tdcompile.trace(nn.Sequential(nn.Flatten(), nn.Linear(16, 16)).eval(), (torch.randn(2, 16),))
    program = program.with_(budget=tdcompile.Budget(macs=0.9))
    monkeypatch.setattr(Bounded, "surely", surely)
    with caplog.at_level(logging.DEBUG, "tdcompile"):
        options = Pipeline.parse(f"propose{{decompose={forms}}}").run(program).facts[Candidates].layers["1"]
    assert len(Bounded.searched) in {searched, searched + 1}  # the exact ranks too, if their bound is zero
    own = [option for option in options if option.form == "bounded"]
    plain = [option.error for option in options if option.form == "svd"]
    if plain:
        more = 0.05 if searched else 0.04
        assert [option.error for option in own] == pytest.approx([error + more for error in plain])
    assert ("other forms are surely better" in caplog.text) == (searched == 0)


def test_fewer_ranks_are_searched_and_the_plan_is_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 48)).eval()
    with torch.no_grad():  # spectra that fall, as in trained layers
        for layer in (network[0], network[2]):
            layer.weight.mul_(torch.logspace(0, -2, layer.in_features))
    samples = Tensors(torch.randn(256, 48))
    program = tdcompile.trace(network, (torch.randn(2, 48),))
    program = program.with_(budget=tdcompile.Budget(params=0.5), task=tdcompile.Task(samples))
    searched: list[int] = []
    errors = TTLinear.errors

    def counting(
        form: TTLinear, layer: Layer, weight: Tensor, space: Sequence[Ranks], seen: Covariance
    ) -> Sequence[float]:
        searched.append(len(space))
        return errors(form, layer, weight, space, seen)

    monkeypatch.setattr(TTLinear, "errors", counting)
    pipeline = Pipeline.parse("calibrate,score,propose{decompose=svd+tt-linear},choose")
    ours, few = pipeline.run(program), sum(searched)
    searched.clear()
    monkeypatch.setattr(TTLinear, "error_bounds", Decomposition.error_bounds)
    assert pipeline.run(program).facts[RankPlan] == ours.facts[RankPlan]
    assert few < sum(searched)


@pytest.mark.parametrize("text", ["propose{grain=-1}", "propose{grain=0}"])
def test_a_grain_below_one_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="must be a whole number of at least 1"):
        Pipeline.parse(text)


@pytest.mark.parametrize("text", ["propose{jobs=0}", "propose{jobs=5000}", "factorize{jobs=5000}"])
def test_a_number_of_jobs_that_no_machine_has_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"must be a whole number in \[1, 1024\]"):
        Pipeline.parse(text)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [("decompose=svd+tuckr2", "tucker2"), ("cost=analytc", "analytic"), ("timer=mesured", "measured")],
)
def test_a_plug_in_that_is_not_there_is_told_before_anything_runs(text: str, nearest: str) -> None:
    with pytest.raises(InputError, match=f"did you mean '{nearest}'"):
        Pipeline.parse(f"calibrate,propose{{{text}}}")
    assert Propose(grain=1, jobs=1).grain == 1


@pytest.mark.parametrize(("share", "floats"), [(0.9, True), (0.01, False)])
def test_auto_computes_each_error_once_and_leaves_out_a_precision_beyond_the_budget(
    share: float, floats: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    program = tdcompile.trace(network, (torch.randn(2, 48),))
    program = program.with_(
        budget=tdcompile.Budget(params=share),
        target=Target(precision="int8"),
        task=tdcompile.Task(Tensors(torch.randn(64, 48))),
    )
    searched: list[Ranks] = []
    errors = SVD.errors

    def counting(form: SVD, layer: Layer, weight: Tensor, space: Sequence[Ranks], seen: Covariance) -> Sequence[float]:
        searched.extend((layer.weight_shape, *ranks) for ranks in space)
        return errors(form, layer, weight, space, seen)

    monkeypatch.setattr(SVD, "errors", counting)
    found = Pipeline.parse("calibrate,propose{decompose=svd,grain=4,also_fp32=true}").run(program)
    others = found.facts[FloatCandidates].candidates
    assert (others is not None) == floats
    assert len(searched) == len(set(searched)) > 0
    for name, options in found.facts[Candidates].layers.items() if others else ():
        own = {option.ranks: option.error for option in options}
        assert all(option.error < own[option.ranks] for option in others.layers[name] if option.ranks in own)

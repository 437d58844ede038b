"""``rene``: known ranks are found, the budget is kept, both ends are looked at, and a diverged search is an error."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tdcompile
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import RankPlan, within
from tdcompile.core.registry import make
from tdcompile.data.metrics import accuracy
from tdcompile.data.task import Samples, Task, Tensors
from tdcompile.errors import BudgetError, InputError, TdcompileError
from tdcompile.ir.program import Program, sites
from tdcompile.ir.target import Budget
from tdcompile.numerics.covariance import Identity
from tdcompile.passes.analyze import rene
from tdcompile.passes.analyze._rene_ranks import WHOLE, SingleRanks
from tdcompile.passes.analyze._rene_relaxation import Interval, Relaxed, intervals, rank_loss
from tdcompile.passes.analyze.rene import Rene

MODES: tuple[Literal["recon", "data"], ...] = ("recon", "data")


def test_the_published_refinement() -> None:
    first = Interval(100, 800, 100)
    assert first.ranks() == list(range(100, 801, 100))
    second = first.around(200, 10, 900)
    assert second == Interval(150, 250, 10)
    third = second.around(240, 10, 900)
    assert third == Interval(235, 245, 1)
    assert third.around(240, 10, 900) is None


def test_intervals_stay_within_the_layer_and_hold_both_ends() -> None:
    assert intervals(64, 10).ranks() == [10, 20, 30, 40, 50, 60, 64]
    assert intervals(3, 10).ranks() == [2, 3]
    assert intervals(1, 10).ranks() == [1]
    assert Interval(10, 64, 10).around(64, 10, 64) == Interval(59, 64, 1)
    assert Interval(2, 3, 2).around(2, 10, 3) == Interval(1, 3, 1)
    assert Interval(5, 5, 1).ranks() == [5]


def low_rank(rank: int, noise: float = 0.01, channels: int = 24) -> nn.Conv2d:
    """A convolution whose Tucker-2 ranks are known."""
    generator = torch.Generator().manual_seed(rank)
    out, inner = (torch.randn(channels, rank, generator=generator) for _ in range(2))
    core = torch.randn(rank, rank, 3, 3, generator=generator)
    weight = torch.einsum("to,oikl,ci->tckl", out, core, inner)
    weight = weight / weight.norm() + noise * torch.randn(weight.shape, generator=generator) / weight.numel() ** 0.5
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    conv.weight = nn.Parameter(weight)
    return conv


def program(*layers: nn.Module, share: float = 0.5, train: Samples | None = None) -> Program:
    made = tdcompile.trace(nn.Sequential(*layers).eval(), (torch.randn(2, layers[0].in_channels, 6, 6),))
    return made.with_(budget=tdcompile.Budget(macs=share), task=Task(train))


def test_mixtures_over_the_budget_are_brought_to_it_by_one_price_and_others_are_left() -> None:
    given = program(low_rank(3), low_rank(5), share=0.5)
    forms = dict.fromkeys(sites(given), make(Decomposition, "tucker2"))
    prices, search = SingleRanks(given, forms), Rene()
    layers = [search._relaxed(site, prices, Interval(2, 24, 2)) for site in sites(given).values()]
    settled = rene._Settled({}, {})
    start = [torch.randn(len(layer.candidates), generator=torch.Generator().manual_seed(1)) for layer in layers]
    for lift, over in ((0.0, False), (3.0, True)):  # to the dearest ranks
        for layer, values in zip(layers, start, strict=True):
            layer.coefficients.data = values + lift * layer.shares - (3.0 * layer.shares if not over else 0.0)
        before = [layer.gates.detach().clone() for layer in layers]
        search._project(layers, prices, settled)
        load = prices.load({layer.site.name: layer.share() for layer in layers}, {}).item()
        moved = [(layer.gates / was).log().detach() for layer, was in zip(layers, before, strict=True)]
        if not over:
            assert load < 1
            assert all(float(change.abs().max()) == 0 for change in moved)
            continue
        assert load == pytest.approx(1.0, abs=1e-4)
        spans = [float(layer.shares[-1] - layer.shares[0]) for layer in layers]
        slopes = [float(change[-1] - change[0]) / span for change, span in zip(moved, spans, strict=True)]
        assert slopes[0] == pytest.approx(slopes[1], rel=1e-3)
        assert slopes[0] < 0


@pytest.mark.parametrize(("rank", "alternate"), [(2, True), (7, True), (4, False)])
def test_a_known_rank_is_found(rank: int, alternate: bool) -> None:
    plan = Rene(step=5, factor=5, budget=False, alternate=alternate).analyze(program(low_rank(rank)))
    assert plan.choices["0"].form == "tucker2"
    assert plan.choices["0"].ranks == (rank, rank)
    assert plan.choices["0"].error < 0.02


def test_the_budget_is_kept_and_the_layer_that_needs_rank_gets_it() -> None:
    layers = (low_rank(3), nn.ReLU(), low_rank(12), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=24))
    given = program(*layers, share=0.45)
    after = Pipeline.parse("rene{step=6,factor=6},factorize").run(given)
    plan = after.facts[RankPlan] if RankPlan in after.facts else Rene(step=6, factor=6).analyze(given)
    assert plan.predicted.macs <= 0.45 * plan.dense.macs * (1 + 1e-9)
    assert plan.choices["2"].ranks[0] > plan.choices["0"].ranks[0]
    assert plan.choices["4"].is_dense
    assert plan.reasons["4"].code == "refused"
    spent = sum(call.macs for site in sites(after).values() for call in site.calls)
    assert spent == plan.predicted.macs


def test_a_layer_stays_dense_where_that_is_the_best_use_of_the_budget() -> None:
    """A low rank is all that the first one needs, and any rank of the other loses much of its noise."""
    given = program(low_rank(3), nn.ReLU(), low_rank(3, noise=3.0), share=0.62)
    plan = Rene(step=6, factor=6, steps=10).analyze(given)
    assert plan.choices["2"].is_dense
    assert plan.reasons["2"].code == "dense_is_best"
    assert plan.choices["0"].error < 0.03
    tighter = Rene(step=6, factor=6, steps=10).analyze(given.with_(budget=Budget(macs=0.5)))
    assert tighter.choices["2"].form == "tucker2"


@pytest.mark.parametrize("layer", [nn.Linear(16, 16), nn.Conv2d(16, 16, 1)], ids=["linear", "1x1"])
@pytest.mark.parametrize("step", [2, 10, 40])
def test_ranks_are_looked_for_where_they_are_cheaper_than_dense(layer: nn.Module, step: int) -> None:
    shape = (2, 16) if isinstance(layer, nn.Linear) else (2, 16, 4, 4)
    given = tdcompile.trace(nn.Sequential(layer, nn.ReLU()).eval(), (torch.randn(shape),))
    plan = Rene(step=step, steps=5).analyze(given.with_(budget=tdcompile.Budget(macs=0.9)))
    assert plan.choices["0"].ranks == (7,)


def test_where_no_rank_is_cheaper_nothing_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SingleRanks, "cost", lambda self, name, rank: self.layers[name])
    plan = Rene(steps=5).analyze(program(low_rank(3), share=1.0))
    assert plan.choices["0"].is_dense
    assert plan.reasons["0"].code == "not_cheaper"


def test_of_a_layer_that_may_stay_dense_the_weight_itself_is_a_candidate() -> None:
    given = program(low_rank(3, noise=1.0))
    form, site = make(Decomposition, "tucker2"), sites(given)["0"]
    layer = Relaxed(site, form, lambda r: (r, r), [2, 6, WHOLE], [0.25, 0.75, 1.0])
    assert torch.equal(layer.branches()[-1], site.weight)
    errors = [(site.weight - branch).square().sum() / layer.energy for branch in layer.branches()[:-1]]
    with torch.no_grad():
        assert float(layer()[2]) == pytest.approx(sum(map(float, errors)) / 3, rel=1e-4)


def test_around_what_a_finer_interval_is_where_dense_is_best() -> None:
    """Around the rank that costs as much as the mixture, so that the layers' mixtures still keep to a budget."""
    given, form = program(low_rank(3)), make(Decomposition, "tucker2")
    layer = Relaxed(sites(given)["0"], form, lambda r: (r, r), [2, 4, 6, WHOLE], [0.2, 0.5, 0.9, 1.0])
    with torch.no_grad():
        layer.coefficients.copy_(torch.tensor([1.1, 0.0, 0.0, 1.2]))  # it costs 0.64
        assert (layer.chosen(), layer.middle()) == (WHOLE, 4)
        layer.coefficients.copy_(torch.tensor([1.2, 0.0, 0.0, 1.1]))
        assert (layer.chosen(), layer.middle()) == (2, 2)


class Linked(nn.Module):
    """A head on the first layer's weight, and a layer with a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.watched, self.free = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 24)
        self.head = nn.Linear(24, 24)
        self.head.weight = self.first.weight
        self.watched.register_forward_hook(lambda module, arguments, output: 2 * output)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.free(self.watched(self.first(x).relu())))


def test_tied_and_hooked_layers_are_left_alone_and_a_plan_that_does_not_is_refused() -> None:
    torch.manual_seed(0)
    given = tdcompile.trace(Linked().eval(), (torch.randn(2, 24),)).with_(budget=tdcompile.Budget(params=0.9))
    after = Pipeline.parse("rene{step=8,factor=8,steps=5},factorize").run(given)
    plan = after.facts[RankPlan]
    assert {name: reason.code for name, reason in plan.reasons.items()} == {
        "first": "tied_parameter",
        "head": "tied_parameter",
        "watched": "hooked",
    }
    assert plan.choices["free"].form == "svd"
    assert sum(p.numel() for p in after.graph.parameters()) == plan.predicted.params <= 0.9 * plan.dense.params
    wrong = replace(plan, choices={**plan.choices, "head": plan.choices["free"]})
    with pytest.raises(InputError, match="svd for 'head': its weight also belongs to first"):
        Pipeline.parse("factorize").run(given.with_(facts=given.facts.having(wrong)))


def test_with_data_settled_layers_run_at_their_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # the grid of the narrow layer ends a refinement before that of the wide one
    layers = (nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 48, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    train, seen = Tensors(torch.randn(64, 2, 6, 6), torch.arange(64) % 48), set()
    real = rene._Batches.loss

    def loss(self: object, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.add(tuple(sorted(weights)))
        return real(self, weights)

    monkeypatch.setattr(rene._Batches, "loss", loss)
    Rene(mode="data", step=8, factor=2, steps=2, samples=32).analyze(program(*layers, train=train))
    assert seen == {("0.weight", "1.weight")}


@pytest.mark.parametrize(("alternate", "losses"), [(True, 2 + 2 * 3), (False, 2 + 3)])
def test_both_steps_are_taken_in_turn_or_from_one_loss(
    monkeypatch: pytest.MonkeyPatch, alternate: bool, losses: int
) -> None:
    taken: list[torch.Tensor] = []
    real = Rene._loss
    monkeypatch.setattr(Rene, "_loss", lambda *given: taken.append(real(*given)) or taken[-1])
    Rene(step=1, warmup=2, steps=3, alternate=alternate).analyze(program(low_rank(2, channels=6)))
    assert len(taken) == losses


@pytest.mark.parametrize(("form", "channels"), [("cp", 12), ("cp4", 8)])
def test_cp_is_searched_too(form: Literal["cp", "cp4"], channels: int) -> None:
    plan = Rene(form=form, step=16, factor=4, steps=20).analyze(program(low_rank(2, channels=channels), share=0.5))
    assert plan.choices["0"].form == form
    assert plan.choices["0"].error < 0.05
    assert plan.predicted.macs <= 0.5 * plan.dense.macs


def test_a_budget_that_cannot_be_met_says_so() -> None:
    given = program(low_rank(3), nn.Conv2d(24, 24, 3, groups=24), share=0.001)
    with pytest.raises(
        BudgetError, match=r"one rank a layer: no plan keeps macs within 0.001 .* keeps 0\.\d+ of macs"
    ) as told:
        Rene(step=8, factor=8, steps=2).analyze(given)
    reached = _reach(told)
    plan = Rene(step=8, factor=8, steps=2).analyze(given.with_(budget=Budget(macs=reached)))
    assert {choice.ranks for choice in plan.choices.values()} == {(1, 1), ()}


def _reach(told: pytest.ExceptionInfo[BudgetError]) -> float:
    """The share that a message says can be reached."""
    return float(re.findall(r"keeps ([\d.]+) of macs", str(told.value))[0])


def test_a_budget_that_cannot_be_met_costs_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rene, "_search", lambda *given: pytest.fail("it searches"))
    with pytest.raises(BudgetError):
        Rene().analyze(program(low_rank(3), share=0.001))


@pytest.mark.parametrize(("share", "ranks"), [(0.5, ()), (0.1, (1, 1))])
def test_a_layer_that_has_rank_1_alone_is_replaced_where_the_budget_needs_it(
    share: float, ranks: tuple[int, ...]
) -> None:
    given = program(nn.Conv2d(1, 24, 5, padding=2), nn.ReLU(), low_rank(3), share=share)
    plan = Rene(step=8, factor=8, steps=5).analyze(given)
    assert plan.choices["0"].ranks == ranks
    assert within(plan.predicted, {"macs": share * plan.dense.macs})
    assert plan.reasons.get("0") is None if ranks else "rank" in plan.reasons["0"].text


def test_of_two_layers_of_rank_1_alone_one_is_enough() -> None:
    given = program(nn.Conv2d(1, 24, 5, padding=2), nn.ReLU(), nn.Conv2d(24, 1, 5, padding=2), share=0.9)
    plan = Rene().analyze(given)
    assert sorted(choice.ranks for choice in plan.choices.values()) == [(), (1, 1)]
    free = Rene(budget=False).analyze(given)
    assert {choice.ranks for choice in free.choices.values()} == {()}


def test_coefficients_at_rest_stay_as_they_are() -> None:
    plan = Rene(step=8, factor=8, steps=5, lr_coefficients=0.0, budget=False).analyze(program(low_rank(3)))
    assert plan.choices["0"].ranks == (1, 1)  # of equal coefficients that of the smallest rank


def test_coefficients_that_are_not_finite_are_an_error_and_never_a_rank() -> None:
    given = program(low_rank(3))
    layer = Relaxed(sites(given)["0"], make(Decomposition, "tucker2"), lambda r: (r, r), [2, 4], [0.2, 0.4])
    with torch.no_grad():
        layer.coefficients[1] = float("nan")
    with pytest.raises(TdcompileError, match="coefficients are not finite"):
        layer.chosen()
    with pytest.raises(TdcompileError, match="diverged"):
        Rene(step=8, steps=5, lr_weights=1e30).analyze(given)


def test_the_mixture_and_the_rank_loss_are_the_papers() -> None:
    given = program(low_rank(3))
    form, site = make(Decomposition, "tucker2"), sites(given)["0"]
    layer = Relaxed(site, form, lambda r: (r, r), [2, 6], [0.25, 0.75])
    plain = Identity.of(site.weight)
    branches = [form.reconstruct(site.layer, form.factorize(site.layer, site.weight, (r, r), plain)) for r in (2, 6)]
    with torch.no_grad():
        mixed, error, _ = layer()
        price = rank_loss([layer.share(), layer.share()], 0.4, 0.8)
    torch.testing.assert_close(mixed, (branches[0] + branches[1]) / 2, atol=1e-5, rtol=1e-5)
    expected = (site.weight - mixed).square().sum() / site.weight.square().sum()
    assert float(error) == pytest.approx(float(expected), rel=1e-4)
    assert float(price) == pytest.approx(0.4 * 2 * 0.5**0.8)


def test_coefficients_can_look_at_held_out_data() -> None:
    torch.manual_seed(0)
    layers = (low_rank(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plan = Rene(mode="data", step=8, factor=8, steps=10, samples=64).analyze(
        program(*layers, train=Tensors(torch.randn(64, 24, 6, 6), torch.arange(64) % 24))
    )
    assert plan.predicted.macs <= 0.5 * plan.dense.macs
    with pytest.raises(InputError, match="needs targets"):
        Rene(mode="data").analyze(program(*layers))


class Narrow(nn.Module):
    """A wide layer that decides the label, beside a narrow one that does not and is below the first grid's step."""

    def __init__(self) -> None:
        super().__init__()
        self.heard, self.ignored = nn.Linear(24, 24), nn.Linear(20, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 32 * self.heard(x) + 0.0 * F.pad(self.ignored(x[:, :20]), (0, 4))


def test_with_data_a_layer_that_does_not_count_is_not_left_dense() -> None:
    torch.manual_seed(0)
    net, x = Narrow().eval(), torch.randn(512, 24)
    given = tdcompile.trace(net, (x[:2],)).with_(
        budget=tdcompile.Budget(macs=0.7), task=Task(Tensors(x, net(x).argmax(1)))
    )
    plan = Rene(mode="data", steps=40).analyze(given)
    assert plan.choices["heard"].is_dense
    assert plan.choices["ignored"].form == "svd"


class Heard(nn.Module):
    """Of two layers one decides the label; the other does not, and with its flatter spectrum would take more rank."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.heard, self.ignored = nn.Linear(24, 24, bias=False), nn.Linear(24, 24, bias=False)
        for layer, falls in ((self.heard, 0.7), (self.ignored, 0.3)):
            left, right = (torch.linalg.qr(torch.randn(24, 24, generator=generator))[0] for _ in range(2))
            layer.weight.data = left @ torch.diag(torch.arange(1, 25.0) ** -falls) @ right

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 32 * self.heard(x) + 0.0 * self.ignored(x)


def labelled() -> tuple[Program, Samples]:
    net, x = Heard().eval(), torch.randn(1024, 24, generator=torch.Generator().manual_seed(1))
    train = Tensors(x, net(x).argmax(1))
    made = tdcompile.trace(net, (x[:2],))
    return made.with_(budget=tdcompile.Budget(macs=0.6), task=Task(train)), train


def test_with_data_rank_goes_to_the_layer_that_decides_the_labels() -> None:
    given, train = labelled()
    recon, data = (Rene(mode=mode, step=4, factor=4, steps=20).analyze(given) for mode in MODES)
    assert all(0.5 < plan.predicted.macs / plan.dense.macs <= 0.6 for plan in (recon, data))
    assert recon.choices["heard"].ranks[0] < recon.choices["ignored"].ranks[0]
    assert data.choices["ignored"].ranks[0] < recon.choices["ignored"].ranks[0] / 2
    assert data.choices["heard"].error < recon.choices["heard"].error / 2
    made = (Pipeline.parse("factorize").run(given.with_(facts=given.facts.having(plan))) for plan in (recon, data))
    worse, better = (accuracy(one.graph, train) for one in made)
    assert worse is not None
    assert better is not None
    assert worse < 0.7 < 0.99 < better


def test_the_papers_own_form_weighs_the_loss_against_the_ranks() -> None:
    given, _ = labelled()
    own = Rene(mode="data", single=0.0, reach=0.5, tolerance=0.0, budget=False, step=4, factor=4, steps=20)
    plans = [replace(own, **options).analyze(given) for options in ({}, {"beta": 4.0}, {"gamma": 40.0})]
    ranks = [{name: choice.ranks for name, choice in plan.choices.items()} for plan in plans]
    assert ranks[0] == {"heard": (), "ignored": (2,)}  # half a step below 4, the smallest at first
    assert ranks[1] == {"heard": (2,), "ignored": (2,)}  # beside the ranks' logarithm, β times, the loss counts less
    assert ranks[2] == ranks[0]  # a factor of the whole product


@pytest.mark.parametrize(
    ("option", "rank"),
    [
        ({}, 13),
        ({"reach": 0.5}, 15),  # the least within half a step of 20, which wins: 10 loses too much
        ({"single": 0.0}, 10),  # its mixture with 20 is good, and by itself it is not
        ({"tolerance": 0.0}, None),  # an error that can vanish is worth any rank
    ],
    ids=str,
)
def test_what_we_have_added_to_the_papers_form_finds_the_rank(option: dict[str, float], rank: int | None) -> None:
    search = replace(Rene(step=10, factor=10, steps=40, budget=False), **option)
    choice = search.analyze(program(low_rank(13))).choices["0"]
    assert choice.ranks == (() if rank is None else (rank, rank))


@pytest.mark.parametrize(("beta", "rank"), [(0.1, None), (4.0, 1)])
def test_without_a_budget_beta_weighs_size(beta: float, rank: int | None) -> None:
    """On a weight that is half noise, of which any rank leaves something."""
    choice = Rene(step=5, factor=5, steps=20, budget=False, beta=beta).analyze(program(low_rank(5, 0.5))).choices["0"]
    assert choice.ranks == (() if rank is None else (rank, rank))


@pytest.mark.parametrize(("gamma", "rank"), [(0.0, None), (0.4, 3)])
def test_within_a_budget_gamma_takes_the_smaller_of_ranks_that_do_as_well(gamma: float, rank: int | None) -> None:
    given = program(low_rank(3, 1e-3), share=1.0)
    choice = Rene(step=4, factor=4, steps=20, gamma=gamma).analyze(given).choices["0"]
    assert choice.ranks == (() if rank is None else (rank, rank))


@pytest.mark.parametrize("options", [{"step": 0}, {"factor": 1}, {"steps": 0}])
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="at least"):
        Rene(**options)  # type: ignore[arg-type]

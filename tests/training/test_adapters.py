"""Progressive Tucker: exact at the start, pure low rank or dense at the end, within the budget, and on schedule."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import RankPlan
from tdcompile.data.task import Batch, Samples, Task
from tdcompile.errors import BudgetError, InputError, TdcompileError
from tdcompile.ir.diagnostics import Diagnostic
from tdcompile.ir.layer import Ranks
from tdcompile.ir.modules import outputs_of
from tdcompile.ir.program import Change, Program, parameters_of, sites
from tdcompile.numerics.covariance import Identity
from tdcompile.passes.rewrite import detach_dense
from tdcompile.passes.tune import anneal
from tdcompile.planning.pricing import Prices
from tdcompile.training import trainer
from tdcompile.training.adapters import Parallel, energy_ranks, parallel_layers

X = torch.randn(2, 3, 10, 10)


class Bright(Samples):
    classes = 2

    def __len__(self) -> int:
        return 160

    def batch(self, indices: object) -> Batch:
        places = torch.as_tensor(list(indices))  # type: ignore[call-overload]
        x = torch.stack([torch.randn(3, 10, 10, generator=torch.Generator().manual_seed(int(i))) for i in places])
        labels = places % 2
        return Batch((x + (2.0 * labels - 1).view(-1, 1, 1, 1),), labels)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.Conv2d(16, 20, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(20, 12),
        nn.ReLU(),
        nn.Linear(12, 2),
    ).eval()


def program(share: float = 0.5, data: bool = True) -> Program:
    made = tdcompile.trace(network(), (X,))
    return made.with_(budget=tdcompile.Budget(macs=share), task=Task(Bright() if data else None))


ANNEAL = "anneal{epochs=2,batch=32,lr=0.05}"


@pytest.mark.parametrize("init", ["exact", "zero"])
def test_the_function_is_the_dense_one_at_the_start(init: str) -> None:
    before = program()
    after = Pipeline.parse(f"attach-adapters{{init={init}}}").run(before)
    assert set(parallel_layers(after.graph)) == {"0", "3", "6", "9", "11"}
    for one, other in zip(outputs_of(before.graph, (X,)), outputs_of(after.graph, (X,)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    told = {entry.layer: entry.code for entry in after.history if isinstance(entry, Diagnostic)}
    assert told == {"5": "depthwise"}


class Awkward(nn.Module):
    """Layers that need more than a convolution of torch's own, one with a hook and one whose weight is used twice."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.even = nn.Conv2d(8, 12, 4, padding="same")
        self.up = nn.ConvTranspose2d(12, 10, 3, stride=2, padding=1, bias=bias)
        self.watched = nn.Conv2d(10, 10, 3, padding=1)
        self.watched.register_forward_hook(lambda module, arguments, output: 2 * output)
        self.embedding, self.head = nn.Linear(10, 16, bias=False), nn.Linear(10, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.watched(self.up(self.even(x))).mean((2, 3))
        return self.embedding(x) + self.head(x.relu())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("passes", ["attach-adapters", "attach-adapters,anneal,detach-dense"])
def test_awkward_layers_have_adapters_too_and_hooked_or_tied_ones_have_none(passes: str, bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 6, 6)
    before = tdcompile.trace(Awkward(bias).eval(), (x,)).with_(budget=tdcompile.Budget(macs=0.7))
    after = Pipeline.parse(passes).run(before)
    codes = {entry.layer: entry.code for entry in after.history if isinstance(entry, Diagnostic) and entry.layer}
    assert codes == {"watched": "hooked", "embedding": "tied_parameter", "head": "tied_parameter"}
    if passes == "attach-adapters":
        assert set(parallel_layers(after.graph)) == {"even", "up"}
        torch.testing.assert_close(after.graph(x), before.graph(x), atol=1e-4, rtol=1e-4)
    else:
        assert {n for n, c in after.facts[RankPlan].choices.items() if not c.is_dense} == {"even", "up"}


@pytest.fixture(scope="module")
def annealed() -> Program:
    return Pipeline.parse(f"attach-adapters,{ANNEAL}").run(program())


def test_ranks_shrink_to_the_budget_and_differ_between_modes(annealed: Program) -> None:
    start = parallel_layers(Pipeline.parse("attach-adapters").run(program()).graph)
    end = parallel_layers(annealed.graph)
    assert all(part.share == 0 for part in end.values())
    assert [name for name, part in end.items() if part.stays] == ["11"]
    assert end["11"].ranks == start["11"].ranks
    for name, part in end.items():
        assert all(new <= old for new, old in zip(part.ranks, start[name].ranks, strict=True))
    assert any(part.ranks != start[name].ranks for name, part in end.items())
    assert any(len(set(part.ranks)) > 1 for part in end.values())


def test_only_adapters_norms_and_biases_have_moved(annealed: Program) -> None:
    start = Pipeline.parse("attach-adapters").run(program()).graph
    for name, part in parallel_layers(annealed.graph).items():
        assert torch.equal(part.gap, parallel_layers(start)[name].gap)
    assert not torch.equal(annealed.graph.get_submodule("1").weight, start.get_submodule("1").weight)
    kept, was = annealed.graph.get_submodule("5"), start.get_submodule("5")  # a depthwise layer, which has no adapter
    assert torch.equal(kept.weight, was.weight)
    assert not torch.equal(kept.bias, was.bias)
    assert all(p.requires_grad for p in annealed.graph.parameters())


def test_an_interrupted_anneal_goes_on_and_ends_as_one_that_was_not(
    annealed: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attached = Pipeline.parse("attach-adapters").run(program()).with_(workspace=tmp_path)
    steps: list[int] = []

    def stop(done: int, of: int, note: str = "") -> None:
        steps.append(done)
        if done == 7:  # five steps an epoch: in the second
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "report_progress", stop)
    with pytest.raises(KeyboardInterrupt):
        Pipeline.parse(ANNEAL).run(attached)
    del steps[:]
    monkeypatch.setattr(trainer, "report_progress", lambda done, of, note="": steps.append(done))
    resumed = Pipeline.parse(ANNEAL).run(attached)
    assert steps == [6, 7, 8, 9, 10]
    assert {n: p.ranks for n, p in parallel_layers(resumed.graph).items()} == {
        n: p.ranks for n, p in parallel_layers(annealed.graph).items()
    }
    whole = annealed.graph.state_dict()
    for name, value in resumed.graph.state_dict().items():
        assert torch.equal(value, whole[name]), name


# Images of 10 pixels a side are not moved by themselves: here they are, each as it is in one process.
SHARED = "attach-adapters,anneal{epochs=2,batch=32,lr=0.05,augment=shift-flip},detach-dense"


def _one_of_two(rank: int, port: int, out: str) -> None:
    """A process of a run over gloo. There is no dropout, the one thing that each would draw for its own half."""
    import os

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    after = Pipeline.parse(SHARED).run(program())
    torch.save((after.graph.state_dict(), after.facts[RankPlan].to_json()), f"{out}/{rank}.pt")


@pytest.mark.slow
def test_two_processes_anneal_to_the_ranks_and_weights_of_one(tmp_path: Path, free_port: int) -> None:
    torch.multiprocessing.spawn(_one_of_two, (free_port, str(tmp_path)), nprocs=2)
    whole = Pipeline.parse(SHARED).run(program())
    alone, chosen = whole.graph.state_dict(), whole.facts[RankPlan].choices
    for rank in range(2):
        state, plan = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        found = RankPlan.from_json(plan).choices
        assert {n: (c.decomposition, c.ranks) for n, c in found.items()} == {
            n: (c.decomposition, c.ranks) for n, c in chosen.items()
        }
        assert state.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(state[name], value, atol=1e-4, rtol=1e-3)


def test_no_dense_branch_is_left_and_the_plan_is_what_the_graph_is(annealed: Program) -> None:
    after = Pipeline.parse("detach-dense").run(annealed)
    assert not parallel_layers(after.graph)
    for one, other in zip(outputs_of(annealed.graph, (X,)), outputs_of(after.graph, (X,)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    plan = after.facts[RankPlan]
    assert plan.predicted.macs <= 0.5 * plan.dense.macs * (1 + 1e-9)
    assert plan.predicted.macs == sum(call.macs for site in sites(after).values() for call in site.calls)
    assert plan.predicted.params == parameters_of(after.graph)
    assert plan.choices["5"].is_dense
    assert plan.reasons["5"].code == "depthwise"


@pytest.mark.parametrize(("share", "dearer"), [(0.8, {"11"}), (0.95, {"6", "9", "11"})])
def test_at_a_mild_budget_a_layer_whose_adapter_costs_more_stays_dense(share: float, dearer: set[str]) -> None:
    mild = Pipeline.parse("attach-adapters,anneal,detach-dense").run(program(share, data=False))
    plan, dense = mild.facts[RankPlan], program().dense
    whole = {name: sum(call.macs for call in site.calls) for name, site in sites(program()).items()}
    left = {name for name, choice in plan.choices.items() if choice.is_dense}
    assert left == {"5", *dearer}
    for name, choice in plan.choices.items():
        assert choice.cost.macs == whole[name] if name in left else choice.cost.macs < whole[name]
    for name in dearer:
        assert plan.reasons[name].code == "not_cheaper"
        assert "no less than dense at the ranks" in plan.reasons[name].text
        new, old = mild.graph.get_submodule(name), dense.get_submodule(name)
        assert type(new) is type(old)
        torch.testing.assert_close(new.weight, old.weight, atol=1e-6, rtol=1e-5)  # nothing has been trained
        torch.testing.assert_close(new.bias, old.bias)
    assert plan.predicted.macs <= share * plan.dense.macs
    assert plan.predicted.macs == sum(call.macs for site in sites(mild).values() for call in site.calls)
    assert plan.predicted.params == parameters_of(mild.graph)


def test_where_nothing_has_to_be_saved_an_adapter_is_taken_only_where_it_costs_less() -> None:
    before = program(share=1.0, data=False)
    after = Pipeline.parse("attach-adapters,anneal,detach-dense").run(before)
    whole = {name: sum(call.macs for call in site.calls) for name, site in sites(before).items()}
    choices = after.facts[RankPlan].choices
    assert all(c.is_dense or c.cost.macs < whole[name] for name, c in choices.items())
    assert choices["11"].is_dense


def test_a_layer_that_stays_dense_computes_as_it_was_trained(annealed: Program) -> None:
    after = Pipeline.parse("detach-dense").run(annealed)
    part, plan = parallel_layers(annealed.graph)["11"], after.facts[RankPlan]
    assert torch.equal(after.graph.get_submodule("11").weight, part.effective())
    assert torch.equal(after.graph.get_submodule("11").bias, part.bias)
    assert not torch.equal(part.bias, annealed.dense.get_submodule("11").bias)
    assert plan.choices["11"].is_dense
    assert plan.choices["11"].error > 0
    assert plan.reasons["11"].code == "not_cheaper"


def test_a_strict_budget_is_met_as_if_no_layer_could_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def ranks() -> dict[str, Ranks]:
        after = Pipeline.parse("attach-adapters,anneal").run(program(share=0.3, data=False))
        return {name: part.ranks for name, part in parallel_layers(after.graph).items() if not part.stays}

    found = ranks()
    assert len(found) == 5
    monkeypatch.setattr(anneal, "gainful", lambda options, limits: options[1:])
    assert ranks() == found


def scheduled(share: float = 0.5, selections: int = 4) -> tuple[anneal._Schedule, dict[str, Parallel], Program]:
    attached = Pipeline.parse("attach-adapters").run(program(share))
    layers = dict(parallel_layers(attached.graph))
    return anneal._Schedule(layers, attached, 0.5, selections), layers, attached


def test_the_dense_share_falls_to_half_and_to_nothing_and_ranks_are_selected_on_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    schedule, layers, _ = scheduled()
    optimizer = torch.optim.SGD(layers["3"].factors.parameters(), 0.1)
    selected: list[tuple[int, float]] = []
    monkeypatch.setattr(schedule, "_select", lambda progress, given: selected.append((step, progress)))
    shares = []
    for step in range(40):
        schedule(step, 40, optimizer)
        assert len({layer.share for layer in layers.values()}) == 1
        shares.append(layers["3"].share)
    assert shares[0] == 1.0
    assert shares[10] == pytest.approx(0.5)  # half-way through the half of the steps over which it decays
    assert all(one > other for one, other in pairwise(shares[:21]))
    assert shares[20:] == [0.0] * 20
    assert selected == [(5, 0.25), (10, 0.5), (15, 0.75), (20, 1.0)]
    schedule.finish()
    assert len(selected) == 4  # all was done on time


def test_a_run_that_goes_on_selects_only_what_had_not_been_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, layers, _ = scheduled()
    selected: list[tuple[int, float]] = []
    monkeypatch.setattr(schedule, "_select", lambda progress, given: selected.append((step, progress)))
    for step in range(10, 40):  # the step at which a selection is due has still to come
        schedule(step, 40, torch.optim.SGD(layers["3"].factors.parameters(), 0.1))
    assert selected == [(10, 0.5), (15, 0.75), (20, 1.0)]
    step = 40
    late, _, _ = scheduled()
    monkeypatch.setattr(late, "_select", lambda progress, given: selected.append((step, progress)))
    late.finish()
    assert selected[3:] == [(40, 1.0)]


@pytest.mark.parametrize("share", [0.95, 0.9, 0.7, 0.4, 0.2])
def test_one_threshold_gives_all_ranks_and_the_next_one_is_above_the_budget(share: float) -> None:
    schedule, layers, attached = scheduled(share)
    start = {name: layer.ranks for name, layer in layers.items()}
    for layer in layers.values():
        layer.share = 0.0
    energies = {name: layer.energies() for name, layer in layers.items()}
    prices = Prices(attached)

    def ranks(threshold: float) -> dict[str, Ranks]:
        return {name: energy_ranks(energies[name], threshold, most) for name, most in start.items()}

    def macs(name: str, chosen: Ranks) -> float:
        return prices.at(name, layers[name].decomposition, chosen).macs

    def spent(threshold: float) -> float:
        changes = sum(
            min(macs(name, chosen), prices.layers[name].macs) - prices.layers[name].macs
            for name, chosen in ranks(threshold).items()
        )
        return prices.dense.macs + changes

    # Between two figures of these no rank changes, so that these are all the thresholds that there are.
    known = sorted({0.0, *(float(value) for modes in energies.values() for mode in modes for value in mode)})
    fitting = [value for value in known if spent(value) <= share * prices.dense.macs * (1 + 1e-9)]
    assert fitting == known[: len(fitting)]
    assert len(fitting) < len(known)
    schedule._select(1.0, None)
    wanted = ranks(fitting[-1])
    for name, layer in layers.items():
        cheaper = macs(name, wanted[name]) < prices.layers[name].macs
        assert layer.ranks == (wanted[name] if cheaper else start[name])


def test_of_several_processes_the_first_selects(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, layers, _ = scheduled()
    start = {name: layer.ranks for name, layer in layers.items()}
    monkeypatch.setattr(anneal, "from_first", lambda work, cpu: {"3": (5, 4)})  # whatever its own prices say
    schedule._select(1.0, None)
    assert {name: layer.ranks for name, layer in layers.items()} == {**start, "3": (5, 4)}


def test_a_limit_falls_in_equal_ratios_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, _, attached = scheduled(0.25, selections=4)
    seen: list[float] = []
    monkeypatch.setattr(schedule, "_chosen", lambda energies, limits: seen.append(limits["macs"]) or {})
    for part in range(1, 5):
        schedule._select(part / 4, None)
    first = schedule._start["macs"] / seen[0]
    assert [one / other for one, other in pairwise(seen)] == pytest.approx([first] * 3)
    assert seen[-1] == pytest.approx(0.25 * Prices(attached).dense.macs)
    assert schedule._start["macs"] <= Prices(attached).dense.macs  # no layer counts for more than dense


def test_a_chain_that_is_not_the_adapter_is_an_error(annealed: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Parallel.truncated

    def perturbed(self: Parallel) -> list[torch.Tensor]:
        return [exact(self)[0] * (1 + 1e-3), *exact(self)[1:]]

    monkeypatch.setattr(Parallel, "truncated", perturbed)
    with pytest.raises(TdcompileError, match="the chains differ from the adapters by"):
        Pipeline.parse("detach-dense").run(annealed)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_how_far_the_chains_may_be_off_is_in_proportion_to_the_outputs(scale: float) -> None:
    y = scale * torch.tensor([[0.5, -1.0]])
    detach_dense._same([y], [y + 5e-6 * scale])
    with pytest.raises(TdcompileError, match="the chains differ"):
        detach_dense._same([y], [y + 2e-5 * scale])
    with pytest.raises(TdcompileError, match="the chains differ"):
        detach_dense._same([y], [y * float("nan")])


def test_a_dense_share_that_is_left_is_an_error() -> None:
    with pytest.raises(TdcompileError, match=r"still has 100\.0% of its dense weight: anneal first"):
        Pipeline.parse("attach-adapters,detach-dense").run(program())


def test_shrinking_is_the_adapters_own_best_approximation() -> None:
    weight = torch.randn(8, 6, 3, 3)
    conv = nn.Conv2d(6, 8, 3)
    layer = tdcompile.ir.layer.Layer.of(conv, (5, 5))
    assert layer is not None
    form = tdcompile.core.registry.make(Decomposition, "tucker2")
    part = Parallel(layer, "tucker2", (8, 6), weight, form.factorize(layer, weight, (8, 6), Identity.of(weight)), None)
    identities = [id(p) for p in part.factors.parameters()]
    part.shrink((4, 3))
    wanted = form.reconstruct(layer, form.factorize(layer, weight, (4, 3), Identity.of(weight)))
    torch.testing.assert_close(part.adapter(), wanted, atol=1e-4, rtol=1e-4)
    assert [id(p) for p in part.factors.parameters()] == identities


def test_ranks_that_were_cut_stay_cut_while_the_rest_trains() -> None:
    layer = tdcompile.ir.layer.Layer.of(nn.Conv2d(6, 8, 3), (5, 5))
    assert layer is not None
    weight = torch.randn(8, 6, 3, 3)
    form = tdcompile.core.registry.make(Decomposition, "tucker2")
    part = Parallel(layer, "tucker2", (8, 6), weight, form.factorize(layer, weight, (8, 6), Identity.of(weight)), None)
    part.shrink((4, 3))
    part.share = 0.0
    optimizer = torch.optim.SGD(part.factors.parameters(), 0.1, momentum=0.9)
    before = part.adapter().detach()
    for _ in range(3):
        optimizer.zero_grad()
        part(torch.randn(4, 6, 5, 5)).square().mean().backward()
        optimizer.step()
    assert not torch.allclose(part.adapter(), before)
    torch.testing.assert_close(form.reconstruct(layer, part.truncated()), part.adapter())
    assert [tuple(f.shape) for f in part.truncated()] == [p.weight_shape for p in form.blueprint(layer, (4, 3))]


def test_energy_ranks_are_the_smallest_that_hold_the_share() -> None:
    energies = (torch.tensor([0.5, 0.8, 0.95, 1.0]), torch.tensor([0.9, 1.0]))
    assert energy_ranks(energies, 0.8, (4, 2)) == (2, 1)
    assert energy_ranks(energies, 0.81, (4, 2)) == (3, 1)
    assert energy_ranks(energies, 1.1, (3, 2)) == (3, 2)


def test_without_data_the_dense_share_is_cut_off_and_told() -> None:
    after = Pipeline.parse("attach-adapters,anneal,detach-dense").run(program(data=False))
    assert [entry.code for entry in after.history if isinstance(entry, Diagnostic)] == ["depthwise", "no_data"]
    assert after.facts[RankPlan].predicted.macs <= 0.5 * after.facts[RankPlan].dense.macs


def test_a_budget_that_cannot_be_met_is_told_before_training() -> None:
    with pytest.raises(BudgetError, match="rank 1"):
        Pipeline.parse(f"attach-adapters,{ANNEAL}").run(program(share=0.01))


def test_without_adapters_there_is_nothing_to_anneal() -> None:
    after = Pipeline.parse("anneal").run(program())
    assert [entry.code for entry in after.history if isinstance(entry, Diagnostic)] == ["no_adapters"]


def test_the_whole_of_it_compiles_by_its_recipe(tmp_path: object) -> None:
    options = ANNEAL.removeprefix("anneal{").removesuffix("}")
    given = {"recipe": "progressive-tucker", "budget": {"macs": 0.5}, "tune": options}
    made = tdcompile.compile(network(), X[:1], data=(Bright(), Bright()), workspace=tmp_path, **given)
    assert made.report.compiled.macs <= 0.5 * made.report.dense.macs
    assert made.report.parity.max_rel < 1e-3
    assert [entry for entry in made.report.layers if entry.decomposition == "tucker2"]


@pytest.mark.parametrize(
    "text",
    [
        *("attach-adapters{rank=0}", "anneal{decay=1}", "anneal{epochs=0}"),
        *("anneal{clip=0}", "anneal{temperature=0}", "anneal{labels=2}"),
    ],
)
def test_options_out_of_range_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        Pipeline.parse(text)


def test_what_was_done_is_in_the_history(annealed: Program) -> None:
    steps = [entry.step for entry in annealed.history if isinstance(entry, Change)]
    assert steps == ["attach-adapters"] * 5 + ["anneal"] * 4
    told = {entry.layer: entry.code for entry in annealed.history if isinstance(entry, Diagnostic)}
    assert told == {"5": "depthwise", "11": "not_cheaper"}

"""``SingleRanks``: a fit uses its budget, takes from the layer that needs rank least, and says where there is none."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tdcompile
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.plan import within
from tdcompile.core.registry import make
from tdcompile.errors import BudgetError
from tdcompile.ir.program import Program, sites
from tdcompile.ir.target import Cost
from tdcompile.passes.analyze._rene_ranks import WHOLE, SingleRanks


def conv(rank: int, noise: float = 0.01) -> nn.Conv2d:
    """16 -> 16, of about that Tucker rank."""
    layer = nn.Conv2d(16, 16, 3, padding=1)
    outer, inner = torch.randn(16, rank), torch.randn(16, rank)
    layer.weight.data = torch.einsum("to,oikl,ci->tckl", outer, torch.randn(rank, rank, 3, 3), inner)
    layer.weight.data += noise * torch.randn_like(layer.weight)
    return layer


def program(share: float, *layers: nn.Module) -> Program:
    made = tdcompile.trace(nn.Sequential(*layers).eval(), (torch.randn(2, 16, 6, 6),))
    return made.with_(budget=tdcompile.Budget(macs=share))


def prices(share: float, other: int = 12) -> SingleRanks:
    torch.manual_seed(0)
    given = program(share, conv(3), nn.ReLU(), conv(other))
    return SingleRanks(given, {name: make(Decomposition, "tucker2") for name in sites(given)})


@settings(max_examples=15, deadline=None)
@given(st.floats(0.15, 0.9), st.integers(1, 16), st.integers(1, 16))
def test_a_fit_keeps_to_the_budget_and_leaves_no_room_for_one_rank_more(share: float, one: int, other: int) -> None:
    table = prices(share)
    made = table.fitted({"0": one, "2": other})
    assert within(table.spent(made), table.limits)
    for name, rank in made.items():
        if rank != WHOLE and rank < table.most(name) and table.share(name, rank + 1) < 1:
            more = {**made, name: rank + (1 if rank < 20 else rank // 10)}  # steps are a tenth
            gains = table.error(name, rank) ** 2 - table.error(name, more[name]) ** 2
            assert gains <= 1e-6 or not within(table.spent(more), table.limits)


def test_the_layer_that_needs_rank_keeps_it() -> None:
    made = prices(0.4).fitted({"0": 12, "2": 12})
    assert made["2"] > 2 * made["0"]


@pytest.mark.parametrize(("share", "dense"), [(0.62, ["2"]), (1.0, ["0", "2"])])
def test_a_plan_far_below_its_budget_grows_to_where_layers_are_dense_again(share: float, dense: list[str]) -> None:
    table = prices(share, 16)
    made = table.fitted({"0": 2, "2": 2})
    choices = table.plan(made, {}, "a test").choices
    assert [name for name, rank in made.items() if rank == WHOLE] == dense
    assert [name for name, choice in choices.items() if choice.is_dense] == dense
    assert made["0"] != 2


@pytest.mark.parametrize("start", [WHOLE, 16])
def test_what_is_dense_at_the_start_goes_down_where_the_budget_asks_for_it(start: int) -> None:
    made = prices(0.4).fitted({"0": start, "2": start})
    assert made == {"0": 5, "2": 11}  # the best of all pairs


def test_a_dense_layers_reason_says_what_the_cheapest_rank_would_have_cost() -> None:
    table = prices(1.0)
    reason = table.plan({"0": 3, "2": WHOLE}, {}, "a test").reasons["2"]
    assert (reason.code, reason.text) == (
        "dense_is_best",
        f"dense is best here under the budget: rank 1 saves {1 - table.share('2', 1):.3g} of its cost "
        f"at error {table.error('2', 1):.3g}",
    )


def test_rank_that_gains_nothing_is_not_paid_for() -> None:
    torch.manual_seed(0)
    given = program(1.0, conv(3, noise=0.0), nn.ReLU(), conv(16))
    table = SingleRanks(given, {name: make(Decomposition, "tucker2") for name in sites(given)})
    made = table.fitted({"0": 3, "2": 6})
    assert made == {"0": 3, "2": WHOLE}


def test_a_price_that_does_not_fall_at_the_next_rank_does_not_end_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    table = prices(0.3)
    honest = table.cost

    def bumpy(name: str, rank: int) -> Cost:
        return honest(name, rank + 2 if rank in (6, 7) else rank)

    monkeypatch.setattr(table, "cost", bumpy)
    assert within(table.spent(table.fitted({"0": 8, "2": 8})), table.limits)


def test_of_two_limits_the_one_that_is_over_is_met_though_the_other_is_worst_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = program(1.0, conv(3)).with_(budget=tdcompile.Budget(macs=0.06, params=0.95))
    table = SingleRanks(given, {"0": make(Decomposition, "tucker2")})
    honest, rough = table.cost, {1: 0.90, 2: 0.91, 3: 0.92, 4: 0.89}

    def bumpy(name: str, rank: int) -> Cost:
        cost = honest(name, rank)
        return replace(cost, params=rough.get(rank, 0.93) * honest(name, WHOLE).params)

    monkeypatch.setattr(table, "cost", bumpy)
    assert within(table.spent(table.fitted({"0": 8})), table.limits)


def test_a_budget_that_not_even_rank_one_meets_is_told() -> None:
    with pytest.raises(BudgetError, match=r"keeps 0\.\d+ of macs; raise the budget"):
        prices(0.001).fitted({"0": 4, "2": 4})


def test_the_load_of_shares_is_the_cost_over_the_limit() -> None:
    table = prices(0.5)
    ranks = {"0": 4, "2": 8}
    shares = {name: torch.tensor(table.share(name, rank)) for name, rank in ranks.items()}
    assert float(table.load(shares, {})) == pytest.approx(table.spent(ranks).macs / table.limits["macs"], rel=1e-5)
    one = {"0": shares["0"]}
    assert float(table.load(one, {"2": table.share("2", 8)})) == pytest.approx(float(table.load(shares, {})), rel=1e-5)


def test_a_shared_layer_has_its_parameters_once() -> None:
    torch.manual_seed(0)
    layer = conv(4)
    given = program(1.0, layer, nn.ReLU(), layer).with_(budget=tdcompile.Budget(params=0.5))
    table = SingleRanks(given, {"0": make(Decomposition, "tucker2")})
    assert table.dense.params == sum(p.numel() for p in layer.parameters())
    chain = make(Decomposition, "tucker2").blueprint(sites(given)["0"].layer, (4, 4))
    assert table.spent({"0": 4}).params == sum(part.params for part in chain)

import pytest

from tdcompile.core.decomposition import Decomposition
from tdcompile.core.plan import Candidate, Candidates, Spectrum
from tdcompile.core.registry import make
from tdcompile.errors import BudgetError, InputError
from tdcompile.ir.target import Budget, Cost
from tdcompile.passes.rank.uniform import Uniform


def test_every_layer_takes_the_same_fraction(table):
    plan = Uniform(form="channel").select(table([0.1, 0.5, 2.0]), {}, Budget(macs=0.5))
    # Rank r costs 1.5 r / 16 of dense: 5 is the largest within one half.
    assert {choice.ranks for choice in plan.choices.values()} == {(5,)}
    assert not plan.reasons


def test_the_fraction_is_the_largest_that_fits(table):
    candidates = table([0.1, 0.5])
    exactly = Uniform(form="channel").select(candidates, {}, Budget(macs=1.5 * 8 / 16))
    below = Uniform(form="channel").select(candidates, {}, Budget(macs=1.5 * 8 / 16 - 0.001))
    assert exactly.choices["layer0"].ranks == (8,)
    assert below.choices["layer0"].ranks == (7,)


def test_full_ranks_come_from_the_spectrum_where_candidates_were_left_out(table):
    candidates = table([0.3, 0.3])
    few = tuple(o for o in candidates.layers["layer1"] if o.form != "channel" or o.ranks <= (8,))
    pruned = Candidates({**candidates.layers, "layer1": few}, candidates.rest, candidates.spectra)
    plan = Uniform(form="channel").select(pruned, {}, Budget(macs=0.4))
    assert plan.choices["layer0"].ranks == plan.choices["layer1"].ranks == (4,)


def test_ranks_of_two_modes_keep_under_one_fraction():
    dense, tucker = Candidate.dense(Cost(macs=100.0)), make(Decomposition, "tucker2")
    rows = [
        Candidate(
            tucker,
            (a, b),
            1 - (a / 8 + b / 4) / 2,
            Cost(macs=100.0 * a * b / 32),
            ("out", "in"),
        )
        for a in (2, 4, 6, 8)
        for b in (1, 2, 3, 4)
    ]
    spectra = {"l": {"out": Spectrum((1.0,) * 8, 8, 36), "in": Spectrum((1.0,) * 4, 4, 72)}}
    plan = Uniform().select(Candidates({"l": (dense, *rows)}, Cost(), spectra), {}, Budget(macs=0.3))
    assert plan.choices["l"].ranks == (4, 2)


def test_auto_takes_the_form_with_the_least_error_at_that_cost(table):
    candidates = table([0.1, 2.0])
    auto = Uniform().select(candidates, {}, Budget(macs=0.5))
    for name, options in candidates.layers.items():
        fitting = [o for o in options if o.cost.macs <= 500]
        assert auto.choices[name].decomposition == min(fitting, key=lambda o: o.error).decomposition


def test_a_layer_whose_candidate_is_dearer_than_dense_stays_dense(table):
    candidates = table([0.3, 0.3])
    dear = tuple(
        Candidate(o.decomposition, o.ranks, o.error, Cost(macs=2000.0 + o.ranks[0]), o.modes)
        for o in candidates.layers["layer1"][1:]
    )
    mixed = Candidates(
        {**candidates.layers, "layer1": (candidates.layers["layer1"][0], *dear)}, Cost(), candidates.spectra
    )
    plan = Uniform().select(mixed, {}, Budget(macs=0.7))
    assert plan.choices["layer1"].is_dense
    assert plan.reasons["layer1"].code == "not_cheaper"
    assert not plan.choices["layer0"].is_dense


def test_a_form_that_no_layer_has_names_the_known_ones(table):
    with pytest.raises(InputError, match="did you mean 'channel'"):
        Uniform(form="chanel").select(table([0.3]), {}, Budget(macs=0.5))


def test_a_layer_without_the_form_stays_dense_with_the_reason(table):
    candidates = table([0.3, 0.3])
    other = tuple(o for o in candidates.layers["layer1"] if o.form != "channel")
    mixed = Candidates({**candidates.layers, "layer1": other}, candidates.rest, candidates.spectra)
    plan = Uniform(form="channel").select(mixed, {}, Budget(macs=0.7))
    assert plan.reasons["layer1"].code == "other_form"


def test_what_it_cannot_reach_but_another_can(table):
    candidates = table([0.3, 0.3])
    with pytest.raises(BudgetError, match=r"uniform\{form=channel\} .*keeps macs=0\.094 .*go down to macs=0\.075"):
        Uniform(form="channel").select(candidates, {}, Budget(macs=0.08))

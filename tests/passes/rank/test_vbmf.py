import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdcompile.core.decomposition import Decomposition
from tdcompile.core.plan import Candidate, Candidates, Spectrum
from tdcompile.core.registry import make
from tdcompile.errors import BudgetError, InputError
from tdcompile.ir.target import Budget, Cost
from tdcompile.passes.rank.vbmf import VBMF, evbmf_rank


def spectrum(rank, rows, columns, noise, scale=1.0, seed=0):
    random = np.random.default_rng(seed)
    matrix = random.normal(size=(rows, rank)) @ random.normal(size=(rank, columns)) / np.sqrt(rank or 1)
    return np.linalg.svd(scale * (matrix + noise * random.normal(size=(rows, columns))), compute_uv=False)


@pytest.mark.parametrize("shape", [(64, 576), (576, 64), (128, 128), (32, 1000)])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_the_rank_under_noise_is_found(shape, rank):
    assert evbmf_rank(spectrum(rank, *shape, noise=0.1), *shape) == rank


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.floats(1e-6, 1e6), st.integers(0, 1000))
def test_the_scale_of_the_weights_does_not_matter(rank, scale, seed):
    assert evbmf_rank(spectrum(rank, 40, 90, noise=0.1, scale=scale, seed=seed), 40, 90) == rank


def test_pure_noise_has_rank_zero():
    assert evbmf_rank(spectrum(0, 64, 256, noise=1.0), 64, 256) == 0


def test_without_noise_the_rank_is_exact():
    assert evbmf_rank(spectrum(7, 32, 80, noise=0.0), 32, 80) == 7
    assert evbmf_rank((3.0, 2.0), 32, 80) == 2


def test_matrices_of_one_row_and_of_zeros_have_an_answer():
    assert evbmf_rank((2.0,), 1, 50) in (0, 1)
    assert evbmf_rank((0.0,) * 8, 8, 20) == 0


def layer(rank, size=32, taps=9, noise=0.05, seed=0):
    """A Tucker-2 table over a true rank: cost by the usual formula, errors that matter little here."""
    values = tuple(map(float, spectrum(rank, size, size * taps, noise, seed=seed)))
    dense, tucker = Candidate.dense(Cost(macs=float(size * size * taps))), make(Decomposition, "tucker2")
    rows = [
        Candidate(
            tucker,
            (a, b),
            1 - (a + b) / (2 * size),
            Cost(macs=float(size * (a + b) + a * b * taps)),
            m,
        )
        for m in [("out", "in")]
        for a in range(4, size + 1, 4)
        for b in range(4, size + 1, 4)
    ]
    return (dense, *rows), {mode: Spectrum(values, size, size * taps) for mode in ("out", "in")}


def candidates_of(*ranks):
    made = {f"l{i}": layer(rank, seed=i) for i, rank in enumerate(ranks)}
    return Candidates({n: m[0] for n, m in made.items()}, Cost(), {n: m[1] for n, m in made.items()})


def test_ranks_are_the_nearest_candidates_from_above():
    plan = VBMF().select(candidates_of(6, 10), {}, Budget(macs=1.0))
    assert {name: choice.ranks for name, choice in plan.choices.items()} == {"l0": (8, 8), "l1": (12, 12)}


def test_weakening_raises_ranks():
    plan = VBMF(weaken=0.7).select(candidates_of(6), {}, Budget(macs=1.0))
    assert plan.choices["l0"].ranks == (16, 16)  # int(32 - 0.7 * 26) = 13


def test_a_weakened_plan_over_the_budget_is_strengthened_just_enough():
    candidates = candidates_of(4, 6, 8)
    loose = VBMF(weaken=0.02).select(candidates, {}, Budget(macs=0.6))
    tight = VBMF(weaken=0.02).select(candidates, {}, Budget(macs=0.3))
    full = VBMF().select(candidates, {}, Budget(macs=1.0))
    assert full.predicted.macs < tight.predicted.macs <= 0.3 * tight.dense.macs
    assert tight.predicted.macs < loose.predicted.macs <= 0.6 * loose.dense.macs


def test_a_budget_below_the_estimate_itself_says_what_it_keeps():
    with pytest.raises(BudgetError, match=r"vbmf gives no plan within macs=0\.2: its closest one keeps macs="):
        VBMF().select(candidates_of(16, 20), {}, Budget(macs=0.2))


def test_a_form_with_neither_mode_is_taken_only_where_there_is_no_other():
    options, spectra = layer(6)
    bargain = [Candidate(make(Decomposition, "cp"), (r,), 0.1, Cost(macs=float(r)), ("",)) for r in range(1, 65)]
    both = Candidates({"l": (*options, *bargain)}, Cost(), {"l": spectra})
    alone = Candidates({"l": (options[0], *bargain)}, Cost(), {"l": spectra})
    assert VBMF().select(both, {}, Budget(macs=1.0)).choices["l"].form == "tucker2"
    assert VBMF().select(alone, {}, Budget(macs=1.0)).choices["l"].ranks == (12,)  # 6 of 32, so 12 of 64


def test_a_layer_without_spectra_stays_dense_with_the_reason():
    options, _ = layer(6)
    plan = VBMF().select(Candidates({"l": options}, Cost()), {}, Budget(macs=1.0))
    assert plan.choices["l"].is_dense
    assert plan.reasons["l"].code == "no_spectrum"


def test_no_rank_is_below_the_floor_and_narrow_layers_stay_dense():
    candidates = candidates_of(6)
    free = VBMF().select(candidates, {}, Budget(macs=1.0)).choices
    held = VBMF(floor=21).select(candidates, {}, Budget(macs=1.0)).choices
    assert any(0 < min(choice.ranks) < 21 for choice in free.values())
    assert all(min(choice.ranks) >= 21 for choice in held.values())
    plan = VBMF(floor=32).select(candidates, {}, Budget(macs=1.0))
    assert all(choice.is_dense for choice in plan.choices.values())
    assert {reason.code for reason in plan.reasons.values()} == {"narrow"}
    with pytest.raises(InputError, match="floor"):
        VBMF(floor=0)


@pytest.mark.parametrize("weaken", ["0", "-1", "1.01"])
def test_a_factor_out_of_range_is_refused(weaken):
    with pytest.raises(InputError, match="weaken"):
        VBMF.from_options({"weaken": weaken})

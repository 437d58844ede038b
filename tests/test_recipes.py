"""``Recipe``: options become a pipeline that can run, files and flags are laid over each other, mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdcompile.core.decomposition import Decomposition
from tdcompile.core.importance import Importance
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.rank_selector import RankSelector
from tdcompile.core.registry import find
from tdcompile.errors import InputError
from tdcompile.recipes import Recipe, load_recipe, recipes


def names(recipe: Recipe) -> list[str]:
    return [step.name for step in recipe.steps().steps]


def changed(recipe: Recipe) -> set[str]:
    return {name for name, field in Recipe.model_fields.items() if getattr(recipe, name) != field.default}


@pytest.mark.parametrize("name", recipes())
def test_every_shipped_recipe_is_a_pipeline_whose_needs_are_met(name: str) -> None:
    recipe = load_recipe(name, {})
    recipe.steps().check()
    recipe.shares()
    assert recipes()[name]["description"]


@settings(deadline=None)
@given(
    st.builds(
        Recipe,
        budget=st.dictionaries(st.sampled_from(["latency", "macs", "params"]), st.just(0.5), min_size=1),
        decompose=st.just(("auto",)) | st.lists(st.sampled_from(sorted(find(Decomposition))), min_size=1).map(tuple),
        ranks=st.sampled_from(sorted(find(RankSelector))),
        importance=st.sampled_from(sorted(find(Importance))),
        tune=st.sampled_from(["none", "epochs=1", "epochs=2,lr=0.1"]),
        grain=st.none() | st.integers(1, 8),
        dynamic_batch=st.booleans(),
        plan=st.none() | st.just("plan.json"),
    )
)
def test_any_options_make_a_pipeline_that_reads_back(recipe: Recipe) -> None:
    if recipe.plan is not None:
        idle = [name for name in ("decompose", "ranks", "importance", "grain") if name in changed(recipe)]
        if idle:
            with pytest.raises(InputError, match=f"^'{idle[0]}' has no effect beside a plan"):
                recipe.steps()
            return
    pipeline = recipe.steps()
    assert Pipeline.parse(str(pipeline)) == pipeline
    if recipe.plan is None:
        pipeline.check()
    made = [step.name for step in pipeline.steps]
    assert ("rehearse" in made) == ("latency" in recipe.budget and recipe.plan is None)
    assert ("finetune" in made) == (recipe.tune != "none")
    assert made[-2:] == ["fold-batchnorm", "drop-dead"]


def test_a_pipeline_of_ones_own_takes_the_place_of_all() -> None:
    assert names(Recipe(pipeline="score,drop-dead")) == ["score", "drop-dead"]


def test_jobs_and_grain_reach_the_passes_of_any_pipeline_that_take_them() -> None:
    steps = Recipe(pipeline="propose{grain=8},choose,factorize,drop-dead", jobs=3, grain=4).steps()
    assert str(steps) == "propose{grain=8,jobs=3},choose,factorize{jobs=3},drop-dead"
    assert str(Recipe(budget={"macs": 0.5}, jobs=2, grain=4).steps()).startswith(
        "reach{grain=4},calibrate,score,propose{grain=4,jobs=2},choose,factorize{jobs=2}"
    )
    assert "propose{decompose=tucker2+svd,spectra=true,jobs=4}" in str(load_recipe("tucker-vbmf", {"jobs": 4}).steps())


def test_a_budget_that_limits_nothing_is_refused_where_a_plan_is_to_be_made() -> None:
    for recipe in (Recipe(budget={}), Recipe(budget={}, pipeline="rene,factorize")):
        with pytest.raises(InputError, match="limits nothing"):
            recipe.shares()
    assert not Recipe(budget={}, plan="plan.json").shares().shares
    assert not Recipe(budget={}, pipeline="fold-batchnorm").shares().shares


def test_a_plan_takes_the_place_of_what_a_recipe_would_make_one_by(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('ranks = "greedy"\ntune = "epochs=1"\n')
    recipe = load_recipe(str(own), {"plan": "plan.json"})
    assert names(recipe) == [
        "calibrate",
        "factorize",
        "recalibrate",
        "refit",
        "finetune",
        "fold-batchnorm",
        "drop-dead",
    ]
    with pytest.raises(InputError, match="'ranks' has no effect beside a plan"):
        load_recipe(str(own), {"plan": "plan.json", "ranks": "greedy"}).steps()


def test_tuning_goes_to_the_pass_of_a_pipeline_that_trains() -> None:
    steps = load_recipe("rene", {"tune": "epochs=2,lr=0.01"}).steps().steps
    (tuned,) = [step for step in steps if step.name == "finetune"]
    assert tuned.spec().options == {"epochs": "2.0", "lr": "0.01", "labels": "1.0", "outputs": "0.5", "weights": "0.5"}
    assert "finetune" not in names(load_recipe("rene", {"tune": "none"}))
    assert "finetune" in names(load_recipe("rene", {}))
    (annealed,) = [
        s for s in load_recipe("progressive-tucker", {"tune": "epochs=2"}).steps().steps if s.name == "anneal"
    ]
    assert annealed.spec().options["epochs"] == "2.0"


def test_tuning_goes_to_the_pass_that_trains_through_rounding_only_if_no_other_trains() -> None:
    tail = "fold-batchnorm,drop-dead,finetune-int8"
    alone = Recipe(pipeline=f"factorize,{tail}", precision="int8", tune="optimizer=adam,epochs=3")
    assert str(alone.steps()).endswith("finetune-int8{epochs=3.0,optimizer=adam}")
    both = Recipe(pipeline=f"factorize,finetune,{tail}", precision="int8", tune="optimizer=adam,epochs=3")
    assert "finetune{epochs=3.0,optimizer=adam}" in str(both.steps())
    assert str(both.steps()).endswith("finetune-int8")


@pytest.mark.parametrize(
    ("recipe", "options", "said"),
    [
        ("progressive-tucker", {"tune": "none"}, "without its training"),
        ("rene", {"ranks": "uniform"}, "'ranks' has no effect"),
        ("rene", {"decompose": ("cp",)}, "'decompose' has no effect"),
        (None, {"pipeline": "score", "importance": "fisher"}, "'importance' has no effect"),
        (None, {"pipeline": "score", "tune": "epochs=1"}, "no pass that trains"),
        ("rene", {"tune": "epoch=1"}, "'epoch'"),
        ("rene", {"plan": "plan.json"}, "'plan' has no effect"),
        ("rene", {"grain": 4}, "'grain' has no effect"),
    ],
)
def test_options_that_a_pipeline_of_ones_own_leaves_no_room_for_are_refused(
    recipe: str | None, options: dict[str, object], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        load_recipe(recipe, options).steps()


def test_a_pipeline_given_beside_a_recipe_takes_the_place_of_what_the_recipe_would_make() -> None:
    for recipe in ("lwiq", "tuned", "tucker-vbmf"):
        made = load_recipe(recipe, {"pipeline": "score,propose,choose,factorize"})
        assert names(made) == ["score", "propose", "choose", "factorize"]
    assert load_recipe("lwiq", {"pipeline": "score"}).budget == load_recipe("lwiq", {}).budget


def test_flags_go_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('keep-dense = ["fc"]\ncalibrate = 64\n[budget]\nmacs = 0.4\n')
    recipe = load_recipe(str(file), {"calibrate": 32})
    assert (recipe.keep_dense, recipe.calibrate, recipe.budget, recipe.seed) == (("fc",), 32, {"macs": 0.4}, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bugdet = 1", "no option 'bugdet': did you mean 'budget'"),
        ("seed = 'x'", "'seed' cannot be 'x'"),
        ("= 1", "is not TOML"),
        ("target = 'tpu'", "'target' cannot be 'tpu'"),
        ("budget = 0.5", r"'budget' cannot be 0.5: .*e.g. \{ macs = 0.5 \}"),
        ("budget = { macs = 1.5 }", "macs=1.5 must be a share in \\(0, 1\\]"),
        ("max-drop = nan", "max-drop 'nan' must be a number of at least 0"),
        ("threads = true", "'threads' cannot be True: it is not true or false"),
        ("budget = { macs = true }", "budget macs=True must be a share"),
        ("jobs = 5000", "'jobs' cannot be 5000: it should be less than or equal to 1024"),
        ("keep-dense = 3", "'keep_dense' cannot be 3: it should be a list"),
        ("decompose = []", "'decompose' is empty"),
        ("decompose = ['auto', 'cp{correct=none}']", "'cp{correct=none}' has no effect beside it"),
        ("ranks = 'knapsak'", "did you mean 'knapsack'"),
        ("pipeline = 'score{by=fischer}'", "did you mean 'fisher'"),
        ("\udcff = 1", "is not UTF-8"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_the_file(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=f"^the recipe {file}.*{said}"):
        load_recipe(str(file), {})


def test_a_mistake_in_an_override_is_not_the_files(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("seed = 3\n")
    with pytest.raises(InputError, match=r"^the option 'jobs' cannot be 0"):
        load_recipe(str(tmp_path / "mine.toml"), {"jobs": 0})


def test_texts_stand_for_budgets_and_lists_as_in_flags(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'input = "1x1x8x8"\nbudget = "macs=0.5,params=0.4"\nkeep_dense = "c1"\ndecompose = "svd,tucker2{sweeps=1}"\n'
    )
    recipe = load_recipe(str(file), {})
    assert (recipe.budget, recipe.keep_dense) == ({"macs": 0.5, "params": 0.4}, ("c1",))
    assert (recipe.decompose, recipe.input) == (("svd", "tucker2{sweeps=1}"), ("1x1x8x8",))


def test_an_empty_name_is_no_recipe() -> None:
    with pytest.raises(InputError, match="there is no recipe ''"):
        load_recipe("", {})
    assert load_recipe(None, {}) == Recipe()


@pytest.mark.parametrize(
    ("name", "said"), [("missing.toml", "cannot be read"), ("qick", "there is no recipe 'qick'.*a file ends in .toml")]
)
def test_a_recipe_that_is_not_there_is_told(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_recipe(name, {})


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        *((name, value, "greater than or equal to 1") for name in ("threads", "grain", "jobs") for value in (0, -1)),
        ("calibrate", 0, "greater than or equal to 1"),
        ("eval", -3, "greater than or equal to 1"),
        ("seed", 10**23, "less than"),
        ("min_speedup", float("inf"), "a finite number"),
        ("min_speedup", float("nan"), "a finite number"),
    ],
)
def test_a_number_out_of_its_range_is_refused(field: str, value: float, said: str) -> None:
    with pytest.raises(InputError, match=rf"^the option '{field}' cannot be \S+: it should be {said}"):
        load_recipe(None, {field: value})
    assert load_recipe(None, {field: 1}) is not None

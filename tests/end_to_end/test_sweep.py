"""``sweep``: several budgets from one calibration, resumed after an interruption; a plan builds its model again."""

import json
from collections import Counter

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.cli.main import main
from tdcompile.core.hooks import Hook
from tdcompile.errors import InputError
from tdcompile.passes.tune.recalibrate import Recalibrate
from tdcompile.recipes import Recipe
from tests.end_to_end.test_goal import network, samples

X = torch.randn(1, 3, 8, 8)
FEW = ("svd", "channel")


class Steps(Hook):
    """Counts the passes; raises before one has run too often."""

    def __init__(self, stop=None, after=0):
        self.counts, self.stop, self.after = Counter(), stop, after

    def started(self, step, position, of):
        self.counts[step.name] += 1
        if step.name == self.stop and self.counts[step.name] > self.after:
            raise KeyboardInterrupt


def swept(workspace=None, watch=None, **options):
    data = (samples(200, 1), samples(100, 2))
    options = {"budget": {"params": 0.2}, "decompose": FEW, "points": 3, **options}
    return tdcompile.sweep(network(), X, data=data, workspace=workspace, watch=watch, **options)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A sweep that was interrupted in its third point, and what the second run repeated."""
    workspace, first, second = tmp_path_factory.mktemp("sweep"), Steps("factorize", after=2), Steps()
    with pytest.raises(KeyboardInterrupt):
        swept(workspace, first)
    return swept(workspace, second, resume=True), first.counts, second.counts


def test_an_interrupted_sweep_goes_on_where_it_was(interrupted):
    made, first, second = interrupted
    assert (first["propose"], first["calibrate"], first["factorize"]) == (1, 1, 3)
    assert (second["propose"], second["calibrate"], second["factorize"]) == (0, 0, 1)
    assert [point.number for point in made.points] == [1, 2, 3]


def test_points_keep_their_budgets_which_rise_from_the_least_share_to_the_dense_network(interrupted):
    made, *_ = interrupted
    shares = [point.budget["params"] for point in made.points]
    assert shares == pytest.approx([0.2, 0.2 + 0.8 / 3, 0.2 + 1.6 / 3])
    for point in made.points:
        assert point.plan.predicted.params <= point.budget["params"] * point.plan.dense.params
        assert point.model.onnx_bytes < made.dense[0].onnx_bytes
    assert made.measure.name == "accuracy"
    assert made.dense[0].quality == 1.0  # the labels are the dense network's answers


def test_the_plan_of_a_point_builds_the_same_model(interrupted, tmp_path):
    made, *_ = interrupted
    point = made.points[1]
    again = tdcompile.compile(network(), X, data=(samples(200, 1), samples(100, 2)), plan=point.plan)
    assert again.report.compiled.score == point.model.quality
    assert again.report.compiled.params == point.plan.predicted.params
    made.save(tmp_path / "out")
    assert (tmp_path / "out" / "sweep.html").read_text().startswith("<!DOCTYPE html>")


def test_the_dense_network_is_pooled_once_for_all_points(monkeypatch):
    networks, pooled = [], Recalibrate._pooled

    def counted(self, graphs, samples):
        networks.append(len(graphs))
        return pooled(self, graphs, samples)

    monkeypatch.setattr(Recalibrate, "_pooled", counted)
    net, options = nn.Sequential(nn.BatchNorm2d(3), *network()).eval(), {"budget": {"params": 0.2}, "decompose": FEW}
    made = tdcompile.sweep(net, X, data=(samples(200, 1), samples(100, 2)), points=2, **options)
    assert len(made.points) == 2
    assert networks == [2, 1]


def test_another_sweep_does_not_take_the_state_for_its_own(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        swept(tmp_path, Steps("factorize", after=0))
    with pytest.raises(InputError, match="another compilation, with another points"):
        swept(tmp_path, points=4, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 1}, "a sweep has 2 to 100 points, not 1"),
        ({"points": True}, "a sweep has 2 to 100 points, not True"),
        ({"goal": "fastest", "max_drop": 1}, "'goal' has no effect in a sweep"),
        ({"plan": "plan.json", "decompose": ("auto",)}, "'plan' has no effect in a sweep"),
        ({"budget": {"macs": 0.5, "params": 0.5}}, "the budget names macs and params: give one of them"),
        ({"budget": {"macs": 1.0}}, "leaves nothing to sweep"),
        ({"max_drop": 1}, "'max_drop' has no effect in a sweep"),
        ({"min_speedup": 2.0}, "'min_speedup' has no effect in a sweep"),
        ({"resume": True}, "no effect without a workspace"),
        ({"pipeline": "score,factorize", "decompose": ("auto",)}, "RankPlan"),
    ],
)
def test_a_sweep_that_cannot_be_made_is_refused_in_one_sentence(options, message):
    with pytest.raises(InputError) as refusal:
        swept(**options)
    assert message in str(refusal.value)


def test_where_no_budget_changes_the_plan_there_is_one_point_and_a_note():
    made = swept(budget={"params": 0.995}, points=4)
    assert len(made.points) == 1
    assert made.notes == (
        "there is one point, because no budget tells plans apart: params reaches 0.995 of the dense network's at least "
        "and 1 at most",
    )


def test_a_recipe_with_the_default_budget_sweeps_latency():
    from tdcompile.budget_sweep import sweep_recipe

    recipe, name, least = sweep_recipe(Recipe(), 8)
    assert (name, least, recipe.shares().shares) == ("latency", None, {"latency": 1.0})
    assert sweep_recipe(Recipe(budget={"macs": 0.3}), 8)[1:] == ("macs", 0.3)


def test_the_command_writes_the_front_and_exits_with_2_where_it_cannot(tmp_path, capsys):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef build():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 4)).eval()\n"
    )
    out = tmp_path / "front"
    arguments = ["sweep", f"{tmp_path / 'net.py'}:build", "--input", "1x24", "--budget", "params=0.3", "-q"]
    assert main([*arguments, "--points", "2", "--decompose", "svd", "-o", str(out)]) == 0
    assert "params=0.3" in capsys.readouterr().out
    document = json.loads((out / "sweep.json").read_text())
    assert document["measure"] is None
    assert len(document["points"]) == 2
    assert {path.name for path in out.iterdir()} == {
        *("sweep.json", "sweep.html", "plan-1.json", "plan-2.json", "manifest.json")
    }
    assert not out.with_name(f".{out.name}.work").exists()
    assert main([*arguments, "--budget", "macs=0.3", "-o", str(tmp_path / "no")]) == 2
    assert not (tmp_path / "no").exists()

"""``compile`` as its users meet it: budgets, reports, reproducibility, resume, plans and refusals."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import onnx
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tdcompile
from tdcompile import compiler
from tdcompile.artifact.checkpoint import Checkpoint
from tdcompile.artifact.report import render_html
from tdcompile.backend import verified_export
from tdcompile.backend.session import infer, open_session
from tdcompile.compiler import Compiled
from tdcompile.core import registry
from tdcompile.core.hooks import Hook
from tdcompile.core.passes import AnalysisPass
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import RankPlan
from tdcompile.data.task import Tensors
from tdcompile.errors import BudgetError, InputError, RuinedError, TdcompileError
from tdcompile.ir.diagnostics import Reason, ReasonCode
from tdcompile.ir.target import Target
from tdcompile.passes import Calibrate, Choose, Factorize, Propose, Score
from tdcompile.training.run_state import Tuning
from tdcompile.training.trainer import Trainer


def points(count=96, classes=2, seed=0):
    """Noise images, bright and dark: the first class and the last."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 2, (count,), generator=generator) * (classes - 1)
    return Tensors(torch.randn(count, 3, 12, 12, generator=generator) + y.view(-1, 1, 1, 1), y, classes)


def network(classes=2):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, classes),
    ).eval()


X = torch.randn(1, 3, 12, 12)
FEW = ("svd", "channel")  # forms whose errors cost little, for tests that do not ask which form is chosen


class Steps(Hook):
    """Records the steps, and raises after one."""

    def __init__(self, stop=None):
        self.names, self.stop = [], stop

    def finished(self, step, program, seconds):
        self.names.append(step.name)

    def started(self, step, position, of):
        if step.name == self.stop:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Named(AnalysisPass):
    """Finds nothing; has a text option."""

    name: ClassVar[str] = ""  # the fixture ``named`` sets it: other tests list all plug-ins
    text: str = ""

    def analyze(self, program):
        return []


class Unnamed(AnalysisPass):
    """Finds nothing; the registry does not know it."""

    def analyze(self, program):
        return []


@pytest.fixture
def named():
    """Let the registry find ``Named`` during one test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Named, "name", "named-by-test")
        registry.refresh()
        yield
    registry.refresh()


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return tdcompile.compile(network(), X, data=(points(), points(seed=1)), budget={"macs": 0.5}, tune="epochs=1")


def test_the_budget_is_kept_and_the_figures_agree_with_each_other(compiled):
    report = compiled.report
    assert report.compiled.macs <= 0.5 * report.dense.macs
    assert report.met
    assert report.ratio.macs == pytest.approx(report.dense.macs / report.compiled.macs)
    assert report.ratio.latency == pytest.approx(report.dense.latency_ms / report.compiled.latency_ms, rel=0.1)
    low, high = report.ratio.latency_interval
    assert low <= report.ratio.latency <= high
    assert report.realised == pytest.approx(report.ratio.latency / report.ratio.macs)
    assert report.compiled.params == sum(p.numel() for p in compiled.module.parameters())
    assert report.compiled.onnx_bytes == compiled.onnx.stat().st_size
    assert sum(layer.macs_after for layer in report.layers) == report.compiled.macs
    assert report.parity.max_rel < 1e-3
    assert report.parity.provider == "CPUExecutionProvider"
    assert report.compiled.score is not None
    assert report.compiled.score_before_tuning is not None
    assert len(report.tuning_curve) == 1
    assert {"calibrate", "propose", "factorize", "finetune", "total"} <= set(report.seconds)
    for layer in report.layers:
        assert (layer.decomposition == "dense") == (layer.refusal is not None), "a layer left alone has a reason"


def test_no_batch_norm_and_no_dense_branch_are_left(compiled):
    assert not [m for m in compiled.module.modules() if isinstance(m, nn.BatchNorm2d)]
    replaced = [layer.name for layer in compiled.report.layers if layer.decomposition != "dense"]
    assert replaced
    for name in replaced:
        weights = [
            p for n, p in compiled.module.named_parameters() if n.startswith(f"{name}.") and n.endswith("weight")
        ]
        assert len(weights) >= 2


def test_what_is_saved_loads_back_and_says_what_it_is(compiled, tmp_path):
    out = compiled.save(tmp_path / "out", command=["tdcompile", "compile"])
    assert {p.name for p in out.iterdir()} == {
        "model.onnx", "dense.onnx", "weights.safetensors", "plan.json", "report.json", "report.html", "manifest.json"
    }  # fmt: skip
    x = torch.randn(5, 3, 12, 12)
    with torch.no_grad():
        assert torch.equal(tdcompile.load(out)(x), compiled.module(x))
    assert json.loads((out / "report.json").read_text())["budget"] == {"macs": 0.5}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not a tdcompile output folder"):
        compiled.save(tmp_path / "mine")


def test_one_seed_gives_one_plan_and_the_same_bytes():
    options = {"data": points(), "budget": {"macs": 0.6}, "seed": 3}
    made = [tdcompile.compile(network(), X, **options) for _ in range(2)]
    assert made[0].plan.to_json() == made[1].plan.to_json()
    assert made[0].onnx.read_bytes() == made[1].onnx.read_bytes()


def test_an_interrupted_run_goes_on_from_its_last_finished_pass(tmp_path):
    options = {"data": points(), "budget": {"params": 0.6}, "workspace": tmp_path / "work", "tune": "epochs=1"}
    options |= {"decompose": FEW}
    whole = tdcompile.compile(network(), X, **{**options, "workspace": tmp_path / "other"})
    first, second = Steps(stop="finetune"), Steps()
    with pytest.raises(KeyboardInterrupt):
        tdcompile.compile(network(), X, watch=first, **options)
    state = json.loads((tmp_path / "work" / "state" / "state.json").read_text())
    resumed = tdcompile.compile(network(), X, watch=second, resume=True, **options)
    assert first.names[-1] == "refit"
    assert second.names[0] == "finetune"
    x = torch.randn(4, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(resumed.module(x), whole.module(x))
    before, report = state["total"], resumed.report
    assert before >= sum(state["seconds"].values())
    assert report.seconds["total"] >= before + report.seconds["verify"]
    assert report.seconds["total"] >= sum(seconds for name, seconds in report.seconds.items() if name != "total")
    assert report.seconds["trace"] > state["seconds"]["trace"]
    assert report.seconds["finetune"] > state["seconds"]["finetune"] > 0  # both runs began it
    assert report.peak_memory_mb >= state["peak_memory_mb"] > 0
    resumed.save(tmp_path / "out")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("resume", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_after_the_last_epoch_does_not_cost_the_training(tmp_path, monkeypatch, resume):
    options = {"data": points(), "budget": {"params": 0.6}, "tune": "epochs=2,batch=16,lr=0.01", "decompose": FEW}
    whole = tdcompile.compile(network(), X, **options)
    save, epochs = Checkpoint.save, []

    def full(self, program, done, *rest):
        if program.facts.get(Tuning) is not None:
            raise InputError("the disk is full")
        save(self, program, done, *rest)

    monkeypatch.setattr(Checkpoint, "save", full)
    with pytest.raises(InputError, match="disk is full"):
        tdcompile.compile(network(), X, workspace=tmp_path, **options)
    monkeypatch.setattr(Checkpoint, "save", save)
    epoch = Trainer._epoch

    def counted(self, number, curve):
        epochs.append(number)
        return epoch(self, number, curve)

    monkeypatch.setattr(Trainer, "_epoch", counted)
    resumed = tdcompile.compile(network(), X, workspace=tmp_path, resume=resume, **options)
    assert epochs == ([] if resume else [1, 2])
    assert resumed.onnx.read_bytes() == whole.onnx.read_bytes()
    assert not (tmp_path / "finetune").exists()
    assert not (whole.folder / "finetune").exists()  # nor where nobody gave a workspace


class Eigen(nn.Module):
    """Has layers to replace, and an operator without an ONNX form."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 16)

    def forward(self, x):
        return torch.linalg.eigvals(self.head(x)[:, :, None] * torch.ones(16)).abs()


def test_a_network_without_an_onnx_form_is_refused_before_the_passes():
    steps = Steps()
    with pytest.raises(TdcompileError, match=r"linalg_eig.*has no ONNX form"):
        tdcompile.compile(Eigen().eval(), torch.randn(2, 16), budget={"macs": 0.6}, watch=steps)
    assert steps.names == []


def test_the_dense_network_is_exported_and_verified_once(monkeypatch):
    exported, checked = [], []
    export, check = torch.onnx.export, verified_export.check_parity
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: exported.append(1) or export(*a, **k))
    monkeypatch.setattr(verified_export, "check_parity", lambda *a, **k: checked.append(a[0].name) or check(*a, **k))
    made = tdcompile.compile(nn.Sequential(nn.Linear(16, 16)).eval(), torch.randn(2, 16), budget={"macs": 0.6})
    assert len(exported) == 2
    assert checked == ["dense.onnx", "model.onnx"]
    assert [entry.value for entry in onnx.load(made.folder / "dense.onnx").metadata_props if entry.key == "model"] == [
        "dense"
    ]
    assert made.report.dense_parity.cases == 6


def test_what_a_consumer_needs_is_in_the_models_and_in_the_report(tmp_path):
    options = {
        "opset": 17,
        "ir": 8,
        "output_names": "scores",
        "metadata": {"version": "3"},
        "labels": ["day", "nacht ü"],
        "decompose": FEW,
    }
    report = (made := tdcompile.compile(network(), X, budget={"macs": 0.6}, **options)).report
    for name in ("dense.onnx", "model.onnx"):
        model = onnx.load(made.folder / name)
        known = {entry.key: entry.value for entry in model.metadata_props}
        assert known.keys() == {"producer", "source", "plan", "model", "version", "labels"}
        assert (known["version"], json.loads(known["labels"])) == ("3", ["day", "nacht ü"])
        assert (model.opset_import[0].version, model.ir_version) == (17, 8)
        assert [value.name for value in model.graph.output] == ["scores"]
    told = report.onnx
    assert (told.opset, told.ir, told.outputs, told.metadata, told.labels) == (
        *(17, 8, ("scores",), {"version": "3"}),
        ("day", "nacht ü"),
    )
    assert "nacht ü" in render_html(report)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"labels": ["a", "b", "c"]}, r"3 class names are given as labels, and the network's output is \d×2"),
        ({"labels": "none.txt"}, "none.txt cannot be read"),
        ({"metadata": {"plan": "mine"}}, "'plan' is written by tdcompile"),
        ({"metadata": ("version",)}, "must have the form KEY=VALUE"),
        ({"opset": 999}, "does not load models of opset 999"),
        ({"opset": 3}, "'opset' cannot be 3"),
        ({"output_names": "a,b"}, "2 output names are given"),
        ({"output_names": "a,a"}, "'a' is given twice"),
    ],
)
def test_what_no_model_can_hold_is_refused_before_the_passes(options, told):
    steps = Steps()
    with pytest.raises(InputError, match=told):
        tdcompile.compile(network(), X, budget={"macs": 0.6}, watch=steps, **options)
    assert steps.names == []


def test_the_state_of_another_compilation_is_refused_and_stays(tmp_path):
    options = {"budget": {"macs": 0.6}, "workspace": tmp_path, "data": (points(), points(seed=1)), "decompose": FEW}
    with pytest.raises(KeyboardInterrupt):
        tdcompile.compile(network(), X, **options, watch=Steps(stop="factorize"))
    for change, told in (({"budget": {"macs": 0.5}}, r'budget \({"macs": 0.6}\): give'), ({"seed": 1}, r"seed \(0\)")):
        with pytest.raises(InputError, match=told):
            tdcompile.compile(network(), X, **options | change, resume=True)
    steps, gates = Steps(), {"max_drop": 90, "min_speedup": 0, "eval": 50, "jobs": 2}
    report = tdcompile.compile(network(), X, **options, **gates, watch=steps, resume=True).report
    assert steps.names[0] == "factorize"
    assert [gate.name for gate in report.gates] == ["macs", "min-speedup", "max-drop"]


@pytest.mark.parametrize("other", ["inputs", "samples", "nothing"])
def test_nor_is_that_of_other_inputs_or_of_other_data(tmp_path, other):
    x, data = torch.randn(2, 3, 8, 8), [tdcompile.Tensors(torch.randn(16, 3, 8, 8)) for _ in range(2)]
    options = {"budget": {"macs": 0.6}, "workspace": tmp_path, "decompose": FEW, "tune": "none"}
    with pytest.raises(KeyboardInterrupt):
        tdcompile.compile(network(), x, data=data[0], watch=Steps(stop="factorize"), **options)
    x, data = {
        "inputs": (torch.randn(2, 3, 12, 12), tdcompile.Tensors(torch.randn(16, 3, 12, 12))),
        "samples": (x, data[1]),
        "nothing": (x, data[0]),
    }[other]
    steps = Steps()
    if other != "nothing":
        with pytest.raises(InputError, match=f"another .*{other}"):
            tdcompile.compile(network(), x, data=data, watch=steps, resume=True, **options)
        assert not steps.names
        return
    tdcompile.compile(network(), x, data=data, watch=steps, resume=True, **options)
    assert steps.names[0] == "factorize"


@pytest.mark.parametrize(
    ("pipeline", "stop"),
    [
        ("attach-adapters,anneal{epochs=2,batch=16},detach-dense", "detach-dense"),
        pytest.param(
            "propose{decompose=svd+channel},score{by=none},choose,factorize,finetune{epochs=1,batch=16,outputs=1.0}",
            "finetune",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path, pipeline, stop):
    options = {"data": points(), "budget": {"macs": 0.6}, "pipeline": pipeline, "max_drop": 100}
    whole = tdcompile.compile(network(), X, **options)
    with pytest.raises(KeyboardInterrupt):
        tdcompile.compile(network(), X, workspace=tmp_path, watch=Steps(stop=stop), **options)
    steps = Steps()
    resumed = tdcompile.compile(network(), X, workspace=tmp_path, watch=steps, resume=True, **options)
    assert steps.names[0] == stop
    assert resumed.onnx.read_bytes() == whole.onnx.read_bytes()


def test_layers_worked_on_side_by_side_give_what_they_give_in_turn():
    options = {"data": points(), "budget": {"macs": 0.5}, "tune": "none", "decompose": ("svd", "tucker2")}
    one, two = (tdcompile.compile(network(), X, **options, jobs=jobs) for jobs in (1, 2))
    assert "propose{decompose=svd+tucker2,jobs=2}" in two.report.pipeline
    assert "factorize{jobs=2}" in two.report.pipeline
    assert one.plan.choices.keys() == two.plan.choices.keys()
    for name, choice in one.plan.choices.items():
        other = two.plan.choices[name]
        assert (other.decomposition, other.ranks, other.cost) == (choice.decomposition, choice.ranks, choice.cost)
        assert other.error == pytest.approx(choice.error, rel=1e-5)
    for name, value in one.module.state_dict().items():
        torch.testing.assert_close(two.module.state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_a_plan_edited_by_hand_is_followed(tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"layers": {"3": {"decomposition": "tucker2", "ranks": [8, 6]}}}))
    made = tdcompile.compile(network(), X, plan=str(plan), budget={"macs": 1.0})
    assert made.module.get_submodule("3.1").weight.shape == (8, 6, 3, 3)
    assert [layer.refusal.code for layer in made.report.layers if layer.refusal] == ["dense_in_plan"] * 2
    assert made.plan.predicted.macs == made.report.compiled.macs < made.plan.dense.macs == made.report.dense.macs
    first, core, last = (made.module.get_submodule(f"3.{place}").weight.flatten(1) for place in range(3))
    weight, core = network()[3].weight.flatten(1), core.reshape(8, 6, 9)
    found = torch.einsum("to,oik,ic->tck", last, core, first).flatten(1)
    error = float((found - weight).detach().norm() / weight.detach().norm())
    assert made.report.layers[1].error == pytest.approx(error, rel=0.05)  # what proposing it would have estimated


def test_the_figures_of_a_plan_are_those_of_the_ranks_it_has_now(tmp_path):
    options = {"data": points(), "budget": {"macs": 0.5}, "tune": "none"}
    made, plan = tdcompile.compile(network(), X, **options, decompose=FEW), tmp_path / "plan.json"
    plan.write_text(made.plan.to_json())
    again = tdcompile.compile(network(), X, **options, plan=str(plan))
    assert (again.plan.choices, again.plan.predicted) == (made.plan.choices, made.plan.predicted)
    document = json.loads(made.plan.to_json())
    name = next(name for name, entry in document["layers"].items() if entry["decomposition"] != "dense")
    document["layers"][name]["ranks"] = [1 for _ in document["layers"][name]["ranks"]]
    plan.write_text(json.dumps(document))
    edited = tdcompile.compile(network(), X, **options, plan=str(plan))
    assert edited.plan.choices[name].error > made.plan.choices[name].error
    assert edited.plan.predicted.macs == edited.report.compiled.macs < made.plan.predicted.macs
    assert (again.plan.selector, again.plan.reasons) == (made.plan.selector, made.plan.reasons)
    assert (edited.report.selector, edited.report.gap) == ("hand", None)
    assert {refusal.code for refusal in edited.plan.reasons.values()} <= {"dense_in_plan"}


def test_the_errors_of_a_plan_by_hand_are_those_of_the_outputs_where_there_are_samples():
    options = {"data": points(), "budget": {"macs": 0.5}, "tune": "none", "decompose": "tucker2,svd"}
    made = tdcompile.compile(network(), X, **options)
    layers = {n: {"decomposition": c.form, "ranks": c.ranks} for n, c in made.plan.choices.items()}
    given = {"plan": json.dumps({"layers": layers}), "tune": "none"}
    seen, blind = (tdcompile.compile(network(), X, data=data, **given).plan for data in (points(), None))
    for name, choice in made.plan.choices.items():
        assert seen.choices[name].error == pytest.approx(choice.error, rel=1e-4)
        assert (blind.choices[name].error == seen.choices[name].error) == choice.is_dense


def test_a_plan_needs_no_budget_and_is_held_to_one_that_is_given(tmp_path):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"layers": {"3": {"decomposition": "tucker2", "ranks": [8, 6]}}}))
    alone = tdcompile.compile(network(), X, plan=plan)
    assert alone.report.budget == {}
    assert not alone.report.gates
    assert "baseline" not in alone.report.pipeline
    held = tdcompile.compile(network(), X, plan=plan, budget="params=0.1").report
    assert [(gate.name, gate.passed) for gate in held.gates] == [("params", False)]


def test_a_plan_and_a_pipeline_are_taken_as_they_are():
    options = {"budget": {"macs": 0.6}, "tune": "none"}
    made = tdcompile.compile(network(), X, **options, decompose=FEW)
    again = tdcompile.compile(network(), X, **options, plan=made.plan)
    assert again.plan == made.plan
    assert again.onnx.read_bytes() == made.onnx.read_bytes()
    steps = tdcompile.Pipeline.parse("score{by=none},propose{decompose=svd+channel},choose{by=greedy},factorize")
    assert tdcompile.compile(network(), X, **options, pipeline=steps).report.pipeline == str(steps)
    other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(X[0].numel(), 4))
    with pytest.raises(InputError, match=r"^the plan is for another network: it has no layer '0'"):
        tdcompile.compile(other, X, plan=made.plan)


def test_the_state_of_a_plan_that_was_edited_since_is_not_taken(tmp_path):
    plan, work = tmp_path / "plan.json", tmp_path / "work"
    for ranks, first, stop, ends in (
        ([8, 6], ["export-dense"], "recalibrate", KeyboardInterrupt),
        ([4, 4], [], "recalibrate", InputError),
        ([8, 6], ["recalibrate"], "fold-batchnorm", KeyboardInterrupt),
    ):
        plan.write_text(json.dumps({"layers": {"3": {"decomposition": "tucker2", "ranks": ranks}}}))
        steps = Steps(stop=stop)
        with pytest.raises(ends, match="another plan" if ends is InputError else None):
            tdcompile.compile(network(), X, plan=plan, workspace=str(work), resume=True, watch=steps)
        assert steps.names[:1] == first


def test_options_may_be_given_as_flags_have_them():
    flags = tdcompile.compile(
        network(), X, budget=tdcompile.Budget(macs=0.6), decompose="svd,channel", keep_dense="8", tune="none"
    )
    lists = tdcompile.compile(
        network(), X, budget={"macs": 0.6}, decompose=["svd", "channel"], keep_dense=["8"], tune="none"
    )
    assert flags.plan.to_json() == lists.plan.to_json()


def test_the_data_of_a_recipe_are_read(tmp_path):
    recipe = tmp_path / "own.toml"
    recipe.write_text('data = "digits"\nimportance = "none"\nbudget = { macs = 0.6 }\ncalibrate = 64\neval = 50\n')
    x = torch.randn(2, 1, 8, 8)
    net = nn.Sequential(nn.Conv2d(1, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.Flatten(), nn.Linear(384, 10)).eval()
    assert tdcompile.compile(net, x, recipe=recipe, decompose=FEW).report.compiled.score is not None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"weights": "some.safetensors"}, "'weights' is an option of the command"),
        ({"input": ["1x3x12x12"]}, "'input' is an option of the command"),
        ({"tune": "epochs=1"}, "'finetune' trains, and there is nothing to train on"),
        ({"max_drop": 5}, "there are no samples to measure it on"),
        ({"max_drop": 5, "data": points(63)}, "there are no samples to measure it on"),
        ({"pipeline": "score", "data": points()}, r"'score' makes no plan: add a pass that gives one \(.*choose.*rene"),
        ({"pipeline": "finetune{epochs=1}", "data": points()}, "makes no plan"),
        ({"calibrate": 0}, "'calibrate' cannot be 0"),
        ({"eval": -3}, "'eval' cannot be -3"),
        (
            {"data": Tensors((torch.zeros(4, 3, 12, 12), torch.zeros(4)))},
            "has 2 input\\(s\\), and the network was given 1",
        ),
    ],
)
def test_what_would_be_left_out_in_silence_is_refused(options, told):
    with pytest.raises(InputError, match=told):
        tdcompile.compile(network(), X, budget={"macs": 0.6}, **options)
    with pytest.raises(InputError, match="give example inputs"):
        tdcompile.compile(network(), None)


def test_the_cores_of_a_tensor_train_are_counted(tmp_path):
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    made = tdcompile.compile(wide, torch.randn(2, 64), budget={"macs": 0.5}, decompose=("tt-linear",), tune="none")
    report = made.report
    assert {layer.decomposition for layer in report.layers} == {"tt-linear"}
    assert report.compiled.macs == sum(layer.macs_after for layer in report.layers) == made.plan.predicted.macs
    assert report.compiled.params == sum(layer.params_after for layer in report.layers) == made.plan.predicted.params
    counter = FlopCounterMode(display=False)
    with counter:
        made.module(torch.randn(3, 64))
    assert counter.get_total_flops() == 3 * 2 * report.compiled.macs


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"30": {"decomposition": "svd", "ranks": [4]}}, "another network"),
        ({"3": {"decomposition": "svd", "ranks": [4]}}, "plan wants svd for '3'"),
        ({"3": {"decomposition": "tucker2", "ranks": [99, 4]}}, "expected 2 rank"),
        ({"3": {"decomposition": "tuckr2", "ranks": [9, 4]}}, "did you mean 'tucker2'"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(tmp_path, entry, message):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"layers": entry}))
    with pytest.raises(InputError, match=message):
        tdcompile.compile(network(), X, plan=str(plan))


@pytest.mark.timed
def test_a_latency_budget_is_predicted_checked_in_the_graph_and_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("TDCOMPILE_CACHE", str(tmp_path))
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)).eval()
    report = tdcompile.compile(wide, torch.randn(1, 64, 28, 28), budget={"latency": 0.7}).report
    assert report.iterations
    assert report.predicted_latency_ms == pytest.approx(report.compiled.latency_ms, rel=0.5)  # a shared machine
    assert all(ranks % 16 == 0 for layer in report.layers for ranks in layer.ranks)
    assert [gate.name for gate in report.gates] == ["latency"]


def test_a_budget_that_no_plan_meets_says_what_can():
    with pytest.raises(BudgetError, match="the cheapest one keeps"):
        tdcompile.compile(network(), X, budget={"macs": 0.001})


@pytest.mark.parametrize("tune", [None, "epochs=1"])
def test_a_layer_that_is_slower_in_the_compiled_model_is_put_back_or_told(monkeypatch, tune):
    honest, outcomes = compiler.measure, []

    def measure(program, *rest, **options):
        """Say of the first model that its first replaced layer is slower."""
        outcome = honest(program, *rest, **options)
        replaced = [name for name, choice in program.facts[RankPlan].choices.items() if not choice.is_dense]
        reason = Reason(ReasonCode.SLOWER_IN_GRAPH, "it took 3 ms, the dense layer 2 ms")
        slower = {} if outcomes else {replaced[0]: reason}
        outcomes.append(replaced)
        return replace(outcome, slower=slower)

    monkeypatch.setattr(compiler, "measure", measure)
    monkeypatch.setattr(compiler, "keeps_counts", lambda plan, budget: True)  # a budget of latency limits no counts
    compiled = tdcompile.compile(network(), X, data=points(), budget={"macs": 0.5}, tune=tune)
    name = outcomes[0][0]
    (row,) = [layer for layer in compiled.report.layers if layer.name == name]
    told = [note for note in compiled.report.notes if "is not faster in the compiled model" in note]
    if tune is None:
        assert len(outcomes) == 2
        assert (row.decomposition, row.refusal.code, row.macs_after) == ("dense", "slower_in_graph", row.macs_before)
        assert compiled.plan.choices[name].is_dense
        assert not told
        x = torch.randn(2, 3, 12, 12)
        with torch.no_grad():
            torch.testing.assert_close(
                compiled.module(x),
                torch.from_numpy(infer(open_session(compiled.onnx, Target()), [x])[0]),
                rtol=1e-3,
                atol=1e-4,
            )
    else:
        assert len(outcomes) == 1
        assert row.decomposition != "dense"
        assert told == [
            f"'{name}' is not faster in the compiled model: it took 3 ms, the dense layer 2 ms; "
            f"--keep-dense {name} leaves it dense"
        ]


def test_gates_that_are_not_passed_are_in_the_report():
    report = tdcompile.compile(
        network(), X, data=(points(), points()), budget={"macs": 0.9}, min_speedup=1e6, max_drop=100.0, decompose=FEW
    ).report
    assert not report.met
    assert [gate.name for gate in report.gates if not gate.passed] == ["min-speedup"]
    assert [gate.name for gate in report.gates if gate.passed] == ["macs", "max-drop"]
    assert "not met" in report.verdict


def unlabelled(count=96, seed=0):
    return Tensors(points(count, seed=seed).inputs)


@pytest.mark.parametrize(
    ("data", "source"), [(unlabelled(), "held-out training"), ((unlabelled(), unlabelled(seed=1)), "test")]
)
def test_without_labels_the_outputs_are_compared_on_samples_that_no_pass_read(data, source):
    report = tdcompile.compile(network(), X, data=data, budget={"macs": 0.9}, decompose=FEW).report
    assert report.quality.source == source
    assert report.quality.samples == (12 if source == "held-out training" else 96)
    (output,) = report.quality.outputs
    assert 0 < output.relative_error < 0.5
    assert output.agreement > 0.8
    assert report.met
    assert [gate.name for gate in report.gates] == ["macs", "answers"]
    assert "top-1 agreement" in report.verdict


def ruin(monkeypatch, scale):
    """Make factorize go wrong: the weights of the last layer are scaled."""
    sound = Factorize.rewrite

    def rewrite(self, graph, program):
        rewritten = sound(self, graph, program)
        head = rewritten.graph.get_submodule("8")
        head.weight = nn.Parameter(scale * head.weight.detach())
        return rewritten

    monkeypatch.setattr(Factorize, "rewrite", rewrite)
    return {
        "data": (unlabelled(), unlabelled(seed=1)),
        "budget": {"macs": 0.95},
        "keep_dense": ["8"],
        "pipeline": "calibrate,score{by=none},propose{decompose=svd+channel},choose,factorize,fold-batchnorm,drop-dead",
    }


def test_a_ruined_network_is_no_success_unless_the_drop_is_allowed(monkeypatch):
    options = ruin(monkeypatch, -1.0)
    monkeypatch.setattr(tdcompile.compiler, "check_answers", lambda program: None)
    report = tdcompile.compile(network(), X, **options).report
    assert report.quality.outputs[0].agreement < 0.7
    assert report.verdict.startswith("the network's answers have changed")
    assert [gate.name for gate in report.gates if not gate.passed] == ["answers"]
    assert tdcompile.compile(network(), X, **options, max_drop=100).report.met


def test_a_network_whose_outputs_say_nothing_is_not_exported(monkeypatch):
    options = ruin(monkeypatch, -30)
    with pytest.raises(RuinedError, match=r"ruined: its outputs differ by .* times the spread .* 64 samples"):
        tdcompile.compile(network(), X, **options)
    assert tdcompile.compile(network(), X, **options, max_drop=100).report.met
    labelled = {**options, "data": (points(), points(seed=1))}
    assert tdcompile.compile(network(), X, **labelled).report.quality.outputs[0].relative_error > 1


def test_without_samples_the_verdict_says_that_quality_is_not_known():
    report = tdcompile.compile(network(), X, budget={"macs": 0.9}, decompose=FEW).report
    assert report.quality is None
    assert "quality not measured, because there are no samples" in report.verdict


def test_with_too_few_samples_the_verdict_does_not_say_that_there_are_none():
    report = tdcompile.compile(network(), X, data=points(63), budget={"macs": 0.9}, decompose=FEW).report
    assert report.quality is None
    assert "63 training samples are too few to hold some out: give test samples, or at least 64" in report.verdict


def test_layers_are_kept_dense_by_pattern_and_a_pattern_without_a_layer_is_an_error():
    report = tdcompile.compile(network(), X, budget={"macs": 0.9}, keep_dense=("8", "0"), decompose=FEW).report
    assert {layer.name: layer.refusal.code for layer in report.layers if layer.refusal}["0"] == "excluded_by_user"
    with pytest.raises(InputError, match="matches no layer"):
        tdcompile.compile(network(), X, keep_dense=("head*",))


def test_python_hands_over_arrays_and_a_loader():
    held = points()
    x, y = held.inputs[0], held.targets
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=7)
    made = tdcompile.compile(network(), X, data=((x, y), loader), budget={"macs": 0.6}, decompose=FEW)
    same = tdcompile.compile(network(), X, data=(held, held), budget={"macs": 0.6}, decompose=FEW)
    assert made.report.compiled.score == same.report.compiled.score
    assert made.report.ratio.macs == same.report.ratio.macs


def test_damaged_data_and_foreign_labels_are_refused():
    bad = points()
    bad.inputs[0][5] = float("nan")
    with pytest.raises(InputError, match="NaN or Inf"):
        tdcompile.compile(network(), X, data=bad, budget={"macs": 0.5})
    with pytest.raises(InputError, match="labels go up to 6"):
        tdcompile.compile(network(), X, data=points(classes=7), budget={"macs": 0.5})


@pytest.mark.parametrize("budget", [{"macs": 0.0}, {"macs": 1.5}, {"energy": 0.5}, {}])
def test_a_budget_outside_its_range_is_refused(budget):
    with pytest.raises(InputError, match="budget"):
        tdcompile.compile(network(), X, budget=budget)


def test_a_fixed_batch_is_exported_verified_and_timed():
    made = tdcompile.compile(network(), X, budget={"macs": 0.7}, dynamic_batch=False, decompose=FEW)
    (given,) = onnx.load(made.onnx).graph.input
    assert [axis.dim_value for axis in given.type.tensor_type.shape.dim] == list(X.shape)
    assert made.report.compiled.latency_ms > 0
    assert made.report.parity.cases == 4  # three draws and the example, all at the one batch


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resume": True}, "resume=True has no effect without a workspace"),
        ({"watch": print}, "a hook is an object of a subclass of tdcompile.Hook"),
        ({"watch": Hook}, "Hook is a class of hooks"),
        ({"pipeline": Pipeline([])}, "the pipeline has no passes"),
        ({"pipeline": Pipeline([Calibrate(), Named(text="a,b")])}, r"the pass Named\(text='a,b'\) has no text form"),
        ({"pipeline": Pipeline([Unnamed()])}, r"the pass Unnamed\(\) has no text form"),
        ({"plan": ""}, "the plan . cannot be read"),
        ({"seed": True}, "'seed' cannot be True"),
    ],
)
@pytest.mark.usefixtures("named")
def test_arguments_without_effect_or_of_the_wrong_type_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        tdcompile.compile(network(), X, **options)


@pytest.mark.usefixtures("named")
def test_a_pass_with_a_text_option_goes_through_compile():
    steps = [Calibrate(), Score(), Propose(decompose=FEW), Choose(), Factorize(), Named(text="a b")]
    report = tdcompile.compile(network(), X, pipeline=Pipeline(steps), budget={"macs": 0.6}).report
    assert report.pipeline.endswith("factorize,named-by-test{text=a b}")


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'budget'"):
        tdcompile.compile(network(), X, budgets={"macs": 0.5})


@pytest.mark.parametrize(
    ("name", "steps", "form"),
    [
        ("lwiq", ["score", "propose", "choose", "factorize", "recalibrate", "finetune"], {"tt", "svd"}),
        ("rene", ["rene", "factorize", "recalibrate", "finetune"], {"tucker2", "svd"}),
        ("progressive-tucker", ["attach-adapters", "anneal", "detach-dense"], {"tucker2", "svd"}),
        ("tucker-vbmf", ["propose", "score", "choose", "factorize", "recalibrate", "finetune"], {"tucker2", "svd"}),
    ],
)
def test_each_published_system_ends_in_a_verified_model(name, steps, form):
    """From plain weights, as their authors do: nothing calibrates or refits."""
    watch = Steps()
    made = tdcompile.compile(network(), X, data=(points(), points(seed=1)), recipe=name, tune="epochs=1", watch=watch)
    assert watch.names == ["export-dense", *steps, "fold-batchnorm", "drop-dead"]
    chosen = {layer.decomposition for layer in made.report.layers} - {"dense"}
    assert chosen
    assert chosen <= form
    assert made.report.parity.max_rel < 1e-3

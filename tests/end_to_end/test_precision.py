"""``precision``: an int8 compilation from samples to four models, ``auto``, and what is refused."""

import json

import onnx
import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.compiler import prepare, resolve
from tdcompile.core.plan import RankPlan
from tdcompile.data.task import Task, Tensors
from tdcompile.errors import InputError
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode
from tdcompile.ir.target import Target
from tdcompile.planning.input_checks import check_not_quantised


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4),
    ).eval()  # fmt: skip


def task() -> Task:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(160, 3, 16, 16, generator=draw)
    with torch.no_grad():
        labels = network()(x).argmax(1)
    return Task(Tensors(x[:128], labels[:128], 4), Tensors(x[128:], labels[128:], 4), calibrate=64)


def compiled(**options):
    options = {"budget": {"macs": 0.6}, "decompose": "spatial", **options}
    return tdcompile.compile(network(), torch.randn(2, 3, 16, 16), **options)


@pytest.fixture(scope="module")
def made():
    return compiled(data=task(), precision="int8", keep_fp32="0")


def test_an_int8_compilation_writes_and_reports_four_models(made, tmp_path) -> None:
    report = made.report
    assert [one.title for one in report.variants] == ["dense fp32", "compiled fp32", "dense int8", "compiled int8"]
    assert report.precision == "int8"
    assert report.compiled.onnx_bytes == report.variants[-1].onnx_bytes < report.variants[1].onnx_bytes
    assert report.compiled.score == report.variants[-1].score
    assert report.quantization is not None
    assert report.quantization.rounding <= report.quantization.error < 0.5
    assert report.quantization.floats["0"] == "kept in float"
    assert 1 <= len(report.quantization.worst) <= 5
    assert all(0 < one.snr_db < 100 for one in report.quantization.worst)
    assert report.quantization.fake is not None
    assert report.quantization.fake <= report.quantization.error
    assert report.quantization.fake_note == ""
    out = made.save(tmp_path / "out")
    files = {path.name for path in out.iterdir()}
    assert {"model.onnx", "model.fp32.onnx", "dense.onnx", "dense.int8.onnx"} <= files
    kinds = {node.op_type for node in onnx.load(out / "model.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    assert json.loads((out / "plan.json").read_text())["precision"] == "int8"
    page = (out / "report.html").read_text()
    assert "All models" in page
    assert "Signal over noise is lowest behind" in page


def test_tuning_for_int8_ends_through_its_rounding_and_the_report_tells(tmp_path) -> None:
    found = compiled(data=task(), precision="int8", tune="epochs=5,batch=32,trial=0,lr=0.01")
    report = found.report
    assert report.pipeline.endswith("fold-batchnorm,drop-dead,finetune-int8{batch=32}")
    assert report.tuning is not None
    assert report.tuning_int8 is not None
    assert (report.tuning.epochs, report.tuning_int8.epochs, report.tuning_int8.rate) == (4, 1, 0.001)
    assert report.tuning_int8.heldout_before is not None
    assert report.quantization is not None
    assert report.quantization.fake is not None
    page = (found.save(tmp_path / "out") / "report.html").read_text()
    assert "through the rounding of int8" in page


def test_a_plan_names_its_precision_and_fp32_plans_do_not(made) -> None:
    assert RankPlan.from_json(made.plan.to_json()).precision == "int8"
    plain = RankPlan({})
    assert "precision" not in json.loads(plain.to_json())
    again = compiled(data=task(), plan=made.plan, budget={}, decompose="auto")
    assert again.report.precision == "int8"


def test_an_int8_plan_compiles_in_fp32_if_asked_and_then_needs_no_samples(made) -> None:
    found = compiled(plan=made.plan, budget={}, decompose="auto", precision="fp32")
    assert found.report.precision == found.plan.precision == "fp32"
    assert any("the plan was made for int8 and is compiled in fp32, as asked" in note for note in found.report.notes)
    assert {n: c.ranks for n, c in found.plan.choices.items()} == {n: c.ranks for n, c in made.plan.choices.items()}
    with pytest.raises(InputError, match=r"int8 needs calibration samples.* or take --precision fp32"):
        compiled(plan=made.plan, budget={}, decompose="auto")


def test_int8_adds_its_own_error_to_that_of_a_form(made) -> None:
    errors = {name: choice.error for name, choice in made.plan.choices.items() if choice.is_dense}
    assert errors["0"] == 0.0  # kept in float
    assert all(0 < error < 0.05 for name, error in errors.items() if name != "0")


def test_a_plan_that_a_pass_makes_without_a_precision_is_compiled_in_the_one_asked_for() -> None:
    found = compiled(
        data=task(), precision="int8", pipeline="rene{steps=2},factorize,fold-batchnorm,drop-dead", decompose="auto"
    )
    assert found.report.precision == found.plan.precision == "int8"
    assert [one.title for one in found.report.variants][-1] == "compiled int8"


def test_auto_without_samples_leaves_int8_out_and_says_so() -> None:
    found = compiled(precision="auto")
    assert found.report.precision == "fp32"
    assert any("precision=auto leaves int8 out" in note for note in found.report.notes)
    assert found.report.variants == ()


def test_auto_takes_the_plan_of_less_loss() -> None:
    found = compiled(data=task(), precision="auto", budget={"latency": 0.9})
    assert found.report.precision == "int8"  # dense int8 meets the budget at nearly no loss
    assert found.report.verdict.startswith("int8 alone is enough")
    assert any("precision=auto chose int8: its plan has a predicted loss" in note for note in found.report.notes)


def test_auto_says_why_it_chose_fp32_and_that_a_pattern_has_no_effect_then() -> None:
    found = compiled(data=task(), precision="auto", keep_fp32="0")  # MACs cost the same in int8
    assert found.report.precision == "fp32"
    (told,) = [note for note in found.report.notes if "precision=auto chose fp32" in note]
    assert told.endswith("keep_fp32 has no effect")


def test_auto_compiles_a_plan_in_its_own_precision() -> None:
    plan = compiled().plan
    again = compiled(data=task(), plan=plan, budget={}, decompose="auto", precision="auto")
    assert again.report.precision == "fp32"


def test_layers_return_to_float_only_as_long_as_the_file_stays_small_and_none_in_int8_is_told() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.LayerNorm(32)).eval()
    x = torch.randn(300, 32)
    samples = Task(Tensors(x[:200], x[:200]), Tensors(x[200:], x[200:]))
    options = {"data": samples, "precision": "int8", "budget": {"macs": 0.8}}
    report = tdcompile.compile(module, x[:1], **options).report
    sizes = [one.onnx_bytes for one in report.variants]
    assert sizes[3] < 0.8 * sizes[1]
    assert not any("no layer of the compiled network is in int8" in note for note in report.notes)
    report = tdcompile.compile(module, x[:1], keep_fp32="*", **options).report
    assert any("no layer of the compiled network is in int8" in note for note in report.notes)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"precision": "int8"}, "int8 needs calibration samples"),
        ({"precision": "fp16"}, "fp16 on CPU is slower than fp32"),
        ({"keep_fp32": "0"}, "keep_fp32 '0' has no effect in fp32"),
        ({"precision": "int8", "opset": 12}, "int8 needs opset 13"),
        ({"precision": "int4"}, "the option 'precision' cannot be 'int4'"),
    ],
)
def test_what_has_no_effect_or_no_kernel_is_refused(options, told) -> None:
    with pytest.raises(InputError, match=told):
        compiled(**options)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="--keep-fp32 'stem' matches no layer"):
        compiled(data=task(), precision="int8", keep_fp32="stem")


def trained_norm(scale: float = 1.0) -> tuple[nn.Module, torch.Tensor]:
    """Return a network whose batch norm has seen samples of this scale, and samples of scale 1."""
    module, x = network(), torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    module[3].momentum = None  # statistics are means over all calls
    module.train()
    module(x * scale)
    return module.eval(), x


@pytest.mark.parametrize(("scale", "warned"), [(1.0, False), (2.0, False), (255.0, True), (0.1, True)])
def test_samples_of_another_scale_than_in_training_are_told(scale, warned) -> None:
    module, x = trained_norm(scale)
    program = prepare(module, x[:2], Task(Tensors(x)), resolve(None, {"budget": {"macs": 0.6}, "precision": "int8"}))
    told = [entry.text for entry in program.history if "another scale" in getattr(entry, "text", "")]
    assert bool(told) == warned
    fp32 = prepare(module, x[:2], Task(Tensors(x)), resolve(None, {"budget": {"macs": 0.6}}))
    assert not any("another scale" in getattr(entry, "text", "") for entry in fp32.history)


def told_of(inputs: torch.Tensor, precision: str) -> list[str]:
    options = resolve(None, {"budget": {"macs": 0.6}, "precision": precision})
    history = prepare(network(), inputs[:1], Task(Tensors(inputs)), options).history
    return [entry.text for entry in history if entry.code == DiagnosticCode.DATA and "calibration" in entry.text]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_equal_samples_are_told(precision: str) -> None:
    x = torch.randn(20, 3, 16, 16)
    (equal,) = told_of(x[:1].expand(20, -1, -1, -1).clone(), precision)
    assert equal.startswith("the 20 calibration samples have equal values: the compiled network may be useless")
    (constant,) = told_of(torch.full_like(x, 0.5), precision)
    assert constant.startswith("the 20 calibration samples have equal values, all 0.5: ")
    (one,) = told_of(x[:1], precision)
    assert one.startswith("calibration reads one sample only")
    assert told_of(x, precision) == []
    assert told_of(torch.cat([x[:1], x[:1], x[1:2]]), precision) == []


def test_a_batch_norm_that_nobody_trained_says_nothing_about_scale() -> None:
    x = 100 * torch.randn(64, 3, 16, 16)
    options = resolve(None, {"budget": {"macs": 0.6}, "precision": "int8"})
    program = prepare(network(), x[:2], Task(Tensors(x)), options)
    assert not any("another scale" in getattr(entry, "text", "") for entry in program.history)


def test_a_network_that_is_quantised_already_is_refused() -> None:
    told = Diagnostic("info", DiagnosticCode.QUANTISED, "left as they are: 2: they are quantised")
    program = tdcompile.trace(network(), (torch.randn(2, 3, 16, 16),)).with_(history=(told,))
    check_not_quantised(program)
    with pytest.raises(InputError, match="int8 needs a float network; left as they are: 2"):
        check_not_quantised(program.with_(target=Target(precision="int8")))

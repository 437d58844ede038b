"""The benchmark of users' cases says what differs from what should come."""

import onnx
import pytest

from tests.benchmark_modules import load

for needed in ("results", "common"):
    load(needed)
cases = load("robustness_cases")
robustness = load("robustness")


@pytest.fixture
def place(tmp_path):
    (tmp_path / "say.py").write_text(
        "import sys, time\ntime.sleep(float(sys.argv[3]))\nprint(sys.argv[2])\nsys.exit(int(sys.argv[1]))\n"
    )
    return tmp_path


def row(place, code, text, seconds=60.0, wait=0, **fields):
    case = cases.Case("a", f"python say.py {code} '{text}' {wait}", "a word", **fields)
    return robustness.judged(case, place, seconds)


def differs(ran):
    raise cases.UnlikeError("the model is another")


def test_a_case_that_is_as_it_should_be_is_ok(place):
    assert row(place, 0, "verified in\nonnxruntime", says=("verified in onnxruntime",))["verdict"] == "ok"
    assert row(place, 2, "error: no", codes=(2,))["seen"] == "exit 2: error: no"


@pytest.mark.parametrize(
    ("code", "text", "fields", "why"),
    [
        (1, "error: x", {}, "exit 1, not 0"),
        (0, "done", {"codes": (2, 4)}, "exit 0, not 2 or 4"),
        (0, "done", {"says": ("a note",)}, "the messages lack 'a note'"),
        (2, "Traceback (most recent call last)", {"codes": (2,)}, "a traceback"),
        (2, "[ 2/10] calibrate: 0.6 s", {"codes": (2,)}, "only after passes have run"),
        (0, "done", {"check": differs}, "the model is another"),
    ],
)
def test_a_case_that_is_not_is_told_with_the_reason(place, code, text, fields, why):
    verdict = row(place, code, text, **fields)["verdict"]
    assert verdict.startswith("not: ")
    assert why in verdict


def test_a_check_is_of_results_alone(place):
    assert row(place, 2, "error: no", codes=(0, 2), check=differs)["verdict"] == "ok"


def test_what_is_for_later_must_be_refused_today(place):
    later = {"codes": (2,), "later": "other tasks"}
    assert row(place, 2, "error: x", **later)["verdict"] == "later: other tasks"
    assert row(place, 1, "error: x", **later)["verdict"] == "not: exit 1, not 2"


def test_a_refusal_that_leaves_files_behind_is_not_as_it_should_be(place):
    (place / "out" / "a").mkdir(parents=True)
    assert "something is written" in row(place, 2, "error: no", codes=(2,))["verdict"]


def test_a_command_that_hangs_is_ended(place):
    assert row(place, 0, "done", seconds=0.5, wait=30)["seen"] == "exit 124: it took over 0.5 s"


def test_names_and_needs_fit_together():
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    assert {case.needs for case in cases.CASES} - {""} <= set(names)
    assert [case.name for case in robustness._chosen(["f-net"])] == ["f-plain", "f-net-key"]


def test_an_unknown_case_and_a_missing_folder_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="no case has a name with 'zzz'"):
        robustness.main(tmp_path, only="zzz")
    with pytest.raises(SystemExit, match="is no folder"):
        robustness.main(tmp_path / "absent")


def test_a_model_is_compared_with_its_network_at_other_shapes(tmp_path):
    (tmp_path / "net.py").write_text("from torch import nn\ndef build():\n    return nn.ReLU()\n")
    place = cases.Ran(tmp_path, tmp_path, 0, "")
    for operator, right in (("Relu", True), ("Neg", False)):
        value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 3]) for name in "xy"]
        graph = onnx.helper.make_graph([onnx.helper.make_node(operator, ["x"], ["y"])], "g", value[:1], value[1:])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
        for name in ("dense.onnx", "model.onnx"):
            onnx.save(model, tmp_path / name)
        check = cases.agrees("net.py:build", (cases.normal(4, 3),), (cases.normal(2, 3),))
        if right:
            check(place)
        else:
            with pytest.raises(cases.UnlikeError, match="the dense model at 4x3 differs"):
                check(place)
    with pytest.raises(cases.UnlikeError, match="does not run at 2x4"):
        cases.agrees("net.py:build", (cases.normal(2, 4),))(place)

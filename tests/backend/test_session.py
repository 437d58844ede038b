from __future__ import annotations

import importlib.metadata

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional as F

import tdcompile.backend.session
from tdcompile.backend.environment import distributions, environment, peak_memory_mb
from tdcompile.backend.profile import node_seconds
from tdcompile.backend.session import Timing, infer, open_probe, open_session, time_models
from tdcompile.errors import InputError, UnavailableError
from tdcompile.ir.onnx_format import OnnxFormat
from tdcompile.ir.target import Target

CPU = Target()


@pytest.fixture(scope="module")
def weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((16, 3, 3, 3), (16, 16, 3, 3), (64, 64, 3, 3))]


def convolutions(first: Tensor, second: Tensor) -> bytes:
    """Conv + Relu + Conv, which onnxruntime fuses and blocks, then a mean, which it leaves alone."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="one/conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="one/relu"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="two/conv", pads=[1, 1, 1, 1]),
        helper.make_node("ReduceMean", ["c2", "axes"], ["y"], name="three/mean", keepdims=0),
    ]
    known = {"w1": first.numpy(), "w2": second.numpy(), "axes": np.array([2, 3])}
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", first.shape[1], 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", second.shape[0]])],
        [numpy_helper.from_array(array, name) for name, array in known.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()


@pytest.fixture(scope="module")
def model(weights) -> bytes:
    return convolutions(weights[0], weights[1])


def in_torch(weights: list[Tensor], x: Tensor) -> Tensor:
    return F.conv2d(F.conv2d(x, weights[0], padding=1).relu(), weights[1], padding=1).mean((2, 3))


def test_a_session_computes_what_torch_computes(model, weights, tmp_path):
    x = torch.randn(2, 3, 16, 16)
    (tmp_path / "m.onnx").write_bytes(model)
    for source in (model, tmp_path / "m.onnx"):
        session = open_session(source, CPU)
        assert session.get_providers() == ["CPUExecutionProvider"]
        np.testing.assert_allclose(infer(session, [x])[0], in_torch(weights, x).numpy(), rtol=1e-4, atol=1e-4)


def test_a_session_is_told_its_threads_and_not_to_spin(model):
    options = open_session(model, Target(threads=2)).get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert options.use_deterministic_compute


def test_models_that_cannot_be_loaded(tmp_path):
    with pytest.raises(InputError, match=r"no model .*gone\.onnx"):
        open_session(tmp_path / "gone.onnx", CPU)
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"cannot load bad\.onnx"):
        open_session(tmp_path / "bad.onnx", CPU)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([], "takes 1 inputs"),
        ([torch.randn(1, 3, 16, 15)], r"cannot run on \(1, 3, 16, 15\)"),
        ([torch.randn(1, 3, 16, 16).double()], "float64"),
    ],
)
def test_inputs_that_do_not_fit(model, inputs, says):
    with pytest.raises(InputError, match=says):
        infer(open_session(model, CPU), inputs)


@pytest.fixture
def no_cuda(monkeypatch) -> None:
    """No CUDA provider, whatever this machine has: onnxruntime is asked for the CPU alone."""
    real = onnxruntime.InferenceSession

    def only_cpu(model: object, options: object, **_: object) -> onnxruntime.InferenceSession:
        return real(model, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(tdcompile.backend.session.ort, "InferenceSession", only_cpu)


@pytest.mark.usefixtures("no_cuda")
def test_a_provider_that_did_not_load_is_an_error_that_says_what_is_missing(model, monkeypatch):
    said = "Failed to load libcublas.so.13: libcublas.so.13: cannot open shared object file\nPlease follow a page\n"
    monkeypatch.setattr(tdcompile.backend.session, "_preload_cuda", lambda: said)
    with pytest.raises(UnavailableError) as caught:
        open_session(model, Target("cuda"))
    assert caught.value.exit_code == 5
    for part in ("CUDAExecutionProvider: libcublas.so.13: cannot open", torch.__version__, "tdcompile[cuda]", "1."):
        assert part in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_cuda_the_error_is_all_that_is_said(model, capfd):
    with pytest.raises(UnavailableError, match="did not load CUDAExecutionProvider"):
        open_session(model, Target("cuda"))
    assert capfd.readouterr() == ("", "")


def test_tensorrt_that_does_not_load_is_told_without_lines_of_onnxruntime(model, monkeypatch):
    said = (
        "/onnxruntime_src/pybind_state.cc:729 void RegisterTensorRTPluginsAsCustomOps() "
        "Please install TensorRT libraries as mentioned in the GPU requirements page"
    )

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(tdcompile.backend.session.ort, "InferenceSession", fails)
    with pytest.raises(UnavailableError, match="onnxruntime did not load TensorrtExecutionProvider: ") as caught:
        open_session(model, Target("cuda", precision="int8"))
    assert "onnxruntime_src" not in str(caught.value)
    assert "TensorRT with the folder of libnvinfer in LD_LIBRARY_PATH, or take --precision fp16" in str(caught.value)
    said = "the graph has a cycle"
    with pytest.raises(InputError, match="onnxruntime cannot load the model: the graph has a cycle"):
        open_session(b"", Target("cuda", precision="int8"))


def test_two_onnxruntimes_are_refused(model, monkeypatch):
    monkeypatch.setattr(
        tdcompile.backend.session, "distributions", lambda: {"onnxruntime": "1.31", "onnxruntime-gpu": "1.31"}
    )
    with pytest.raises(UnavailableError, match="onnxruntime and onnxruntime-gpu are installed together"):
        open_session(model, CPU)


def test_the_installed_wheels_are_found_by_their_own_names(monkeypatch):
    assert len(distributions()) == 1  # this environment has one onnxruntime and no more

    def version(name: str) -> str:
        if name in {"onnxruntime", "onnxruntime-gpu"}:
            return "1.31.1"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert set(distributions.__wrapped__()) == {"onnxruntime", "onnxruntime-gpu"}


def test_quantiles_of_single_runs():
    timing = Timing.of([float(i + 1) for i in range(11)])
    assert (timing.median, timing.p10, timing.p90, timing.runs) == (6.0, 2.0, 10.0, 11)
    assert timing.speedup == (1.0, 1.0, 1.0)


def test_a_heavier_model_takes_longer(weights, model):
    heavy = convolutions(weights[2][:, :3].contiguous(), weights[2])
    light, slow = time_models([model, heavy], [torch.randn(4, 3, 16, 16)], CPU, seconds=0.1, min_runs=20)
    assert 0 < light.p10 <= light.median <= light.p90
    assert light.median < slow.median
    assert light.runs == slow.runs >= 20


def test_rounds_go_on_for_the_seconds_asked_for(model):
    (timing,) = time_models([model], [torch.randn(1, 3, 16, 16)], CPU, seconds=0.2, min_runs=1)
    assert timing.runs > 5


def test_timing_refuses_inputs_that_do_not_fit(model):
    with pytest.raises(InputError, match="takes 1 inputs"):
        time_models([model], [], CPU, seconds=0)


def test_fused_nodes_go_by_the_models_own_names(model, tmp_path):
    (tmp_path / "m.onnx").write_bytes(model)
    for source in (model, tmp_path / "m.onnx"):
        seconds = node_seconds(source, [torch.randn(1, 3, 16, 16)], CPU, runs=3)
        assert {"one/conv", "two/conv", "three/mean"} <= set(seconds)
        assert set(seconds) <= {"one/conv", "one/relu", "two/conv", "three/mean", "ReorderInput", "ReorderOutput"}
        assert all(0 <= value < 1 for value in seconds.values())


def test_the_profile_is_removed(model, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    node_seconds(model, [torch.randn(1, 3, 16, 16)], CPU, runs=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("event", "kind", "name"),
    [
        ("one/conv", "Conv", "one/conv"),
        ("r1_nchwc", "Conv", "one/conv"),
        ("c2_nchwc", "Conv", "two/conv"),
        ("fused one/conv", "FusedConv", "one/conv"),
        ("two/conv/SomeFusion/", "FusedConv", "two/conv"),
        ("ReorderOutput_token_4", "ReorderOutput", "ReorderOutput"),
        ("nothing_nchwc", "Conv", "Conv"),
    ],
)
def test_names_that_onnxruntime_makes(model, event, kind, name):
    nodes = onnx.load_from_string(model).graph.node
    producers = {output: node for node in nodes for output in node.output}
    assert tdcompile.backend.profile._model_node_name(event, kind, {node.name for node in nodes}, producers) == name


def test_the_environment_names_what_a_figure_depends_on():
    found = environment(Target(threads=2))
    assert {"python", "torch", "onnx", "tensorly", "numpy", "tdcompile", "cpu", "cores", "os"} <= set(found)
    assert (found["threads"], found["provider"]) == ("2", "CPUExecutionProvider")
    assert any(name.startswith("onnxruntime") for name in found)
    assert all(isinstance(value, str) and value for value in found.values())


def test_peak_memory_is_what_the_process_has_held():
    before = peak_memory_mb()
    assert 10 < before < 1e6  # this process has torch loaded: anything else is a wrong unit
    held = np.ones(1_000_000)
    assert peak_memory_mb() >= before
    del held
    assert peak_memory_mb() >= before


@pytest.mark.gpu
def test_cuda_runs_and_computes_what_torch_computes(model, weights):
    session = open_session(model, Target("cuda"), tf32=False)
    assert session.get_providers()[0] == "CUDAExecutionProvider"
    x = torch.randn(2, 3, 16, 16)
    np.testing.assert_allclose(infer(session, [x])[0], in_torch(weights, x).numpy(), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_cuda_is_timed_and_profiled(model):
    inputs = [torch.randn(2, 3, 16, 16)]
    (timing,) = time_models([model], inputs, Target("cuda"), seconds=0.1)
    assert timing.median > 0
    assert "two/conv" in node_seconds(model, inputs, Target("cuda"), runs=3)


@pytest.mark.parametrize(("form", "told"), [(OnnxFormat(opset=999), "opset 999"), (OnnxFormat(ir=99), "IR version 99")])
def test_versions_that_onnxruntime_does_not_load_are_refused(form, told):
    with pytest.raises(InputError, match=f"does not load models of {told}"):
        open_probe(Target(), form)
    open_probe(Target(), OnnxFormat(opset=13, ir=7))

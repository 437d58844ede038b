from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from tdcompile.backend import parity as validate
from tdcompile.backend.export import export_onnx
from tdcompile.backend.parity import _draw, check_parity, compare_models
from tdcompile.backend.session import open_session
from tdcompile.errors import InputError, ParityError
from tdcompile.ir.diagnostics import DiagnosticCode
from tdcompile.ir.target import Target

CPU = Target()
INPUTS = (torch.randn(2, 4, generator=torch.Generator().manual_seed(0)),)


class Shifted(nn.Module):
    """A linear layer and what is added to its outputs: a model that is wrong by a known amount."""

    def __init__(self, by: Tensor | float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 3)
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.by


def write(path: Path, batch: int | str = "batch", outputs: int = 1, kind: int = TensorProto.FLOAT) -> Path:
    """``Shifted`` as ONNX."""
    layer = Shifted().layer
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    known = {"w": layer.weight.detach().numpy().astype(dtype), "b": layer.bias.detach().numpy().astype(dtype)}
    names = [f"y{place}" for place in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], [name], transB=1) for name in names],
        "linear",
        [helper.make_tensor_value_info("x", kind, [batch, 4])],
        [helper.make_tensor_value_info(name, kind, [batch, 3]) for name in names],
        [numpy_helper.from_array(array, name) for name, array in known.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def model(tmp_path) -> Path:
    return write(tmp_path / "m.onnx")


def test_a_right_model_passes_at_every_batch_size(model):
    parity = check_parity(model, Shifted(), INPUTS, CPU)
    assert parity.provider == "CPUExecutionProvider"
    assert parity.max_abs < 1e-5
    assert 0 <= parity.max_rel < 1e-5
    assert [case[:2] for case in parity.cases] == [(1, 0), (1, 1), (1, 2), (2, 0), (5, 0), (2, None)]
    assert parity.max_abs == max(case[2] for case in parity.cases)


def test_the_same_seed_draws_the_same(model):
    assert check_parity(model, Shifted(), INPUTS, CPU) == check_parity(model, Shifted(), INPUTS, CPU)


def test_another_seed_draws_something_else(model):
    one, other = (check_parity(model, Shifted(1e-5), INPUTS, CPU, seed=seed).cases for seed in (0, 7))
    assert [case[2] for case in one] != [case[2] for case in other]


def test_a_fixed_batch_is_the_only_one_tried(tmp_path):
    parity = check_parity(write(tmp_path / "m.onnx", batch=2), Shifted(), INPUTS, CPU)
    assert {case[0] for case in parity.cases} == {2}


def test_the_reference_runs_in_eval_mode_and_keeps_its_own(model):
    class Dropping(Shifted):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    reference = Dropping().train()
    check_parity(model, reference, INPUTS, CPU)
    assert reference.training


def test_a_wrong_model_is_told_with_output_batch_and_place(model):
    with pytest.raises(ParityError) as caught:
        check_parity(model, Shifted(torch.tensor([0.0, 0.5, 0.0])), INPUTS, CPU, batches=(5,))
    assert caught.value.exit_code == 3
    for part in ("m.onnx", "'y0'", "batch 5", "0.5 at (", ", 1)"):
        assert part in str(caught.value)


@pytest.mark.parametrize(("by", "agrees"), [(1e-4, True), (1e-2, False)])
def test_the_tolerance_follows_the_scale_of_the_output(model, by, agrees):
    reference = Shifted(by)
    if agrees:
        assert check_parity(model, reference, INPUTS, CPU).max_abs > by / 2
    else:
        with pytest.raises(ParityError):
            check_parity(model, reference, INPUTS, CPU)


def test_tighter_and_looser_tolerances_are_obeyed(model):
    with pytest.raises(ParityError):
        check_parity(model, Shifted(1e-4), INPUTS, CPU, rtol=0.0, atol=1e-5)
    assert check_parity(model, Shifted(1e-2), INPUTS, CPU, atol=0.1).max_abs > 5e-3


def test_half_precision_is_held_to_its_own_tolerance(model):
    check_parity(model, Shifted(5e-3), INPUTS, Target(precision="fp16"))
    with pytest.raises(ParityError):
        check_parity(model, Shifted(0.2), INPUTS, Target(precision="fp16"))


def test_a_scale_of_nothing_is_no_division_by_zero(model):
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.new_zeros(len(x), 3)

    assert check_parity(model, Nothing(), INPUTS, CPU, atol=100.0).max_rel == 0.0


def masked(path: Path, by: Sequence[float]) -> Path:
    """The model of ``Shifted`` with something added to its bias."""
    write(path)
    proto = onnx.load(path)
    bias = next(weight for weight in proto.graph.initializer if weight.name == "b")
    bias.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(bias) + by).astype(np.float32), "b"))
    path.write_bytes(proto.SerializeToString())
    return path


def test_infinite_outputs_are_to_be_infinite_in_the_same_places(tmp_path):
    path, one = masked(tmp_path / "m.onnx", (0.0, -math.inf, 0.0)), torch.tensor([0.0, -math.inf, 0.0])
    assert check_parity(path, Shifted(one), INPUTS, CPU).max_rel < 1e-5
    for other in (torch.zeros(3), -one, torch.tensor([-math.inf, -math.inf, 0.0])):
        with pytest.raises(ParityError, match="not finite"):
            check_parity(path, Shifted(other), INPUTS, CPU)
    with pytest.raises(ParityError, match=r"0\.5"):
        check_parity(path, Shifted(one + 0.5), INPUTS, CPU)


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        (Shifted(float("nan")), "not finite"),
        (Shifted(float("inf")), "of the reference is not finite"),
        (nn.Linear(4, 2), r"\(1, 3\) and \(1, 2\)"),
    ],
)
def test_what_is_not_comparable(model, reference, says):
    with pytest.raises(ParityError, match=says):
        check_parity(model, reference, INPUTS, CPU)


def test_a_model_that_gives_another_number_of_outputs(tmp_path):
    with pytest.raises(ParityError, match="2 and 1 outputs"):
        check_parity(write(tmp_path / "m.onnx", outputs=2), Shifted(), INPUTS, CPU)


def test_inputs_that_do_not_fit_the_model(model):
    with pytest.raises(InputError, match="takes 1 inputs"):
        check_parity(model, Shifted(), INPUTS * 2, CPU)


def test_two_models_that_agree(model, tmp_path):
    parity = compare_models(model, write(tmp_path / "other.onnx"), CPU)
    assert (parity.max_abs, len(parity.cases)) == (0.0, 5)


def test_two_models_that_do_not(model, tmp_path):
    other = write(tmp_path / "other.onnx")
    proto = onnx.load(other)
    proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.full(3, 9.0, np.float32), "b"))
    other.write_bytes(proto.SerializeToString())
    with pytest.raises(ParityError, match=r"m\.onnx and other\.onnx differ"):
        compare_models(model, other, CPU)


@pytest.mark.parametrize("form", [{"batch": 2}, {"outputs": 2}, {"kind": TensorProto.DOUBLE}])
def test_models_that_are_not_interchangeable(model, tmp_path, form):
    with pytest.raises(InputError, match="not interchangeable"):
        compare_models(model, write(tmp_path / "other.onnx", **form), CPU)


def gather(path: Path, axes: list[int | str]) -> Path:
    """Rows of a table by index: a model whose inputs are integers."""
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "rows"], ["y"])],
        "gather",
        [helper.make_tensor_value_info("rows", TensorProto.INT64, axes)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*axes, 3])],
        [numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(4, 3), "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def test_integers_are_picked_from_the_examples_own(tmp_path):
    class Rows(nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            return torch.arange(12.0).reshape(4, 3)[rows]

    path = gather(tmp_path / "m.onnx", ["batch", 6])
    assert check_parity(path, Rows(), [torch.tensor([[3, 2, 1, 0, 3, 3]])], CPU).max_abs == 0.0
    assert compare_models(path, path, CPU).max_abs == 0.0  # without examples, indices that are valid everywhere


def test_another_open_axis_needs_examples(tmp_path):
    path = gather(tmp_path / "m.onnx", ["batch", "length"])
    with pytest.raises(InputError, match="open beside its batch"):
        compare_models(path, path, CPU)
    assert compare_models(path, path, CPU, inputs=[torch.tensor([[0, 1, 2]])]).max_abs == 0.0


@given(st.floats(-100, 100), st.floats(0.1, 10), st.integers(1, 8))
def test_draws_have_the_examples_mean_and_deviation(mean, deviation, batch):
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(2, 4000, generator=generator) * deviation + mean
    drawn = _draw(example, batch, generator)
    assert drawn.shape == (batch, 4000)
    assert drawn.dtype == example.dtype
    assert abs(float(drawn.mean()) - mean) < 0.1 * deviation + 1e-3 * abs(mean)
    assert 0.9 < float(drawn.std()) / deviation < 1.1


def test_a_constant_example_still_gives_random_values():
    assert _draw(torch.ones(1), 50, torch.Generator().manual_seed(0)).unique().numel() > 10


@pytest.mark.parametrize("mask", [torch.arange(5).expand(2, 5) > 2, nn.Transformer.generate_square_subsequent_mask(5)])
def test_rows_of_a_mask_are_drawn_whole(mask):
    drawn = _draw(mask, 40, torch.Generator().manual_seed(0))
    assert drawn.shape == (40, 5)
    rows = {tuple(row) for row in mask.tolist()}
    assert {tuple(row) for row in drawn.tolist()} == rows


class Masked(nn.Module):
    """A mean over what a mask keeps: 0 where it keeps nothing."""

    def __init__(self, empty: float = 0.0) -> None:
        super().__init__()
        self.empty = empty

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        count = keep.sum(1, keepdim=True)
        return torch.where(count > 0, (x * keep).sum(1, keepdim=True) / count.clamp(min=1), self.empty)


@pytest.mark.parametrize(
    ("empty", "told"),
    [
        (0.0, []),
        (
            0.25,
            ["where a whole row of the mask 'keep' is False, 'output' of the model and of the network differ by 0.25"],
        ),
        (math.nan, ["where a whole row of the mask 'keep' is False, 'output' of the network is not finite"]),
    ],
)
def test_a_difference_where_a_mask_leaves_nothing_of_a_row_is_a_note(tmp_path, empty, told):
    inputs = (torch.randn(2, 5), torch.arange(5).expand(2, 5) > 2)
    path = export_onnx(Masked(), inputs, tmp_path / "m.onnx").path
    parity = check_parity(path, Masked(empty), inputs, CPU)
    assert parity.max_abs < 1e-5
    assert len(parity.notes) == len(told)
    for note, start in zip(parity.notes, told, strict=True):
        assert note.text.startswith(start)
        assert note.code == DiagnosticCode.MASKED_ROW


def test_integers_are_drawn_from_the_values_of_the_data(tmp_path):
    class Rows(nn.Module):
        def forward(self, rows: Tensor) -> Tensor:
            table = torch.arange(12.0).reshape(4, 3)
            table[3] += 1  # only the data hold the row
            return table[rows]

    path, example = gather(tmp_path / "m.onnx", ["batch", 6]), [torch.tensor([[2, 1, 0, 1, 0, 1]])]
    assert check_parity(path, Rows(), example, CPU).max_abs == 0.0
    with pytest.raises(ParityError, match="differ"):
        check_parity(path, Rows(), example, CPU, values=[torch.tensor([[3, 2], [1, 3]])])


@pytest.mark.parametrize("as_written", [0.0, 0.25])
def test_what_onnxruntime_alone_computes_wrongly_is_told_from_a_wrong_model(model, tmp_path, monkeypatch, as_written):
    wrong = {True: masked(tmp_path / "a.onnx", (0.0, 0.5, 0.0)), False: masked(tmp_path / "b.onnx", (as_written,) * 3)}

    def opened(path: Path, target: Target, *, optimised: bool = True, **options: bool) -> ort.InferenceSession:
        return open_session(wrong[optimised], target, optimised=optimised, **options)

    monkeypatch.setattr(validate, "open_session", opened)
    with pytest.raises(ParityError, match=r"'y0' by 0\.5 at \(\d, 1\)") as caught:
        check_parity(model, Shifted(), INPUTS, CPU)
    told = "without onnxruntime's own optimisations of the graph they agree: the model is right"
    assert (told in str(caught.value)) == (as_written == 0.0)


@pytest.mark.gpu
def test_cuda_agrees_without_tf32(model):
    parity = check_parity(model, Shifted(), INPUTS, Target("cuda"))
    assert parity.provider == "CUDAExecutionProvider"

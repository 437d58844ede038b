"""Batch axes and steps of open axes are found by running the network at other sizes."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tdcompile
from tdcompile.backend.lowering import export_lowered
from tdcompile.backend.parity import check_parity
from tdcompile.errors import InputError

CHUNK_AND_STATE = {"chunk": torch.randn(1, 12), "state": torch.randn(2, 1, 8)}


class Recurrent(nn.Module):
    """The batch of its state is the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.cell = nn.Linear(12, 8), nn.GRUCell(8, 8)

    def forward(self, chunk: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = self.cell(self.inp(chunk), state[0])
        return h, torch.stack([h, state[1]])


class Graph(nn.Module):
    """Nodes and edges: no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.fc(torch.zeros_like(x).index_add(0, edges[1], x[edges[0]]))


class Shuffled(nn.Module):
    """Sizes must be multiples of two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pixel_unshuffle(x, 2))


class OnSquares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y @ y


def verified(program: tdcompile.Program, folder: Path) -> list[list[str | int]]:
    """Export, compare, and return the shapes of the model's inputs."""
    import onnx

    path = export_lowered(program, program.graph, folder / "m.onnx").path
    check_parity(path, program.graph, program.inputs, program.target, axes=program.axes, batch_axes=program.batch_axes)
    shapes = (value.type.tensor_type.shape.dim for value in onnx.load(path).graph.input)
    return [[dim.dim_param or dim.dim_value for dim in shape] for shape in shapes]


@pytest.mark.parametrize("given", [(), ("state=1",)])
def test_a_batch_on_another_axis_is_found_or_given_and_exported(given: tuple[str, ...], tmp_path: Path) -> None:
    program = tdcompile.trace(Recurrent().eval(), CHUNK_AND_STATE, batch_axis=given)
    assert program.batch_axes == (0, 1)
    assert [entry.code for entry in program.history if entry.code == "open_axes"] == ([] if given else ["open_axes"])
    assert program.graph(torch.randn(5, 12), torch.randn(2, 5, 8))[1].shape == (2, 5, 8)
    if given:
        assert verified(program, tmp_path) == [["batch", 12], [2, "batch", 8]]


def test_a_batch_that_does_not_work_is_told_in_the_users_numbers() -> None:
    with pytest.raises(InputError, match=r"runs on an input of 1x12:float32, 2x1x8:float32 and not at a batch of 2"):
        tdcompile.trace(Recurrent().eval(), CHUNK_AND_STATE, batch_axis=["state=none"])
    with pytest.raises(InputError, match=r"does not run on an input of 1x9:float32"):
        tdcompile.trace(nn.Linear(8, 8).eval(), torch.randn(1, 9))


class Either(nn.Module):
    """Its state may have the batch on either axis of two, but not on none."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        if state.numel() != 4 * len(x) or state.dim() != 4 or len(state) > 1:
            raise ValueError("one state for each sample")
        return self.fc(x) + state.reshape(-1, 4)


def test_a_batch_that_two_axes_may_have_is_asked_for() -> None:
    inputs = {"x": torch.randn(1, 4), "state": torch.randn(1, 1, 1, 4)}
    with pytest.raises(InputError, match=r"--batch-axis state=1 or .*--batch-axis state=2"):
        tdcompile.trace(Either().eval(), inputs)


def test_the_first_axis_is_no_batch_where_the_batch_is_closed(tmp_path: Path) -> None:
    inputs = {"x": torch.randn(7, 6), "edges": torch.randint(0, 7, (2, 9))}
    with pytest.raises(InputError, match=r"'x:0' is the batch axis.*--no-dynamic-batch"):
        tdcompile.trace(Graph().eval(), inputs, dynamic=["x:0"])
    dynamic = ["x:0=nodes", "edges:1=arcs"]
    program = tdcompile.trace(Graph().eval(), inputs, dynamic=dynamic, dynamic_batch=False)
    assert verified(program, tmp_path) == [["nodes", 6], [2, "arcs"]]
    with pytest.raises(InputError, match="leave out --batch-axis"):
        tdcompile.trace(Graph().eval(), inputs, dynamic_batch=False, batch_axis=["x=0"])


@pytest.mark.parametrize(("given", "step"), [("", 2), ("%4", 4)])
def test_sizes_in_steps_are_found_or_given(given: str, step: int) -> None:
    program = tdcompile.trace(Shuffled().eval(), torch.randn(2, 3, 8, 8), dynamic=[f"x:2{given}", f"x:3{given}"])
    assert [(axis.name, axis.step, axis.alone) for axis in program.axes] == [("x_2", step, True), ("x_3", step, True)]
    assert [entry.code for entry in program.history] == ([] if given else ["open_axes"] * 2)


def test_a_step_that_does_not_work_is_refused() -> None:
    with pytest.raises(InputError, match="not with x_2 3 longer"):
        tdcompile.trace(Shuffled().eval(), torch.randn(2, 3, 6, 8), dynamic=["x:2%3"])


def test_two_equal_axes_are_two_and_one_only_where_the_network_does_not_run_otherwise() -> None:
    x = torch.randn(2, 3, 8, 8)
    program = tdcompile.trace(nn.Conv2d(3, 4, 3).eval(), x, dynamic=["input:2", "input:3"])
    assert [axis.name for axis in program.axes] == ["input_2", "input_3"]
    assert program.graph(torch.randn(1, 3, 9, 12)).shape == (1, 4, 7, 10)
    program = tdcompile.trace(OnSquares().eval(), x, dynamic=["x:2", "x:3"])
    assert [axis.name for axis in program.axes] == ["x_2", "x_2"]
    assert "open as one size" in program.history[0].text
    program = tdcompile.trace(OnSquares().eval(), x, dynamic=["x:2=h", "x:3=w"])
    assert [axis.name for axis in program.axes] == ["h", "w"]  # labels are the user's
    assert "does not run where 'h' alone is longer" in program.history[0].text


def test_entries_that_need_each_other_are_no_batch() -> None:
    inputs = {"x": torch.randn(7, 6), "edges": torch.randint(0, 7, (2, 9))}
    program = tdcompile.trace(Graph().eval(), inputs)
    assert not program.dynamic_batch
    assert [(axis.name, axis.axis) for axis in program.axes] == [("x_0", 0)]
    assert program.graph(torch.randn(9, 6), torch.randint(0, 9, (2, 9))).shape == (9, 5)
    assert tdcompile.trace(nn.Linear(6, 5).eval(), torch.randn(7, 6)).batch_axes == (0,)


class OverTime(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], batch_first: bool) -> None:
        super().__init__()
        self.inp, self.rnn = nn.Linear(4, 6), kind(6, 5, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.inp(x))[0]


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_time_is_refused_as_an_open_axis_with_the_reason(kind: type[nn.RNNBase]) -> None:
    x = torch.randn(3, 7, 4)
    with pytest.raises(InputError, match="recurrent layer 'rnn' runs over the open axis 'time'"):
        tdcompile.trace(OverTime(kind, batch_first=True).eval(), x, dynamic=["x:1=time"])
    assert tdcompile.trace(OverTime(kind, batch_first=True).eval(), x).batch_axes == (0,)
    with pytest.raises(InputError, match="over the batch axis, axis 0 of 'x', as if it were time"):
        tdcompile.trace(OverTime(kind, batch_first=False).eval(), x)
    assert tdcompile.trace(OverTime(kind, batch_first=False).eval(), x, batch_axis=["x=1"]).batch_axes == (1,)


def test_data_lies_along_the_first_axis() -> None:
    data = tdcompile.Tensors((torch.randn(4, 12), torch.randn(4, 2, 8)))
    with pytest.raises(InputError, match="along axis 1"):
        tdcompile.compile(Recurrent().eval(), CHUNK_AND_STATE, data=data, batch_axis="state=1", budget={"macs": 0.7})

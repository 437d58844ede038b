"""What a stranger may bring: signatures of every kind, open axes, quantised and compiled networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tdcompile
from tdcompile.backend.export import export_onnx
from tdcompile.backend.parity import check_parity
from tdcompile.backend.session import infer, open_session
from tdcompile.core.importance import Importance
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.registry import find
from tdcompile.data.nesting import tensors_in
from tdcompile.data.task import Batch, Samples, Task
from tdcompile.errors import InputError, TdcompileError
from tdcompile.ir.diagnostics import Diagnostic
from tdcompile.ir.modules import outputs_of
from tdcompile.ir.program import Change, Program
from tdcompile.ir.target import Target
from tdcompile.support.spec import parse_spec


@dataclass
class Answer:
    """An output type that torch has never heard of."""

    scores: Tensor
    parts: tuple[Tensor, dict[str, Tensor]]
    loss: Tensor | None = None


class Text(nn.Module):
    """Integer inputs, a mask that may be left out, keyword arguments, a nested output."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind
        self.words = nn.Embedding(30, 16)
        self.mix, self.head = nn.Linear(16, 64), nn.Linear(64, 7)

    def forward(self, ids: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> object:
        x = torch.tanh(self.mix(self.words(ids))) * scale
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        if ids.shape[1] < 2:
            raise ValueError("at least two words are expected")
        scores = self.head(x.sum(1))
        if self.kind is dict:
            return {"scores": scores, "parts": (x, {"mean": x.mean(1)})}
        return self.kind(scores, (x, {"mean": x.mean(1)}))


def ids(length: int = 6) -> Tensor:
    return torch.randint(0, 30, (2, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [dict, Answer])
@pytest.mark.parametrize("frontend", ["auto", "export"])
def test_nested_outputs_and_keyword_inputs(kind: type, frontend: str) -> None:
    torch.manual_seed(0)
    module = Text(kind).eval()
    inputs = {"mask": torch.ones(2, 6), "ids": ids()}
    compiled = tdcompile.compile(module, inputs, budget={"macs": 0.6}, frontend=frontend, dynamic=["ids:1", "mask:1"])
    assert compiled.report.frontend == "export"
    shapes = [
        [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in onnx.load(compiled.onnx).graph.input
    ]
    assert shapes == [["batch", "ids_1"], ["batch", "ids_1"]]
    expected = list(tensors_in(compiled.module(ids(9), torch.ones(2, 9))))
    got = infer(open_session(compiled.onnx, Target()), [ids(9), torch.ones(2, 9)])
    assert len(got) == len(expected) == 3
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-4, atol=1e-5)


def test_an_argument_without_a_tensor_keeps_the_value_it_is_given() -> None:
    torch.manual_seed(0)
    module = Text(dict).eval()
    program = tdcompile.trace(module, {"ids": ids(), "scale": 3.0})
    torch.testing.assert_close(
        outputs_of(program.graph, (ids(),)), list(tensors_in(module(ids(), scale=3.0))), rtol=1e-4, atol=1e-5
    )


class FxAnswer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Answer:
        return Answer(self.fc(x), (x, {"double": 2 * x}))


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_a_dataclass_is_the_same_outputs_through_both_front_ends(frontend: str) -> None:
    module = FxAnswer().eval()
    compiled = tdcompile.compile(module, torch.randn(2, 8), budget={"macs": 0.9}, frontend=frontend)
    assert len(onnx.load(compiled.onnx).graph.output) == 3


def test_a_compiled_network_can_be_compiled_again() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(512, 4)).eval()
    options = {"budget": {"macs": 0.7}, "decompose": ("svd", "channel")}
    once = tdcompile.compile(module, torch.randn(1, 3, 8, 8), **options)
    twice = tdcompile.compile(once.module, torch.randn(1, 3, 8, 8), **options)
    assert twice.report.ratio.macs > 1.4
    assert twice.report.dense.macs == once.report.compiled.macs


@pytest.mark.filterwarnings("ignore")  # torch announces that its own quantisation moves elsewhere
def test_a_quantised_layer_is_left_with_a_reason_and_said_to_have_no_onnx_form() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    quantised = torch.ao.quantization.quantize_dynamic(module, {"2"}, dtype=torch.qint8)
    program = tdcompile.trace(quantised, torch.randn(2, 8))
    assert list(tdcompile.sites(program)) == ["0"]
    assert [e.code for e in program.history if isinstance(e, Diagnostic)] == ["quantised"]
    with pytest.raises(TdcompileError, match="quantise the compiled network instead"):
        tdcompile.compile(quantised, torch.randn(2, 8), budget={"macs": 0.9})


def test_no_layers_at_all_is_said_in_a_sentence() -> None:
    with pytest.raises(InputError, match="no convolution or linear layer"):
        tdcompile.compile(nn.ReLU(), torch.randn(2, 8), budget={"macs": 0.9})


def test_a_transposed_network_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(16, 16, 4, 2, 1)).eval()
    compiled = tdcompile.compile(module, torch.randn(1, 3, 8, 8), budget={"macs": 0.8}, decompose=("svd", "channel"))
    compiled.save(tmp_path / "out")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(tdcompile.load(tmp_path / "out")(x), compiled.module(x))


def test_an_open_axis_beside_a_fixed_batch_of_one() -> None:
    module = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 8, 3)).eval()
    compiled = tdcompile.compile(
        module, torch.randn(1, 3, 8, 8), budget={"macs": 0.8}, dynamic_batch=False, dynamic=["input:2"]
    )
    (value,) = onnx.load(compiled.onnx).graph.input
    assert [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim] == [1, 3, "input_2", 8]


def test_padding_before_a_max_pool_stays_what_it_is(tmp_path: Path) -> None:
    """onnxruntime takes the zeros into the pool, where they count as minus infinity; negative values tell."""

    class Pool(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.max_pool2d(nn.functional.pad(x, (0, 1, 0, 1)), 3, 2)

    x = torch.randn(2, 3, 6, 6) - 5
    done = export_onnx(Pool(), (x,), tmp_path / "m.onnx")
    check_parity(done.path, Pool(), (x,), Target())


class ByName(nn.Module):
    """Layers that are called by keyword, in the open and inside what nothing can trace."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(input=self.conv(input=x))
            return x.clamp(max=6.0) if float(x.detach().sum()) > 1e9 else x

    def __init__(self, closed: bool) -> None:
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
        self.inner = self.Inner() if closed else nn.Identity()
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.act(input=self.norm(input=self.stem(input=x))))
        return self.head(input=x.mean((2, 3)))


class Drawn(Samples):
    """Random samples with labels."""

    def __init__(self, *shape: int, kind: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(*shape, generator=generator).to(kind)
        self.y = torch.randint(0, 10, shape[:1], generator=generator)

    def __len__(self) -> int:
        return len(self.y)

    def batch(self, indices: Sequence[int]) -> Batch:
        return Batch((self.x[list(indices)],), self.y[list(indices)])

    @property
    def classes(self) -> int:
        return 10


@pytest.mark.parametrize("score", find(Importance))
@pytest.mark.parametrize("closed", [False, True])
def test_every_score_and_repair_works_on_layers_called_by_name(closed: bool, score: str) -> None:
    torch.manual_seed(0)
    module = ByName(closed).eval()
    program = tdcompile.trace(module, torch.randn(2, 3, 8, 8))
    assert program.frontend == "fx"
    assert set(tdcompile.sites(program)) == {"stem", "head", *(["inner.conv"] if closed else [])}
    program = program.with_(task=Task(Drawn(64, 3, 8, 8)), budget=tdcompile.Budget(macs=0.6))
    steps = ["calibrate", f"score{{by={score}}}", "propose", "choose", "factorize", "refit"]
    after = Pipeline(map(parse_spec, [*steps, "recalibrate"])).run(program)
    changed = {entry.layer for entry in after.history if isinstance(entry, Change) and entry.step == "factorize"}
    assert changed >= ({"inner.conv"} if closed else {"stem"})


@pytest.mark.parametrize("form", ["tt-linear", "svd", "channel"])
def test_factors_are_called_by_the_names_that_layers_are_called_by(form: str) -> None:
    class Outer(nn.Module):
        class Inner(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.up, self.fc = nn.Conv2d(16, 16, 3), nn.Linear(64, 64)

            def forward(self, x: Tensor) -> Tensor:
                y = self.fc(input=self.up(input=x).mean((2, 3)).repeat(1, 4))
                return y.clamp(max=6.0) if float(x.detach().sum()) > 1e9 else y

        def __init__(self) -> None:
            super().__init__()
            self.inner = self.Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    program = tdcompile.trace(Outer().eval(), torch.randn(2, 16, 8, 8), frontend="fx")
    program = program.with_(budget=tdcompile.Budget(macs=0.6 if form == "channel" else 0.999))
    after = Pipeline.parse(f"propose{{decompose={form}}},score,choose,factorize").run(program)
    assert any(isinstance(entry, Change) for entry in after.history)
    assert outputs_of(after.graph, program.inputs)[0].shape == (2, 64)


@pytest.mark.parametrize(("weights", "kind"), [(torch.float16, torch.float16), (torch.float32, torch.float64)])
def test_samples_come_in_the_precision_that_the_network_is_compiled_in(weights: torch.dtype, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    module = ByName(closed=False).eval().to(weights)
    data = Drawn(32, 3, 8, 8, kind=kind)
    example = torch.randn(2, 3, 8, 8).to(weights)
    compiled = tdcompile.compile(module, example, data=(data, data), budget={"macs": 0.6})
    assert compiled.report.compiled.score is not None


def test_an_input_that_is_also_an_output_keeps_its_name(tmp_path: Path) -> None:
    class Both(nn.Module):
        def forward(self, picture: Tensor) -> tuple[Tensor, Tensor]:
            return picture * 2, picture

    x = torch.randn(2, 5)
    done = export_onnx(Both(), (x,), tmp_path / "m.onnx")
    assert (done.input_names, done.output_names) == (("picture",), ("output_0", "output_1"))
    first, second = infer(open_session(done.path, Target()), (x,))
    assert (first == 2 * x.numpy()).all()
    assert (second == x.numpy()).all()


class Forking(nn.Module):
    """Another way for large batches, and for long rows."""

    def __init__(self, batch: int = 10**9, rows: int = 10**9) -> None:
        super().__init__()
        self.batch, self.rows = batch, rows
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > self.batch or x.shape[1] > self.rows:
            return self.a(x)
        return torch.relu(self.b(x))


@pytest.mark.parametrize("frontend", ["auto", "fx", "export"])
def test_a_fork_on_the_batch_closes_that_axis(frontend: str) -> None:
    """Above every batch that is ever tried, so that running does not find it."""
    x = torch.randn(2, 6, 64)
    with pytest.raises(InputError, match="no-dynamic-batch"):
        tdcompile.compile(Forking(batch=37).eval(), x, frontend=frontend, budget={"macs": 0.6})
    compiled = tdcompile.compile(
        Forking(batch=37).eval(), x, frontend=frontend, budget={"macs": 0.6}, dynamic_batch=False
    )
    assert compiled.report.parity.max_rel < 1e-4


def test_a_fork_on_an_open_axis_closes_it_and_a_limit_of_the_network_does_not() -> None:
    x = torch.randn(2, 6, 64)
    with pytest.raises(InputError, match="the axis 'x_1' is 41"):
        tdcompile.trace(Forking(rows=40).eval(), x, dynamic=["x:1"], frontend="export")

    class Limited(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.places = nn.Linear(64, 64), nn.Parameter(torch.randn(1, 40, 64))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x + self.places[:, : x.shape[1]])

    program = tdcompile.trace(Limited().eval(), x, dynamic=["x:1"], frontend="export")
    assert program.graph(torch.randn(3, 40, 64)).shape == (3, 40, 64)


class Mixed(nn.Module):
    """Outputs of every kind: a parameter, a buffer, booleans, integers, views."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(64, 64), nn.Parameter(torch.randn(3))
        self.register_buffer("anchors", torch.randn(5, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.fc(x)
        return y, self.scale, self.anchors, y > 0, y.argmax(-1), x[:, :8], y.view(-1, 8, 8)


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_outputs_of_every_kind(frontend: str) -> None:
    torch.manual_seed(0)
    module = Mixed()
    with torch.no_grad():
        module.fc.weight.copy_(torch.randn(64, 4) @ torch.randn(4, 64))
    module.fc.train(False)
    modes = [part.training for part in module.modules()]
    compiled = tdcompile.compile(module, torch.randn(2, 64), frontend=frontend, budget={"macs": 0.6})
    assert [part.training for part in module.modules()] == modes
    assert len(infer(open_session(compiled.onnx, Target()), (torch.randn(5, 64),))) == 7


class Masking(nn.Module):
    """Scores, and which of them are positive."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layers(x)
        return y, y > 0


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_mask_beside_the_scores_is_compiled_with_samples(precision: str) -> None:
    torch.manual_seed(0)
    data = torch.randn(96, 32), torch.randint(0, 4, (96,))
    chosen: dict[str, Any] = {"precision": precision, "budget": {"macs": 0.6}, "max_drop": 100}
    compiled = tdcompile.compile(Masking().eval(), data[0][:1], data=data, **chosen)
    scores, mask = infer(open_session(compiled.onnx, Target()), (data[0][:8],))
    assert mask.dtype == bool
    assert (mask == (scores > 0)).all()


@pytest.mark.parametrize("value", ["net", 3, 0.5, True])
def test_an_output_that_is_no_tensor_is_refused_in_a_sentence(value: object) -> None:
    class Telling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> dict[str, object]:
            return {"y": self.fc(x), "told": value, "nothing": None}

    with pytest.raises(InputError, match="returns tensors only"):
        tdcompile.trace(Telling().eval(), torch.randn(2, 8))


def test_odd_names_of_parts_are_no_matter_but_for_words_of_the_language() -> None:
    module = nn.Sequential()
    for name, part in (("fc-1", nn.Linear(32, 32)), ("0 a/b", nn.ReLU()), ("output", nn.Linear(32, 32))):
        module.add_module(name, part)
    compiled = tdcompile.compile(module.eval(), torch.randn(2, 32), budget={"macs": 0.6})
    assert compiled.report.parity.max_rel < 1e-4
    module.add_module("lambda", nn.Linear(32, 32))
    with pytest.raises(InputError, match="'lambda' is named by a word of Python"):
        tdcompile.compile(module.eval(), torch.randn(2, 32), budget={"macs": 0.6})


def test_what_torch_has_exported_can_be_compiled() -> None:
    x = torch.randn(2, 32)
    inner = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    module = torch.export.export(inner, (x,), dynamic_shapes=shapes, strict=False).module()
    compiled = tdcompile.compile(module, x, budget={"macs": 0.6})
    assert len(compiled.report.layers) == 2


@dataclass
class Pair:
    x: Tensor
    more: list[Tensor]


class Taking(nn.Module):
    """Its input in a dataclass, or by names that its signature does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, pair: Pair | None = None, **given: Tensor) -> Tensor:
        if pair is None:
            return self.fc(given["x"]) + given["y"]
        return self.fc(pair.x) + pair.more[0]


def test_inputs_may_stand_in_a_dataclass_and_tensors_without_a_name_are_told() -> None:
    x, y = torch.randn(2, 16), torch.randn(2, 16)
    compiled = tdcompile.compile(Taking().eval(), [Pair(x, [y])], budget={"macs": 0.7})
    assert [layer.decomposition for layer in compiled.report.layers] == ["svd"]
    assert compiled.report.parity.max_rel < 1e-4
    with pytest.raises(InputError, match=r"by \*\*kwargs, here x, y: name it in forward"):
        tdcompile.compile(Taking().eval(), {"x": x, "y": y}, budget={"macs": 0.7})
    closed = tdcompile.compile(Taking().eval(), {"x": x, "y": y}, budget={"macs": 0.7}, dynamic_batch=False)
    assert closed.report.parity.max_rel < 1e-4


def test_torchscript_is_told_to_be_no_network() -> None:
    scripted = torch.jit.trace(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))
    with pytest.raises(InputError, match=r"nn\.Module"):
        tdcompile.trace(scripted, torch.randn(2, 4))


@pytest.mark.parametrize("wrong", [nn.Linear, lambda x: x], ids=["class", "function"])
def test_what_is_no_network_is_told_so(wrong: Any) -> None:
    for work in (tdcompile.trace, partial(tdcompile.compile, budget={"macs": 0.5})):
        with pytest.raises(InputError, match=r"the network is a (type|function): give an nn\.Module"):
            work(wrong, torch.randn(2, 4))


class At(nn.Module):
    """Another way at sizes that are told by a function of the batch and the number of rows."""

    def __init__(self, forks: Callable[[int, int], bool]) -> None:
        super().__init__()
        self.forks, self.a, self.b = forks, nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if self.forks(x.shape[0], x.shape[1]) else self.b(x)


@pytest.mark.parametrize("frontend", ["auto", "fx", "export"])
@pytest.mark.parametrize(
    "forks",
    [
        lambda n, rows: n == 1,
        lambda n, rows: n == 8,
        lambda n, rows: n % 4 == 0,
        lambda n, rows: n in (29, 31),
        lambda n, rows: n == 700,
    ],
)
def test_a_fork_at_one_batch_closes_the_axis_too(forks: Callable[[int, int], bool], frontend: str) -> None:
    x = torch.randn(2, 6, 16)
    with pytest.raises(InputError, match="no-dynamic-batch"):
        tdcompile.trace(At(forks).eval(), x, frontend=frontend)
    tdcompile.trace(At(forks).eval(), x, frontend=frontend, dynamic_batch=False)


def _even_beyond(rows: int, limit: int) -> bool:
    if rows > limit and rows % 2:
        raise ValueError
    return rows > limit


@pytest.mark.parametrize("frontend", ["auto", "fx", "export"])
@pytest.mark.parametrize(
    ("forks", "told"),
    [
        (lambda n, rows: rows == 17, "the axis 'x_1' is 17"),
        (lambda n, rows: n > rows, "the batch is 7"),
        (lambda n, rows: n * rows > 70, "the axis 'x_1' is (36|48)"),
        (lambda n, rows: n == rows + 40, "the batch is 46"),
        (lambda n, rows: (rows + 6) % 64 == 60, "the axis 'x_1' is 54"),
        (lambda n, rows: _even_beyond(rows, 16), "the axis 'x_1' is 18"),
    ],
)
def test_a_fork_on_an_open_axis_is_found_wherever_it_is(
    forks: Callable[[int, int], bool], told: str, frontend: str
) -> None:
    x = torch.randn(2, 6, 16)
    with pytest.raises(InputError, match=told):
        tdcompile.trace(At(forks).eval(), x, frontend=frontend, dynamic=["x:1"])


class Square(nn.Module):
    """Another way where height and width are equal, which torch then takes for one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.shape[2] == x.shape[3] else self.b(x)


def test_axes_of_two_names_that_are_one_to_the_network_are_refused() -> None:
    x = torch.randn(2, 3, 16, 16)
    with pytest.raises(InputError, match="the axis 'w' is 17"):
        tdcompile.trace(Square().eval(), x, dynamic=["x:2=h", "x:3=w"])
    program = tdcompile.trace(Square().eval(), x, dynamic=["x:2=side", "x:3=side"])
    assert program.graph(torch.randn(3, 3, 20, 20)).shape == (3, 4, 18, 18)


class Masked(nn.Module):
    def __init__(self, by: str) -> None:
        super().__init__()
        self.words, self.by = nn.Linear(4, 8), by

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.by == "place" and x.shape[1] > 6:
            raise ValueError("six places are known")
        return (self.words(x) * mask[..., None]).mean(1)


@pytest.mark.parametrize(
    ("by", "said"), [("mask", "by itself: open mask:1 too; it says"), ("place", "give no --dynamic for it; it says")]
)
def test_an_axis_that_cannot_be_open_alone_names_its_companions(by: str, said: str) -> None:
    inputs = {"x": torch.randn(2, 6, 4), "mask": torch.ones(2, 6)}
    with pytest.raises(InputError, match=said):
        tdcompile.trace(Masked(by).eval(), inputs, dynamic=["x:1"])
    if by == "mask":
        tdcompile.trace(Masked(by).eval(), inputs, dynamic=["x:1", "mask:1"])


def test_sizes_that_take_too_much_memory_are_not_tried_and_told() -> None:
    program = tdcompile.trace(At(lambda n, rows: n > 10**6).eval(), torch.randn(2, 6, 16), frontend="export")
    told = [entry.text for entry in program.history if isinstance(entry, Diagnostic) and entry.code == "untried"]
    assert len(told) == 1
    assert "the batch is 1000001" in told[0]


def right_at(program: Program, module: nn.Module, sizes: Sequence[tuple[int, int]]) -> None:
    """The graph and its ONNX model compute what the network computes, of batches and rows of these sizes."""
    with TemporaryDirectory() as folder:
        done = export_onnx(program.graph, program.inputs, Path(folder) / "m.onnx", axes=program.axes)
        session = open_session(done.path, Target())
    for n, rows in sizes:
        x = torch.randn(n, rows, 16)
        with torch.no_grad():
            expected = module(x)
            torch.testing.assert_close(program.graph(x), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(torch.from_numpy(infer(session, (x,))[0]), expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from(["==", ">", "%", "product", "+"]),
    number=st.integers(2, 50),
    frontend=st.sampled_from(["auto", "fx", "export"]),
)
def test_what_is_accepted_is_right_at_every_size(kind: str, number: int, frontend: str) -> None:
    forks: dict[str, Callable[[int, int], bool]] = {
        "==": lambda n, rows: n == number,
        ">": lambda n, rows: rows > 3 * number,
        "%": lambda n, rows: rows % number == 1,
        "product": lambda n, rows: n * rows > 40 * number,
        "+": lambda n, rows: n + number == rows,
    }
    module = At(forks[kind]).eval()
    try:
        program = tdcompile.trace(module, torch.randn(2, 6, 16), frontend=frontend, dynamic=["x:1"])
    except InputError:
        return
    right_at(program, module, [(1, 6), (number, 6), (2, 3 * number + 1), (2, number + 1), (2, number + 2), (9, 50)])


@pytest.mark.parametrize("frontend", ["auto", "fx", "export"])
def test_what_never_forks_is_accepted_and_right_at_every_size(frontend: str) -> None:
    module = At(lambda n, rows: False).eval()
    program = tdcompile.trace(module, torch.randn(2, 6, 16), frontend=frontend, dynamic=["x:1"])
    right_at(program, module, [(1, 6), (2, 1), (1, 1), (29, 31), (9, 50), (3, 151), (700, 2)])


def test_a_layer_with_a_hook_or_a_forward_of_its_own_stays_what_it_is() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)).eval()
    module[0].register_forward_hook(lambda part, given, y: y * 2)
    module[1].register_forward_pre_hook(lambda part, given: (given[0] + 1,))
    module[2].forward = lambda x: torch.nn.functional.linear(x, module[2].weight) * 3  # type: ignore[method-assign]
    x = torch.randn(2, 32)
    compiled = tdcompile.compile(module, x, budget={"macs": 0.9}, data=Drawn(16, 32), frontend="fx")
    rows = {row.name: row for row in compiled.report.layers}
    assert set(rows) == {"0", "1", "2", "3"}
    for name in ("0", "1", "2"):
        assert rows[name].decomposition == "dense"
        assert rows[name].refusal is not None
        assert rows[name].refusal.code == "hooked"
    assert rows["3"].decomposition != "dense"


def test_a_layer_without_a_size_is_told() -> None:
    with pytest.raises(InputError, match="no size yet"):
        tdcompile.trace(nn.Sequential(nn.LazyLinear(8)).eval(), torch.randn(2, 16))


class Routed(nn.Module):
    """Experts that read the rows which a gate sends them: a compressed gate sends other rows."""

    def __init__(self, features: int = 24, experts: int = 3) -> None:
        super().__init__()
        self.into, self.gate = nn.Linear(features, features), nn.Linear(features, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(features, features) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.into(x).reshape(-1, x.shape[-1])
        pick = self.gate(rows).argmax(-1)
        total = torch.zeros_like(rows)
        for place, expert in enumerate(self.experts):
            (sent,) = torch.where(pick == place)
            total = total.index_add(0, sent, expert(rows[sent]))
        return total.reshape(x.shape)


def test_rows_that_a_compressed_gate_sends_elsewhere_do_not_count_as_macs() -> None:
    torch.manual_seed(0)
    made = tdcompile.compile(Routed().eval(), torch.randn(1, 32, 24), budget={"macs": 0.7})
    (gate,) = made.report.gates
    assert gate.passed
    assert gate.value == pytest.approx(made.plan.predicted.macs / made.plan.dense.macs)

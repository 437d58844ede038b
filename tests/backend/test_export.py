from __future__ import annotations

import dataclasses
import logging
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxsim
import pytest
import torch
from onnx import helper
from torch import Tensor, fx, nn

import tdcompile.backend.export
from tdcompile.backend.export import _explain_fixed_axis, export_onnx, rewrite_metadata, unique_node_names
from tdcompile.backend.session import infer, open_session
from tdcompile.errors import InputError, TdcompileError
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode
from tdcompile.ir.modules import register_trees
from tdcompile.ir.onnx_format import OnnxFormat
from tdcompile.ir.program import sites
from tdcompile.ir.target import Target


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).flatten(2).transpose(1, 2)).mean(1)


class Several(nn.Module):
    """Two inputs, one of them a table without a batch, and outputs in a nesting."""

    def forward(self, x: Tensor, table: Tensor) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        return {"sum": x + table, "pair": (x * 2, x)}


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.zeros(2, 3)


class NoOperator(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x[:, :, None] * torch.ones(3)).abs()


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else x + 1


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def written(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "new" / "model.onnx"
    done = export_onnx(net.train(), (torch.randn(1, 3, 8, 8),), path, metadata={"b": "2", "a": "1"})
    return done, onnx.load(path)


def run(path: Path, *inputs: Tensor) -> list[np.ndarray]:
    return infer(open_session(path, Target()), inputs)


def test_a_batch_of_one_stays_open(written, net):
    done, _ = written
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            expected = net.eval()(x)
        np.testing.assert_allclose(run(done.path, x)[0], expected.numpy(), atol=1e-5)


def test_what_is_reported_is_what_was_written(written):
    done, model = written
    assert (done.input_names, done.output_names) == (("x",), ("output",))
    assert done.bytes == done.path.stat().st_size
    assert done.nodes == len(model.graph.node)
    assert done.opset == model.opset_import[0].version
    assert done.notes == ()


def test_only_the_model_lies_in_its_folder(written):
    assert list(written[0].path.parent.iterdir()) == [written[0].path]


def test_nodes_are_named_by_module(written):
    names = [node.name for node in written[1].graph.node]
    assert names[:2] == ["block.0/conv2d", "block.1/relu"]
    assert sum(name.startswith("head/Gemm") for name in names) == 1  # onnxsim made it of MatMul + Add
    assert len(set(names)) == len(names)


def test_metadata_is_sorted_and_nothing_of_the_exporting_machine_stays(written):
    done, model = written
    assert [(entry.key, entry.value) for entry in model.metadata_props] == [("a", "1"), ("b", "2")]
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert str(Path(torch.__file__).parent).encode() not in done.path.read_bytes()


def test_the_same_network_gives_the_same_bytes_in_silence_and_keeps_its_modes(written, net, tmp_path, capfd):
    logger = logging.getLogger("torch.onnx")
    before = (sys.stdout, sys.stderr, logger.handlers, logger.propagate)
    net.train()
    net.block.eval()
    again = export_onnx(net, (torch.randn(2, 3, 8, 8),), tmp_path / "m.onnx", metadata={"a": "1", "b": "2"})
    assert again.path.read_bytes() == written[0].path.read_bytes()
    assert net.training
    assert not net.block[2].training
    assert capfd.readouterr() == ("", "")
    assert (sys.stdout, sys.stderr, logger.handlers, logger.propagate) == before


def test_a_traced_graph_gives_what_its_module_gives(written, net, tmp_path):
    done = export_onnx(fx.symbolic_trace(net), (torch.randn(2, 3, 8, 8),), tmp_path / "m.onnx")
    assert [node.op_type for node in onnx.load(done.path).graph.node] == [
        node.op_type for node in written[1].graph.node
    ]
    assert {"block.0", "head"} <= {node.name.partition("/")[0] for node in onnx.load(done.path).graph.node}


def test_a_fixed_batch_when_asked_for(tmp_path):
    done = export_onnx(FixedBatch(), (torch.randn(2, 3),), tmp_path / "m.onnx", dynamic_batch=False)
    assert open_session(done.path, Target()).get_inputs()[0].shape == [2, 3]


def test_several_inputs_and_nested_outputs(tmp_path):
    inputs = (torch.randn(2, 3), torch.randn(3))
    done = export_onnx(Several(), inputs, tmp_path / "m.onnx")
    assert done.input_names == ("x", "table")
    assert done.output_names == ("sum", "pair_0", "pair_1")
    x = torch.randn(4, 3)
    total, double, same = run(done.path, x, inputs[1])
    np.testing.assert_allclose(total, x + inputs[1])
    np.testing.assert_allclose(double, x * 2)
    np.testing.assert_allclose(same, x)


class Answers(nn.Module):
    """Returns what it is told to make of its input."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> object:
        return self.answer(x)


@dataclasses.dataclass
class Found:
    boxes: Tensor
    scores: Tensor


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        (lambda x: x + 1, ("output",)),
        (lambda x: (x + 1, x + 2), ("output_0", "output_1")),
        (lambda x: ({"a": x + 1}, x + 2), ("output_0", "output_1")),
        (lambda x: {"logits": x + 1}, ("logits",)),
        (lambda x: {"x": x + 1, "y z": x + 2}, ("x_output", "y_z")),
        (lambda x: {"a": {"b": x + 1}, "a_b": x + 2}, ("a_b", "a_b_1")),
        (lambda x: Found(x + 1, x + 2), ("boxes", "scores")),
    ],
)
def test_outputs_are_named_by_the_keys_that_the_network_returns(answer, names, tmp_path):
    register_trees(Found(torch.zeros(1), torch.zeros(1)))
    done = export_onnx(Answers(answer), (torch.randn(2, 3),), tmp_path / "m.onnx")
    assert done.output_names == names
    assert done.input_names == ("x",)


def test_an_input_gives_way_to_the_usual_name_of_an_output(tmp_path):
    done = export_onnx(Answers(lambda x: x + 1), (torch.randn(2, 3),), tmp_path / "m.onnx", input_names=("output",))
    assert (done.input_names, done.output_names) == (("output_inner",), ("output",))


def test_given_output_names_are_taken(tmp_path):
    form = OnnxFormat(output_names=("sum", "add", "twice"))
    inputs = (torch.randn(2, 3), torch.randn(3))
    done = export_onnx(Several(), inputs, tmp_path / "m.onnx", form=form)
    assert done.output_names == ("sum", "add", "twice")
    np.testing.assert_allclose(run(done.path, *inputs)[1], inputs[0] * 2)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("a", "b"), r"2 output names are given \(a, b\) for 3 outputs \(sum, pair_0, pair_1\)"),
        (("a", "b", "table"), "'table' is the name of an input"),
        (("a", "b", "a"), "'a' is given twice"),
        (("a", "b", ""), "empty"),
    ],
)
def test_output_names_that_do_not_fit_are_refused(names, says, tmp_path):
    inputs = (torch.randn(2, 3), torch.randn(3))
    with pytest.raises(InputError, match=says):
        export_onnx(Several(), inputs, tmp_path / "m.onnx", form=OnnxFormat(output_names=names))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("opset", "version"), [(17, 8), (18, 9), (21, 10), (None, None)])
def test_the_opset_and_the_ir_version_that_are_asked_for_are_written(net, written, tmp_path, opset, version):
    form = OnnxFormat(opset=opset, ir=version)
    done = export_onnx(net, (torch.randn(2, 3, 8, 8),), tmp_path / "m.onnx", form=form)
    model = onnx.load(done.path)
    assert (done.opset, done.ir) == (opset or written[0].opset, version or written[0].ir)
    assert (model.opset_import[0].version, model.ir_version) == (done.opset, done.ir)
    assert [node.name for node in model.graph.node][:2] == ["block.0/conv2d", "block.1/relu"]
    x = torch.randn(3, 3, 8, 8)
    np.testing.assert_allclose(run(done.path, x)[0], net.eval()(x).detach(), atol=1e-5)


@pytest.mark.parametrize(
    ("module", "opset", "says"),
    [
        (nn.LayerNorm(3), 16, "cannot be converted to opset 16: .*LayerNormalization"),
        (nn.ReLU(), 999, "does not export opset 999"),
    ],
)
def test_an_opset_that_an_operator_or_the_exporter_lacks_is_refused(module, opset, says, tmp_path, capfd):
    with pytest.raises(InputError, match=says) as caught:
        export_onnx(module, (torch.randn(2, 3),), tmp_path / "m.onnx", form=OnnxFormat(opset=opset))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("module", "error", "says"),
    [
        (FixedBatch(), InputError, "dynamic_batch=False"),
        (NoOperator(), TdcompileError, "aten.linalg_eig"),
        (Branching(), TdcompileError, r"depends on the values of its inputs in .*test_export\.py:\d+.*torch\.where"),
    ],
)
def test_what_cannot_be_exported_says_why_and_leaves_nothing(module, error, says, tmp_path, capfd):
    with pytest.raises(error, match=says) as caught:
        export_onnx(module, (torch.randn(2, 3),), tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


class Packed(nn.Module):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)[0]


@pytest.mark.parametrize(
    ("axis", "said"), [(1, "fixes the open axis 'time'.*--dynamic"), (0, "fixes its batch size.*--no-dynamic-batch")]
)
def test_a_fixed_axis_is_named_by_the_users_name(axis, said):
    opened = [{0: "batch", 1: "time"}]
    text = f"Constraints violated\n- inferred a static shape of 10 for dimension inputs['x'].shape[{axis}]."
    assert re.search(said, _explain_fixed_axis(text, opened))


def test_a_network_that_torch_does_not_trace_is_refused_with_the_line_of_its_code(tmp_path):
    inputs = (torch.randn(2, 9, 6), torch.tensor([9, 4]))
    with pytest.raises(InputError, match=r"'.*pad_packed_sequence.*' at test_export\.py:\d+") as caught:
        export_onnx(Packed(), inputs, tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "names", "says"),
    [
        ((), None, "no batch axis"),
        ((torch.tensor(1.0),), None, "no batch axis"),
        ((torch.randn(2, 3),), ("a", "b"), "2 input names are given for 1 inputs"),
        ((torch.randn(2, 3), torch.randn(3)), ("a", "a"), "given twice"),
    ],
)
def test_inputs_that_cannot_be_used(inputs, names, says, tmp_path):
    with pytest.raises(InputError, match=says):
        export_onnx(Several(), inputs, tmp_path / "m.onnx", input_names=names)


def _fails(_: onnx.ModelProto) -> None:
    raise RuntimeError("a rule broke\nin many lines")


def _renames(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, bool]:
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    changed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    return changed, True


def _invalid(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, bool]:
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    changed.graph.node[0].op_type = "NoSuchOperator"
    return changed, True


@pytest.mark.parametrize(
    ("broken", "says"),
    [(_fails, "a rule broke"), (_renames, "inputs or outputs"), (_invalid, "NoSuchOperator")],
)
def test_a_model_that_onnxsim_takes_wrong_is_kept_as_it_is(broken, says, tmp_path, monkeypatch):
    monkeypatch.setattr(onnxsim, "simplify", broken)
    done = export_onnx(nn.Linear(3, 2), (torch.randn(2, 3),), tmp_path / "m.onnx")
    assert says in done.notes[0].text
    assert done.notes[0].code == DiagnosticCode.NOT_SIMPLIFIED
    assert not done.simplified
    assert run(done.path, torch.randn(5, 3))[0].shape == (5, 2)


def test_large_weights_stand_beside_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(tdcompile.backend.export, "LARGEST_SINGLE_FILE", 1024)
    layer = nn.Linear(64, 64)
    done = export_onnx(layer, (torch.randn(2, 64),), tmp_path / "m.onnx", metadata={"a": "1"})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert done.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert "external data" in done.notes[0].text
    x = torch.randn(3, 64)
    np.testing.assert_allclose(run(done.path, x)[0], layer(x).detach(), atol=1e-5)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        export_onnx(nn.Linear(3, 2), (torch.randn(2, 3),), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_is_stamped_anew_without_another_export(tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
    first = export_onnx(network, [torch.randn(2, 3, 5, 5)], tmp_path / "a.onnx", metadata={"model": "draft"})
    note = Diagnostic("warning", "code", "a note")
    again = rewrite_metadata(tmp_path / "a.onnx", tmp_path / "b.onnx", {"model": "dense", "by": "us"}, [note])
    assert again == dataclasses.replace(first, path=tmp_path / "b.onnx", bytes=again.bytes, notes=(note,))
    one, other = onnx.load(tmp_path / "a.onnx"), onnx.load(tmp_path / "b.onnx")
    assert {entry.key: entry.value for entry in other.metadata_props} == {"model": "dense", "by": "us"}
    assert one.graph == other.graph
    fresh = export_onnx(
        network, [torch.randn(2, 3, 5, 5)], tmp_path / "c.onnx", metadata={"model": "dense", "by": "us"}
    )
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "c.onnx").read_bytes()
    assert fresh.bytes == again.bytes


@pytest.mark.parametrize("folder", ["same", "other"])
def test_a_model_whose_weights_stand_beside_it_is_stamped_with_them(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(tdcompile.backend.export, "LARGEST_SINGLE_FILE", 1024)
    layer = nn.Linear(64, 64)
    first = export_onnx(layer, [torch.randn(2, 64)], tmp_path / "same" / "m.onnx", metadata={"a": "1"})
    (tmp_path / folder).mkdir(exist_ok=True)
    again = rewrite_metadata(first.path, tmp_path / folder / "m.onnx", {"a": "2"}, simplified=False)
    assert again.bytes == first.bytes
    assert sorted(file.name for file in again.path.parent.iterdir()) == ["m.onnx", "m.onnx.data"]
    x = torch.randn(3, 64)
    np.testing.assert_allclose(run(again.path, x)[0], layer(x).detach(), atol=1e-5)


def test_a_node_that_a_rewrite_names_like_another_is_numbered(tmp_path, monkeypatch):
    simplify = onnxsim.simplify

    def alike(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, bool]:
        simple, right = simplify(proto)
        for node in simple.graph.node:
            node.name = "block/relu"
        return simple, right

    monkeypatch.setattr(onnxsim, "simplify", alike)

    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(torch.tanh(torch.relu(x)))

    module = Root().eval()
    done = export_onnx(module, (torch.randn(2, 3),), tmp_path / "m.onnx")
    assert [node.name for node in onnx.load(done.path).graph.node] == ["block/relu", "block/relu_1", "block/relu_2"]
    assert done.simplified
    x = torch.randn(5, 3)
    np.testing.assert_allclose(run(done.path, x)[0], module(x), atol=1e-6)


def test_names_in_subgraphs_are_numbered_too_and_others_stay():
    def graph(*nodes: onnx.NodeProto) -> onnx.GraphProto:
        return helper.make_graph(nodes, "g", [], [])

    inner = graph(helper.make_node("Relu", ["a"], ["b"], name="n"), helper.make_node("Relu", ["b"], ["c"], name="n"))
    branch = helper.make_node("If", ["p"], ["d"], name="n_1", then_branch=inner, else_branch=graph())
    outer = graph(*(helper.make_node("Relu", ["x"], ["y"], name=name) for name in ("n", "", "", "n")), branch)
    unique_node_names(outer)
    assert [node.name for node in outer.node] == ["n", "", "", "n_2", "n_1"]
    then = next(a.g for a in outer.node[-1].attribute if a.name == "then_branch")
    assert [node.name for node in then.node] == ["n", "n_1"]


def test_two_pools_may_read_one_padded_value(tmp_path):
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            padded = nn.functional.pad(x, (1, 1, 1, 1))
            return nn.functional.max_pool2d(padded, 2), nn.functional.max_pool2d(padded, 3)

    x = -torch.rand(2, 1, 6, 6) - 1
    done = export_onnx(Twice(), (x,), tmp_path / "m.onnx")
    for got, expected in zip(run(done.path, x), Twice()(x), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_equal_weights_change_no_names(tmp_path):
    """onnxsim makes Reshape and Gemm of linear layers; equal weights are stored once."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    one = onnx.load(export_onnx(module, (torch.randn(2, 4, 8),), tmp_path / "one.onnx").path)
    module[2].load_state_dict(module[0].state_dict())
    two = onnx.load(export_onnx(module, (torch.randn(2, 4, 8),), tmp_path / "two.onnx").path)
    assert len(two.graph.initializer) < len(one.graph.initializer)
    assert [n.name.partition("/")[0] for n in two.graph.node if n.op_type == "Gemm"] == ["0", "2"]
    assert [(n.name, *n.output) for n in two.graph.node] == [(n.name, *n.output) for n in one.graph.node]
    named = {str(n.output[0]) for n in two.graph.node if n.op_type in ("Gemm", "Reshape")}
    assert all(name.startswith(("0/", "2/", "linear", "output")) for name in named)


class Heads(nn.Module):
    """Attention whose linear layer gives queries, keys and values, which the attention itself splits into heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, length, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + self.proj(mixed.transpose(1, 2).reshape(n, length, 8))


@pytest.mark.parametrize("equal", [False, True])
def test_a_layer_whose_output_is_split_keeps_its_name(tmp_path, equal):
    """Its values are reshaped twice, and onnxsim merges both: what follows it belongs to the module around it."""
    torch.manual_seed(0)
    module = nn.Sequential(Heads(), Heads()).eval()
    if equal:
        module[1].load_state_dict(module[0].state_dict())
    made = onnx.load(export_onnx(module, (torch.randn(2, 4, 8),), tmp_path / "m.onnx").path)
    products = [n.name.partition("/")[0] for n in made.graph.node if n.op_type in ("Gemm", "MatMul")]
    layers = [name for name in products if name.endswith(("qkv", "proj"))]
    assert layers == ["0.qkv", "0.proj", "1.qkv", "1.proj"]


class Reading(nn.Module):
    """A module that reads the weights of its linear layers itself, as attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x, self.a.weight, self.a.bias).relu()
        return nn.functional.linear(x, self.b.weight, self.b.bias)


@pytest.mark.parametrize(("equal", "layers"), [(False, ["0.a", "0.b"]), (True, ["0", "0"])])
def test_a_layer_is_named_whose_weights_the_module_around_it_reads_unless_others_have_equal_ones(
    tmp_path: Path, equal: bool, layers: list[str]
) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(Reading()).eval()
    if equal:
        module[0].b.load_state_dict(module[0].a.state_dict())
    made = onnx.load(export_onnx(module, (torch.randn(2, 4, 8),), tmp_path / "m.onnx").path)
    assert [node.name.partition("/")[0] for node in made.graph.node if node.op_type == "Gemm"] == layers


def test_the_projections_of_attention_are_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    with torch.no_grad():
        layer.self_attn.in_proj_bias.add_(torch.randn(48))
    x = torch.randn(2, 5, 16)
    program = tdcompile.trace(layer, (x,))
    export_onnx(program.graph, (x,), tmp_path / "m.onnx")
    nodes = onnx.load(tmp_path / "m.onnx").graph.node
    named = [node.name.rpartition("/")[0] for node in nodes if node.op_type in ("Gemm", "MatMul")]
    assert [named.count(name) for name in sites(program)] == [1, 1, 1, 1]


class Recurrent(nn.Module):
    """A recurrent layer over six steps."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


@pytest.mark.filterwarnings("ignore:The tensor attributes")  # of torch.export, on weights that cuDNN wants flat
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers_take_any_batch(kind: type[nn.RNNBase], tmp_path: Path) -> None:
    """An export before it has replaced ``len``, which dynamo must know to trace the layer's loop."""
    export_onnx(nn.Linear(8, 4), (torch.randn(2, 8),), tmp_path / "plain.onnx")
    torch.manual_seed(0)
    module = Recurrent(kind).eval()
    for name, given in (
        ("module", module),
        ("operators", torch.export.export(module, (torch.randn(2, 6, 8),)).module()),
    ):
        path, open_ = tmp_path / f"{name}.onnx", name == "module"
        export_onnx(given, (torch.randn(2, 6, 8),), path, dynamic_batch=open_)
        for batch in (1, 2, 5) if open_ else (2,):
            x = torch.randn(batch, 6, 8)
            with torch.no_grad():
                np.testing.assert_allclose(run(path, x)[0], module(x).numpy(), atol=1e-5)


def test_a_message_of_dynamo_is_told_beyond_its_first_line(tmp_path, monkeypatch):
    said = "It must be captured completely. Got graph break/error:\n\nFailed to trace\n  Explanation: no 'length'\n"

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(TdcompileError, match=r"says: no 'length'$"):
        export_onnx(nn.ReLU(), (torch.randn(2, 3),), tmp_path / "m.onnx")
    said = "The operator failed:\n\n  because of its input\n"
    with pytest.raises(TdcompileError, match=r"says: The operator failed: because of its input$"):
        export_onnx(nn.ReLU(), (torch.randn(2, 3),), tmp_path / "m.onnx")


class Factored(nn.Module):
    """Linear layers as two factors that read one value, and one that is dense."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Linear(16, rank, bias=False), nn.Linear(rank, 16)) for rank in (4, 8))
        self.dense, self.alone = nn.Linear(16, 16), nn.Linear(16, 3, bias=False)
        train = [nn.Linear(16, 4, bias=False), nn.Linear(4, 5, bias=False), nn.Linear(5, 16)]
        self.train_of_three = nn.Sequential(*train)

    def forward(self, x):
        return self.alone((self.a(x) + self.b(x) * self.dense(x) + self.train_of_three(x)).relu())


def test_both_factors_of_a_linear_layer_read_rows_and_all_layers_share_the_reshape(tmp_path: Path) -> None:
    network, x = Factored().eval(), torch.randn(2, 5, 16)
    export_onnx(network, (x,), tmp_path / "net.onnx")
    graph = onnx.load(tmp_path / "net.onnx").graph
    makers = {output: node for node in graph.node for output in node.output}
    second = [node for node in graph.node if node.name.startswith(("a.1/Gemm", "b.1/Gemm"))]
    first = [makers[node.input[0]] for node in second]
    assert [node.op_type for node in first] == ["MatMul", "MatMul"]
    assert {node.name.split("/")[0] for node in first} == {"a.0", "b.0"}
    (dense,) = [node for node in graph.node if node.name.startswith("dense/Gemm")]
    (last,) = [node for node in graph.node if node.name.startswith("train_of_three.2/Gemm")]
    products = [makers[last.input[0]], makers[makers[last.input[0]].input[0]]]
    assert [node.op_type for node in products] == ["MatMul", "MatMul"]
    assert len({node.input[0] for node in [*first, dense, products[1]]}) == 1
    assert makers[first[0].input[0]].op_type == "Reshape"
    (alone,) = [node for node in graph.node if node.name.startswith("alone")]
    assert makers[alone.input[0]].op_type == "Relu"  # nothing is flattened behind it
    read = {value for node in graph.node for value in node.input}
    assert all(weight.name in read for weight in graph.initializer)
    many = torch.cat([x, x, x])
    (found,) = infer(open_session(tmp_path / "net.onnx", Target()), (many,))
    torch.testing.assert_close(torch.from_numpy(found), network(many).detach(), atol=1e-5, rtol=1e-4)

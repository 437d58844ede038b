"""``graft_layers``: a layer's node becomes its chain, the rest stays; what is not the layer alone is refused."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from tdcompile.backend.export import export_onnx
from tdcompile.backend.graft import Graft, graft_layers
from tdcompile.backend.profile import layer_seconds
from tdcompile.backend.session import infer, open_session
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.registry import make
from tdcompile.ir.layer import Layer
from tdcompile.ir.target import Target

X = torch.randn(2, 4, 9, 9)


class Shared(nn.Module):
    """One convolution called twice, and linear layers on two and on three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, (3, 1), stride=1, padding=(1, 0))
        self.token, self.head = nn.Linear(9, 6), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.token(self.conv(self.conv(x).relu())).mean((1, 2)))


def graft(form: str, module: nn.Module, extent: tuple[int, ...], ranks: tuple[int, ...], calls: int = 1) -> Graft:
    layer = Layer.of(module, extent)
    assert layer is not None
    return Graft(layer, calls, make(Decomposition, form).blueprint(layer, ranks))


class Alike(nn.Module):
    """Two layers of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(9, 9), nn.Linear(9, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).relu())


def test_no_two_weights_are_equal_because_onnxruntime_would_store_them_once(tmp_path: Path) -> None:
    network = Alike().eval()
    export_onnx(network, (X,), tmp_path / "dense.onnx")
    grafts = {name: graft("svd", network.get_submodule(name), (4, 9), (9,)) for name in ("a", "b")}
    assert graft_layers(tmp_path / "dense.onnx", grafts, tmp_path / "out.onnx")
    stored = [w for w in onnx.load(tmp_path / "out.onnx").graph.initializer if list(w.dims) == [9, 9]]
    assert len(stored) == 4
    assert len({weight.raw_data for weight in stored}) == 4


def test_every_call_becomes_the_chain_and_the_model_still_runs(tmp_path: Path) -> None:
    network = Shared().eval()
    export_onnx(network, (X,), tmp_path / "dense.onnx")
    grafts = {
        "conv": graft("channel", network.conv, (9, 9), (2,), calls=2),
        "token": graft("svd", network.token, (4, 9), (3,)),
        "head": graft("svd", network.head, (), (1,)),
    }
    assert graft_layers(tmp_path / "dense.onnx", grafts, tmp_path / "out.onnx")
    proto = onnx.load(tmp_path / "out.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert [node.op_type for node in proto.graph.node].count("Conv") == 4
    shapes = {weight.name: tuple(weight.dims) for weight in proto.graph.initializer}
    assert shapes["conv.0.weight"] == (2, 4, 3, 1)
    assert shapes["token.1.weight"] == (3, 6)
    assert not [name for name in shapes if name in ("conv.weight", "head.weight")], "weights nobody reads"
    (y,) = infer(open_session(tmp_path / "out.onnx", Target()), [X])
    assert y.shape == (2, 5)
    assert all(layer_seconds(tmp_path / "out.onnx", ["conv", "head"], [X], Target()).values())


@pytest.mark.parametrize(
    ("conv", "made"),
    [
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), False),  # by a node of its own
        (nn.Conv2d(4, 4, 2, padding="same"), True),
    ],
    ids=["reflect", "same"],
)
def test_a_layer_that_may_be_padded_by_another_node_is_right_or_refused(
    tmp_path: Path, conv: nn.Conv2d, made: bool
) -> None:
    export_onnx(nn.Sequential(conv).eval(), (X,), tmp_path / "dense.onnx")
    grafts = {"0": graft("channel", conv, (9, 9), (2,))}
    assert graft_layers(tmp_path / "dense.onnx", grafts, tmp_path / "out.onnx") == made
    assert made == (tmp_path / "out.onnx").exists()
    if made:
        (y,) = infer(open_session(tmp_path / "out.onnx", Target()), [X])
        assert y.shape == conv(X).shape


class Padded(nn.Module):
    """A convolution whose input is padded outside, as TensorFlow's "same" is."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.conv, self.value = nn.Conv2d(4, 6, (4, 3), stride=(2, 1), padding=(0, 1)), value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(nn.functional.pad(x, (0, 1, 1, 2), value=self.value))


@pytest.mark.parametrize("form", ["channel", "spatial", "cp"])
def test_zeros_around_the_input_go_to_the_first_layer_of_the_chain(tmp_path: Path, form: str) -> None:
    network = Padded(0.0).eval()
    export_onnx(network, (X,), tmp_path / "dense.onnx")
    (node,) = onnx.load(tmp_path / "dense.onnx").graph.node
    assert node.op_type == "Conv"  # it has the padding
    grafts = {"conv": graft(form, network.conv, (12, 10), (2,))}
    assert graft_layers(tmp_path / "dense.onnx", grafts, tmp_path / "out.onnx")
    (y,) = infer(open_session(tmp_path / "out.onnx", Target()), [X])
    assert y.shape == network(X).shape
    first = onnx.load(tmp_path / "out.onnx").graph.node[0]
    padding = next(list(a.ints) for a in first.attribute if a.name == "pads")
    assert padding[0::2] == [1, 2]
    assert padding[3] - padding[1] == 1


def test_a_layer_whose_input_is_padded_by_other_values_keeps_the_padding_before_it(tmp_path: Path) -> None:
    network = Padded(1.0).eval()
    export_onnx(network, (X,), tmp_path / "dense.onnx")
    grafts = {"conv": graft("channel", network.conv, (12, 10), (2,))}
    assert graft_layers(tmp_path / "dense.onnx", grafts, tmp_path / "out.onnx")
    assert [node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node] == ["Pad", "Conv", "Conv"]


def test_a_layer_that_is_not_there_as_often_as_it_is_called_is_refused(tmp_path: Path) -> None:
    network = Shared().eval()
    export_onnx(network, (X,), tmp_path / "dense.onnx")
    once = {"conv": graft("channel", network.conv, (9, 9), (2,), calls=1)}
    assert not graft_layers(tmp_path / "dense.onnx", once, tmp_path / "out.onnx")
    missing = {"body": graft("channel", network.conv, (9, 9), (2,))}
    assert not graft_layers(tmp_path / "dense.onnx", missing, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()

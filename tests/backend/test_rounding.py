"""A network that amplifies rounding is told from a wrong model, and the layer where fp32 and fp64 part is found."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import tdcompile
from tdcompile.backend.export import export_onnx
from tdcompile.backend.parity import check_parity
from tdcompile.backend.rounding import first_parting, in_double, own_deviation
from tdcompile.errors import ParityError
from tdcompile.ir.target import Target


class Cancelling(nn.Module):
    """Adds a huge number to what a layer gives and takes it away again, which leaves rounding alone."""

    def __init__(self, size: float) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("size", torch.tensor(size))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last((y + self.size) - self.size)


class Narrow(nn.Module):
    """A network that names fp32 itself, as norms of language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.softmax(x.to(torch.float32), -1, dtype=torch.float32).float())


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def graph_of(module: nn.Module, frontend: str = "auto") -> fx.GraphModule:
    return tdcompile.trace(module.eval(), (X,), frontend=frontend).graph  # type: ignore[arg-type]


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_where_fp32_and_fp64_part_is_the_node_that_loses_digits(frontend: str) -> None:
    found = first_parting(graph_of(Cancelling(1e6), frontend), (X,))
    assert found is not None
    assert found.node is not None
    assert "sub" in found.node
    assert found.before < 1e-5 < 1e-3 < found.after
    assert f"part at '{found.node}'" in str(found)


@pytest.mark.parametrize("frontend", ["fx", "export"])
def test_a_network_that_keeps_its_digits_parts_nowhere_even_if_it_names_fp32(frontend: str) -> None:
    graph = graph_of(Narrow(), frontend)
    found = first_parting(graph, (X,))
    assert found is not None
    assert found.node is None
    assert found.after < 1e-5
    assert in_double(graph)(X.double()).dtype is torch.float64
    assert graph(X).dtype is torch.float32  # the network itself is as it was
    own = own_deviation(graph, (X,), 0)
    assert own is not None
    assert own < 1e-5


def test_a_parity_error_of_a_network_that_amplifies_rounding_says_so(tmp_path: Path) -> None:
    right, noisy = graph_of(Cancelling(0.0)), graph_of(Cancelling(3e6))
    with torch.no_grad():  # a difference of 0.3 in the fp32 outputs, all of it from rounding
        model = tmp_path / "model.onnx"
        export_onnx(right, (X,), model)
        with pytest.raises(ParityError, match=r"the network itself amplifies rounding: .* fp32 and in fp64 differ by"):
            check_parity(model, noisy, (X,), Target())


def test_a_wrong_model_of_a_sound_network_is_just_wrong(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    export_onnx(graph_of(Cancelling(0.0)), (X,), model)
    other = Cancelling(0.0)
    with torch.no_grad():
        other.last.bias.add_(1.0)
    with pytest.raises(ParityError, match="differ at batch") as raised:
        check_parity(model, graph_of(other), (X,), Target())
    assert "amplifies" not in str(raised.value)


def test_a_network_that_does_not_run_in_fp64_says_nothing() -> None:
    class Insisting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype is not torch.float32:
                raise TypeError("fp32 only")
            return x + 1

    assert own_deviation(Insisting(), (X,), 0) is None

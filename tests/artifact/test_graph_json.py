"""Networks of many makes come back from their text; a text that names anything dangerous does not."""

import json
import math
import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from tdcompile.artifact.graph_json import describe, rebuild, tensors_of
from tdcompile.errors import InputError
from tdcompile.ir.conv_modules import Pad


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.left = nn.Conv2d(8, 8, (3, 1), padding="same", groups=2)
        self.right = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.pad = Pad(((0, 1), (1, 0)), "zeros")
        self.head = nn.Linear(16, 5)
        self.register_buffer("scale", torch.rand(8, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.stem(x)
        x = x + self.left(x) * self.scale
        y = torch.cat(
            [F.pad(x, (0, 1, 1, 0), value=-math.inf)[:, :, 1:, :-1], self.pad(self.right(x))[..., 1:, :-1]], 1
        )
        y = F.adaptive_avg_pool2d(F.max_pool2d(y.clamp(min=-3.0), 2), 1)
        flat = y.view(y.size(0), -1)
        return self.head(flat), {"features": torch.flatten(y, 1), "half": y.to(torch.float64).mean(dim=(1, 2))}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        x = torch.cat([self.token.expand(n, -1, -1), x], dim=1)
        q, k, v = self.qkv(self.norm(x)).reshape(n, length + 1, 3, 4, width // 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length + 1, width)
        return self.mlp(F.gelu(x + y))[:, 0].softmax(-1)


class Shared(nn.Module):
    """One module under two names, and two layers that share a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.third = nn.Linear(4, 4, bias=False)
        self.third.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


class Leaves(nn.Module):
    """torch.nn's own modules with attributes of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, activation=F.gelu, batch_first=True)
        self.rnn = nn.LSTM(8, 4, batch_first=True, bidirectional=True)
        self.up = nn.Upsample(scale_factor=2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.rnn(self.encoder(x))[0])


class Untraceable(nn.Module):
    """A class of the user's own, with control flow."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.options = {"sizes": [1, 2], "act": F.relu, "norm": nn.LayerNorm, "table": torch.arange(3.0)}

    def forward(self, x: Tensor) -> Tensor:
        return self.options["act"](self.inner(x)) if x.sum() > 0 else x + self.options["table"].sum()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (2, 3, 8, 8)),
    "attention": (Attention, (2, 6, 16)),
    "shared": (Shared, (2, 4)),
    "leaves": (Leaves, (2, 5, 8)),
}


def traced(module: nn.Module, leaf: type[nn.Module] | None = None) -> fx.GraphModule:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return (leaf is not None and isinstance(m, leaf)) or super().is_leaf_module(m, module_qualified_name)

    graph = fx.GraphModule(module, Tracer().trace(module))
    graph.eval()
    return graph


def flat(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for part in (value.values() if isinstance(value, dict) else value) for t in flat(part)]  # type: ignore[union-attr,attr-defined]


def again(graph: fx.GraphModule, trusted: tuple[str, ...] = ()) -> fx.GraphModule:
    return rebuild(describe(graph), trusted, tensors_of(graph))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_comes_back_and_computes_the_same_bits(name: str) -> None:
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    graph = traced(build())
    back = again(graph)
    x = torch.randn(shape)
    with torch.no_grad():
        for a, b in zip(flat(graph(x)), flat(back(x)), strict=True):
            assert torch.equal(a, b)
    assert list(back.state_dict()) == list(graph.state_dict())
    assert not back.training
    assert not any(module.training for module in back.modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_text_of_what_came_back_is_the_same_text(name: str) -> None:
    graph = traced(NETWORKS[name][0]())
    assert describe(rebuild(describe(graph))) == describe(graph)


def test_sharing_is_kept() -> None:
    graph = traced(Shared())
    graph.add_submodule("second", graph.get_submodule("first"))  # tracing gives both calls the first name
    list(graph.graph.nodes)[2].target = "second"
    graph.recompile()
    back = again(graph)
    assert back.first is back.second
    assert back.third.weight is back.first.weight
    assert len(list(back.parameters())) == 2


def test_a_module_in_training_mode_stays_in_it() -> None:
    graph = traced(nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4)))
    graph.train()
    graph.get_submodule("1").eval()
    back = again(graph)
    assert (back.training, back.get_submodule("0").training, back.get_submodule("1").training) == (True, True, False)


def test_a_class_of_ones_own_needs_trust() -> None:
    graph = traced(nn.Sequential(nn.Linear(4, 4), Untraceable()), leaf=Untraceable)
    with pytest.raises(InputError, match=r"Untraceable, which is not part of torch.nn.*trusted=\("):
        again(graph)
    back = again(graph, trusted=(Untraceable.__module__,))
    for x in (torch.ones(1, 4), -torch.ones(1, 4)):
        assert torch.equal(graph(x), back(x))
    assert isinstance(back.get_submodule("1"), Untraceable)


def test_a_class_inside_a_function_has_no_name() -> None:
    class Local(Untraceable):
        pass

    with pytest.raises(InputError, match=r"the class of module '0' is .*Local, which cannot be found by its name"):
        describe(traced(nn.Sequential(Local()), leaf=Local))


def test_what_has_no_text_form_is_named() -> None:
    module = Untraceable()
    module.options = {"act": lambda x: x}
    with pytest.raises(InputError, match=r"'0.options' is .*lambda"):
        describe(traced(nn.Sequential(module), leaf=Untraceable))
    module.options = {"act": object()}
    with pytest.raises(InputError, match=r"'0.options' \(.*Untraceable\) holds a object"):
        describe(traced(nn.Sequential(module), leaf=Untraceable))


def test_forward_hooks_are_refused() -> None:
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match=r"module '0' .*has forward hooks"):
        describe(traced(nn.Sequential(layer)))


def test_weights_that_do_not_fit_are_named() -> None:
    graph = traced(nn.Sequential(nn.Linear(2, 3)))
    with pytest.raises(InputError, match=r"the weights lack '0.bias'"):
        rebuild(describe(graph), tensors={"0.weight": torch.zeros(3, 2)})
    with pytest.raises(InputError, match=r"the weight '0.weight' is \[2, 2\] .* has \[3, 2\]"):
        rebuild(describe(graph), tensors={"0.weight": torch.zeros(2, 2), "0.bias": torch.zeros(3)})


def tampered(**changes: object) -> str:
    """The text of a linear layer and a view, its second node changed."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("layer", (x,)))
    root = nn.Module()
    root.add_module("layer", nn.Linear(2, 2))
    document = json.loads(describe(fx.GraphModule(root, graph)))
    document["modules"][-1]["graph"][1].update(changes)
    return json.dumps(document)


@pytest.mark.parametrize(
    "changes",
    [
        {"op": "call_function", "target": "os:system", "args": ["true"]},
        {"op": "call_function", "target": "torch.load", "args": ["x"]},
        {"op": "call_function", "target": "torch.hub:load", "args": ["x"]},
        {"op": "call_function", "target": "torch.from_file", "args": ["x"]},
        {"op": "call_function", "target": "torch.ops.load_library", "args": ["x"]},
        {"op": "call_function", "target": "torch.ops.aten.from_file", "args": ["x"]},
        {"op": "call_function", "target": "builtins.eval", "args": ["1"]},
        {"op": "call_function", "target": "operator.methodcaller", "args": ["1"]},
        {"op": "call_function", "target": "operator.call", "args": ["1"]},
        {"op": "call_function", "target": "torch.nn.functional.handle_torch_function"},
        {"op": "call_function", "target": "builtins.getattr", "args": [{"node": "x"}, "__class__"]},
        {"op": "call_function", "target": "builtins.getattr", "args": [{"node": "x"}, {"node": "x"}]},
        {"op": "call_method", "target": "__reduce_ex__"},
        {"op": "call_method", "target": "tofile"},
        {"op": "call_module", "target": 'layer"), print("'},
        {"op": "call_module", "target": "nothing"},
        {"op": "get_attr", "target": 'layer", None) or print("'},
        {"op": "placeholder", "target": "y=print(1)", "args": []},
        {"op": "placeholder", "target": "class", "args": []},
        {"op": "exec", "target": "x"},
        {"kwargs": {"input=print(1), y": 1}},
        {"args": [{"node": "unknown"}]},
        {"args": [{"class": "subprocess:Popen"}]},
        {"args": [{"dtype": "load"}]},
    ],
)
def test_a_text_that_reaches_outside_is_refused(changes: dict[str, object]) -> None:
    assert rebuild(tampered())
    with pytest.raises(InputError):
        rebuild(tampered(**changes))


@pytest.mark.parametrize("cls", ["subprocess:Popen", "torch.nn.functional:relu", "torch.nn.modules:Nothing"])
def test_a_class_that_is_no_module_is_refused(cls: str) -> None:
    document = json.loads(tampered())
    document["modules"][0]["class"] = cls
    with pytest.raises(InputError):
        rebuild(json.dumps(document))


def test_a_module_s_inner_state_is_not_the_file_s_to_set() -> None:
    document = json.loads(tampered())
    document["modules"][0]["attributes"]["_forward_hooks"] = {"dict": [[0, {"function": "builtins.len"}]]}
    with pytest.raises(InputError, match="_forward_hooks"):
        rebuild(json.dumps(document))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 2}', '{"format": 1, "tensors": {}, "modules": []}'])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        rebuild(text)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS | st.sampled_from([torch.float16, torch.device("cpu"), torch.strided, torch.channels_last, ...]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
        | st.builds(slice, st.integers(), st.none(), st.integers(1, 3))
    ),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(VALUES)
def test_every_value_of_an_attribute_comes_back(value: object) -> None:
    layer = nn.Identity()
    layer.value = value  # type: ignore[assignment]
    back = rebuild(describe(traced(nn.Sequential(layer)))).get_submodule("0").value
    assert operator.eq(back, value)
    assert type(back) is type(value)

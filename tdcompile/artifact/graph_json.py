"""Convert an fx graph and its modules to JSON and back, without weights and without code.

``rebuild`` executes no code from the text. Functions come from a fixed list, and classes from torch.nn and tdcompile.
All other classes and functions come only from packages that the caller trusts.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen

from tdcompile.artifact.allowlist import function, module_class, name_of, readable
from tdcompile.errors import InputError
from tdcompile.ir.layer import Layer

FORMAT = 1
_PATH = re.compile(r"[^\"\\\x00-\x1f]+")  # fx writes these values between double quotes into its generated code
_OWN = frozenset(vars(nn.Module())) - {"training"}


def describe(graph: fx.GraphModule) -> str:
    """Return the architecture as JSON text for ``rebuild``; equal graphs give equal texts.

    Raises:
        InputError: a part of the network has no text form; the message names the part and its module's class.
    """
    writer = _Writer()
    writer.module(graph, "")
    shapes = {name: _shape(tensor) for name, tensor in writer.tensors.items()}
    document = {"format": FORMAT, "tensors": shapes, "modules": writer.modules}
    return json.dumps(document, separators=(",", ":"), allow_nan=False)


def tensors_of(graph: fx.GraphModule) -> dict[str, Tensor]:
    """Return each tensor that ``describe`` names once: parameters and buffers under their first names.

    Raises:
        InputError: see ``describe``.
    """
    writer = _Writer()
    writer.module(graph, "")
    return writer.tensors


def rebuild(text: str, trusted: Sequence[str] = (), tensors: Mapping[str, Tensor] | None = None) -> fx.GraphModule:
    """Return the graph that a text describes, in its saved mode (training or eval).

    Args:
        text: the result of ``describe``.
        trusted: packages, modules or ``.py`` files, besides torch.nn and tdcompile, whose classes and functions may be
            used.
        tensors: the weights by name, used without a copy. None leaves the weights uninitialised.

    Raises:
        InputError: the text is malformed or names an untrusted class or function, or the weights do not fit.
    """
    try:
        document = json.loads(text)
        if document["format"] != FORMAT:
            raise InputError(f"the architecture has format {document['format']}; this version reads {FORMAT}")
        return _Reader(document, trusted, tensors).root()
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        RuntimeError,
        ImportError,
        SyntaxError,
    ) as error:
        raise InputError(f"the architecture of the network cannot be read: {error!r}") from error


class _Writer:
    """Collects modules, inner modules first, and tensors, each under its first name."""

    def __init__(self) -> None:
        self.modules: list[dict[str, Any]] = []
        self.tensors: dict[str, Tensor] = {}
        self._places: dict[int, int] = {}
        self._names: dict[int, str] = {}

    def module(self, module: nn.Module, path: str) -> int:
        """Return the index of a module in the list; append the module if it is missing."""
        if id(module) in self._places:
            return self._places[id(module)]
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        if module._forward_hooks or module._forward_pre_hooks:
            raise InputError(f"module '{path}' ({kind}) has forward hooks, which have no text form: remove them first")
        dot = f"{path}." if path else ""
        entry: dict[str, Any] = {
            "parameters": {k: self.tensor(p, dot + k) for k, p in module._parameters.items()},
            "buffers": {
                k: [self.tensor(b, dot + k), k not in module._non_persistent_buffers_set]
                for k, b in module._buffers.items()
            },
        }
        if isinstance(module, fx.GraphModule):
            entry["graph"] = self.graph(module.graph, path)
            state = {"training": module.training}
        else:
            entry["class"] = name_of(type(module), f"the class of module '{path}'")
            state = {k: v for k, v in dict(module.__getstate__()).items() if k not in _OWN}  # type: ignore[no-untyped-call]
        entry["attributes"] = {k: self.value(v, dot + k, kind) for k, v in state.items()}
        entry["modules"] = {k: None if m is None else self.module(m, dot + k) for k, m in module._modules.items()}
        self.modules.append(entry)
        return self._places.setdefault(id(module), len(self.modules) - 1)

    def tensor(self, tensor: Tensor | None, name: str) -> str | None:
        """Return the name under which a tensor is saved."""
        if tensor is None:
            return None
        if id(tensor) not in self._names:
            while name in self.tensors:  # an attribute may hold a list of tensors under one name
                name += "'"
            self.tensors[name] = tensor
            self._names[id(tensor)] = name
        return self._names[id(tensor)]

    def graph(self, graph: fx.Graph, path: str) -> list[dict[str, Any]]:
        """Return the nodes in order, without the metadata of passes (``meta``)."""
        if type(graph._codegen) is not CodeGen:
            raise InputError(f"the graph of '{path}' takes its inputs as a nesting, which has no text form here")
        return [
            {
                "name": node.name,
                "op": node.op,
                "target": name_of(node.target, f"what node '{node.name}' calls")
                if node.op == "call_function"
                else node.target,
                "args": self.value(list(node.args), node.name, "node"),
                "kwargs": {k: self.value(v, node.name, "node") for k, v in node.kwargs.items()},
            }
            for node in graph.nodes
        ]

    def value(self, value: object, where: str, kind: str) -> Any:
        """Return a value as JSON: scalars and lists unchanged, all other types as ``{tag: content}``."""
        if value is None or isinstance(value, bool | str) or type(value) is int:
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if value is Ellipsis:
            return {"ellipsis": None}
        if isinstance(value, fx.Node):
            return {"node": value.name}
        if isinstance(value, Tensor):
            return {"tensor": self.tensor(value, where)}
        if type(value) is Layer:
            return {"layer": self.value({f.name: getattr(value, f.name) for f in fields(value)}, where, kind)}
        if isinstance(value, slice):
            return {"slice": [self.value(part, where, kind) for part in (value.start, value.stop, value.step)]}
        if isinstance(value, dict):
            return {"dict": [[self.value(part, where, kind) for part in item] for item in value.items()]}
        for tag, sequence in _SEQUENCES.items():
            if isinstance(value, list | tuple) and isinstance(value, sequence) and not hasattr(value, "_fields"):
                members = [self.value(part, where, kind) for part in value]
                return members if tag == "list" else {tag: members}
        for tag, (scalar, _) in _SCALARS.items():
            if isinstance(value, scalar):
                return {tag: str(value).removeprefix("torch.")}
        if isinstance(value, type) and issubclass(value, nn.Module):
            return {"class": name_of(value, f"'{where}'")}
        if callable(value) and hasattr(value, "__name__"):
            return {"function": name_of(value, f"'{where}'")}
        raise InputError(f"'{where}' ({kind}) holds a {type(value).__name__}, which has no text form")


class _Reader:
    """Builds modules in order; names in the text are looked up in fixed tables and never evaluated."""

    def __init__(
        self, document: Mapping[str, Any], trusted: Sequence[str], tensors: Mapping[str, Tensor] | None
    ) -> None:
        self.document, self.trusted = document, tuple(trusted)
        self.tensors = {name: _filled(name, shape, tensors) for name, shape in document["tensors"].items()}
        self.made: list[nn.Module] = []

    def root(self) -> fx.GraphModule:
        """Return the last module, after building all modules."""
        for entry in self.document["modules"]:
            self.made.append(self.module(entry))
        root = self.made[-1]
        if not isinstance(root, fx.GraphModule):
            raise ValueError("the outermost module has no graph")
        return root

    def module(self, entry: Mapping[str, Any]) -> nn.Module:
        """Return one module; its inner modules exist already."""
        cls = nn.Module if "graph" in entry else module_class(entry["class"], self.trusted)
        module: nn.Module = cls.__new__(cls)
        nn.Module.__init__(module)
        for name, tensor in entry["parameters"].items():
            module.register_parameter(name, None if tensor is None else self.tensors[tensor])  # type: ignore[arg-type]
        for name, (tensor, persistent) in entry["buffers"].items():
            module.register_buffer(name, None if tensor is None else self.tensors[tensor], persistent)
        for name, place in entry["modules"].items():
            module.register_module(name, None if place is None else self.made[place])
        state = {name: self.value(value, {}) for name, value in entry["attributes"].items()}
        if not _OWN.isdisjoint(state):
            raise ValueError(f"attributes {sorted(_OWN.intersection(state))} are not for a file to set")
        if "graph" not in entry:
            module.__setstate__(vars(module) | state)  # type: ignore[no-untyped-call]
            return module
        module.training = bool(state["training"])
        graph = fx.GraphModule(module, self.graph(entry["graph"]))
        for name, part in graph.named_modules():  # fx creates new containers in training mode
            part.training = module.get_submodule(name).training
        return graph

    def graph(self, nodes: Iterable[Mapping[str, Any]]) -> fx.Graph:
        """Return the checked nodes; fx writes their targets and argument names into the code that it compiles."""
        graph, made = fx.Graph(), dict[str, fx.Node]()
        for node in nodes:
            op, target, kwargs = node["op"], node["target"], node["kwargs"]
            _check_node(op, target, kwargs)
            made[node["name"]] = graph.create_node(
                op,
                function(target, self.trusted) if op == "call_function" else target,
                tuple(self.value(value, made) for value in node["args"]),
                {key: self.value(value, made) for key, value in kwargs.items()},
                node["name"],
            )
            if made[node["name"]].target is getattr and not readable(node["args"][1]):
                raise ValueError(f"'{node['args'][1]}' is not a public attribute of a tensor")
        graph.lint()
        return graph

    def value(self, value: Any, nodes: Mapping[str, fx.Node]) -> Any:
        """Return the value that the JSON describes."""
        if isinstance(value, list):
            return [self.value(part, nodes) for part in value]
        if not isinstance(value, dict):
            return value
        ((tag, content),) = value.items()
        if tag in _SEQUENCES:
            return _SEQUENCES[tag](self.value(content, nodes))
        if tag in _SCALARS:
            return _scalar(tag, content)
        readers: dict[str, Callable[[], Any]] = {
            "ellipsis": lambda: ...,
            "float": lambda: float(content),
            "node": lambda: nodes[content],
            "tensor": lambda: self.tensors[content],
            "layer": lambda: Layer(**self.value(content, nodes)),
            "slice": lambda: slice(*self.value(content, nodes)),
            "dict": lambda: {self.value(k, nodes): self.value(v, nodes) for k, v in content},
            "function": lambda: function(content, self.trusted),
            "class": lambda: module_class(content, self.trusted),
        }
        return readers[tag]()


def _shape(tensor: Tensor) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    parameter = tensor.requires_grad if isinstance(tensor, nn.Parameter) else None
    shape = {"shape": list(tensor.shape), "dtype": dtype, "parameter": parameter}
    # PyTorch uses other kernels for channels-last weights, and their rounding differs.
    return shape if tensor.is_contiguous() else shape | {"stride": list(torch.empty_like(tensor).stride())}


def _filled(name: str, shape: Mapping[str, Any], tensors: Mapping[str, Tensor] | None) -> Tensor:
    """Return a tensor with its weights; ``parameter`` is None for a buffer, otherwise the ``requires_grad`` flag."""
    dtype = _scalar("dtype", shape["dtype"])
    if tensors is None:
        tensor = torch.empty(shape["shape"], dtype=dtype)
    elif name not in tensors:
        raise InputError(f"the weights lack '{name}', which the architecture names")
    else:
        tensor = tensors[name]
        if list(tensor.shape) != shape["shape"] or tensor.dtype != dtype:
            raise InputError(
                f"the weight '{name}' is {list(tensor.shape)} {tensor.dtype} where the architecture has "
                f"{shape['shape']} {dtype}"
            )
        if "stride" in shape:
            tensor = torch.empty_strided(shape["shape"], shape["stride"], dtype=dtype).copy_(tensor)
    return tensor if shape["parameter"] is None else nn.Parameter(tensor, requires_grad=shape["parameter"])


def _scalar(tag: str, content: str) -> Any:
    kind, read = _SCALARS[tag]
    value = read(content)
    if not isinstance(value, kind):
        raise TypeError(f"'{content}' is no {tag}")
    return value


def _check_node(op: str, target: str, kwargs: Mapping[str, Any]) -> None:
    if not _CHECKS[op](target):
        raise ValueError(f"'{target}' as the target of a {op}")
    if not all(key.isidentifier() for key in kwargs):
        raise ValueError(f"arguments {list(kwargs)}")


_SEQUENCES: dict[str, type] = {"size": torch.Size, "tuple": tuple, "list": list}
_SCALARS: dict[str, tuple[type, Callable[[str], Any]]] = {
    "device": (torch.device, lambda name: torch.device(name)),
    "dtype": (torch.dtype, functools.partial(getattr, torch)),
    "layout": (torch.layout, functools.partial(getattr, torch)),
    "memory_format": (torch.memory_format, functools.partial(getattr, torch)),
}
_CHECKS: dict[str, Callable[[str], object]] = {
    "placeholder": lambda target: target.lstrip("*").isidentifier(),
    "call_function": lambda target: True,  # a look-up in a table
    "call_method": readable,
    "call_module": _PATH.fullmatch,
    "get_attr": _PATH.fullmatch,
    "output": "output".__eq__,
}

"""Export a PyTorch network to a checked, simplified ONNX file whose bytes are reproducible."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sysconfig
import tempfile
import traceback
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from tdcompile.backend.torchlib import translations_read_once
from tdcompile.errors import InputError, TdcompileError, first_line
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode
from tdcompile.ir.dynamic_shapes import (
    BATCH,
    Axis,
    BatchAxes,
    batch_of,
    batch_size,
    default_batch_axes,
    limits,
    symbolic_lengths,
)
from tdcompile.ir.modules import evaluating, separate_attention
from tdcompile.ir.onnx_format import WEIGHTED, OnnxFormat
from tdcompile.support.quiet import captured_output

# A protobuf message is limited to 2 GiB; 64 MiB of it are left for the graph beside the weights.
LARGEST_SINGLE_FILE = 2**31 - 2**26
_OPERATOR = re.compile(r"OpOverload\(op='(?P<name>[^']+)'")
_RECURRENT = {"gru", "lstm", "rnn_relu", "rnn_tanh"}  # torch's operators
_GRAPH_BREAK = "graph break"  # in a message of dynamo, which traces loops and branches
_EXPLANATION = re.compile(r"^\s*Explanation: (?P<text>.+)$", re.MULTILINE)
_SOURCE_LINE = re.compile(r"(?P<place>[\w./-]+\.py:\d+)")
LOWEST_EXPORTED = 18  # the lowest opset that torch exports; models are converted to lower ones
# What onnx's converter says about an operator without a lower version.
_NO_ADAPTER = re.compile(r"No Adapter From Version \$?(?P<opset>\d+) for (?P<operator>\w+)")
_NO_OPERATOR = re.compile(r"No Previous Version of (?P<operator>\w+) exists")
_HERE = str(Path(__file__).resolve().parents[1])  # this package
_FIXED_AXIS = re.compile(r"\.shape\[(?P<axis>\d+)\]")
_TORCH = Path(torch.__file__).parent
# Functions on packed sequences, which have no ONNX form.
_PACKED = ("pack_padded_sequence", "pad_packed_sequence", "pack_sequence", "unpack_sequence")
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Exported:
    """An ONNX file that was written.

    Attributes:
        bytes: size of the file and of its external data, if any.
        simplified: whether the model is the result of onnxsim.
        notes: deviations from the usual export.
    """

    path: Path
    bytes: int
    opset: int
    ir: int
    nodes: int
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    simplified: bool = False
    notes: tuple[Diagnostic, ...] = ()


def export_onnx(
    module: nn.Module,
    inputs: Sequence[Tensor],
    path: Path,
    *,
    dynamic_batch: bool = True,
    batch_axes: BatchAxes | None = None,
    axes: Sequence[Axis] = (),
    input_names: Sequence[str] | None = None,
    form: OnnxFormat | None = None,
    simplify: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Export a network in eval mode and write the file atomically.

    Nodes are named ``<module>/<operator>``, so that a profile can be summed by layer. The outputs of a network that
    returns a dict or a dataclass are named by its keys, with ``_`` between those of a nesting. Other outputs are named
    ``output``, or ``output_0``, ``output_1``, ... in the order of ``modules.tensors_in``. Weights over 2 GB go to
    ``<name>.data`` beside the file.

    Args:
        module: the network; its train or eval mode is restored.
        inputs: example inputs, the tensors of ``forward``'s arguments in order; an input whose first axis is as long
            as that of the first input has a batch axis.
        path: the file to write; its folder is created if needed.
        dynamic_batch: make the batch axis dynamic, under the name ``batch``.
        batch_axes: axis of the samples in each input; by default the first where it is as long as the first input's.
        axes: further dynamic axes, under their names.
        input_names: names of the graph's inputs; default the arguments of ``forward``.
        form: versions of the model and names of its outputs.
        simplify: run onnxsim on the exported model; its result is used only if it is valid.
        metadata: entries of the model's ``metadata_props``.

    Raises:
        InputError: no input has a batch axis, the network fixes an axis, the names do not fit the inputs or outputs, or
            the network needs a later opset.
        TdcompileError: torch cannot export the network, or the model is not valid ONNX.
    """
    samples = default_batch_axes(inputs) if batch_axes is None else batch_axes
    if not inputs or (dynamic_batch and all(axis is None for axis in samples)):
        raise InputError("the example inputs have no batch axis to leave open: give tensors (N, ...)")
    if input_names is not None and len(input_names) != len(inputs):
        raise InputError(f"{len(input_names)} input names are given for {len(inputs)} inputs: {', '.join(input_names)}")
    if input_names is not None and len(set(input_names)) < len(input_names):
        raise InputError(f"an input name is given twice: {', '.join(input_names)}")
    opened: list[dict[int, str]] = [{} for _ in inputs]
    for place, along in enumerate(samples):
        opened[place] |= {along: BATCH} if along is not None and dynamic_batch else {}
    for axis in axes:
        opened[axis.input][axis.axis] = axis.name
    # torch treats a size of 1 as a constant
    one = dynamic_batch and batch_size(inputs, samples) == 1
    form = form or OnnxFormat()
    model, keys = _capture(module, batch_of(inputs, 2, samples) if one else tuple(inputs), opened, form.opset)
    _check_open(model.graph, opened)
    model.ir_version = form.ir or model.ir_version
    _normalize_names(model, input_names or _argument_names(module, len(inputs)))
    for value, name in zip(model.graph.outputs, _names_of_outputs(model.graph, form.output_names, keys), strict=True):
        _rename(model.graph, value, name)
    model.metadata_props.update(sorted((metadata or {}).items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        return _write(model, Path(folder) / path.name, path, simplify=simplify, opset=form.opset)


def rewrite_metadata(
    model: Path, path: Path, metadata: Mapping[str, str], notes: Sequence[Diagnostic] = (), *, simplified: bool = True
) -> Exported:
    """Write a model of ``export_onnx`` with other metadata; external data is copied under its own name.

    Args:
        model: the exported file; it may be the same as ``path``.
        path: the file to write.
        metadata: entries of ``metadata_props``.
        notes: copied into the result.
        simplified: copied into the result.
    """
    proto = onnx.load(model, load_external_data=False)
    del proto.metadata_props[:]
    helper.set_model_props(proto, dict(sorted(metadata.items())))
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        draft.write_bytes(proto.SerializeToString(deterministic=True))
        external = _external_files(proto)
        for name in external if path.parent.resolve() != model.parent.resolve() else ():
            shutil.copyfile(model.parent / name, Path(folder) / name)
            os.replace(Path(folder) / name, path.parent / name)
        os.replace(draft, path)
    size = sum((path.parent / name).stat().st_size for name in (path.name, *external))
    return _exported(proto, path, size, notes, simplified=simplified)


def _external_files(proto: onnx.ModelProto) -> list[str]:
    """Return the names of the files beside a model that hold its external data."""
    entries = (entry for weight in proto.graph.initializer for entry in weight.external_data)
    return sorted({entry.value for entry in entries if entry.key == "location"})


def _capture(
    module: nn.Module, examples: tuple[Tensor, ...], opened: Sequence[Mapping[int, str]], opset: int | None
) -> tuple[ir.Model, list[str]]:
    """Return the exported model, of ``LOWEST_EXPORTED`` if a lower opset is asked for, and the keys of its outputs."""
    shapes = tuple(dict(each) or None for each in opened) if any(opened) else None
    version = None if opset is None else max(opset, LOWEST_EXPORTED)
    with (
        evaluating(module),
        torch.no_grad(),
        separate_attention(),
        nullcontext() if _recurrent(module) else symbolic_lengths(),
        translations_read_once(),
        captured_output() as said,
    ):
        try:
            program = torch.onnx.export(
                module, examples, dynamo=True, dynamic_shapes=shapes, verbose=False, opset_version=version
            )
        except Exception as error:  # noqa: BLE001  # the exporter and the network raise anything
            cause = _root(error)
            cause.add_note(said.getvalue())
            if "inferred a static shape" in str(cause) or "Constraints violated" in str(cause):
                raise InputError(_explain_fixed_axis(str(cause), opened)) from cause
            kind = InputError if "data-dependent" in str(cause) or _users_line(cause) else TdcompileError
            raise kind(f"torch cannot export the network to ONNX: {_explain_failure(cause, module)}") from cause
    assert program is not None  # torch.onnx.export returns one under dynamo=True
    if version is not None and program.model.opset_imports[""] != version:
        raise InputError(f"torch {torch.__version__} does not export opset {opset}: give a lower --opset")
    if program.exported_program is not None:
        found = limits(program.exported_program, opened)
        least, largest = found.get(BATCH, (1, None))
        if largest is not None or least > 2:
            raise InputError(
                f"the network does something else where its batch is {largest + 1 if largest else least - 1}, so the "
                "batch axis cannot stay open: pass dynamic_batch=False (--no-dynamic-batch)"
            )
    return program.model, _output_keys(program.exported_program)


def _recurrent(module: nn.Module) -> bool:
    """Return whether a network has recurrent layers: dynamo traces their loops, and not with symbolic lengths."""
    nodes = module.graph.nodes if isinstance(module, fx.GraphModule) else ()
    names = {str(node.target).partition(".")[2].partition(".")[0] for node in nodes if node.op == "call_function"}
    return bool(names & _RECURRENT) or any(isinstance(part, nn.RNNBase) for part in module.modules())


def _output_keys(program: ExportedProgram | None) -> list[str]:
    """Return a name for each output of a network that returns a dict or a dataclass, from its keys; else nothing."""
    spec = program.call_spec.out_spec if program is not None else None
    if spec is None or spec.is_leaf() or spec.type in (tuple, list):
        return []
    paths = [path for path, _ in pytree.tree_flatten_with_path(pytree.tree_unflatten([0] * spec.num_leaves, spec))[0]]
    return ["_".join(re.sub(r"\W", "_", _step_name(step)) for step in path) for path in paths]


def _step_name(step: object) -> str:
    """Return the key, field or position of one step of a pytree's path."""
    return str(next((getattr(step, name) for name in ("key", "name", "idx") if hasattr(step, name)), step))


def _explain_failure(cause: BaseException, module: nn.Module) -> str:
    """Return what failed, in which module, and what to do, as far as the exporter's message tells."""
    said = str(cause).strip()
    lines = [line.strip() for line in said.splitlines() if line.strip()] or [type(cause).__name__]
    first = lines[0] if not lines[0].endswith(":") else " ".join(lines[:2])
    if _GRAPH_BREAK in said:
        told = [match["text"] for match in _EXPLANATION.finditer(said)]
        first = told[0] if told else first
    if "torch.classes.quantized" in said:
        return "its quantised layers have no ONNX form: quantise the compiled network instead"
    operator = _OPERATOR.search(said)
    if operator is not None and "No ONNX function" in said:
        name = operator["name"]
        where = _module_using(module, name)
        return (
            f"the operator '{name}'{where} has no ONNX form: take another implementation of that part where the "
            "network is built"
        )
    line = _users_line(cause)
    if "data-dependent" in said:
        places = [match["place"] for match in _SOURCE_LINE.finditer(said)]
        own = [place for place in places if not (_TORCH / place).is_file() and not place.startswith("torch/")]
        where = f" in {line}" if line else f" at {own[0]}" if own else ""
        return (
            f"what it does depends on the values of its inputs{where}, and an ONNX graph is the same for all: compute "
            "every case for all inputs and select the result by torch.where or by weights, for instance every expert "
            "for every row"
        )
    if any(name in line for name in _PACKED):
        return f"torch does not trace {line}: give the layer padded sequences, and mask the padding in its output"
    return f"torch does not trace {line}; it says: {first}" if line else first


def _explain_fixed_axis(said: str, opened: Sequence[Mapping[int, str]]) -> str:
    """Return which open axis the network fixes, from torch's message."""
    last = said.strip().splitlines()[-1].lstrip("- ")
    axes = {int(match["axis"]) for match in _FIXED_AXIS.finditer(last)}
    names = {name for each in opened for axis, name in each.items() if axis in axes}
    if names and BATCH not in names:
        fixed = " or ".join(f"'{name}'" for name in sorted(names))
        return f"the network fixes the open axis {fixed}: leave it out of dynamic (--dynamic); torch says: {last}"
    return (
        "the network fixes its batch size, so the batch axis cannot stay open: pass dynamic_batch=False "
        f"(--no-dynamic-batch); torch says: {last}"
    )


def _users_line(error: BaseException) -> str:
    """Return the innermost line of the network's own code in a traceback, with its place; empty without one."""
    installed = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), str(Path(torch.__file__).parent), _HERE)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(("<", *installed)):
            return f"'{frame.line}' at {Path(frame.filename).name}:{frame.lineno}"
    return ""


def _module_using(module: nn.Module, operator: str) -> str:
    """Return `` of '<module>'`` for the module of a traced network that uses an operator, or an empty text."""
    nodes = module.graph.nodes if isinstance(module, fx.GraphModule) else ()
    for node in nodes:
        stack = node.meta.get("nn_module_stack")
        if stack and str(getattr(node.target, "name", lambda: "")()).replace("::", ".").startswith(operator):
            return f" of '{next(reversed(stack.values()))[0]}'"
    return ""


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _argument_names(module: nn.Module, count: int) -> list[str] | None:
    """Return the names of ``forward``'s arguments, or None if they are not one for each input tensor."""
    names = list(inspect.signature(module.forward).parameters)
    return names if len(names) == count else None


def _check_open(graph: ir.Graph, opened: Sequence[Mapping[int, str]]) -> None:
    for value, axes in zip(graph.inputs, opened, strict=True):
        for axis, name in axes.items():
            if value.shape is not None and not isinstance(value.shape[axis], int):
                continue
            if name == BATCH:
                raise InputError(
                    f"the network fixes the batch size of its input '{value.name}' ({value.shape}): "
                    "pass dynamic_batch=False (--no-dynamic-batch)"
                )
            raise InputError(
                f"the network fixes the axis '{name}' of its input '{value.name}' ({value.shape}): leave it out of "
                "dynamic (--dynamic)"
            )


def _normalize_names(model: ir.Model, input_names: Sequence[str] | None) -> None:
    """Name nodes by module and inputs as given; remove file names and versions of the exporting machine."""
    graph = model.graph
    for node in graph.all_nodes():
        module = _module_of(node)
        name = (node.name or "").removeprefix("node_")
        node.name = f"{module}/{name}" if module else name
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    model.metadata_props.clear()
    for value, name in zip(graph.inputs, input_names or (), strict=bool(input_names)):
        _rename(graph, value, name)


def _names_of_outputs(graph: ir.Graph, given: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Return the names that the user gave, else the keys, else positions.

    Callers rely on the names ``output`` and ``output_0``, so an input of that name is renamed. A key gives way.

    Raises:
        InputError: there are more or fewer given names than outputs, or one is the name of an input.
    """
    inputs, count = {str(value.name) for value in graph.inputs}, len(graph.outputs)
    if given and len(given) != count:
        known = ", ".join(_names_of_outputs(graph, (), keys))
        raise InputError(
            f"{len(given)} output names are given ({', '.join(given)}) for {count} outputs ({known}): "
            "give one name for each"
        )
    if taken := [name for name in given if name in inputs]:
        raise InputError(f"the output name '{taken[0]}' is the name of an input: give another")
    if given:
        return list(given)
    if len(keys) != count:
        return ["output"] if count == 1 else [f"output_{place}" for place in range(count)]
    names: list[str] = []
    for key in keys:
        names.append(_free(f"{key}_output" if key in inputs else key, {*inputs, *names}))
    return names


def _module_of(node: ir.Node) -> str:
    """Return ``layer1.0.conv1`` from the exporter's ``['layer1', 'layer1.0', 'layer1.0.conv1', 'conv2d_1']``."""
    scopes = [part.strip(" '\"") for part in node.metadata_props.get(_SCOPES, "").strip("[]").split(",")]
    return scopes[-2] if len(scopes) > 1 and not scopes[-2].startswith("_empty_nn_module_stack") else ""


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph.all_nodes() for v in node.outputs)]
    for other in values:
        if other.name == name and other is not value:
            other.name = _free(f"{name}_inner", {str(v.name) for v in values})
    value.name = name


def _free(name: str, taken: Collection[str]) -> str:
    """Return the name, with the first number behind it that makes it new if it is taken."""
    numbered = (f"{name}_{number}" for number in range(1, len(taken) + 1))
    return name if name not in taken else next(other for other in numbered if other not in taken)


def _write(model: ir.Model, draft: Path, path: Path, *, simplify: bool, opset: int | None) -> Exported:
    """Write and check a draft in its own temporary folder, then move its files to their final place.

    Raises:
        InputError: the model cannot be converted to the opset.
        TdcompileError: the model is not valid ONNX.
    """
    convert = opset is not None and opset < LOWEST_EXPORTED
    notes: list[Diagnostic] = []
    simplified = False
    if sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value) > (
        LARGEST_SINGLE_FILE
    ):
        if convert:
            raise InputError(
                f"a model of over 2 GB cannot be converted to opset {opset}: give {LOWEST_EXPORTED} or later"
            )
        notes.append(_not_simplified("the weights are over 2 GB: they are external data"))
        ir.save(model, draft, external_data=f"{path.name}.data")
        proto = onnx.load(draft, load_external_data=False)
        _check(str(draft))
    else:
        proto = ir.to_proto(model) if not convert else _converted(ir.to_proto(model), int(opset or 0))
        simple = _simplify(proto) if simplify else None
        if isinstance(simple, Diagnostic):
            notes.append(simple)
        simplified = isinstance(simple, onnx.ModelProto)
        proto = simple if isinstance(simple, onnx.ModelProto) else _completed(proto)
        draft.write_bytes(proto.SerializeToString(deterministic=True))
    written = sorted(draft.parent.iterdir(), key=lambda file: file.name == path.name)  # the model itself comes last
    size = sum(file.stat().st_size for file in written)
    for file in written:
        os.replace(file, path.parent / file.name)
    return _exported(proto, path, size, notes, simplified=simplified)


def _converted(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Return the model in a lower opset.

    Raises:
        InputError: an operator needs a later opset.
    """
    with captured_output():
        try:
            lower = onnx.version_converter.convert_version(proto, opset)
            _drop_unknown_defaults(lower.graph, opset)
            onnx.checker.check_model(lower)
            return lower
        except Exception as error:  # the converter raises RuntimeError, or what protobuf raises
            raise InputError(f"the model cannot be converted to opset {opset}: {_why_not_lower(str(error))}") from error


def _drop_unknown_defaults(graph: onnx.GraphProto, opset: int) -> None:
    """Remove attributes that the opset's operators lack, where their value is the default of the operators exported.

    onnx's converter (seen in 1.23) leaves them: ``noop_with_empty_axes`` of ReduceMean below opset 18.
    """
    for node in graph.node:
        if node.domain or not onnx.defs.has(node.op_type, max_inclusive_version=opset):
            continue
        known = onnx.defs.get_schema(node.op_type, opset).attributes
        later = onnx.defs.get_schema(node.op_type, LOWEST_EXPORTED).attributes
        kept = [
            a for a in node.attribute if a.name in known or a.name not in later or not _is_default(a, later[a.name])
        ]
        del node.attribute[:]
        node.attribute.extend(kept)


def _is_default(attribute: onnx.AttributeProto, declared: onnx.defs.OpSchema.Attribute) -> bool:
    default = declared.default_value
    return bool(default.name) and helper.get_attribute_value(attribute) == helper.get_attribute_value(default)


def _why_not_lower(said: str) -> str:
    """Return the operator that needs a later opset, and the opset to give, from the message of onnx's converter."""
    known = _NO_ADAPTER.search(said)
    if known is not None:
        return f"the operator {known['operator']} needs opset {known['opset']} or later: give --opset {known['opset']}"
    unknown = _NO_OPERATOR.search(said)
    if unknown is not None:
        return f"it has no operator {unknown['operator']}: give a higher --opset"
    return f"{next(iter(said.splitlines()), '')}: give a higher --opset"


def _exported(
    proto: onnx.ModelProto, path: Path, size: int, notes: Sequence[Diagnostic], *, simplified: bool
) -> Exported:
    return Exported(
        path=path,
        bytes=size,
        opset=next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")),
        ir=proto.ir_version,
        nodes=len(proto.graph.node),
        input_names=tuple(value.name for value in proto.graph.input),
        output_names=tuple(value.name for value in proto.graph.output),
        simplified=simplified,
        notes=tuple(notes),
    )


def _completed(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Make the last changes to a model, in place, and check it.

    Raises:
        TdcompileError: the model is not valid ONNX.
    """
    _keep_zero_padding(proto.graph)
    unique_node_names(proto.graph)
    _check(proto)
    return proto


def unique_node_names(graph: onnx.GraphProto) -> None:
    """Number the nodes whose name an earlier node of the graph has; onnxruntime refuses two of one name."""
    seen: set[str] = set()
    taken = {node.name for node in graph.node}
    for node in graph.node:
        if node.name and node.name in seen:
            node.name = _free(node.name, taken)
            taken.add(node.name)
        seen.add(node.name)
        for attribute in node.attribute:
            for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                unique_node_names(inner)


def _check(model: onnx.ModelProto | str) -> None:
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise TdcompileError(f"the exported model is not valid ONNX: {first_line(error)}") from error


def _simplify(proto: onnx.ModelProto) -> onnx.ModelProto | Diagnostic:
    """Return the simplified model, completed; or why there is none: onnxsim fails, or its result is not usable."""
    import onnxsim  # slow to import, and optional

    with captured_output():
        try:
            simple, right = onnxsim.simplify(proto)
            if not right or _interface(simple) != _interface(proto):
                return _not_simplified("onnxsim changed the model's inputs or outputs")
            del simple.metadata_props[:]  # a log that onnxsim writes
            simple.metadata_props.extend(proto.metadata_props)
            _flatten_before_products(simple.graph)
            _name_merged_nodes(simple.graph, proto.graph)
            _name_by_weights(simple.graph)
            _name_made_values(simple.graph, proto.graph)
            return _completed(simple)
        except Exception as error:  # noqa: BLE001  # simplification is optional: on any failure the model is kept
            return _not_simplified(f"onnxsim failed ({first_line(error)})")


def _not_simplified(why: str) -> Diagnostic:
    return Diagnostic("warning", DiagnosticCode.NOT_SIMPLIFIED, f"{why}, and the model is not simplified")


def _flatten_before_products(graph: onnx.GraphProto) -> None:
    """Flatten the input of a product whose output is flattened: MatMul, Reshape, Gemm becomes Reshape, MatMul, Gemm.

    onnxsim flattens in front of a linear layer with a bias only, and so between the two factors of a layer. Layers that
    read one value then share the Reshape. A model of MiniLM took 5.3 ms before and 4.3 ms behind this, timed in turn.
    """
    if any(part.HasField("g") or part.graphs for node in graph.node for part in node.attribute):
        return  # a graph inside a node may read the values that go
    known = {value for node in graph.node for value in node.input}
    while products := {product.output[0]: (reshape, rows) for product, reshape, rows in _flattened_products(graph)}:
        gone = {reshape.output[0] for reshape, _ in products.values()}
        kept: list[onnx.NodeProto] = []
        for node in graph.node:
            if node.op_type == "MatMul" and node.output[0] in products:
                reshape, rows = products[node.output[0]]
                source, flat = node.input[0], f"{node.output[0]}/rows"
                graph.initializer.append(numpy_helper.from_array(rows, f"{flat}/shape"))
                kept.append(helper.make_node("Reshape", [source, f"{flat}/shape"], [flat], name="Reshape_rows"))
                node.input[0], node.output[0] = flat, reshape.output[0]
                known.add(f"{flat}/shape")
            elif node.op_type == "Reshape" and node.output[0] in gone:
                continue
            kept.append(node)
        _set_nodes(graph, kept)
    _set_nodes(graph, _reshaped_once(graph))
    made = {value for node in graph.node for value in node.output}
    described = [value for value in graph.value_info if value.name in made]
    count = len(graph.value_info)
    graph.value_info.extend(described)
    del graph.value_info[:count]
    unread = known - {value for node in graph.node for value in node.input} - {value.name for value in graph.output}
    for weight in [weight for weight in graph.initializer if weight.name in unread]:
        graph.initializer.remove(weight)


def _flattened_products(
    graph: onnx.GraphProto,
) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto, NDArray[np.int64]]]:
    """Yield each product with a stored matrix whose output goes into one Reshape to rows and nowhere else.

    Returns:
        The product, the Reshape, and the shape of the product's input as rows.
    """
    stored = {weight.name: weight for weight in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    users = Counter(value for node in graph.node for value in node.input)
    users.update(value.name for value in graph.output)
    for node in graph.node:
        product = makers.get(node.input[0]) if node.op_type == "Reshape" and node.input[1] in stored else None
        if product is None or product.op_type != "MatMul" or users[product.output[0]] > 1:
            continue
        weight, sizes = stored.get(product.input[1]), numpy_helper.to_array(stored[node.input[1]]).tolist()
        if weight is not None and len(weight.dims) == len(sizes) == 2 and sizes[1] == weight.dims[1]:
            yield product, node, np.array([sizes[0], weight.dims[0]], np.int64)


def _set_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Give a graph other nodes, which may be its own."""
    count = len(graph.node)
    graph.node.extend(nodes)
    del graph.node[:count]


def _reshaped_once(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Return the nodes without Reshapes of a value to a shape that an earlier one makes; their users read that one."""
    stored = {weight.name: weight for weight in graph.initializer}
    outputs = {value.name for value in graph.output}
    first: dict[tuple[object, ...], str] = {}
    renamed: dict[str, str] = {}
    kept = []
    for node in graph.node:
        for place, value in enumerate(node.input):
            node.input[place] = renamed.get(value, value)
        if node.op_type == "Reshape" and node.input[1] in stored and node.output[0] not in outputs:
            sizes = numpy_helper.to_array(stored[node.input[1]]).tolist()
            same = first.setdefault((node.input[0], *sizes, str(node.attribute)), node.output[0])
            if same != node.output[0]:
                renamed[node.output[0]] = same
                continue
        kept.append(node)
    return kept


def _name_merged_nodes(new: onnx.GraphProto, old: onnx.GraphProto) -> None:
    """Name a node that onnxsim made, such as the Gemm of MatMul and Add, by the module that it belongs to.

    That is the module that makes the first value behind the node that the old graph has too; or the one module inside
    it whose weights the node reads, or that reads the first value before the node, as the linear layer of an attention
    whose output is split into heads. Weights alone do not tell the module: equal weights of several modules are stored
    once.
    """
    makers = {output: node.name.rpartition("/")[0] for node in old.node for output in node.output}
    readers: dict[str, set[str]] = {weight.name: set() for weight in old.initializer}
    for node in old.node:
        for value in readers.keys() & set(node.input):
            readers[value].add(node.name.rpartition("/")[0])
    takers: dict[str, set[str]] = {}
    for node in old.node:
        for value in node.input:
            takers.setdefault(value, set()).add(node.name.rpartition("/")[0])
    before = {output: node.input[0] for node in new.node if node.input for output in node.output}
    behind: dict[str, str] = {}  # value that only the new graph has -> its module
    for node in reversed(new.node):
        module = next((m for value in node.output if (m := makers.get(value, behind.get(value, "")))), "")
        for value in node.input:
            if value not in makers:
                behind[value] = module
    known = {node.name for node in old.node}
    for node in new.node:
        if node.name not in known:
            module = next((m for value in node.output if (m := makers.get(value, behind.get(value, "")))), "")
            source = node.input[0] if node.input else ""
            while source not in takers and source in before:
                source = before[source]
            weighted = set[str]().union(*(readers.get(value, ()) for value in node.input))
            reading = takers.get(source, ()) if node.op_type in WEIGHTED else ()
            module = _only_inside(weighted, module) or _only_inside(reading, module) or module
            node.name = f"{module}/{node.name}" if module else node.name


def _name_by_weights(graph: onnx.GraphProto) -> None:
    """Name a node by the layer whose weight or bias it reads, if that layer is inside the module that it is named by.

    Attention reads the weights of its linear layers itself and does not call them. A weight that several nodes read
    may be that of several layers: equal ones are stored once.
    """
    users = Counter(value for node in graph.node for value in node.input)
    stored = {weight.name for weight in graph.initializer if users[weight.name] == 1}
    for node in graph.node:
        if node.op_type not in WEIGHTED:
            continue
        module, _, operator = node.name.rpartition("/")
        read = [name.rpartition(".") for name in node.input[1:] if name in stored]
        layer = _only_inside({owner for owner, _, own in read if own in ("weight", "bias")}, module)
        node.name = f"{layer}/{operator}" if layer else node.name


def _only_inside(modules: Iterable[str], outer: str) -> str:
    """Return the only one of the modules that is a module or inside it; an empty text if there are none or several.

    An empty name is the network, which all modules are inside.
    """
    inside = {name for name in modules if name and (not outer or name == outer or name.startswith(f"{outer}."))}
    return inside.pop() if len(inside) == 1 else ""


def _name_made_values(new: onnx.GraphProto, old: onnx.GraphProto) -> None:
    """Name the values that onnxsim made by the nodes that compute them.

    Its own names are numbers that depend on which weights are equal, so that training would change them.
    """
    unique_node_names(new)
    taken = {name for node in (*old.node, *new.node) for name in (*node.input, *node.output)}
    taken |= {value.name for value in (*new.input, *new.output, *new.initializer)}
    kept = {name for node in old.node for name in node.output} | {value.name for value in new.output}
    names: dict[str, str] = {}
    for node in new.node:
        for value in node.output:
            if value and value not in kept and node.name:
                names[value] = _free(node.name, taken)
                taken.add(names[value])
    _rename_values(new, names)


def _rename_values(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Rename values in a graph and in the graphs inside its nodes, which may read them."""
    for value in graph.value_info:
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for values in (node.input, node.output):
            for place, value in enumerate(values):
                values[place] = names.get(value, value)
        for attribute in node.attribute:
            for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                _rename_values(inner, names)


def _interface(proto: onnx.ModelProto) -> list[bytes]:
    return [value.SerializeToString(deterministic=True) for value in (*proto.graph.input, *proto.graph.output)]


def _keep_zero_padding(graph: onnx.GraphProto) -> None:
    """Replace the zeros that pad a max-pool's input by the smallest positive number.

    onnxruntime (seen in 1.31) fuses a Pad of zeros into the pool, whose padding counts as minus infinity. That is
    right after a ReLU and wrong if pooled values may be negative.
    """
    made = {output: node for node in graph.node for output in node.output}
    stored = {weight.name: weight for weight in graph.initializer}
    for pool in graph.node:
        pad = made.get(pool.input[0]) if pool.op_type == "MaxPool" else None
        if pad is None or pad.op_type != "Pad" or _padding_mode(pad) != "constant":
            continue
        given = stored.get(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else None
        if given is not None:
            value = numpy_helper.to_array(given)
            if value.any():
                continue
            kind = value.dtype
            if not np.issubdtype(kind, np.floating):
                continue  # integers have no smallest positive number close to zero
        else:
            kind = np.dtype(np.float32)
        name = f"{pad.output[0]}_least"
        if name not in stored:  # two pools may read one pad
            stored[name] = numpy_helper.from_array(np.array(np.finfo(kind).tiny, kind), name)
            graph.initializer.append(stored[name])
        del pad.input[2:3]
        pad.input.insert(2, name)


def _padding_mode(pad: onnx.NodeProto) -> str:
    """Return the mode of a Pad node, ``constant`` by default."""
    found = next((helper.get_attribute_value(a) for a in pad.attribute if a.name == "mode"), b"constant")
    return str(found.decode())

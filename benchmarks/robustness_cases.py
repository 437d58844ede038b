"""The cases of ``robustness.py``: command, what should come, and how to see that it came."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

from tdcompile.data.loading import load_data
from tdcompile.data.nesting import tensors_in
from tdcompile.frontend.load_network import load_source
from tdcompile.ir.modules import evaluating

PREPARE = ("python c_make_data.py", "python f_checkpoints_make.py")
_CLOSE = 1e-3  # of the largest output: other shapes differ by rounding, another network by far more
_TASKS = "other tasks and data than class numbers"


class UnlikeError(Exception):
    """The result differs from what should come; the message says how."""


@dataclass(frozen=True)
class Ran:
    """One command that ended.

    Attributes:
        folder: the folder in which it ran.
        out: its output folder.
        code: its exit code.
        text: what it printed, both streams.
    """

    folder: Path
    out: Path
    code: int
    text: str

    @property
    def said_all(self) -> str:
        """All messages, with every run of white space as one blank."""
        return " ".join(self.text.split())

    @property
    def said(self) -> str:
        """The error, else the verdict before the path of the report."""
        lines = [line for line in self.text.strip().splitlines() if not line.startswith("report: ")] or [""]
        return next((line for line in lines if line.startswith("error: ")), lines[-1])


Check = Callable[[Ran], None]
Draw = Callable[[torch.Generator], Tensor]


@dataclass(frozen=True)
class Case:
    """One command and what should come.

    Attributes:
        name: the case.
        command: the command; ``-o FOLDER`` is added to ``tdcompile compile``.
        expected: what should come, in words.
        says: texts that the messages must contain.
        codes: exit codes that are right.
        check: raises ``UnlikeError`` if the result of a command that ended with 0 is not as it should be.
        needs: the case that must have run before, because the command reads its output.
        later: what the project lacks for the case; the command must then be refused in one sentence.
    """

    name: str
    command: str
    expected: str
    says: tuple[str, ...] = ()
    codes: tuple[int, ...] = (0,)
    check: Check | None = None
    needs: str = ""
    later: str = ""


def normal(*shape: int) -> Draw:
    """Draw floats of a shape."""
    return lambda generator: torch.randn(shape, generator=generator)


def whole(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Draw:
    """Draw integers in ``[low, high)``."""
    return lambda generator: torch.randint(low, high, shape, generator=generator).to(dtype)


def agrees(
    source: str,
    *calls: Sequence[Draw],
    close: float = _CLOSE,
    call: Callable[[nn.Module, Sequence[Tensor]], Any] = lambda module, inputs: module(*inputs),
) -> Check:
    """Require that the dense model computes the network for every call, and that the compiled model runs there.

    Args:
        source: the network, as of the command.
        calls: the inputs of each call, in the order of the model's inputs.
        close: allowed difference, as a share of the largest output.
        call: how the network takes the inputs.
    """

    def check(ran: Ran) -> None:
        with _inside(ran.folder):
            module, _ = load_source(source)
        for draws in calls:
            generator = torch.Generator().manual_seed(0)
            inputs = [draw(generator) for draw in draws]
            with evaluating(module), torch.no_grad():
                wanted = [y.numpy() for y in tensors_in(call(module, [x.clone() for x in inputs]))]
            shapes = ", ".join("x".join(map(str, x.shape)) for x in inputs)
            _compare(_infer(ran.out / "dense.onnx", inputs), wanted, close, f"the dense model at {shapes}")
            _same_shapes(_infer(ran.out / "model.onnx", inputs), wanted, f"the compiled model at {shapes}")

    return check


def both(*checks: Check) -> Check:
    """Require all of several checks."""

    def check(ran: Ran) -> None:
        for one in checks:
            one(ran)

    return check


def header(opset: int | None = None, ir: int | None = None, **metadata: str) -> Check:
    """Require the versions and the metadata of both models; ``None`` requires nothing."""

    def check(ran: Ran) -> None:
        for name in ("dense.onnx", "model.onnx"):
            model = onnx.load(ran.out / name)
            found = {entry.key: entry.value for entry in model.metadata_props}
            if opset is not None and model.opset_import[0].version != opset:
                raise UnlikeError(f"{name} has opset {model.opset_import[0].version}")
            if ir is not None and model.ir_version != ir:
                raise UnlikeError(f"{name} has IR version {model.ir_version}")
            if lost := [key for key, value in metadata.items() if found.get(key) != value]:
                raise UnlikeError(f"{name} lacks the metadata {lost[0]!r}")

    return check


def outputs(*names: str) -> Check:
    """Require these names of the outputs of both models."""

    def check(ran: Ran) -> None:
        for model in ("dense.onnx", "model.onnx"):
            found = tuple(output.name for output in onnx.load(ran.out / model).graph.output)
            if found != names:
                raise UnlikeError(f"the outputs of {model} are named {', '.join(found)}")

    return check


def names_unique(ran: Ran) -> None:
    """Require that no two nodes of a model have one name, and that the models are valid."""
    for name in ("dense.onnx", "model.onnx"):
        model = onnx.load(ran.out / name)
        onnx.checker.check_model(model, full_check=True)
        nodes = [node.name for node in model.graph.node]
        if len(set(nodes)) < len(nodes):
            raise UnlikeError(f"two nodes of {name} have one name")


def input_type(dtype: str) -> Check:
    """Require the type of the first input of both models, such as ``tensor(uint8)``."""

    def check(ran: Ran) -> None:
        for name in ("dense.onnx", "model.onnx"):
            found = _session(ran.out / name).get_inputs()[0].type
            if found != dtype:
                raise UnlikeError(f"{name} takes {found}")

    return check


def data_given(source: str, shape: tuple[int, ...], dtype: torch.dtype, low: float, high: float) -> Check:
    """Require the type of the samples, and values at or beyond two limits.

    Args:
        source: the data, as of the command.
        shape: a sample.
        dtype: the type of the network's input.
        low, high: the smallest value must be at most ``low``, and the largest at least ``high``.
    """

    def check(ran: Ran) -> None:
        with _inside(ran.folder):
            train, _ = load_data(source, shape, "none", 0, dtype)
            x = train.batch(range(12)).inputs[0]
        if x.dtype is not dtype:
            raise UnlikeError(f"the samples are {x.dtype}")
        if float(x.min()) > low or float(x.max()) < high:
            raise UnlikeError(f"the samples lie in {float(x.min()):.3g} – {float(x.max()):.3g}")

    return check


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work in a folder, whose modules may be imported."""
    before = Path.cwd()
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        sys.path.remove(str(folder))


def _session(model: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def _infer(model: Path, inputs: Sequence[Tensor]) -> list[np.ndarray[Any, Any]]:
    try:
        session = _session(model)
        feeds = {known.name: x.numpy() for known, x in zip(session.get_inputs(), inputs, strict=True)}
        return list(session.run(None, feeds))
    except Exception as error:  # noqa: BLE001  # onnxruntime has a class of its own for each failure
        shapes = ", ".join("x".join(map(str, x.shape)) for x in inputs)
        raise UnlikeError(f"{model.name} does not run at {shapes}: {str(error).splitlines()[0]}") from None


def _compare(
    ours: Sequence[np.ndarray[Any, Any]], theirs: Sequence[np.ndarray[Any, Any]], close: float, where: str
) -> None:
    _same_shapes(ours, theirs, where)
    for ours_one, wanted in zip(ours, theirs, strict=True):
        seen = np.isfinite(wanted)
        scale = float(np.abs(wanted[seen]).max(initial=0.0)) or 1.0
        worst = float(np.abs(ours_one[seen].astype(np.float64) - wanted[seen]).max(initial=0.0)) / scale
        if not worst <= close:
            raise UnlikeError(f"{where} differs by {worst:.1e} of the largest output")


def _same_shapes(ours: Sequence[np.ndarray[Any, Any]], theirs: Sequence[np.ndarray[Any, Any]], where: str) -> None:
    if [y.shape for y in ours] != [y.shape for y in theirs]:
        raise UnlikeError(f"{where} gives {[y.shape for y in ours]}, not {[y.shape for y in theirs]}")
    if any((~np.isfinite(y) & np.isfinite(wanted)).any() for y, wanted in zip(ours, theirs, strict=True)):
        raise UnlikeError(f"{where} gives NaN")


def _compile(arguments: str, share: str = "macs=0.6") -> str:
    return f"tdcompile compile {arguments} --budget {share}"


def _refused(name: str, arguments: str, expected: str, *says: str) -> Case:
    return Case(name, _compile(arguments), expected, ("error: ", *says), codes=(2,))


def _later(name: str, network: str, shape: str, data: str) -> Case:
    return Case(
        name,
        _compile(f"b_common.py:{network} --input {shape} --data b_common.py:{data}"),
        "refused in one sentence until it is supported",
        ("error: ",),
        codes=(2,),
        later=_TASKS,
    )


def _checkpoint(name: str, reference: str, *says: str, truth: str = "f-plain", source: str = "build") -> Case:
    """Compare the model of another checkpoint with the network that loads this one."""
    shape = "1x8:int64" if source == "build_tied" else "1x3x16x16"
    command = f"tdcompile validate out/{truth}/dense.onnx --against f_net.py:{source} --input {shape}"
    return Case(f"f-{name}", f"{command} --weights f/{reference}", "loads, and computes the same", says, needs=truth)


def _whole(name: str, reference: str, source: str, shape: str, *says: str) -> Case:
    command = _compile(f"f_net.py:{source} --weights f/{reference} --input {shape}")
    return Case(f"f-{name}", command, "loads and compiles", says)


def _no_checkpoint(name: str, reference: str, expected: str, *says: str) -> Case:
    return _refused(f"f-{name}", f"f_net.py:build --weights f/{reference} --input 1x3x16x16", expected, *says)


def _dict(module: nn.Module, inputs: Sequence[Tensor]) -> Any:
    return module({"image": inputs[0]})


def _keyword(module: nn.Module, inputs: Sequence[Tensor]) -> Any:
    return module(pixel_values=inputs[0])


_WRAPPERS = {"dp": "DataParallel", "tc": "torch.compile", "tcm": "compile()", "ema": "AveragedModel", "ddp": "DDP"}

_NETWORKS = (
    Case(
        "a38",
        _compile(
            "a38_sdpa_variants.py:build --input x=1x16x64 --input mask=1x16:bool --dynamic x:1=t --dynamic mask:1=t"
        ),
        "compiles; node names are unique after every rewrite",
        check=both(
            names_unique,
            agrees(
                "a38_sdpa_variants.py:build",
                (normal(3, 11, 64), whole(0, 1, 3, 11, dtype=torch.bool)),
                (normal(1, 23, 64), whole(0, 1, 1, 23, dtype=torch.bool)),
            ),
        ),
    ),
    Case(
        "a33",
        _compile("a33_uint8_input.py:build --input 1x32x32x3:uint8"),
        "the model takes bytes",
        check=both(
            input_type("tensor(uint8)"),
            agrees("a33_uint8_input.py:build", (whole(0, 256, 3, 32, 32, 3, dtype=torch.uint8),)),
        ),
    ),
    Case(
        "a33-data",
        _compile("a33_uint8_input.py:build_chw --input 1x3x24x24:uint8 --data imagefolder:d/images"),
        "bytes stay bytes where the input is integer (also the case c16)",
        check=both(
            input_type("tensor(uint8)"),
            data_given("imagefolder:d/images", (3, 24, 24), torch.uint8, 100, 200),
            agrees("a33_uint8_input.py:build_chw", (whole(0, 256, 2, 3, 24, 24, dtype=torch.uint8),)),
        ),
    ),
    Case(
        "a01",
        _compile("a01_yolo_cached_anchors.py:build --input 1x3x64x64 --dynamic x:2 --dynamic x:3"),
        "two axes stay two unless they are named alike",
        check=agrees("a01_yolo_cached_anchors.py:build", (normal(1, 3, 64, 96),), (normal(2, 3, 96, 48),)),
    ),
    Case(
        "a03",
        _compile("a03_zip_anchor_tensors.py:build --input 1x3x64x96 --dynamic x:2 --dynamic x:3"),
        "open in steps, verified at multiples",
        check=agrees("a03_zip_anchor_tensors.py:build", (normal(1, 3, 72, 104),), (normal(2, 3, 40, 64),)),
    ),
    Case(
        "a05",
        _compile("a05_sr_pixel.py:build --input 1x3x24x32 --dynamic lr:2 --dynamic lr:3", "macs=0.5"),
        "open in steps, verified at multiples",
        check=agrees("a05_sr_pixel.py:build", (normal(1, 3, 26, 38),), (normal(2, 3, 40, 22),)),
    ),
    Case(
        "a08",
        _compile("a08_gru_front.py:build --input 1x40x50 --dynamic feats:2=time", "macs=0.7"),
        "opens, or is refused before any pass with the reason (recurrent time)",
        codes=(0, 2),
        check=agrees("a08_gru_front.py:build", (normal(1, 40, 44),), (normal(3, 40, 97),)),
    ),
    Case(
        "a10",
        _compile("a10_vad_state.py:build --input chunk=1x512 --input state=2x1x64"),
        "the batch axis of the state is found",
        check=agrees("a10_vad_state.py:build", (normal(3, 512), normal(2, 3, 64))),
    ),
    Case(
        "a10-axis",
        _compile("a10_vad_state.py:build --input chunk=1x512 --input state=2x1x64 --batch-axis state=1"),
        "the batch axis of the state is taken as given",
        check=agrees("a10_vad_state.py:build", (normal(3, 512), normal(2, 3, 64))),
    ),
    Case(
        "h04",
        _compile(
            "h04_gnn.py:build --input x=9x24 --input edge_index=2x20:int64 --dynamic x:0=nodes "
            "--dynamic edge_index:1=edges --no-dynamic-batch",
            "macs=0.7",
        ),
        "axis 0 is a batch only where the network says so",
        check=agrees("h04_gnn.py:build", (normal(14, 24), whole(0, 14, 2, 33)), (normal(5, 24), whole(0, 5, 2, 6))),
    ),
    _refused(
        "a14",
        "a14_moe.py:build --input 1x16x48",
        "refused before any pass with the user's file and line",
        "a14_moe.py",
    ),
    Case(
        "a14-static",
        _compile("a14_moe.py:build_static --input 1x16x48", "macs=0.7"),
        "compiles and is right for inputs that route otherwise, or is refused before any pass",
        codes=(0, 2),
        check=agrees("a14_moe.py:build_static", (normal(1, 16, 48),), (normal(3, 16, 48),)),
    ),
    Case(
        "a14-dense",
        _compile("a14_moe.py:build_dense --input 1x16x48", "macs=0.7"),
        "compiles with every expert",
        check=agrees("a14_moe.py:build_dense", (normal(3, 16, 48),)),
    ),
    *(
        Case(
            f"a22-{name}",
            _compile(f"a22_wrapped.py:build_{name} --input 1x3x16x16"),
            f"{what} is unwrapped",
            check=agrees("a22_wrapped.py:build", (normal(3, 3, 16, 16),)),
        )
        for name, what in _WRAPPERS.items()
    ),
    Case(
        "a29",
        _compile("a29_half_mixed.py:build --input 1x3x32x32:float16"),
        "compiled in fp32 with a note",
        ("float32",),
    ),
    Case(
        "a29-autocast",
        _compile("a29_half_mixed.py:build_autocast --input 1x3x32x32"),
        "compiled in fp32 with a note",
        ("float32",),
    ),
    Case(
        "a30",
        _compile("a30_detr_list.py:build --input 2x3x32x40"),
        "compiles, or the true reason",
        check=agrees("a30_detr_list.py:build", (normal(1, 3, 32, 40),), (normal(3, 3, 32, 40),)),
    ),
    Case(
        "h01",
        _compile("h01_hooks.py:build --input 1x3x32x32"),
        "features that hooks read are those of this call",
        check=agrees("h01_hooks.py:build", (normal(3, 3, 32, 32),)),
    ),
    _refused(
        "h05",
        "h05_packed.py:build --input x=2x9x24 --input lengths=2:int64",
        "refused before any pass, with the line",
        "h05_packed.py",
    ),
    Case(
        "a35-star",
        _compile("a35_forward_signatures.py:build_star --input 1x3x16x16"),
        "forward(*inputs) compiles",
        check=agrees("a35_forward_signatures.py:build_star", (normal(3, 3, 16, 16),)),
    ),
    Case(
        "a35-keyword",
        _compile("a35_forward_signatures.py:build_kw --input pixel_values=1x3x16x16"),
        "a keyword-only input compiles",
        check=agrees("a35_forward_signatures.py:build_kw", (normal(3, 3, 16, 16),), call=_keyword),
    ),
    Case(
        "a35-nested",
        _compile("a35_forward_signatures.py:build_dict --input batch.image=1x3x16x16"),
        "nested names",
        check=agrees("a35_forward_signatures.py:build_dict", (normal(3, 3, 16, 16),), call=_dict),
    ),
    _refused(
        "a35-dict",
        "a35_forward_signatures.py:build_dict --input image=1x3x16x16",
        "refused with the form of nested names",
        "batch.",
    ),
    _refused(
        "a35-flag",
        "a35_forward_signatures.py:build_flag --input x=1x3x16x16",
        "refused: the missing argument is named",
        "mode",
    ),
    Case(
        "a40",
        _compile("a40_masked_row.py:build --input x=2x8x48 --input keep=2x8:bool"),
        "verification draws rows that are fully masked; told in the report",
        ("mask",),
    ),
)

_DATA = (
    Case(
        "c06",
        _compile("b_common.py:cls --input 1x3x24x24 --data b_common.py:collate_dataset_loader"),
        "the loader's collate_fn is applied",
        check=data_given("b_common.py:collate_dataset_loader", (3, 24, 24), torch.float32, -5, 5),
    ),
    Case(
        "c13",
        _compile("b_common.py:cls --input 1x3x24x24 --data parquet:d/pq_str"),
        "classes by sorted order, told",
        ("0 = a, 1 = b, 2 = c", "accuracy"),
    ),
    _later("b01", "seg", "1x3x24x24", "seg_data"),
    _later("b02", "reg", "1x20", "reg_data"),
    _later("b03", "lm", "1x12:int64", "lm_data"),
    _later("b04", "multi", "1x3x24x24", "multi_data"),
    _later("b05", "sr", "1x3x16x16", "sr_data"),
    _later("b06", "cls", "1x3x24x24", "multilabel_data"),
    _later("b07", "binary", "1x3x24x24", "binary_data"),
    _later("b08", "multi", "1x3x24x24", "multi_data_three"),
    _later("c04", "cls", "1x3x24x24", "dict_data"),
    _later("c05", "cls", "1x3x24x24", "stream_data"),
    Case(
        "c11",
        _compile("b_common.py:cls --input 1x3x24x24 --data imagefolder:d/flat"),
        "a flat folder calibrates without labels, told",
        ("has no class folders", "no labels"),
    ),
)

_CHECKPOINTS = (
    _whole("plain", "plain.pt", "build", "1x3x16x16"),
    _whole("averaged", "model_and_ema.pth#model_ema", "build", "1x3x16x16"),
    _whole("tied", "tied.safetensors", "build_tied", "1x8:int64"),
    _checkpoint("lightning", "lightning.ckpt"),
    _checkpoint("lightning-criterion", "lightning_criterion.ckpt"),
    _checkpoint("deep-prefix", "deep_prefix.ckpt"),
    _checkpoint("ema-only", "ema_only.pth", truth="f-averaged"),
    _checkpoint("ema-state-dict", "ema_state_dict.pt", truth="f-averaged"),
    _checkpoint("averaged-model", "averaged_model.pt"),
    _checkpoint("net-key", "net_key.pth"),
    _checkpoint("compiled", "compiled_nano.pt"),
    _checkpoint("compiled-ddp", "compile_ddp.pt"),
    _checkpoint("weights-key", "weights_key.pt"),
    _checkpoint("no-counters", "no_batches_tracked.pt"),
    _checkpoint("namespace", "namespace.pt"),
    _checkpoint("numpy-scalar", "numpy_scalar.pt"),
    _checkpoint("extra", "clean_extra.pt"),
    _checkpoint("sharded", "sharded"),
    _checkpoint("sharded-index", "sharded/model.safetensors.index.json"),
    _checkpoint("sharded-bin", "sharded_bin"),
    _checkpoint("chosen", "timm_ema.pth.tar#state_dict_ema", truth="f-averaged"),
    _checkpoint("tied-prefix", "tied_prefix.safetensors", truth="f-tied", source="build_tied"),
    *(
        _no_checkpoint(name, file, "two candidates: asks which", *(f"{file}#{key}" for key in keys))
        for name, file, keys in (
            ("two", "model_and_ema.pth", ("model", "model_ema")),
            ("two-timm", "timm_ema.pth.tar", ("state_dict", "state_dict_ema")),
            ("two-basicsr", "basicsr.pth", ("params", "params_ema")),
        )
    ),
    _no_checkpoint("module", "whole_module.pt", "refused: code of a file is never run"),
    _no_checkpoint("yolo", "yolo_like.pt", "refused: code of a file is never run"),
)

_CONSUMERS = (
    Case(
        "d01",
        _compile("f_net.py:build --input 1x3x16x16 --opset 17 --ir 8"),
        "--opset N and --ir N",
        check=both(header(opset=17, ir=8), agrees("f_net.py:build", (normal(3, 3, 16, 16),))),
    ),
    Case(
        "d02",
        _compile("f_net.py:build --input 1x3x16x16 --output-names scores --metadata version=3"),
        "--output-names and --metadata",
        check=both(outputs("scores"), header(version="3")),
    ),
    Case(
        "d06",
        _compile("b_common.py:multi --input 1x3x24x24"),
        "the keys of a dict are the names of the outputs",
        check=outputs("kind", "age"),
    ),
)

CASES = (*_NETWORKS, *_DATA, *_CHECKPOINTS, *_CONSUMERS)

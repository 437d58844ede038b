"""Time single layers in onnxruntime, many in one session, and cache the measurements."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import onnx
import onnxruntime as ort
import platformdirs
import torch
from onnx import TensorProto, helper, numpy_helper

from tdcompile.backend.environment import environment
from tdcompile.backend.onnx_nodes import layer_node, make_model, noise_weight
from tdcompile.backend.profile import profile_nodes
from tdcompile.backend.quantize import quantized_model
from tdcompile.backend.quantized_form import form_of
from tdcompile.backend.session import time_models
from tdcompile.ir.layer import Layer
from tdcompile.ir.target import Target
from tdcompile.support.processors import idle_processors
from tdcompile.support.progress import report_progress

LAYERS_PER_SESSION = 48  # layers that share the cost of opening one session
BYTES_PER_SESSION = 128 << 20  # weights and activations together
SECONDS_PER_SESSION = 0.5  # estimated time of a session above which it makes fewer runs
FEWEST_RUNS = 3
MACS_PER_SECOND = 5e10  # rough rate of one core; only the number of runs depends on it
_INDEX = re.compile(r"layer(\d+)(?!\d)")
# Names of nodes between floats and integers: inside a network a layer's neighbours are quantised too.
_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")
_UNDER_LOAD = "under load: "  # of a key in the cache file: the price of this layer is to be measured again
_ENOUGH_IDLE = 0.8  # of a session's processors: below it, other processes disturb the session


class Priced(NamedTuple):
    """Layers of one session and their seconds; ``quiet`` if other processes did not disturb the measurement."""

    layers: list[Layer]
    seconds: list[float]
    quiet: bool = True


def cache_folder() -> Path:
    """Return the folder of the measurements: ``TDCOMPILE_CACHE``, or the user's cache folder."""
    return Path(os.environ.get("TDCOMPILE_CACHE") or platformdirs.user_cache_dir("tdcompile"))


class CostCache:
    """Seconds by layer for one target, machine and version of onnxruntime, kept in a JSON file.

    Seconds that were measured beside other processes are marked, until a measurement on a quiet machine replaces them.
    The mark is an entry of its own, so that earlier versions read the file too.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._seconds = _read_cache(file)
        self._tried: set[str] = set()

    @classmethod
    def of(cls, target: Target) -> Self:
        """Return the cache for a target, one object for each process and folder."""
        return cls._opened(target, str(cache_folder()))

    @classmethod
    @cache
    def _opened(cls, target: Target, folder: str) -> Self:
        described = environment(target)
        device = described.get("gpu") or described["cpu"]
        key = f"{target.provider}|{device}|{target.threads}|{target.precision}|{target.batch}|{ort.__version__}"
        return cls(Path(folder) / f"layers-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json")

    def __contains__(self, layer: Layer) -> bool:
        return repr(layer) in self._seconds

    def __getitem__(self, layer: Layer) -> float:
        return self._seconds[repr(layer)]

    def under_load(self, layer: Layer) -> bool:
        """Return whether the seconds of a layer were measured beside other processes."""
        return _UNDER_LOAD + repr(layer) in self._seconds

    def doubtful(self, layers: Iterable[Layer]) -> list[Layer]:
        """Return the layers measured under load that this process has not tried to measure yet."""
        return [layer for layer in layers if self.under_load(layer) and repr(layer) not in self._tried]

    def add(self, measured: Priced) -> None:
        """Add measurements; those under load do not replace others."""
        for layer, seconds in zip(measured.layers, measured.seconds, strict=True):
            self._tried.add(repr(layer))
            if measured.quiet or layer not in self or self.under_load(layer):
                _set(self._seconds, repr(layer), seconds, quiet=measured.quiet)

    def save(self) -> None:
        """Write the file atomically, merged with what other processes have added."""
        merged = _read_cache(self._file)
        for key, seconds in self._seconds.items():
            quiet = _UNDER_LOAD + key not in self._seconds
            if not key.startswith(_UNDER_LOAD) and (quiet or key not in merged or _UNDER_LOAD + key in merged):
                _set(merged, key, seconds, quiet=quiet)
        self._seconds = merged
        self._file.parent.mkdir(parents=True, exist_ok=True)
        draft = self._file.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(merged))
        draft.replace(self._file)


def _set(entries: dict[str, float], key: str, seconds: float, *, quiet: bool) -> None:
    """Set the seconds of a layer, and set or delete their mark."""
    entries[key] = seconds
    if quiet:
        entries.pop(_UNDER_LOAD + key, None)
    else:
        entries[_UNDER_LOAD + key] = 1.0


def _read_cache(file: Path) -> dict[str, float]:
    try:
        return {str(key): float(value) for key, value in json.loads(file.read_text()).items()}
    except (OSError, ValueError, AttributeError, TypeError):  # no cache yet, or a damaged one: measure again
        return {}


def is_quiet(target: Target) -> bool:
    """Return whether other processes leave the processors idle that a session of the target uses."""
    return target.device != "cpu" or idle_processors() >= _ENOUGH_IDLE * target.threads


def measure_layers(layers: Sequence[Layer], target: Target, runs: int) -> Iterator[Priced]:
    """Yield layers and their seconds, a session at a time: the median of ``runs`` runs of ``target.batch`` samples.

    On a CPU the layers lie side by side in one model, and onnxruntime's profiler gives the time of each kernel. That
    leaves out the memory reordering that a layer alone would pay and a layer in a network does not. On CUDA the
    profiler sees kernel launches only, so that each layer is timed as its own model.
    """
    done = 0
    for batch in _batches(layers):
        if target.device == "cpu":
            measured = _profiled(batch, target, _runs(batch, target, runs))
        else:
            measured = Priced(batch, [_time_alone(layer, target) for layer in batch])
        done += len(batch)
        report_progress(done, len(layers), "layers measured")
        yield measured


def _runs(layers: Sequence[Layer], target: Target, most: int) -> int:
    """Return the number of runs, fewer for long kernels, whose times vary less."""
    seconds = sum(layer.macs for layer in layers) * target.batch / MACS_PER_SECOND
    return max(FEWEST_RUNS, min(most, round(SECONDS_PER_SESSION / max(seconds, 1e-9))))


def _profiled(layers: list[Layer], target: Target, runs: int) -> Priced:
    # the share of processor time that several threads can get is unknown: look whether processors are idle instead
    free = target.threads == 1 or is_quiet(target)
    model, inputs = _deployed_layers(layers, target), _inputs(layers, target)
    profile = profile_nodes(model, inputs, target, runs)
    seconds = [0.0] * len(layers)
    for name, value in profile.seconds.items():
        match = _INDEX.search(name)
        if match and not name.endswith(_CONVERSIONS):
            seconds[int(match[1])] += value
    return Priced(layers, seconds, free and profile.quiet)


def _time_alone(layer: Layer, target: Target) -> float:
    model = _deployed_layers([layer], target)
    return time_models([model], _inputs([layer], target), target, seconds=0.05)[0].median


def _batches(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """Yield layers by size, so that small ones share a session and a large one has its own."""
    batch: list[Layer] = []
    used = 0
    for layer in sorted(layers, key=_footprint):
        if batch and (len(batch) == LAYERS_PER_SESSION or used + _footprint(layer) > BYTES_PER_SESSION):
            yield batch
            batch, used = [], 0
        batch.append(layer)
        used += _footprint(layer)
    if batch:
        yield batch


def _footprint(layer: Layer) -> int:
    activations = layer.in_channels * math.prod(layer.extent) + layer.out_channels * math.prod(layer.out_extent)
    return 4 * (layer.params + activations)


def _input_shape(layer: Layer, batch: int) -> list[int]:
    inner = (*layer.extent, layer.in_channels) if layer.kind == "linear" else (layer.in_channels, *layer.extent)
    return [batch, *inner]


def _inputs(layers: Sequence[Layer], target: Target) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    kind = torch.float16 if target.precision == "fp16" else torch.float32
    return [torch.randn(_input_shape(layer, target.batch), generator=generator).to(kind) for layer in layers]


def _deployed_layers(layers: Sequence[Layer], target: Target) -> bytes:
    """Return the layers as a serialized model in the target's precision; int8 layers read and write int8."""
    proto = layers_model(layers, target)
    if target.precision == "int8":
        proto, _ = quantized_model(proto, None, form_of(target))
    made: bytes = proto.SerializeToString()
    return made


def layers_model(layers: Sequence[Layer], target: Target) -> onnx.ModelProto:
    """Return an ONNX model that computes the layers side by side, each on its own input behind a ReLU.

    Nodes and values of layer ``i`` are named ``layer<i>...``: onnxruntime names a convolution that it rewrites after
    its output value.
    """
    kind, number = (TensorProto.FLOAT16, np.float16) if target.precision == "fp16" else (TensorProto.FLOAT, np.float32)
    nodes, inputs, outputs, weights = [], [], [], []
    for i, layer in enumerate(layers):
        shape = _input_shape(layer, target.batch)
        inputs.append(helper.make_tensor_value_info(f"input{i}", kind, shape))
        nodes.append(helper.make_node("Relu", [f"input{i}"], [f"fresh{i}"], name=f"fresh{i}"))
        weights.append(numpy_helper.from_array(noise_weight(layer, f"weight{i}").astype(number), f"weight{i}"))
        weights.append(numpy_helper.from_array(np.zeros(layer.out_channels, number), f"bias{i}"))
        nodes += _nodes(layer, i)
        outputs.append(helper.make_tensor_value_info(f"layer{i}", kind, None))
    graph = helper.make_graph(nodes, "layers", inputs, outputs, weights)
    return make_model(graph)


def _nodes(layer: Layer, i: int) -> list[onnx.NodeProto]:
    name, source, weight, bias = f"layer{i}", f"fresh{i}", f"weight{i}", f"bias{i}"
    if layer.kind == "linear" and layer.extent:
        product = f"{name}_product"
        return [
            layer_node(layer, [source, weight], product, product),
            helper.make_node("Add", [product, bias], [name], name=name),
        ]
    return [layer_node(layer, [source, weight, bias], name, name)]

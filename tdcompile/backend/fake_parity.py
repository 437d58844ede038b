"""Check an int8 model against the fake-quantised PyTorch graph, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from tdcompile.backend.fake_quantization import FakeQuantize
from tdcompile.backend.output_spread import OutputSpread
from tdcompile.backend.quantize import described_value
from tdcompile.backend.session import infer, open_session
from tdcompile.data.nesting import tensors_in
from tdcompile.errors import ParityError
from tdcompile.ir.modules import evaluating, outputs_of, separate_attention
from tdcompile.ir.target import Target

Array = NDArray[Any]


@dataclass(frozen=True)
class FakeParity:
    """Agreement of an int8 model with the fake-quantised PyTorch graph.

    The first four compare each tensor from equal inputs: every layer gets what the int8 model computed before it.

    Attributes:
        steps: largest distance of an unrounded value from the int8 model's rounded one, in steps of its scale: half a
            step if both agree.
        grid: largest distance of a rounded value from a multiple of the int8 model's step, in steps.
        share: share of the rounded values that differ.
        outputs: largest difference of an output, relative to its largest value.
        difference: root mean square of the difference if both run on their own, relative to the outputs' spread. A
            value that is rounded to the other step changes what later layers round, so it grows with depth.
        tensors: number of rounded tensors compared.
    """

    steps: float
    grid: float
    share: float
    outputs: float
    difference: float
    tensors: int


# A value lies at most half a step from where it is rounded to, and sums in another order move it by about 1e-6 of 255
# steps. Values may lie exactly between two steps, as the means of two rounded values do: which one they are rounded to
# says nothing, so ``share`` has no bound.
_STEPS = 0.55
_GRID = 1e-2  # steps: less is float rounding; a scale that is wrong by 0.1 % is off by 0.25 at the end of its range
_OUTPUTS = 1e-3  # as between the float model and its graph (``parity.TOLERANCE``)


def check_fake_quantized(graph: fx.GraphModule, model: Path, inputs: Sequence[Tensor]) -> FakeParity:
    """Compare a fake-quantised graph with its int8 model in onnxruntime without optimisations.

    Args:
        graph: from ``fake_quantized``.
        model: the int8 model.
        inputs: samples in the graph's order.

    Raises:
        ParityError: a tensor or an output differs by more than rounding; the message names the worst tensor.
    """
    tensors = {part.tensor for part in graph.modules() if isinstance(part, FakeQuantize)}
    theirs, rounded = _run(model, inputs, tensors)
    forced = _Forced(graph, rounded)
    with evaluating(graph), torch.no_grad(), separate_attention():
        ours = [y.numpy() for y in tensors_in(forced.run(*(x.clone() for x in inputs)))]
    alone = [y.numpy() for y in outputs_of(graph, inputs)]
    found = FakeParity(
        steps=max((steps for _, steps in forced.seen.values()), default=0.0),
        grid=max((grid for grid, _ in forced.seen.values()), default=0.0),
        share=sum(forced.differing.values()) / max(sum(forced.counted.values()), 1),
        outputs=max((_largest(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0),
        difference=_spread_of(alone, theirs),
        tensors=len(forced.seen),
    )
    if not (found.steps <= _STEPS and found.grid <= _GRID and found.outputs <= _OUTPUTS):
        name = max(forced.seen, key=lambda name: forced.seen[name], default="")
        worst = f"that of {described_value(onnx.load(model), name)}" if name else "the output"
        raise ParityError(
            f"{model.name} is not the fake-quantised PyTorch graph: from equal inputs its rounded values lie up "
            f"to {found.steps:.3g} steps from the unrounded ones ({worst}; half a step is right) and {found.grid:.3g} "
            f"steps from its grid, {found.share:.2%} of them differ, and its outputs differ by {found.outputs:.3g} of "
            "their largest value"
        )
    return found


class _Forced(fx.Interpreter):
    """Run a graph, compare each rounded value with the int8 model's and go on with the latter."""

    def __init__(self, graph: fx.GraphModule, rounded: Mapping[str, Array]) -> None:
        super().__init__(graph)
        self._rounded = rounded
        self.seen: dict[str, tuple[float, float]] = {}
        self.differing: dict[str, int] = {}
        self.counted: dict[str, int] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Replace the value of a fake quantisation by the int8 model's."""
        value = super().call_module(target, args, kwargs)
        part = self.module.get_submodule(target)
        if not isinstance(part, FakeQuantize) or part.tensor not in self._rounded:
            return value
        theirs = torch.from_numpy(self._rounded[part.tensor]).reshape(value.shape)
        scale, zero = float(part.scale.detach()), int(part.zero)
        unrounded = (args[0].double() / scale).clamp(part.low - zero, part.high - zero)
        steps = (unrounded - theirs.double() / scale).abs()
        apart = (value.double() - theirs.double()) / scale
        differing = int((apart.abs() > _GRID).sum())
        grid = (apart - apart.round()).abs()
        own = (float(grid.max()), float(steps.max())) if steps.numel() else (0.0, 0.0)
        self.seen[part.tensor] = max(own, self.seen.get(part.tensor, (0.0, 0.0)))
        self.differing[part.tensor] = differing
        self.counted[part.tensor] = steps.numel()
        return theirs


def _run(model: Path, inputs: Sequence[Tensor], tensors: set[str]) -> tuple[list[Array], dict[str, Array]]:
    """Return the outputs of an int8 model, and its rounded values by the names of the float model."""
    proto = onnx.load(model)
    outputs = [value.name for value in proto.graph.output]
    quantised = {
        node.output[0]: node.input[0].removesuffix("_QuantizeLinear_Input")
        for node in proto.graph.node
        if node.op_type == "QuantizeLinear"
    }
    places = {
        quantised[node.input[0]]: node.output[0]
        for node in proto.graph.node
        if node.op_type == "DequantizeLinear" and quantised.get(node.input[0]) in tensors
    }
    further = [name for name in dict.fromkeys(places.values()) if name not in outputs]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in further)
    session = open_session(proto.SerializeToString(), Target(), optimised=False)
    values = dict(zip((*outputs, *further), infer(session, inputs), strict=True))
    return [values[name] for name in outputs], {name: values[place] for name, place in places.items()}


def _largest(ours: Array, theirs: Array) -> float:
    if not theirs.size or not np.issubdtype(theirs.dtype, np.floating):
        return 0.0
    scale = max(float(np.abs(theirs).max()), 1e-30)
    return float(np.abs(ours.astype(np.float64) - theirs).max()) / scale


def _spread_of(ours: Sequence[Array], theirs: Sequence[Array]) -> float:
    """Return the root mean square difference of outputs, relative to their spread over the samples."""
    apart, spread = 0.0, OutputSpread()
    for place, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if np.issubdtype(b.dtype, np.floating):
            apart += float(((a - b.astype(np.float64)) ** 2).sum())
            spread.add(place, b)
    return math.sqrt(apart) / spread.value

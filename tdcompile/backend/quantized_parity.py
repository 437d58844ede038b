"""Check an int8 model: onnxruntime's integer kernels against floats between the same roundings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from tdcompile.backend.output_spread import OutputSpread, values_of
from tdcompile.backend.session import infer, open_session
from tdcompile.errors import ParityError
from tdcompile.ir.target import Target

# Integer kernels may round a value that lies between two steps to the other one, in every layer. What this adds to the
# output has been below a third of the quantisation error on all networks of the tests; a wrong kernel, or saturation
# of 16-bit sums, adds many times that error.
_ALLOWED = 1.0
# Where the quantisation error exceeds the spread, the int8 model answers noise: one step more or less in an early layer
# grows to the whole error, and two independent errors of one size differ by √2 of it.
_ALLOWED_OF_NOISE, _NOISE = 1.5, 1.0
# Below this share of the output's spread, or of its magnitude, both errors are rounding of floats.
_FLOOR, _ROUNDING = 1e-4, 1e-6


@dataclass(frozen=True)
class QuantizedParity:
    """Agreement of an int8 model with and without onnxruntime's optimisations, over samples.

    Attributes:
        kernels: root mean square of the difference, relative to the float model's spread, over all outputs: what the
            integer kernels round differently. One sample, or constant outputs, have their magnitude for a spread.
        error: the quantisation error: the int8 model against the float model, relative to the same spread.
        max_abs: largest difference with and without optimisations.
        samples: number of samples.
    """

    kernels: float
    error: float
    max_abs: float
    samples: int


def check_quantized(
    model: Path, original: Path, batches: Iterable[Sequence[Tensor]], target: Target
) -> QuantizedParity:
    """Compare an int8 model with itself unoptimised, and with the float model that it was made from.

    Args:
        model: the int8 model, with QuantizeLinear and DequantizeLinear nodes.
        original: the float model.
        batches: inputs in the graph's order.
        target: provider to run on.

    Raises:
        ParityError: the integer kernels differ from the rounded floats by more than int8 differs from the float model.
    """
    fused, plain = (open_session(model, target, optimised=optimised) for optimised in (True, False))
    reference = open_session(original, target)
    kernels = error = worst = 0.0
    samples, spread = 0, OutputSpread()
    for inputs in batches:
        samples += len(inputs[0])
        triples = zip(*(infer(session, inputs) for session in (fused, plain, reference)), strict=True)
        for place, triple in enumerate(triples):
            a, b, c = (values_of(y) for y in triple)
            kernels += float(((a - b) ** 2).sum())
            error += float(((b - c) ** 2).sum())
            spread.add(place, c)
            worst = max(worst, float(np.abs(a - b).max(initial=0.0)))
    scale = spread.value
    found = QuantizedParity(math.sqrt(kernels) / scale, math.sqrt(error) / scale, worst, samples)
    allowed = _ALLOWED if found.error < _NOISE else _ALLOWED_OF_NOISE
    if not found.kernels <= max(allowed * found.error, _FLOOR, _ROUNDING * spread.magnitude / scale):
        raise ParityError(
            f"{model.name} computes something else in onnxruntime's integer kernels than its rounded floats do: they "
            f"differ by {found.kernels:.3g} of the output's spread, the quantisation error is {found.error:.3g}; "
            "`tdcompile doctor` tells what this processor does for int8"
        )
    return found

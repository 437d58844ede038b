"""Check an int8 model: onnxruntime's integer kernels against floats between the same roundings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tdcompile.backend.session import infer, open_session
from tdcompile.errors import ParityError
from tdcompile.ir.target import Target

# Integer kernels may round a value that lies between two steps to the other one, in every layer. What this adds to the
# output has been below a third of the quantisation error on all networks of the tests; a wrong kernel, or saturation
# of 16-bit sums, adds many times that error.
_ALLOWED = 1.0
_FLOOR = 1e-4  # of the output's spread: below it both errors are rounding of floats


@dataclass(frozen=True)
class QuantizedParity:
    """Agreement of an int8 model with and without onnxruntime's optimisations, over samples.

    Attributes:
        kernels: root mean square of the difference, relative to the float model's spread, over all outputs: what the
            integer kernels round differently.
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
    kernels = error = spread = worst = 0.0
    samples = 0
    for inputs in batches:
        samples += len(inputs[0])
        triples = zip(*(infer(session, inputs) for session in (fused, plain, reference)), strict=True)
        for ours, rounded, floats in triples:
            a, b, c = (_values(y) for y in (ours, rounded, floats))
            kernels += float(((a - b) ** 2).sum())
            error += float(((b - c) ** 2).sum())
            spread += float(((c - c.mean(0)) ** 2).sum())
            worst = max(worst, float(np.abs(a - b).max(initial=0.0)))
    scale = math.sqrt(max(spread, 1e-30))
    found = QuantizedParity(math.sqrt(kernels) / scale, math.sqrt(error) / scale, worst, samples)
    if not found.kernels <= max(_ALLOWED * found.error, _FLOOR):
        raise ParityError(
            f"{model.name} computes something else in onnxruntime's integer kernels than its rounded floats do: they "
            f"differ by {found.kernels:.3g} of the output's spread, the quantisation error is {found.error:.3g}; "
            "`tdcompile doctor` tells what this processor does for int8"
        )
    return found


def _values(output: NDArray[np.generic]) -> NDArray[np.float64]:
    return (
        output.reshape(len(output), -1).astype(np.float64) if output.ndim else output.reshape(1, 1).astype(np.float64)
    )

"""Convert an exported fp32 model to the precision that it is deployed in."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import Tensor

from tdcompile.backend.bias_correction import Means, correct_biases, input_means
from tdcompile.backend.evaluation import filled_batches
from tdcompile.backend.quantize import Quantized, Ranges, activation_ranges, save_model, write_quantized
from tdcompile.backend.quantized_form import form_of
from tdcompile.data.task import FEW
from tdcompile.ir.memory import samples_within
from tdcompile.ir.program import Program
from tdcompile.ir.target import Precision
from tdcompile.support.quiet import captured_output

# Most samples that give the ranges: least and largest values change little with more, and each sample costs a run of a
# model that returns all its values.
RANGE_SAMPLES = 256
# Most samples that give the means of layers' inputs: each has many places, and a mean needs few.
MEAN_SAMPLES = 64
_BATCH = 32


@dataclass(frozen=True)
class Activations:
    """What samples tell about a model's activations.

    Attributes:
        ranges: see ``activation_ranges``.
        means: see ``input_means``; biases are corrected by them. Empty leaves biases as they are, for a network that
            was trained with its rounded weights.
    """

    ranges: Ranges
    means: Means = field(default_factory=dict)


@contextlib.contextmanager
def deployed(program: Program, model: Path, precision: Precision) -> Iterator[Path]:
    """Write a model in a precision to a file that exists within the context, good enough to measure its latency.

    Args:
        program: gives the target and the layers that stay float.
        model: exported in fp32.
        precision: of the file; fp32 gives ``model`` itself.
    """
    if precision == "fp32":
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="tdcompile-") as folder:
        path = Path(folder) / model.name
        write_deployed(program, model, path, precision)
        yield path


def sample_activations(program: Program, model: Path) -> Activations:
    """Return the ranges of a model's activations and the means of its layers' inputs, over training samples.

    Raises:
        InputError: an activation is not finite.
    """
    train = program.task.train
    assert train is not None  # ``calibrated`` has checked it
    most = min(program.task.calibrate, RANGE_SAMPLES)

    def batches(limit: int) -> Iterator[list[NDArray[Any]]]:
        for batch, _ in filled_batches(train, program, samples_within(program, _BATCH), limit):
            yield [x.numpy() for x in batch.inputs]

    ranges = activation_ranges(model, batches(most))
    return Activations(ranges, input_means(model, batches(min(most, MEAN_SAMPLES))))


def held_out_batches(program: Program, count: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield inputs of training samples that did not give the ranges; of all training samples if those are too few.

    The batches are so small that all values of a network can be kept.
    """
    train = program.task.train
    assert train is not None  # ``calibrated`` has checked it
    used = min(program.task.calibrate, RANGE_SAMPLES)
    left = range(used, min(used + count, len(train)))
    samples = train.subset(left) if len(left) >= FEW else train
    for batch, _ in filled_batches(samples, program, samples_within(program, FEW, kept=True), min(count, len(samples))):
        yield batch.inputs


def write_deployed(
    program: Program,
    model: Path,
    path: Path,
    precision: Precision,
    activations: Activations | None = None,
    keep: Collection[str] = (),
) -> Quantized | None:
    """Write a model in fp16 or int8; see ``write_quantized`` for what int8 returns.

    Args:
        program: gives the target and the layers that stay float.
        model: exported in fp32.
        path: the file to write.
        precision: of the file.
        activations: over samples, for int8; None is enough to measure latency.
        keep: more layers that stay float.

    Raises:
        InputError: the model cannot be quantised.
    """
    if precision == "int8":
        ranges, floats = None if activations is None else activations.ranges, {*program.keep_fp32, *keep}
        made = write_quantized(model, path, ranges, form_of(program.target), keep=floats)
        if activations is not None and activations.means:
            correct_biases(path, model, activations.means)
        return made
    with captured_output():
        half = convert_float_to_float16(onnx.load(model), keep_io_types=True)
    save_model(half, path)
    return None

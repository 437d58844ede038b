"""Convert an exported fp32 model to the precision that it is deployed in."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import Tensor

from tdcompile.backend.evaluation import filled_batches
from tdcompile.backend.quantize import Quantized, Ranges, activation_ranges, save_model, write_quantized
from tdcompile.backend.quantized_form import form_of
from tdcompile.data.task import FEW
from tdcompile.ir.program import Program
from tdcompile.ir.target import Precision
from tdcompile.support.quiet import captured_output

# Most samples that give the ranges: least and largest values change little with more, and each sample costs a run of a
# model that returns all its values.
RANGE_SAMPLES = 256
_BATCH = 32


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


def sample_ranges(program: Program, model: Path) -> Ranges:
    """Return the ranges of a model's activations over training samples.

    Raises:
        InputError: an activation is not finite.
    """
    train = program.task.train
    assert train is not None  # ``calibrated`` has checked it
    limit = min(program.task.calibrate, RANGE_SAMPLES)
    batches = filled_batches(train, program, _BATCH, limit)
    return activation_ranges(model, ([x.numpy() for x in batch.inputs] for batch, _ in batches))


def held_out_batches(program: Program, count: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield inputs of training samples that did not give the ranges; of all training samples if those are too few."""
    train = program.task.train
    assert train is not None  # ``calibrated`` has checked it
    used = min(program.task.calibrate, RANGE_SAMPLES)
    left = range(used, min(used + count, len(train)))
    samples = train.subset(left) if len(left) >= FEW else train
    for batch, _ in filled_batches(samples, program, FEW, min(count, len(samples))):
        yield batch.inputs


def write_deployed(
    program: Program,
    model: Path,
    path: Path,
    precision: Precision,
    ranges: Ranges | None = None,
    keep: Collection[str] = (),
) -> Quantized | None:
    """Write a model in fp16 or int8; see ``write_quantized`` for the ranges, and for what int8 returns.

    Args:
        program: gives the target and the layers that stay float.
        model: exported in fp32.
        path: the file to write.
        precision: of the file.
        ranges: of the activations, for int8.
        keep: more layers that stay float.

    Raises:
        InputError: the model cannot be quantised.
    """
    if precision == "int8":
        return write_quantized(model, path, ranges, form_of(program.target), keep={*program.keep_fp32, *keep})
    with captured_output():
        made = convert_float_to_float16(onnx.load(model), keep_io_types=True)
    save_model(made, path)
    return None

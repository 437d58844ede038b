"""Find the values that int8 rounds worst, and let single layers go back to float where that pays."""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization.qdq_loss_debug import (
    collect_activations,
    compute_activation_error,
    create_activation_matching,
    modify_model_output_intermediate_tensors,
)
from torch import Tensor

from tdcompile.backend.quantize import Quantized, float_inputs, module_of
from tdcompile.support.quiet import captured_output

Values = Sequence[NDArray[Any]] | NDArray[Any]
NOISE_SAMPLES = 32  # they and all values between layers are in memory, a batch at a time
WORST = 5  # values that the report names
TRIALS = 3  # each costs a model to write, to run and to time
# A layer goes back to float if that takes at least this share off the model's quantisation error. In the dense
# ResNet-20 each of the 20 layers alone changes it by -7 to +8 %, of either sign on 64 samples and on 64 others:
# nothing is gained. The latency changes by -8 to +17 % (median +2 %; 2 cores with AVX-512 VNNI). The limit is twice
# that noise. A chain with an outlier inside takes off far more (tests/backend/test_sensitive_layers.py).
WORTHWHILE = 0.15
# A layer that makes the model slower by more than this share, more than most layers cost there, does so only within a
# latency budget, and only if it takes off ``RESCUED`` of the error: an outlier. With WORTHWHILE alone CREPE and ESPCN
# spent a budget of half on layers in float: 1.2 times as slow as in int8, and not better in pitch or PSNR.
SLOWER, RESCUED = 0.05, 0.5
# Its file may become larger by this share: a small first or last layer may go back, half of the network may not. The
# second share holds if the goal is the smallest model.
LARGER, LARGER_OF_SMALLEST = 0.25, 0.02


@dataclass(frozen=True)
class TensorNoise:
    """One quantised value of an int8 model against the fp32 model.

    Attributes:
        name: the module that computes the value, or the name of a model's input.
        tensor: the name of the value in the ONNX model.
        snr: signal over noise in dB of all roundings up to here (``xmodel_err`` of onnxruntime).
        own: the same of this value's rounding alone (``qdq_err``).
    """

    name: str
    tensor: str
    snr: float
    own: float


def tensor_noise(model: Path, original: Path, batches: Iterable[Sequence[Tensor]]) -> list[TensorNoise]:
    """Return every quantised activation, the one of most accumulated noise first.

    Args:
        model: the int8 model.
        original: the fp32 model that it was made from.
        batches: inputs in the graph's order; powers are averaged over the batches.
    """
    proto = onnx.load(original)
    inputs, makers = float_inputs(proto), {name: node for node in proto.graph.node for name in node.output}
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="tdcompile-") as folder, captured_output():
        augmented = [Path(folder) / f"{role}.onnx" for role in ("int8", "float")]
        for source, path in zip((model, original), augmented, strict=True):
            modify_model_output_intermediate_tensors(source, path)
        for batch in batches:
            given = [dict(zip(inputs, (x.numpy() for x in batch), strict=True))]
            ours, theirs = (collect_activations(str(path), given) for path in augmented)
            matching = create_activation_matching(ours, theirs)
            known = {name: _unclipped(match) for name, match in matching.items() if "float" in match}
            for name, errors in compute_activation_error(known, _noise_share).items():
                found[name].append(errors)
    noises = []
    for name, errors in found.items():
        snr, own = (_decibels(float(np.mean([each[key] for each in errors]))) for key in ("xmodel_err", "qdq_err"))
        noises.append(TensorNoise(module_of(makers[name]) if name in makers else name, name, snr, own))
    return sorted(noises, key=lambda noise: (noise.snr, noise.tensor))


def _unclipped(match: dict[str, Sequence[NDArray[Any]]]) -> dict[str, Sequence[NDArray[Any]]]:
    """Return the values before and after rounding without what the range cuts off: the zero point replaces ReLU."""
    after = match["post_qdq"]
    before = [np.clip(x, y.min(), y.max()) if y.size else x for x, y in zip(match["pre_qdq"], after, strict=True)]
    return {**match, "pre_qdq": before}


def _noise_share(signal: Values, rounded: Values) -> float:
    """Return the power of the difference over the power of the signal."""
    noise = power = 0.0
    for before, after in zip(signal, rounded, strict=True):
        noise += _energy(before - after)
        power += _energy(before)
    return noise / max(power, 1e-30)


def _energy(x: NDArray[Any]) -> float:
    """Return the sum of squares; single values may be float32, whose square overflows above 1e19."""
    flat = np.ravel(x)
    largest = float(np.abs(flat).max(initial=0.0))
    if largest == 0.0:
        return 0.0
    scaled = flat / flat.dtype.type(largest)
    return float(np.dot(scaled, scaled)) * largest**2


def _decibels(share: float) -> float:
    """Return the signal-to-noise ratio in dB, at most 150.

    >>> _decibels(0.01)
    20.0
    """
    return -10 * math.log10(max(share, 1e-15))


def suspects(noises: Iterable[TensorNoise], original: Path, layers: Collection[str]) -> list[str]:
    """Return the layers by the noise of the values that they read, compute and hold, most first.

    Args:
        noises: see ``tensor_noise``.
        original: the fp32 model.
        layers: names of layers; the factors of a layer are modules in it.
    """
    shares = {noise.tensor: 10 ** (-noise.own / 10) for noise in noises}
    scores: dict[str, float] = defaultdict(float)
    for node in onnx.load(original, load_external_data=False).graph.node:
        module = module_of(node)
        layer = next((name for name in layers if module == name or module.startswith(f"{name}.")), None)
        if layer is not None:
            scores[layer] += sum(shares.get(name, 0.0) for name in {*node.input, *node.output})
    return sorted((name for name in scores if scores[name] > 0), key=lambda name: (-scores[name], name))


@dataclass(frozen=True)
class Trial:
    """An int8 model on trial.

    Attributes:
        error: its quantisation error.
        allowed: its latency and size are within their limits.
        slower: share by which it is slower than the model with all layers in int8.
    """

    error: float
    allowed: bool
    slower: float = 0.0


def back_to_float(
    first: Quantized,
    order: Sequence[str],
    write: Callable[[frozenset[str]], Quantized],
    judge: Callable[[Quantized], Trial],
) -> tuple[Quantized, Mapping[str, str]]:
    """Try layers in float one after the other, and keep each that lowers the error enough for what it costs.

    Args:
        first: the model with all layers in int8.
        order: the layers to try; the first ``TRIALS`` are tried.
        write: writes a model with these layers in float, each to a file of its own.
        judge: measures a model.

    Returns:
        the model to keep, and the layers that are float in it with the reason.
    """
    kept, reasons = first, dict[str, str]()
    for layer in order[:TRIALS]:
        before, made = judge(kept), write(frozenset({*reasons, layer}))
        trial = judge(made)
        needed = WORTHWHILE if trial.slower <= before.slower + SLOWER else RESCUED
        if not trial.allowed or trial.error > (1 - needed) * before.error:
            continue
        reasons[layer] = (
            f"in int8 it makes the quantisation error {before.error:.2g} instead of {trial.error:.2g}, and the model "
            "is fast and small enough without"
        )
        kept = made
    return kept, reasons

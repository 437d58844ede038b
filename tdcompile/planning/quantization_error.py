"""Closed-form estimates of what int8 adds to the error of a layer's output."""

from __future__ import annotations

import math

from torch import Tensor

from tdcompile.numerics.covariance import Covariance

_LEVELS = 255  # steps of an 8-bit activation range
_WEIGHT_LEVELS = 127  # steps between 0 and the largest weight of a row
_SPREAD = 6.0  # range of an activation in standard deviations, MinMax over many samples of a Gaussian
# Relative noise power of a value between two factors at the square-root split, at most ``k² / (3 · 255²)`` with k = 6.
_INNER = _SPREAD**2 / (3 * _LEVELS**2)


def quantization_error(weight: Tensor, covariance: Covariance, parts: int = 1) -> float:
    """Return the relative error of a layer's output that int8 adds, for a chain of ``parts`` layers.

    A quantiser of step D adds noise of power D² / 12 to each value. The input's range is taken as six times its largest
    root mean square, and each row of the weight has its own scale. The noises are independent, so powers add; each
    value between two parts adds noise of its own, and each part the rounding of its weights.

    Args:
        weight: ``(T, C / groups, *kernel)``.
        covariance: of the layer's input.
        parts: number of layers in the chain; 1 for the layer itself.
    """
    flat = weight.detach().flatten(1).double()
    signal = covariance.energy(flat)
    if not signal > 0:
        return 0.0
    power = covariance.diagonal().double().to(flat.device)
    largest = float(power.max().clamp(min=0).sqrt())
    step = _SPREAD * largest / _LEVELS
    # of the groups' inputs each output sees one group's
    rounding = flat.abs().amax(1) / _WEIGHT_LEVELS
    seen = float(power.sum()) / covariance.groups
    activations = step**2 / 12 * float((flat**2).sum())
    weights = float((rounding**2).sum()) / 12 * seen
    return math.sqrt((activations + parts * weights) / signal + (parts - 1) * _INNER)


def combined(approximation: float, quantization: float) -> float:
    """Return the relative error of both together: they are independent, so their powers add.

    >>> combined(0.3, 0.4)
    0.5
    """
    return math.hypot(approximation, quantization) if math.isfinite(approximation) else approximation

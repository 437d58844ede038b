"""Facts about the network as it runs: moments of every layer's input, and the dense model measured whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from tdcompile.errors import InputError
from tdcompile.ir.facts import Aspect, Fact
from tdcompile.numerics.covariance import Sketch


@dataclass(frozen=True)
class Calibration(Fact):
    """Second moments of the inputs of layers, by layer name.

    Attributes:
        moments: empty without calibration data.
        skipped: layers without moments although there is data, and why.
        samples: how many training samples were read.
    """

    reads: ClassVar[frozenset[Aspect]] = frozenset(Aspect)
    moments: Mapping[str, Moments]
    skipped: Mapping[str, str]
    samples: int


@dataclass(frozen=True)
class Baseline(Fact):
    """The dense network as an ONNX model, batch norm folded, and its measured latency.

    Attributes:
        model: the file.
        seconds: median of one run of ``target.batch`` samples.
        dynamic_batch: whether its batch dimension is open.
        notes: what did not go the usual way when it was exported.
    """

    model: Path
    seconds: float
    dynamic_batch: bool = True
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Round:
    """One round of the in-graph check: what was predicted, what was measured, which layers were put back."""

    predicted: float
    measured: float
    dense: float
    put_back: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rehearsal(Fact):
    """The rounds of the in-graph check of a plan, before any factor is computed."""

    rounds: tuple[Round, ...]


# Rows of the largest moment that is written out from its sketch: 2 GB in float64.
ENTIRE = 2**14


@dataclass(frozen=True)
class Moments:
    """Second moment of a layer's input over calibration data.

    Attributes:
        metric: E[x xᵀ], float64, ``(C·K, C·K)`` with K the number of kernel taps; x is an im2col patch in the
            order of ``weight.reshape(T, C·K)``. Of a wide layer a sketch, by which a matrix is multiplied from the
            right like by a tensor. Of a layer in G groups one for each, ``(G, C·K / G, C·K / G)``.
        samples: how many patches it was averaged over.
    """

    metric: torch.Tensor | Sketch
    samples: int

    @property
    def second(self) -> torch.Tensor:
        """E[x xᵀ] for what needs its entries; what a sketch stands for is written out anew at each call.

        Raises:
            InputError: it is a sketch of more than ``ENTIRE`` inputs.
        """
        if not isinstance(self.metric, Sketch):
            return self.metric
        if len(self.metric) > ENTIRE:
            raise InputError(
                f"the second moment of {len(self.metric)} inputs is a sketch, too large to be written out: the form is "
                "to multiply by 'metric', or the layer to be left alone with --keep-dense"
            )
        return self.metric.dense()

    @property
    def groups(self) -> int:
        """Of the layer: how many matrices there are."""
        return 1 if isinstance(self.metric, Sketch) or self.metric.dim() == 2 else len(self.metric)

    def of_group(self, place: int) -> Moments:
        """Those of one group's input, of a layer in groups."""
        return Moments(self.second[place], self.samples)

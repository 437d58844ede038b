"""``synthesize``: make training samples from the statistics that batch norm keeps, where there are no real ones."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from tdcompile.core.passes import AnalysisPass
from tdcompile.errors import InputError, UnwrittenError
from tdcompile.ir.facts import Fact
from tdcompile.ir.measurements import SyntheticSamples
from tdcompile.ir.modules import evaluating, trained_norms
from tdcompile.ir.program import Program, sites
from tdcompile.passes.analyze._matched_statistics import Drawing, Statistics, best_scale, draw_matched
from tdcompile.planning.synthetic_data import refusal
from tdcompile.support.options import Count, Positive, PositiveOrInf
from tdcompile.support.progress import report_progress

_IMAGE = 16  # values along an axis from which samples are smooth and shifted: fewer are no image
_FEWEST, _SHORTEST = 16, 50  # samples and steps that a large network still gets
_SCALED = 8  # samples that show the scale of the input
_MEMORY = 2**31  # bytes of the values between layers in one group of samples
_KEPT = 3  # values kept for the gradient for each output of a layer: the layer's, batch norm's, the nonlinearity's
_BACKWARD = 3  # a step with its gradient costs three forward passes


@dataclass(frozen=True)
class Synthesize(AnalysisPass):
    """Make samples whose statistics at the batch-norm layers are those from training; no data is read.

    Noise is optimised by Adam until the mean and deviation of each channel, over all samples of a group, are those that
    batch norm keeps. ``compile`` runs this pass first for the data ``synthetic``, whose options are those of this pass:
    ``--data "synthetic{images=128}"``.

    Attributes:
        images: number of samples; a large network gets fewer, at least 16.
        steps: steps of Adam; a large network gets fewer, at least 50.
        rate: learning rate, in units of the first noise; it falls to 0 by a cosine.
        shift: largest shift of an image in a step.
        work: most multiply-accumulates, about 10 minutes of a processor core; ``inf`` for no limit.
    """

    name: ClassVar[str] = "synthesize"
    gives: ClassVar[tuple[type[Fact], ...]] = (SyntheticSamples,)
    images: Annotated[int, Field(ge=2)] = 64
    steps: Count = 150
    rate: Positive = 0.2
    shift: Annotated[int, Field(ge=0)] = 4
    work: PositiveOrInf = 1e13

    def analyze(self, program: Program) -> SyntheticSamples:
        """Return the samples and how well their statistics match.

        Raises:
            InputError: the network has no trained batch norm, or another input than one of floating point.
            UnwrittenError: the samples cannot be written.
        """
        if why := refusal(program):
            raise InputError(f"data=synthetic: {why}")
        graph, norms = program.dense, trained_norms(program.dense)
        sizes, steps = self._groups(program)
        drawing, generator = self._drawing(program, steps), program.generator(self.name)
        done, of = 0, len(sizes) * steps

        def told() -> None:
            nonlocal done
            done += 1
            report_progress(done, of, "steps")

        with evaluating(graph):
            few = sizes[0] if not program.dynamic_batch else min(sizes[0], _SCALED)
            scale = best_scale(graph, norms, drawing, few, program.generator(f"{self.name}/scale"))
            drawing = replace(drawing, scale=scale)
            groups = [draw_matched(graph, norms, drawing, size, generator, told) for size in sizes]
            shift, spread = _match(graph, Statistics(norms), groups)
        # Without a workspace the temporary folder stays: the fact that names the file outlives the pass.
        folder = program.workspace or Path(tempfile.mkdtemp(prefix="tdcompile-"))
        file = folder / "synthetic.safetensors"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({"x": torch.cat(groups)}, file)
        except OSError as error:
            raise UnwrittenError(f"the synthetic samples cannot be written to {file}: {error}") from error
        return SyntheticSamples(file, sum(sizes), len(norms), shift, spread)

    def _groups(self, program: Program) -> tuple[list[int], int]:
        """Return the number of samples in each group that is optimised together, and the number of steps."""
        calls = [call for site in sites(program).values() for call in site.calls]
        macs = max(1, sum(call.macs for call in calls))
        count, steps = self.images, self.steps
        if math.isfinite(self.work):
            passes = self.work / (_BACKWARD * macs)
            count = min(count, max(_FEWEST, int(passes / steps)))
            steps = min(steps, max(_SHORTEST, int(passes / count)))
        if not program.dynamic_batch:
            size = len(program.inputs[0])
            return [size] * math.ceil(count / size), steps
        values = 4 * _KEPT * sum(call.out_channels * math.prod(call.out_extent) for call in calls)
        parts = math.ceil(count / max(2, _MEMORY // max(1, values)))
        return [len(part) for part in torch.arange(count).tensor_split(min(parts, count // 2))], steps

    def _drawing(self, program: Program, steps: int) -> Drawing:
        shape = tuple(program.inputs[0].shape[1:])
        layers = [site.layer for site in sites(program).values()]
        seen = any(layer.kind != "linear" and (layer.in_channels, *layer.extent) == shape for layer in layers)
        axes = tuple(axis for axis, size in enumerate(shape[1:], start=2) if seen and size >= _IMAGE)
        mirrored = len(axes) == 2 and shape[0] == 3
        return Drawing(shape, axes, self.shift, mirrored, steps, self.rate, program.inputs[0].dtype)


@torch.no_grad()
def _match(graph: nn.Module, statistics: Statistics, groups: list[Tensor]) -> tuple[float, float]:
    """Return the medians over all channels of how far mean and deviation are off, over all samples."""
    with statistics.watching():
        for group in groups:
            graph(group.clone())
    found = statistics.take()
    shifts, spreads = (torch.cat(values).abs().tolist() for values in list(zip(*found, strict=True))[:2])
    return median(shifts), median(spreads)

"""``fisher``: the sensitivity of the loss to each layer's output, by the empirical Fisher information."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from tdcompile.core.importance import Importance, normalised
from tdcompile.errors import InputError
from tdcompile.ir.program import Program, Site, sites
from tdcompile.passes.importance._gradients import GradientMeter, backward_passes
from tdcompile.support.options import Count
from tdcompile.support.progress import report_progress


@dataclass(frozen=True)
class Fisher(Importance):
    """Fisher information of each layer's output times the output's energy, so that score · error² estimates the loss.

    To second order an error δy of an output costs ½ E[(g·δy)²], where g is the gradient of the loss at the output. For
    δy without a preferred direction in D dimensions this is ½ E‖g‖² E‖δy‖² / D. E‖δy‖² is error² · E‖y‖², y without its
    bias. The score is E‖g‖² E‖y‖² / D, mean 1 over the layers. The loss is cross-entropy on the labels, or without
    labels on classes drawn from the network's predictions. The outputs of a module called twice count as one output.

    Attributes:
        samples: number of training samples to read; by default as many as calibration reads.
        batch: samples in one pass; it changes the memory use, not the score.
    """

    name: ClassVar[str] = "fisher"
    samples: Count | None = None
    batch: Count = 16

    def score(self, program: Program) -> Mapping[str, float]:
        """See ``Importance.score``.

        Raises:
            InputError: there are no training samples, or the network returns no class scores, or NaN or Inf.
        """
        train = program.task.train
        if train is None or len(train) == 0:
            raise InputError(
                "the importance 'fisher' needs training samples: give data, or take 'relative-error' or 'none'"
            )
        count = min(len(train), self.samples or program.task.calibrate)
        generator = program.generator(self.name)
        meters = {name: _Meter(site) for name, site in sites(program).items()}
        # Shuffled, because data may be sorted by class.
        batches = train.shuffled(generator).batches(self.batch, limit=count)
        done = 0
        for samples in backward_passes(program, [*meters.values()], batches, generator, self.name):
            done += samples
            report_progress(done, count)
        return normalised({name: meter.score(done) for name, meter in meters.items()})


class _Meter(GradientMeter):
    """Sums ‖g‖² and ‖y‖² of one layer."""

    def __init__(self, site: Site) -> None:
        super().__init__(site.module)
        self.gradient, self.energy, self.elements = 0.0, 0.0, 0

    def observe(self, input: Tensor, output: Tensor) -> Callable[[Tensor], None]:
        """Add ‖y‖²; the returned function adds ‖g‖²."""
        y = output.detach() - _bias(self.module, output)
        self.energy += float(y.double().square().sum())
        self.elements += y.numel()
        return self._add

    def _add(self, gradient: Tensor) -> None:
        self.gradient += float(gradient.double().square().sum())

    def score(self, samples: int) -> float:
        """Return E‖g‖² E‖y‖² / D."""
        if not self.elements:
            return 0.0
        return (self.gradient / samples) * (self.energy / samples) / (self.elements / samples)


def _bias(module: nn.Module, output: Tensor) -> Tensor:
    """Return the bias in the shape of the layer's output, or zero if the layer has none."""
    bias = module.bias
    if not isinstance(bias, Tensor):
        return output.new_zeros(())
    axes = (1,) * (0 if isinstance(module, nn.Linear) else output.dim() - 2)
    return bias.detach().reshape(-1, *axes)

"""``noise``: the change of the network's output if the output of one layer is disturbed, for each layer in turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from tdcompile.core.importance import Importance, normalised
from tdcompile.ir.program import Program, sites
from tdcompile.passes.importance._divergence import answers, divergence, drawn
from tdcompile.support.options import Positive
from tdcompile.support.progress import report_progress


@dataclass(frozen=True)
class Noise(Importance):
    """KL of the dense outputs from the outputs with one layer disturbed, for each unit of squared relative error.

    The disturbance is the deviation of the layer's output from its mean, taken from another sample and position of the
    batch and scaled. This noise has the covariance of the output, like the error of a factorisation, and needs no
    factorisation (this project's method). It needs no labels. Outputs other than class scores count by their squares.

    Attributes:
        error: relative size of the disturbance.
        samples: number of training samples, read once for each layer.
    """

    name: ClassVar[str] = "noise"
    error: Positive = 0.2
    samples: Annotated[int, Field(ge=2)] = 256

    @torch.no_grad()
    def score(self, program: Program) -> Mapping[str, float]:
        """See ``Importance.score``."""
        batches = drawn(program, self.samples, self.name, "the importance 'noise'")
        wanted, found = answers(program.graph, batches), sites(program)
        scores = {}
        for done, (name, site) in enumerate(found.items(), start=1):
            disturb = _Disturb(self.error, program.generator(f"noise/{name}"))
            hook = site.module.register_forward_hook(disturb)
            try:
                scores[name] = divergence(wanted, answers(program.graph, batches)) / disturb.squared
            finally:
                hook.remove()
            report_progress(done, len(found), name)
        return normalised(scores)


class _Disturb:
    """A forward hook that adds noise with the covariance of the output, and measures it."""

    def __init__(self, error: float, generator: torch.Generator) -> None:
        self._error, self._generator = error, generator
        self._added, self._whole = 0.0, 0.0

    @property
    def squared(self) -> float:
        """The squared relative size of the added noise, or the requested one if the output is zero."""
        return self._added / self._whole if self._whole > 0 and self._added > 0 else self._error**2

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return the output plus scaled deviations of other samples and positions."""
        channel = output.ndim - 1 if isinstance(module, nn.Linear) else 1
        rows = output.movedim(channel, -1).reshape(-1, output.shape[channel])
        bias = module.bias if isinstance(module.bias, Tensor) else rows.new_zeros(())
        deviation = rows - rows.mean(0)
        energy, spread = float((rows - bias).square().sum()), float(deviation.square().sum())
        if not spread > 0:
            return output
        noise = deviation[torch.randperm(len(rows), generator=self._generator).to(rows.device)]
        noise = noise * (self._error * (energy / spread) ** 0.5)
        self._added += float(noise.square().sum())
        self._whole += energy
        shape = output.movedim(channel, -1).shape
        disturbed: Tensor = output + noise.reshape(shape).movedim(-1, channel)
        return disturbed

"""``taylor``: the loss change that gradients foretell for a layer's own truncation, without running it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tdcompile.core.importance import Importance, normalised
from tdcompile.data.metrics import logits
from tdcompile.errors import InputError
from tdcompile.ir.layer import owner
from tdcompile.ir.modules import input_of
from tdcompile.ir.program import Program, sites
from tdcompile.passes.importance._divergence import drawn
from tdcompile.passes.importance._trial import FORMS, Trial, trials
from tdcompile.support.options import Count
from tdcompile.support.progress import report_progress


@dataclass(frozen=True)
class Taylor(Importance):
    """Mean |⟨g, δ⟩| over samples, for each unit of squared relative error: δ is what truncation changes in the output.

    Pruning scores of first order are gradient times weight (Molchanov et al. 2017, 1611.06440); here the change is that
    of a truncation at a share of the weights, and g the gradient of the loss in the layer's output. Order 2
    takes ½ E⟨g, δ⟩², the second-order term with the empirical Fisher information as the Hessian. Dividing by the
    squared relative error makes it a price that selectors multiply by a loss (this project's completion).

    The loss is cross-entropy on the labels, and without labels on classes drawn from the network's own answers.

    Attributes:
        share: of the layer's weights that the truncation keeps.
        order: 1 or 2.
        samples: how many training samples are read; by default as many as calibration does.
        batch: samples in one pass; memory grows with it, the score does not change.
        forms: decompositions; a layer takes the first that applies to it, and counts nothing where none does.
        largest: a layer counts nothing whose weight, unfolded by its outputs, has more rows and columns than that: its
            truncation would take longer than everything else.
    """

    name: ClassVar[str] = "taylor"
    share: float = 0.5
    order: Annotated[int, Field(ge=1, le=2)] = 2
    samples: Count | None = None
    batch: Count = 32
    forms: tuple[str, ...] = FORMS
    largest: int | None = None

    def score(self, program: Program) -> Mapping[str, float]:
        """See ``Importance.score``."""
        batches = drawn(program, self.samples, self.name, "the importance 'taylor'", self.batch)
        generator = program.generator("taylor/classes")
        meters = {name: _Meter(trial) for name, trial in trials(program, self.share, self.forms, self.largest).items()}
        hooks = [
            meter.trial.site.module.register_forward_hook(meter.watch, with_kwargs=True) for meter in meters.values()
        ]
        program.graph.eval()
        try:
            for done, batch in enumerate(batches, start=1):
                with torch.enable_grad():
                    scores = logits(program.graph(*batch.inputs))
                    loss = _loss(scores, batch.labels, generator)
                probes = [p for m in meters.values() for p in m.take()]
                if loss.requires_grad:  # a network may detach what it returns
                    torch.autograd.grad(loss, probes, allow_unused=True)
                for meter in meters.values():
                    meter.close(len(scores))
                report_progress(done, len(batches), "batches")
        finally:
            for hook in hooks:
                hook.remove()
        found = dict.fromkeys(sites(program), 0.0)
        return normalised(found | {name: meter.score(self.order) for name, meter in meters.items()})


def _loss(scores: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
    """Cross-entropy summed over the samples, so that each one's gradient is its own."""
    if scores.dim() != 2:
        raise InputError(f"the importance 'taylor' needs class scores (samples, classes), not {tuple(scores.shape)}")
    if not bool(torch.isfinite(scores).all()):
        raise InputError("NaN or Inf appears in the network's output on the training samples")
    if labels is None:
        labels = torch.multinomial(scores.detach().softmax(1).cpu(), 1, generator=generator).squeeze(1)
    return F.cross_entropy(scores, labels.to(scores.device), reduction="sum")


class _Meter:
    """⟨g, δ⟩ of one layer for each sample, summed over its calls."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self._difference = replace(trial.site.layer, bias=False).build()
        owner(self._difference).weight = nn.Parameter(trial.weight - trial.site.weight, requires_grad=False)
        self._probes: list[Tensor] = []
        self._batch: list[Tensor] = []
        self._first, self._second, self._count = 0.0, 0.0, 0

    def watch(
        self, module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
    ) -> Tensor:
        """Forward hook: a zero added to the output makes a gradient flow there, whatever else is frozen."""
        with torch.no_grad():
            # by ``forward``: what watches a network's own layers is not to see this one
            change = self._difference.forward(input_of(arguments, named).detach())
        probe = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        watched = output + probe
        if not watched.requires_grad:  # the network's own code computes without gradients here
            return output
        self._probes.append(probe)

        def add(gradient: Tensor) -> None:
            self._batch.append((gradient * change).reshape(len(change), -1).double().sum(1))

        watched.register_hook(add)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return watched

    def take(self) -> list[Tensor]:
        """The probes of the last forward pass."""
        probes, self._probes = self._probes, []
        return probes

    def close(self, samples: int) -> None:
        """Take in a batch."""
        if self._batch:
            # calls of other first axes than one another, on crops and on the whole say, are samples of their own
            alike = len({len(call) for call in self._batch}) == 1
            each = torch.stack(self._batch).sum(0) if alike else torch.cat(self._batch)
            self._first += float(each.abs().sum())
            self._second += float(each.square().sum()) / 2
        self._batch, self._count = [], self._count + samples

    def score(self, order: int) -> float:
        """For each unit of squared relative error."""
        return (self._first if order == 1 else self._second) / self._count / max(self.trial.error**2, 1e-12)

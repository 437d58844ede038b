"""``taylor``: the loss change that gradients predict for the truncation of each layer, without running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from tdcompile.core.importance import Importance, normalised
from tdcompile.data.class_scores import of_tokens
from tdcompile.ir.layer import owner
from tdcompile.ir.modules import outputs_of
from tdcompile.ir.program import Program, sites
from tdcompile.passes.importance._divergence import drawn
from tdcompile.passes.importance._gradients import GradientMeter, backward_passes
from tdcompile.passes.importance._trial import FORMS, Trial, trials
from tdcompile.support.options import Count, Share
from tdcompile.support.progress import report_progress


@dataclass(frozen=True)
class Taylor(Importance):
    """Mean |⟨g, δ⟩| over samples, for each unit of squared relative error; δ is the change of the output by truncation.

    Pruning scores of first order are gradient times weight (Molchanov et al. 2017, 1611.06440). Here the change is a
    truncation that keeps a share of the weights, and g is the gradient of the loss at the layer's output. Order 2 takes
    ½ E⟨g, δ⟩², the second-order term with the empirical Fisher information as the Hessian. Division by the squared
    relative error makes it a price that selectors multiply by a loss (this project's completion).

    The loss is cross-entropy on the labels, or without labels on classes drawn from the network's predictions. In a
    language model, which returns scores for every token, each position of a layer's output counts as a sample.

    Attributes:
        share: share of the layer's weights that the truncation keeps.
        order: 1 or 2.
        samples: number of training samples to read; by default as many as calibration reads.
        batch: samples in one pass; it changes the memory use, not the score.
        forms: decompositions; a layer takes the first that applies, and scores 0 if none does.
        largest: a layer scores 0 if its weight (T x CK) has more rows and more columns than this, because its
            truncation takes too long.
    """

    name: ClassVar[str] = "taylor"
    share: Share = 0.5
    order: Annotated[int, Field(ge=1, le=2)] = 2
    samples: Count | None = None
    batch: Count = 32
    forms: tuple[str, ...] = FORMS
    largest: Count | None = None

    def score(self, program: Program) -> Mapping[str, float]:
        """See ``Importance.score``."""
        batches = drawn(program, self.samples, self.name, "the importance 'taylor'", self.batch)
        generator = program.generator("taylor/classes")
        outputs = outputs_of(program.graph, program.inputs)
        tokens = bool(batches) and of_tokens(batches[0].inputs, outputs[0])
        tried = trials(program, self.share, self.forms, self.largest)
        meters = {name: _Meter(trial, tokens) for name, trial in tried.items()}
        passes = backward_passes(program, [*meters.values()], batches, generator, self.name)
        for done, samples in enumerate(passes, start=1):
            for meter in meters.values():
                meter.close(samples)
            report_progress(done, len(batches), "batches")
        found = dict.fromkeys(sites(program), 0.0)
        return normalised(found | {name: meter.score(self.order) for name, meter in meters.items()})


class _Meter(GradientMeter):
    """Measures ⟨g, δ⟩ of one layer for each sample, summed over its calls.

    Args:
        trial: the truncated layer.
        tokens: whether each position of the output is a sample.
    """

    def __init__(self, trial: Trial, tokens: bool) -> None:
        super().__init__(trial.site.module)
        self.trial, self._tokens = trial, tokens
        self._difference = replace(trial.site.layer, bias=False).build()
        owner(self._difference).weight = nn.Parameter(trial.weight - trial.site.weight, requires_grad=False)
        self._batch: list[Tensor] = []
        self._first, self._second, self._count = 0.0, 0.0, 0

    def observe(self, input: Tensor, output: Tensor) -> Callable[[Tensor], None]:
        """Compute δ; the returned function keeps ⟨g, δ⟩."""
        with torch.no_grad():
            change = self._difference.forward(input)  # not called, because hooks for all modules must not see it

        def add(gradient: Tensor) -> None:
            product = gradient * change
            if self._tokens:
                product = product if self.trial.site.layer.kind == "linear" else product.movedim(1, -1)
                self._batch.append(product.double().sum(-1).flatten())
            else:
                self._batch.append(product.reshape(len(change), -1).double().sum(1))

        return add

    def close(self, samples: int) -> None:
        """Add the batch to the sums."""
        if self._batch:
            # Calls with different first axes, for example on crops and on the whole image, count as separate samples.
            alike = len({len(call) for call in self._batch}) == 1
            each = torch.stack(self._batch).sum(0) if alike else torch.cat(self._batch)
            self._first += float(each.abs().sum())
            self._second += float(each.square().sum()) / 2
        self._batch, self._count = [], self._count + samples

    def score(self, order: int) -> float:
        """Return the score for each unit of squared relative error."""
        return (self._first if order == 1 else self._second) / self._count / max(self.trial.error**2, 1e-12)

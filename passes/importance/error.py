"""``error``: the six approximation errors of arXiv 2305.05318 as scores: weights or features, in three scalings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from tdcompile.core.importance import Importance, normalised
from tdcompile.errors import InputError
from tdcompile.ir.program import Program, sites
from tdcompile.passes.importance._divergence import drawn
from tdcompile.passes.importance._trial import FORMS, trials
from tdcompile.planning.approximation_error import feature_errors, weight_errors
from tdcompile.support.options import Count, Share
from tdcompile.support.progress import report_progress


@dataclass(frozen=True)
class Error(Importance):
    """The square of one of the six errors for each unit of a candidate's squared relative error.

    A selector that sums score times squared relative error then sums the squares of the chosen error: ‖W − W̃‖, ‖W − W̃‖
    over ‖W‖ or over the number of weights, or the same for the layer's output (arXiv 2305.05318, section 3.2). The
    ratio is measured on a truncation that keeps a share of the layer's weights; the share is halved until there is an
    error. For weights the ratio does not depend on the share, unless the candidates' errors are errors of the output
    (this project's completion).

    Attributes:
        of: ``weights``, or ``features``, the outputs of the layer on training samples.
        scaling: ``absolute``, ``relative`` to the norm of the original, or ``scaled`` by its number of elements.
        share: share of the layer's weights that the truncation keeps.
        samples: training samples, read once for each layer; only for features.
        forms: decompositions; a layer takes the first that applies, and scores 0 if none does.
    """

    name: ClassVar[str] = "error"
    of: Literal["weights", "features"] = "weights"
    scaling: Literal["absolute", "relative", "scaled"] = "relative"
    share: Share = 0.5
    samples: Count = 256
    forms: tuple[str, ...] = FORMS

    @torch.no_grad()
    def score(self, program: Program) -> Mapping[str, float]:
        """See ``Importance.score``.

        Raises:
            InputError: a weight holds NaN or Inf, or ``features`` has no samples.
        """
        batches = []
        if self.of == "features":
            batches = drawn(program, self.samples, self.name, "the importance 'error{of=features}'")
        tried = trials(program, self.share, self.forms)
        scores = dict.fromkeys(sites(program), 0.0)
        for done, (name, trial) in enumerate(tried.items(), start=1):
            if not torch.isfinite(trial.weight).all():
                raise InputError(f"the weight of '{name}' holds NaN or Inf")
            if self.of == "weights":
                errors = weight_errors(trial.site.weight, trial.weight)
            else:
                errors = feature_errors(program.graph, trial.site, trial.weight, batches)
            scores[name] = getattr(errors, self.scaling) ** 2 / max(trial.error**2, 1e-12)
            report_progress(done, len(tried), name)
        return normalised(scores)

"""``probe``: the loss of the network if one layer alone is compressed; expensive, the reference for cheaper scores."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from tdcompile.core.importance import Importance, normalised
from tdcompile.data.objective import has_targets
from tdcompile.data.task import Batch
from tdcompile.errors import InputError
from tdcompile.ir.program import Program, sites
from tdcompile.ir.scoring import objective_of, score_of
from tdcompile.passes.importance._divergence import answers, divergence, drawn
from tdcompile.passes.importance._trial import FORMS, trials
from tdcompile.support.options import Count, Share
from tdcompile.support.progress import report_progress

log = logging.getLogger("tdcompile")


@dataclass(frozen=True)
class Probe(Importance):
    """Loss of the network with one layer compressed, for each unit of that layer's squared relative error.

    Attributes:
        share: share of the layer's weights that are kept.
        measure: ``kl`` of the dense outputs from the compressed ones, or the loss of the task's ``metric``, which needs
            targets.
        samples: number of training samples, read once for each layer and once for the dense network.
        forms: decompositions; a layer takes the first that applies, and scores 0 if none does.
    """

    name: ClassVar[str] = "probe"
    share: Share = 0.5
    measure: Literal["kl", "metric"] = "kl"
    samples: Count = 512
    forms: tuple[str, ...] = FORMS

    @torch.no_grad()
    def score(self, program: Program) -> Mapping[str, float]:
        """See ``Importance.score``."""
        batches = drawn(program, self.samples, self.name, "the importance 'probe'")
        lost, tried = self._loss(program, batches), trials(program, self.share, self.forms)
        scores = dict.fromkeys(sites(program), 0.0)
        for done, (name, trial) in enumerate(tried.items(), start=1):
            with trial.applied():
                scores[name] = lost() / max(trial.error**2, 1e-12)
            report_progress(done, len(tried), name)
        log.info("probe: %d forward passes over %d samples", len(tried) + 1, sum(len(b.inputs[0]) for b in batches))
        return normalised(scores)

    def _loss(self, program: Program, batches: list[Batch]) -> Callable[[], float]:
        """Return a function that tells how much the graph, as it then is, loses against the graph as it is now.

        Raises:
            InputError: the metric is asked for, and there are no targets.
        """
        graph = program.graph
        if self.measure == "kl":
            wanted = answers(graph, batches)
            return lambda: divergence(wanted, answers(graph, batches))
        objective = objective_of(program)
        if objective is None or not has_targets(objective, batches[0]):
            raise InputError("'probe{measure=metric}' needs targets: give data with targets, or take measure=kl")
        before = score_of(objective, graph, batches)
        return lambda: max(objective.metric.about.drop(before, score_of(objective, graph, batches)), 0.0)

"""``anneal``: decay the dense share of parallel layers to zero while their adapters train and lose ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from tdcompile.backend.lowering import lower
from tdcompile.core.passes import Rewritten, TunePass
from tdcompile.core.plan import Candidate, within
from tdcompile.data.task import lacking
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode, Reason, ReasonCode
from tdcompile.ir.graph_edits import copy_weights
from tdcompile.ir.layer import Ranks
from tdcompile.ir.program import Change, Program
from tdcompile.ir.scoring import objective_of
from tdcompile.ir.target import Cost
from tdcompile.planning.allocation import gainful
from tdcompile.planning.pricing import Prices
from tdcompile.support.options import Count, NonNegative, Positive, PositiveOrInf
from tdcompile.training.adapters import Parallel, energy_ranks, parallel_layers
from tdcompile.training.augment import AugmentOption, resolve_augment
from tdcompile.training.distillation import Distillation, excluded_output, scored_outputs
from tdcompile.training.distributed import from_first, no_gpu
from tdcompile.training.mixed_precision import Precision
from tdcompile.training.trainer import Settings, Trainer, training_state_of

_BISECTIONS = 40


@dataclass(frozen=True)
class Anneal(TunePass):
    """Train adapters, norms and biases while the dense share falls along a cosine and ranks shrink to the budget.

    One energy threshold over the current weights sets the ranks of every layer and mode. Bisection finds the threshold
    that meets a limit; the limit falls to the budget in equal ratios. Ranks never grow. A layer whose adapter would
    not cost less than the dense layer is priced as dense and keeps its ranks. If that still holds at the end, it stays
    dense with its current weight. The loss is distillation from the dense network, mixed with labels. Schedule and
    limits are this project's completion.

    Attributes:
        epochs: number of epochs; may be a fraction.
        lr: highest learning rate for a batch of 128; scaled in proportion for other batch sizes.
        decay: share of the steps over which the dense share falls to zero; then the adapters train alone.
        selections: number of rank selections, the last one when the dense share reaches zero.
        temperature, labels, others: parameters of the loss, as in ``finetune``.
        augment, precision: as in ``finetune``.
    """

    name: ClassVar[str] = "anneal"
    trains: ClassVar[bool] = True
    epochs: Positive = 10.0
    lr: Positive = 0.01
    batch: Count = 128
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.7
    selections: Count = 5
    clip: PositiveOrInf = 5.0
    temperature: Positive = 4.0
    labels: Annotated[float, Field(ge=0, le=1)] = 0.1
    others: NonNegative = 1.0
    augment: AugmentOption = "auto"
    precision: Precision = "fp32"

    def tune(self, graph: fx.GraphModule, program: Program) -> Rewritten:
        """Anneal, then remove the dense share of every parallel layer that is cheaper without it, within the budget.

        Raises:
            BudgetError: ranks of 1 exceed the budget.
        """
        layers = parallel_layers(graph)
        if not layers:
            return Rewritten(
                graph,
                [
                    Diagnostic(
                        "warning", DiagnosticCode.NO_ADAPTERS, "anneal: no layer has an adapter; attach-adapters first"
                    )
                ],
            )
        train = program.task.train
        schedule = _Schedule(layers, program, self.decay, self.selections)
        why = lacking(train)
        if train is None or why:
            dense = schedule.finish()
            told = Diagnostic("warning", DiagnosticCode.NO_DATA, f"anneal: {why}; the dense share is cut off")
            return Rewritten(graph, [told, *(reason.about(name) for name, reason in dense.items())])
        settings = Settings(
            epochs=self.epochs,
            lr=self.lr * self.batch / 128,
            batch=self.batch,
            momentum=0.9,
            warmup=0.05,
            clip=self.clip,
            augment=resolve_augment(self.augment, program.inputs, objective_of(program)),
            frozen=False,
            precision=self.precision,
        )
        teacher = copy_weights(lower(program, program.dense))
        scored, left = scored_outputs(program, train, self.others)
        loss = Distillation(teacher, self.temperature, self.labels, precision=self.precision, scored=scored)
        # No held-out split: an epoch that still has a dense share must not be chosen as the best one.
        saved, moving = training_state_of(self, graph, train, program), _moving(graph)
        Trainer(graph, loss, train, None, settings, program, self.name, saved, schedule, moving).run()
        dense = schedule.finish()
        unlearnt = [excluded_output(self.name, place, why) for place, why in left.items()]
        changes = [
            dense[name].about(name) if name in dense else Change(name, self.name, f"ranks {list(p.ranks)}")
            for name, p in layers.items()
        ]
        return Rewritten(graph, [*unlearnt, *changes])


def _moving(graph: fx.GraphModule) -> list[nn.Parameter]:
    """Return the trained parameters: factors, and all parameters with at most one axis (norms and biases)."""
    factors = {id(p) for layer in parallel_layers(graph).values() for p in layer.factors.parameters()}
    return [p for p in graph.parameters() if id(p) in factors or p.ndim <= 1]


class _Schedule:
    """Called before every step: sets the dense share, and selects ranks when a selection is due.

    A resumed run begins at the step and with the ranks of its saved epoch. With several processes the first one
    selects, because under a latency budget each process would measure different times.

    Raises:
        BudgetError: ranks of 1 exceed the budget.
    """

    def __init__(self, layers: Mapping[str, Parallel], program: Program, decay: float, selections: int) -> None:
        self._layers = dict(layers)
        self._prices, self._decay, self._selections = Prices(program), decay, selections
        self._cpu = no_gpu(program.target.device)
        self._done: int | None = None
        start = self._cost({name: layer.ranks for name, layer in self._layers.items()})
        self._start = {f: max(getattr(start, f), limit) for f, limit in self._prices.limits.items()}
        from_first(self._check, self._cpu)

    def _check(self) -> None:
        least = self._cost({name: (1,) * len(layer.ranks) for name, layer in self._layers.items()})
        self._prices.check(least, "adapters of rank 1")

    def __call__(self, step: int, of: int, optimizer: Optimizer) -> None:
        progress = self._progress(step, of)
        if self._done is None:
            self._done = sum(self._due(count, self._progress(step - 1, of)) for count in range(self._selections))
        for layer in self._layers.values():
            layer.share = 0.5 * (1 + math.cos(math.pi * progress)) if progress < 1 else 0.0
        while self._done < self._selections and self._due(self._done, progress):
            self._select((self._done + 1) / self._selections, optimizer)
            self._done += 1

    def _progress(self, step: int, of: int) -> float:
        return min(step / max(self._decay * of, 1.0), 1.0)

    def _due(self, done: int, progress: float) -> bool:
        return progress >= (done + 1) / self._selections

    def finish(self) -> dict[str, Reason]:
        """End the schedule, however far training went; return the layers that stay dense, with the reason.

        They keep the weight of their last forward pass, or the dense weight if nothing was trained.
        """
        shares = {name: layer.share for name, layer in self._layers.items()}
        for layer in self._layers.values():
            layer.share = 0.0
        if (self._done or 0) < self._selections:
            self._select(1.0, None)
            self._done = self._selections
        dense = from_first(self._dense, self._cpu)
        for name, layer in self._layers.items():
            layer.stays = name in dense
            layer.share = shares[name] if layer.stays else 0.0
        return dense

    def _dense(self) -> dict[str, Reason]:
        why = "its adapter costs no less than dense at the ranks that it has left, {}"
        return {
            name: Reason(ReasonCode.NOT_CHEAPER, why.format(list(layer.ranks)))
            for name, layer in self._layers.items()
            if self._gain(name, layer.ranks) is None
        }

    def _select(self, progress: float, optimizer: Optimizer | None) -> None:
        limits = {f: start * (self._prices.limits[f] / start) ** progress for f, start in self._start.items()}
        energies = {name: layer.energies() for name, layer in self._layers.items()}
        for name, chosen in from_first(partial(self._chosen, energies, limits), self._cpu).items():
            layer = self._layers[name]
            if chosen != layer.ranks:
                layer.shrink(chosen)
                for parameter in layer.factors.parameters() if optimizer is not None else ():
                    optimizer.state.pop(parameter, None)  # type: ignore[union-attr]  # momentum of another shape

    def _chosen(self, energies: Mapping[str, tuple[Tensor, ...]], limits: Mapping[str, float]) -> dict[str, Ranks]:
        """Return the ranks at the highest threshold that meets the limits, for layers with a cheaper adapter."""

        def ranks(threshold: float) -> dict[str, Ranks]:
            return {name: energy_ranks(energies[name], threshold, p.ranks) for name, p in self._layers.items()}

        low, high = 0.0, 1.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if within(self._cost(ranks(middle)), limits) else (low, middle)
        return {name: chosen for name, chosen in ranks(low).items() if self._gain(name, chosen) is not None}

    def _cost(self, ranks: Mapping[str, Ranks]) -> Cost:
        """Return the network's cost with adapters of these ranks, or dense layers if the adapters are not cheaper."""
        gains = {name: self._gain(name, chosen) for name, chosen in ranks.items()}
        return self._prices.network({name: cost for name, cost in gains.items() if cost is not None})

    def _gain(self, name: str, ranks: Ranks) -> Cost | None:
        """Return an adapter's cost; None if it saves nothing in the limited fields or costs more in one of them."""
        form = self._layers[name].decomposition
        dense, cost = self._prices.layers[name], self._prices.at(name, form, ranks)
        options = [Candidate.dense(dense), Candidate(form, ranks, cost=cost)]
        return cost if gainful(options, self._prices.limits) else None

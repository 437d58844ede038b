"""``finetune``: train the compressed network to reproduce the outputs of the dense one."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import fx

from tdcompile.backend.lowering import lower
from tdcompile.core.passes import Rewritten, TunePass
from tdcompile.core.plan import RankPlan
from tdcompile.data.task import lacking
from tdcompile.errors import InputError, TdcompileError
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode
from tdcompile.ir.facts import Fact
from tdcompile.ir.graph_edits import copy_weights
from tdcompile.ir.program import Change, Program, sites_of
from tdcompile.ir.scoring import objective_of
from tdcompile.passes.tune._distil import Lesson, highest_rate, split, told_of
from tdcompile.support.options import Count, NonNegative, Part, Positive, PositiveOrInf
from tdcompile.training.augment import AugmentOption, resolve_augment
from tdcompile.training.distillation import (
    Distillation,
    LayerwiseLoss,
    RememberedAnswers,
    excluded_output,
    scored_outputs,
)
from tdcompile.training.mixed_precision import Precision
from tdcompile.training.run_state import Optimizer, Saved, Tuning
from tdcompile.training.trainer import Settings, Trainer, training_state_of

_SHARES = (
    1.0,
    1 / 3,
    1 / 10,
    1 / 30,
    1 / 100,
)  # of the highest rate; a good start needs a far lower one
_JUDGES = 1024  # held-out samples that compare rates


@dataclass(frozen=True)
class Finetune(TunePass):
    """Train the compressed network by distillation from the dense one, and by the task's loss if there are targets.

    The loss is (1 - labels) · T² · KL(dense ‖ compressed), both softened by the temperature T (Hinton, Vinyals and
    Dean, 2015), plus labels · the loss of the task, such as cross-entropy. There is no weight decay: decay on factors
    shrinks their product unevenly.

    Attributes:
        epochs: number of epochs; may be a fraction.
        optimizer: ``sgd`` with Nesterov momentum, or ``adam``, which suits transformers.
        lr: highest learning rate. ``none`` searches: short runs try 0.03 for a batch of 128, 0.003 with Adam, and
            shares of it down to a hundredth, and the least held-out loss wins. For other batch sizes the rate changes
            in proportion, with Adam by the square root. One epoch uses the winner; more epochs use √epochs times it,
            because they have time to recover from a high rate. If the whole tuning is no longer than a short run, the
            winner's weights are the result.
        trial: steps of each short run; 0, or no held-out samples, takes the highest rate without a search.
        batch: samples in one step.
        momentum: that of SGD; β₁ of Adam.
        warmup: share of the steps in which the rate rises.
        clip: largest norm of the gradient; a chain of factors multiplies its gradients.
        temperature: T.
        labels: weight of the loss on targets; ignored without targets.
        others: weight of the outputs after the first, each by its squared difference over its energy; 0 ignores them.
        outputs: weight of layer-output distillation, the mean squared difference of each replaced layer's output.
        weights: weight of weight distillation, the mean squared difference of each replaced layer's weight (RENE,
            arXiv 2409.03555).
        holdout: share of the training samples (at most 5,000) that is held out to choose the best epoch; 0 keeps the
            last. The weights before training are kept if every epoch is worse by more than a hundredth.
        augment: ``auto`` shifts images of at least 16 pixels a side, and also mirrors those of three channels.
        bn: ``frozen`` keeps batch-norm statistics; ``train`` normalises by the statistics of each batch, over all
            processes.
        average: decay of the exponential moving average of the weights, e.g. 0.999; 0 trains without one.
        patience: stop after this number of epochs without a better one; 0 runs all epochs.
        precision: ``bf16`` or ``fp16`` for automatic mixed precision (``fp16`` only on CUDA), or ``fp32``.
    """

    name: ClassVar[str] = "finetune"
    fine_tunes: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    gives: ClassVar[tuple[type[Fact], ...]] = (Tuning,)
    epochs: Positive = 5.0
    optimizer: Optimizer = "sgd"
    lr: Positive | None = None
    trial: Annotated[int, Field(ge=0)] = 40
    batch: Count = 128
    momentum: Part = 0.9
    warmup: Part = 0.05
    clip: PositiveOrInf = 5.0
    temperature: Positive = 4.0
    labels: Annotated[float, Field(ge=0, le=1)] = 0.1
    others: NonNegative = 1.0
    outputs: NonNegative = 0.0
    weights: NonNegative = 0.0
    holdout: Part = 0.05
    augment: AugmentOption = "auto"
    bn: Literal["train", "frozen"] = "train"
    average: Part = 0.0
    patience: Annotated[int, Field(ge=0)] = 0
    precision: Precision = "fp32"

    def check(self) -> None:
        """Require held-out samples if ``patience`` is set."""
        if self.patience and not self.holdout:
            raise InputError("finetune: patience judges epochs by held-out samples: give it a holdout above 0")

    def tune(self, graph: fx.GraphModule, program: Program) -> Rewritten:
        """Train the graph and keep its best epoch.

        Raises:
            TdcompileError: the training diverged.
        """
        train = program.task.train
        why = lacking(train)
        if train is None or why:
            return Rewritten(graph, [Diagnostic("warning", DiagnosticCode.NO_DATA, f"finetune: {why}")], [Tuning()])
        fit, heldout = split(train, self.holdout, program)
        saved = training_state_of(self, graph, train, program)
        settings = self._settings(program)
        teacher = copy_weights(program.dense if self._watched else lower(program, program.dense))
        scored, left = scored_outputs(program, train, self.others)
        lesson = Lesson(teacher, fit, heldout, program, scored)
        rate, done = self._rate(graph, lesson, settings)
        settings = replace(settings, lr=rate)
        tuning = done or self._trained(graph, lesson, settings, self.name, saved)
        told = [excluded_output(self.name, place, why) for place, why in left.items()]
        return Rewritten(
            graph,
            [*told, Change("", self.name, f"{told_of(tuning, program)}, {self.optimizer}, rate {settings.lr:.3g}")],
            [tuning],
        )

    @property
    def _watched(self) -> bool:
        """Whether the loss reads the layers of the dense network."""
        return bool(self.outputs or self.weights)

    def _trained(self, graph: fx.GraphModule, lesson: Lesson, settings: Settings, purpose: str, saved: Saved) -> Tuning:
        program, layers = lesson.program, None
        if self._watched:
            plan = program.facts.get(RankPlan)
            if plan is None:
                raise InputError("finetune{outputs=…, weights=…} looks at the layers of a plan, and there is none")
            known = {name: site.layer for name, site in sites_of(program.dense, program.inputs).items()}
            layers = LayerwiseLoss(lesson.teacher, graph, plan, known, self.outputs, self.weights)
        loss = Distillation(lesson.teacher, self.temperature, self.labels, layers, settings.precision, lesson.scored)
        with layers.watching() if layers else nullcontext():
            return Trainer(graph, loss, lesson.fit, lesson.heldout, settings, program, purpose, saved).run()

    def _rate(self, graph: fx.GraphModule, lesson: Lesson, settings: Settings) -> tuple[float, Tuning | None]:
        """Return the requested rate, or the one whose short run ends with the least loss.

        A short run has its own warm-up and cosine. The best rate of a short run is too low for a long one
        (``docs/results/tuning.md``). The result never exceeds the highest rate that did not diverge.

        If a short run is the whole tuning, the graph gets the weights of the best one, and its figures are returned.
        """
        if self.lr is not None or not self.trial or lesson.heldout is None:
            return settings.lr, None
        judges = lesson.heldout.subset(range(min(len(lesson.heldout), _JUDGES)))
        # All short runs see the same batches in the same order.
        known = None if self._watched else RememberedAnswers(lesson.teacher)
        short_lesson = replace(lesson, heldout=judges, teacher=known or lesson.teacher)
        epoch = max(1, len(lesson.fit) // self.batch)
        short = replace(settings, epochs=min(self.trial / epoch, self.epochs), average=0.0, patience=0)
        whole = short == settings and self.epochs <= 1 and len(judges) == len(lesson.heldout)
        purpose = self.name if whole else f"{self.name}/trial"
        ends: dict[float, float] = {}
        best: tuple[float, Tuning, fx.GraphModule] | None = None
        for share in _SHARES:
            trial, tried = replace(short, lr=share * settings.lr), copy_weights(graph)
            if known is not None:
                known.restart()
            try:
                run = self._trained(tried, short_lesson, trial, purpose, Saved(None, ""))
                end = run.curve[-1].heldout_loss
            except InputError:
                raise
            except TdcompileError:  # the run diverged; a lower rate may not
                continue
            ends[trial.lr] = math.inf if end is None else end
            if whole and ends[trial.lr] < (math.inf if best is None else best[0]):
                best = ends[trial.lr], run, tried
        if best is not None:
            _, run, tried = best
            graph.load_state_dict(tried.state_dict())
            return run.rate or settings.lr, run
        if not ends:
            return settings.lr, None
        least = min(ends, key=lambda rate: ends[rate])
        return min(least * math.sqrt(max(self.epochs, 1.0)), max(ends)), None

    def _settings(self, program: Program) -> Settings:
        return Settings(
            epochs=self.epochs,
            lr=highest_rate(self.optimizer, self.batch) if self.lr is None else self.lr,
            batch=self.batch,
            momentum=self.momentum,
            warmup=self.warmup,
            clip=self.clip,
            augment=resolve_augment(self.augment, program.inputs, objective_of(program)),
            frozen=self.bn == "frozen",
            average=self.average,
            patience=self.patience,
            precision=self.precision,
            optimizer=self.optimizer,
        )

"""``finetune-int8``: train the compressed network through the rounding of its int8 model, with learned scales.

The network is exported and quantised first. Its PyTorch graph then rounds weights, biases and activations where the
int8 model does. The scales of activations are trained with the weights (LSQ, Esser et al., ICLR 2020), and rounding
passes gradients straight through. The int8 model that is written at the end has the integers, scales and zero points
that were trained.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field
from torch import fx

from tdcompile.backend.compiled_int8 import as_tuned, chosen_int8, judged_inputs
from tdcompile.backend.learned_quantization import LearnedScales, learned_quantization, settled
from tdcompile.backend.lowering import export_lowered, lower
from tdcompile.backend.verified_export import DenseModel, export_verified
from tdcompile.backend.weight_uses import UnmatchedError
from tdcompile.core.passes import Rewritten, TunePass
from tdcompile.core.plan import Candidates, RankPlan
from tdcompile.data.task import Samples, lacking
from tdcompile.errors import InputError
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode
from tdcompile.ir.facts import Fact
from tdcompile.ir.graph_edits import copy_weights
from tdcompile.ir.modules import outputs_of
from tdcompile.ir.program import Change, Program
from tdcompile.ir.scoring import objective_of
from tdcompile.passes.tune._distil import highest_rate, split, told_of
from tdcompile.support.options import Count, NonNegative, Part, Positive
from tdcompile.training.augment import AugmentOption, resolve_augment
from tdcompile.training.distillation import Distillation, excluded_output, scored_outputs
from tdcompile.training.distributed import from_first, no_gpu, same_in_all
from tdcompile.training.run_state import Int8Tuning, Optimizer, Tuning
from tdcompile.training.trainer import Settings, Trainer, training_state_of

# LSQ trains 8-bit networks at a tenth of the rate of lower precisions: they begin next to where they end.
_SHARE = 0.1
_MOMENTUM, _WARMUP, _CLIP = 0.9, 0.05, 5.0  # the defaults of ``finetune``
_MATCHED = 4  # samples on which values of the ONNX model are found in the PyTorch graph


@dataclass(frozen=True)
class FinetuneInt8(TunePass):
    """Train the compressed network by distillation while it rounds as its int8 model does, with learned scales.

    The pass comes last, behind ``fold-batchnorm`` and ``drop-dead``, because it trains the network as it is exported.
    It does nothing if the plan is not in int8. A network whose rounded values cannot all be found in PyTorch is not
    trained, and the report says so. Layers that stay float are chosen before the training.

    Attributes:
        epochs: number of epochs; may be a fraction.
        optimizer: ``sgd`` or ``adam``; ``none`` takes that of ``finetune``, or ``sgd`` if that did not run.
        lr: highest learning rate, also of the scales. ``none`` takes a tenth of the rate of ``finetune``, or of the
            highest that it tries if it did not run with this optimizer.
        batch: see ``finetune``.
        temperature: see ``finetune``.
        labels: see ``finetune``.
        others: see ``finetune``.
        holdout: see ``finetune``; the same samples are held out.
        augment: see ``finetune``.
        average: see ``finetune``.
        patience: see ``finetune``.
    """

    name: ClassVar[str] = "finetune-int8"
    trains: ClassVar[bool] = True
    fine_tunes_int8: ClassVar[bool] = True
    needs: ClassVar[tuple[type[Fact], ...]] = (RankPlan,)
    gives: ClassVar[tuple[type[Fact], ...]] = (Int8Tuning, LearnedScales)
    epochs: Positive = 1.0
    optimizer: Optimizer | None = None
    lr: Positive | None = None
    batch: Count = 128
    temperature: Positive = 4.0
    labels: Annotated[float, Field(ge=0, le=1)] = 0.1
    others: NonNegative = 1.0
    holdout: Part = 0.05
    augment: AugmentOption = "auto"
    average: Part = 0.0
    patience: Annotated[int, Field(ge=0)] = 0

    def check(self) -> None:
        """Require held-out samples if ``patience`` is set."""
        if self.patience and not self.holdout:
            raise InputError("finetune-int8: patience judges epochs by held-out samples: give it a holdout above 0")

    def tune(self, graph: fx.GraphModule, program: Program) -> Rewritten:
        """Train the graph and keep its best epoch.

        Raises:
            InputError: the graph is not yet in the form that is exported.
            TdcompileError: the training diverged.
        """
        if not _in_int8(program):
            return _untrained(graph)
        train = program.task.train
        why = lacking(train)
        if train is None or why:
            return _untrained(graph, f"finetune-int8: {why}", DiagnosticCode.NO_DATA)
        lowered = lower(program, graph)
        if _topology(lowered) != _topology(graph):
            raise InputError(
                "finetune-int8 trains the network as it is exported: put fold-batchnorm,drop-dead before it"
            )
        same_in_all([value.data for value in lowered.parameters()])
        try:
            student, floats = _student(lowered, program, train)
        except UnmatchedError as error:
            return _untrained(graph, f"finetune-int8: the network is not tuned through rounding: {error}")
        known = program.facts.get(Tuning)
        optimizer = self.optimizer or (known.optimizer if known else "sgd")
        rate = known.rate if known is not None and known.optimizer == optimizer else None
        rate = rate or highest_rate(optimizer, self.batch)
        settings = Settings(
            epochs=self.epochs,
            lr=self.lr or _SHARE * rate,
            batch=self.batch,
            momentum=_MOMENTUM,
            warmup=_WARMUP,
            clip=_CLIP,
            augment=resolve_augment(self.augment, program.inputs, objective_of(program)),
            frozen=True,
            average=self.average,
            patience=self.patience,
            optimizer=optimizer,
        )
        fit, heldout = split(train, self.holdout, program)
        scored, left = scored_outputs(program, train, self.others)
        loss = Distillation(copy_weights(lower(program, program.dense)), self.temperature, self.labels, scored=scored)
        saved = training_state_of(replace(self, optimizer=optimizer, lr=settings.lr), student, train, program)
        tuning = Trainer(student, loss, fit, heldout, settings, program, self.name, saved).run()
        # Without a better epoch, ranges from samples and corrected biases are better than the start without them.
        found = settled(student, lowered, floats) if tuning.best_epoch else LearnedScales()
        told = [excluded_output(self.name, place, why) for place, why in left.items()]
        change = f"{told_of(tuning, program)}, rate {tuning.rate:.3g}, {len(found.scales)} scales"
        kept, facts = lowered if found.scales else graph, [Int8Tuning(**vars(tuning)), found]
        return Rewritten(kept, [*told, Change("", self.name, change)], facts)


def _in_int8(program: Program) -> bool:
    """Return whether the network is compiled to int8; a pass that makes plans itself leaves their precision open."""
    open_precision = Candidates not in program.facts and program.target.precision == "int8"
    return program.facts[RankPlan].precision == "int8" or open_precision


def _untrained(graph: fx.GraphModule, why: str = "", code: DiagnosticCode = DiagnosticCode.NOT_TUNED_INT8) -> Rewritten:
    return Rewritten(graph, [Diagnostic("warning", code, why)] if why else [], [Int8Tuning(), LearnedScales()])


def _topology(graph: fx.GraphModule) -> list[tuple[str, str]]:
    return [(node.op, str(node.target)) for node in graph.graph.nodes]


def _student(lowered: fx.GraphModule, program: Program, train: Samples) -> tuple[fx.GraphModule, Mapping[str, str]]:
    """Return a copy of a lowered graph that rounds as its int8 model does, and the layers that stay float.

    Raises:
        UnmatchedError: there is no such graph.
    """
    with tempfile.TemporaryDirectory(prefix="tdcompile-") as folder:
        model = Path(folder) / "model.onnx"
        export_verified(program, lowered, model)
        # latency is measured: each process might leave another layer in float
        first = from_first(lambda: _chosen(program, model), no_gpu(program.target.device))
        quantized = as_tuned(program, model, Path(folder) / "int8.onnx", first)
        student = learned_quantization(lowered, model, quantized, next(judged_inputs(program, _MATCHED)))
    try:
        outputs_of(student, train.batch([0, 1]).inputs)
    except (RuntimeError, AssertionError) as error:
        raise UnmatchedError("traced operator by operator, it takes no batches of other sizes") from error
    return student, first.floats


def _chosen(program: Program, model: Path) -> LearnedScales:
    """Return the scales to begin with, and the layers that stay float."""
    known, dense = program.facts.get(DenseModel), model.with_name("dense.onnx")
    if known is not None and known.model.is_file():
        dense = known.model
    else:
        export_lowered(program, program.dense, dense)
    made, floats = chosen_int8(program, model, model.with_name("chosen.onnx"), dense)
    return LearnedScales(made.scales, floats)

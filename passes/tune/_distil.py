"""What the passes that distil the dense network share: rate, held-out split, one lesson for several runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from tdcompile.data.task import Samples
from tdcompile.ir.program import Program
from tdcompile.ir.scoring import objective_of
from tdcompile.training.distillation import ScoredOutputs
from tdcompile.training.run_state import Optimizer, Tuning

_RATES: dict[Optimizer, float] = {"sgd": 0.03, "adam": 0.003}  # highest learning rates to try, for batches of 128
_HELDOUT = 5000  # upper bound: more samples do not change which epoch wins


@dataclass(frozen=True)
class Lesson:
    """Settings that all runs of one tuning share."""

    teacher: nn.Module
    fit: Samples
    heldout: Samples | None
    program: Program
    scored: ScoredOutputs


def highest_rate(optimizer: Optimizer, batch: int) -> float:
    """Return the highest learning rate to try: for SGD in proportion to the batch, for Adam to its root.

    Goyal et al. 2017, arXiv 1706.02677; Malladi et al. 2022, arXiv 2205.10287.
    """
    times = batch / 128
    return _RATES[optimizer] * (math.sqrt(times) if optimizer == "adam" else times)


def split(train: Samples, share: float, program: Program) -> tuple[Samples, Samples | None]:
    """Return the samples to train on, and the share that chooses the best epoch; every pass holds out the same."""
    count = min(int(share * len(train)), _HELDOUT, len(train) - 2)
    order = torch.randperm(len(train), generator=program.generator("finetune/holdout")).tolist()
    return train.subset(order[count:]), train.subset(order[:count]) if count else None


def told_of(tuning: Tuning, program: Program) -> str:
    """Return the outcome of a training run in words."""
    objective = objective_of(program)
    about = objective.metric.about if objective else None
    best = next((e for e in tuning.curve if e.epoch == tuning.best_epoch), None)
    kept = f"{tuning.epochs} epochs, epoch {tuning.best_epoch} kept" if best else "every epoch did worse than the start"
    if best is None or best.heldout_score is None or tuning.start_score is None or about is None:
        return kept
    before, after = about.text(tuning.start_score), about.text(best.heldout_score)
    return f"{kept}, held-out {about.name} {before} before and {after} after"

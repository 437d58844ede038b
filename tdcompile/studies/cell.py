"""One cell of an approximation-error study: one compressed layer, its six errors, and the network's accuracies."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tdcompile.core.decomposition import Decomposition, reading
from tdcompile.core.pipeline import fine_tuner
from tdcompile.core.registry import make
from tdcompile.data.metric import About
from tdcompile.data.task import Batch, Task
from tdcompile.errors import FixedAxisError, InputError, TdcompileError, UnavailableError
from tdcompile.frontend.select import Frontend
from tdcompile.frontend.tracing import trace
from tdcompile.ir.graph_edits import copy_graph, copy_weights, replace_module
from tdcompile.ir.layer import Ranks
from tdcompile.ir.program import Program, sites
from tdcompile.ir.scoring import network_score, objective_of
from tdcompile.ir.target import Target
from tdcompile.numerics.covariance import Identity
from tdcompile.planning.approximation_error import feature_errors, weight_errors
from tdcompile.planning.rank_grid import ranks_for, weights_of
from tdcompile.studies.findings import Cell, Failure
from tdcompile.training.run_state import key_of

_DIGITS = 12  # to which 1 - compression is rounded, so that 1 - 0.9 is 0.1


@dataclass(frozen=True)
class Subject:
    """The network to study, example inputs (see ``trace``), the data, and the front end that traces the network."""

    module: nn.Module
    inputs: Sequence[Any] | Mapping[str, Any]
    task: Task
    frontend: Frontend = "auto"


@dataclass(frozen=True)
class Point:
    """The coordinates of a cell in the grid.

    Attributes:
        compression: share of the layer's weights to remove.
    """

    layer: str
    method: str
    compression: float
    seed: int

    @property
    def kept(self) -> float:
        """Share of the layer's weights to keep."""
        return round(1 - self.compression, _DIGITS)


@dataclass(frozen=True)
class _Compressed:
    """The network with one layer compressed. All seeds share it, because nothing in it is random."""

    of: tuple[str, str, float]
    ranks: Ranks
    approximation: Tensor
    graph: fx.GraphModule
    score: float


class Bench:
    """Measure cells of one network; no cell depends on another.

    Args:
        subject: the network and its data; neither is changed.
        tune: options of the pass ``finetune``, or ``none``.
        target: the device that runs the network.

    Raises:
        InputError: there is no training data or no test data with targets, the network fixes its batch size, or an
            option does not fit.
    """

    def __init__(self, subject: Subject, tune: str, target: Target) -> None:
        self.task = _sampled(subject.task)
        self.program: Program = _tested(_placed(_traced(subject), target).with_(task=self.task))
        self.sites = sites(self.program)
        self.tuning = None if tune == "none" else fine_tuner(tune)
        self._last: _Compressed | None = None

    @property
    def tune(self) -> str:
        """The text form of the fine-tuning pass, or ``none``."""
        return "none" if self.tuning is None else str(self.tuning.spec())

    @property
    def metric(self) -> About:
        """The metric of the test samples."""
        objective = objective_of(self.program)
        assert objective is not None  # ``_tested`` checked it
        return objective.metric.about

    @property
    def dense_score(self) -> float:
        """The metric of the dense network."""
        return self._score(self.program.graph)

    def digest(self) -> str:
        """Return a digest of what all cells share: weights, data and settings."""
        parts = [part.fingerprint() for part in (self.task.train, self.task.test) if part is not None]
        settings = (self.task.calibrate, self.task.evaluate, self.task.source, self.tune)
        return key_of([self.program.dense], *settings, *parts)

    def ranks(self, point: Point) -> Ranks:
        """Return the ranks of a cell."""
        return ranks_for(make(Decomposition, point.method), self.sites[point.layer].layer, point.kept)

    def key(self, point: Point, digest: str) -> str:
        """Return a digest of everything that decides a cell."""
        text = repr((digest, point, self.ranks(point)))
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def measure(self, point: Point, key: str) -> Cell:
        """Measure a cell.

        Raises:
            TdcompileError: an error is not finite, or fine-tuning diverged.
        """
        start, site = time.perf_counter(), self.sites[point.layer]
        layer, form = site.layer, make(Decomposition, point.method)
        made = self._compressed(point)
        program = self.program.with_(seed=point.seed)
        weights = weight_errors(site.weight, made.approximation)
        features = feature_errors(self.program.graph, site, made.approximation, self._calibration(program))
        if not all(map(math.isfinite, (*weights, *features))):
            raise TdcompileError(f"{point.method} of '{point.layer}' gave factors that are not finite")
        after = None
        if self.tuning is not None:
            after = self._score(self.tuning.run(program.with_(graph=made.graph)).graph)
        return Cell(
            key=key,
            layer=point.layer,
            method=point.method,
            ranks=made.ranks,
            compression=point.compression,
            kept=weights_of(form, layer, made.ranks) / math.prod(layer.weight_shape),
            seed=point.seed,
            weights_absolute=weights.absolute,
            weights_relative=weights.relative,
            weights_scaled=weights.scaled,
            features_absolute=features.absolute,
            features_relative=features.relative,
            features_scaled=features.scaled,
            score_before=made.score,
            score_after=after,
            seconds=time.perf_counter() - start,
        )

    def attempt(self, point: Point, key: str) -> Cell | Failure:
        """Measure a cell; if the measurement fails, return the reason, so that the other cells are still measured.

        Raises:
            InputError: an input cannot be used; the other cells would fail as well.
        """
        try:
            return self.measure(point, key)
        except InputError:
            raise
        except TdcompileError as error:
            return Failure(
                layer=point.layer,
                method=point.method,
                compression=point.compression,
                seed=point.seed,
                reason=str(error),
            )

    def _compressed(self, point: Point) -> _Compressed:
        of = (point.layer, point.method, point.compression)
        if self._last is None or self._last.of != of:
            site, form, ranks = self.sites[point.layer], make(Decomposition, point.method), self.ranks(point)
            weight, bias = site.weight.cpu(), site.module.bias
            with reading(form, weight):
                factors = form.factorize(site.layer, weight, ranks, Identity.of(weight))
            assert bias is None or isinstance(bias, Tensor)  # convolutions and linear layers have no other
            graph = copy_graph(self.program.graph)
            replace_module(graph, point.layer, form.build(site.layer, ranks, factors, bias).to(site.weight.device))
            graph.graph.lint()
            graph.recompile()
            approximation = form.reconstruct(site.layer, factors)
            self._last = _Compressed(of, ranks, approximation, graph.eval(), self._score(graph))
        return self._last

    def _calibration(self, program: Program) -> Sequence[Batch]:
        assert self.task.train is not None  # ``_sampled`` checked it
        chosen = self.task.train.shuffled(program.generator("study/calibrate"))
        device = self.program.inputs[0].device
        batches = chosen.batches(limit=self.task.calibrate)
        return [batch.on(device) for batch in batches]

    def _score(self, graph: nn.Module) -> float:
        score = network_score(self.program, graph)
        assert score is not None  # ``_tested`` checked it
        return score


Load = Callable[[], Bench]  # makes a new bench; other processes receive this function


def _sampled(task: Task) -> Task:
    """Return the task, if it has the samples that a study needs.

    Raises:
        InputError: there are no training samples, or no test samples.
    """
    if task.train is None or len(task.train) == 0:
        raise InputError("a study averages feature errors over training samples, but there are none")
    if task.test is None or len(task.test) == 0:
        raise InputError(f"a study measures a metric, and '{task.source}' has no test samples")
    return task


def _tested(program: Program) -> Program:
    """Return the program, if its test samples have targets.

    Raises:
        InputError: they have none, or targets that fit no task.
    """
    if objective_of(program) is None:
        raise InputError(f"a study measures a metric, and the test samples of '{program.task.source}' have no targets")
    return program


def _traced(subject: Subject) -> Program:
    try:
        return trace(subject.module, subject.inputs, frontend=subject.frontend)
    except FixedAxisError as error:
        raise InputError(
            "a study runs the network on batches of several sizes, but the network fixes its batch size"
            + (f": {error.reason}" if error.reason else "")
        ) from error


def _placed(program: Program, target: Target) -> Program:
    """Move the program to the target's device; the tensors are copied first, because others share them.

    Raises:
        UnavailableError: the device is missing.
    """
    if target.device == "cpu":
        return program.with_(target=target)
    if not torch.cuda.is_available():
        raise UnavailableError(f"--target {target.device}: torch {torch.__version__} sees no CUDA device")
    graph = copy_weights(program.graph).to(target.device)
    return program.with_(
        graph=graph, dense=graph, inputs=tuple(x.to(target.device) for x in program.inputs), target=target
    )

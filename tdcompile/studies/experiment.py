"""``study``: how well approximation errors predict the metric, over layers, methods and compressions."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from tdcompile.backend.environment import environment
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.pipeline import fine_tuner
from tdcompile.core.registry import make, registered
from tdcompile.data.loading import Given
from tdcompile.data.loading import given as samples_of
from tdcompile.data.task import Task
from tdcompile.errors import InputError, TdcompileError, nearest
from tdcompile.ir.program import Site
from tdcompile.ir.target import Target
from tdcompile.studies.cell import Bench, Load, Point, Subject
from tdcompile.studies.correlation import taus
from tdcompile.studies.crew import Outcomes, Work, in_turn, over_processes, over_ray
from tdcompile.studies.findings import Cell, Failure, Findings, Omission, When
from tdcompile.studies.ledger import Ledger
from tdcompile.studies.page import render_html
from tdcompile.support.options import MOST_WORKERS, Count, Options
from tdcompile.support.spec import split

METHODS = ("cp4", "tucker2", "tt")
COMPRESSIONS = (0.5, 0.75, 0.9)

Told = Callable[[int, int, Cell | Failure], None]  # number of finished cells, number of all cells, the last cell


@dataclass(frozen=True)
class Grid(Options):
    """The values to vary, and the options of tuning.

    Attributes:
        methods: decompositions, optionally with options: ``tucker2{sweeps=0}``.
        compressions: shares of a layer's weights to remove, each in (0, 1).
        layers: patterns of layer names; empty selects all layers except the first and the last.
        seeds: number of seeds.
        seed: the first seed.
        tune: options of ``finetune``, e.g. ``epochs=5``, or ``none``.
    """

    methods: tuple[Annotated[str, registered(Decomposition)], ...] = METHODS
    compressions: tuple[Annotated[float, Field(title="a share", gt=0, lt=1)], ...] = COMPRESSIONS
    layers: tuple[str, ...] = ()
    seeds: Count = 1
    seed: int = 0
    tune: str = "none"

    def check(self) -> None:
        """Require at least one method and one compression, none of them twice, and options that tuning knows."""
        for name, values in (("method", self.methods), ("compression", self.compressions)):
            if not values:
                raise InputError(f"a study needs at least one {name}")
            if len(set(values)) < len(values):
                raise InputError(f"a {name} is given twice: {', '.join(map(str, values))}")
        if self.tune != "none":
            fine_tuner(self.tune)

    def points(self, sites: Mapping[str, Site]) -> tuple[list[Point], list[Omission]]:
        """Return the cells in order, seeds innermost, and the layers to which a method does not apply.

        Raises:
            InputError: a pattern matches no layer, or no method applies to any layer.
        """
        points, omitted = [], []
        for layer in self._chosen(sites):
            for method in self.methods:
                reason = make(Decomposition, method).refuse(sites[layer].layer)
                if reason is not None:
                    omitted.append(Omission(layer=layer, method=method, reason=reason.text))
                    continue
                seeds = range(self.seed, self.seed + self.seeds)
                points += [Point(layer, method, share, seed) for share in self.compressions for seed in seeds]
        if not points:
            why = f" ({omitted[0].method} of '{omitted[0].layer}': {omitted[0].reason})" if omitted else ""
            raise InputError(f"there is no cell to measure: {', '.join(self.methods)} apply to no chosen layer{why}")
        return points, omitted

    def _chosen(self, sites: Mapping[str, Site]) -> list[str]:
        names = list(sites)
        if not self.layers:
            return names[1:-1]
        for pattern in self.layers:
            if not fnmatch.filter(names, pattern):
                raise InputError(f"--layers '{pattern}' matches no layer: {nearest(pattern, names)}")
        return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.layers)]


def study(
    module: nn.Module,
    inputs: Sequence[Tensor] | Tensor,
    data: Task | Given,
    *,
    methods: str | Sequence[str] = METHODS,
    compressions: float | Sequence[float] = COMPRESSIONS,
    layers: str | Sequence[str] = (),
    seeds: int = 1,
    seed: int = 0,
    tune: str = "none",
    out: str | Path | None = None,
    jobs: int = 1,
    ray: bool = False,
    resume: bool = False,
    told: Told | None = None,
) -> Findings:
    """Study how approximation errors rank compressed networks (arXiv 2305.05318).

    One layer is compressed at a time, from its weights alone. For each cell (layer, method, compression, seed) the
    study measures six errors, and the metric on the test samples before and after fine-tuning of the whole network.
    The metric is the object of the study; no choice depends on it. The paper starts CP at random in each run. The
    factorisations here are deterministic: a seed changes the calibration samples and the draws of fine-tuning, and the
    metric before fine-tuning is the same for all seeds.

    Args:
        module: the network; it is not changed.
        inputs: example inputs in the order of ``forward``'s arguments.
        data: training samples and labelled test samples, in the forms of ``compile``. The ``calibrate`` and
            ``evaluate`` of a ``Task`` limit the samples that are read; of other data the study reads 1,024 and all.
        methods: names of decompositions, or one text ``tucker2,tt``.
        compressions: shares of a layer's weights to remove, or one share.
        layers: patterns of layer names, or one text; by default all layers except the first and the last.
        seeds: number of seeds, starting at ``seed``; the paper uses 5.
        tune: options of the pass ``finetune``, e.g. ``epochs=5``.
        out: a folder for ``cells.jsonl``, ``study.json`` and ``study.html``; by default nothing is written.
        jobs: parallel processes; with more than one the module and the data must be picklable.
        ray: use Ray instead of processes.
        resume: continue from the cells in ``out``.
        told: called after each cell.

    Raises:
        InputError: an argument cannot be used.
        UnavailableError: Ray is not installed.
    """
    given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    if not isinstance(data, Task):
        name = data if isinstance(data, str) else "given"
        data = Task(*samples_of(data, tuple(given[0].shape[1:]), dtype=given[0].dtype), source=name)
    shares = (compressions,) if isinstance(compressions, int | float | str) else tuple(compressions)
    grid = Grid(_listed(methods), shares, _listed(layers), seeds, seed, tune)
    load = partial(_given, Subject(module, given, data))
    return run(load, grid, source=type(module).__name__, out=out, jobs=jobs, ray=ray, resume=resume, told=told)


def run(
    load: Callable[[], Subject],
    grid: Grid,
    *,
    source: str,
    target: Target | None = None,
    out: str | Path | None = None,
    jobs: int = 1,
    ray: bool = False,
    resume: bool = False,
    told: Told | None = None,
) -> Findings:
    """Run a study of a network that every process loads itself.

    Args:
        load: makes the subject; must be picklable if there are several jobs.
        source: name of the network.
        target: the device that runs the network; by default the CPU.

    Raises:
        InputError: an argument cannot be used.
        UnavailableError: Ray is not installed, or the device is missing.
    """
    if type(jobs) is not int or not 1 <= jobs <= MOST_WORKERS:
        raise InputError(f"jobs={jobs!r} must be a whole number in [1, {MOST_WORKERS}]")
    if resume and out is None:
        raise InputError("resume=True has no effect without out, the folder that keeps the cells of a study")
    ledger = Ledger(Path(out) if out is not None else None, resume=resume)
    target = target or Target()
    make_bench: Load = partial(_bench, load, grid.tune, target)
    bench = make_bench()
    points, omitted = grid.points(bench.sites)
    digest = bench.digest()
    keyed = [(point, bench.key(point, digest)) for point in points]
    todo = [(point, key) for point, key in keyed if key not in ledger.cells]
    failed = _measure(_crew(bench, make_bench, todo, jobs, ray), ledger, len(keyed) - len(todo), len(keyed), told)
    cells = tuple(ledger.cells[key] for _, key in keyed if key in ledger.cells)
    if not cells:
        raise TdcompileError(f"no cell could be measured; the first failed: {failed[0].reason}")
    made = _findings(bench, grid, source, cells, omitted, failed)
    ledger.finish({"study.json": made.to_json(), "study.html": render_html(made)})
    return made


def _crew(bench: Bench, load: Load, work: Work, jobs: int, ray: bool) -> Outcomes:
    if not work:
        return iter(())
    if ray:
        return over_ray(load, work, jobs)
    return over_processes(load, work, jobs) if jobs > 1 else in_turn(bench, work)


def _measure(outcomes: Outcomes, ledger: Ledger, done: int, of: int, told: Told | None) -> list[Failure]:
    failed = []
    for position, outcome in enumerate(outcomes, start=done + 1):
        if isinstance(outcome, Cell):
            ledger.add(outcome)
        else:
            failed.append(outcome)
        if told is not None:
            told(position, of, outcome)
    return failed


def _findings(
    bench: Bench,
    grid: Grid,
    source: str,
    cells: tuple[Cell, ...],
    omitted: Sequence[Omission],
    failed: Sequence[Failure],
) -> Findings:
    task = bench.task
    assert task.train is not None  # the bench checked it
    assert task.test is not None
    moments: tuple[When, ...] = ("before",) if grid.tune == "none" else ("before", "after")
    return Findings(
        source=source,
        data=task.source,
        metric=bench.metric,
        dense_score=bench.dense_score,
        methods=grid.methods,
        compressions=grid.compressions,
        layers=tuple(dict.fromkeys(cell.layer for cell in cells)),
        seeds=tuple(range(grid.seed, grid.seed + grid.seeds)),
        tune=bench.tune,
        calibrate=min(task.calibrate, len(task.train)),
        tested=min(task.evaluate or len(task.test), len(task.test)),
        cells=cells,
        taus=taus(cells, grid.compressions, moments, bench.metric),
        omitted=tuple(omitted),
        failed=tuple(sorted(failed, key=lambda one: (one.layer, one.method, one.compression, one.seed))),
        seconds=math.fsum(cell.seconds for cell in cells),
        environment=environment(bench.program.target),
    )


def _listed(given: str | Sequence[str]) -> tuple[str, ...]:
    """Read a text as the flag does."""
    return tuple(split(given)) if isinstance(given, str) else tuple(given)


def _given(subject: Subject) -> Subject:
    return subject


def _bench(load: Callable[[], Subject], tune: str, target: Target) -> Bench:
    return Bench(load(), tune, target)

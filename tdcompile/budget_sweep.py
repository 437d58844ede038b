"""``sweep``: compile a network at several budgets from one calibration and one table of prices."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from tdcompile.artifact.checkpoint import Checkpoint
from tdcompile.artifact.front import Sweep, SweepModel, SweepPoint, joined, models_of
from tdcompile.backend.environment import environment
from tdcompile.compiler import Compilation, after_exact, key_parts, prepare, resolved_call
from tdcompile.core.free_threads import FreeThreads
from tdcompile.core.hooks import Hook, RunRecord
from tdcompile.core.passes import Pass
from tdcompile.core.pipeline import Pipeline, check_hooks
from tdcompile.core.plan import Candidates, FloatCandidates, RankPlan
from tdcompile.data.loading import Given
from tdcompile.data.metric import About
from tdcompile.data.task import Task
from tdcompile.errors import BudgetError, InputError, ParityError
from tdcompile.frontend.tracing import check_is_network
from tdcompile.frontend.wrappers import unwrapped
from tdcompile.ir.diagnostics import Diagnostic
from tdcompile.ir.facts import Shared
from tdcompile.ir.modules import evaluating
from tdcompile.ir.program import Program
from tdcompile.ir.target import LIMITED, Budget
from tdcompile.planning.allocation import lowest_shares
from tdcompile.planning.input_checks import check_training_samples
from tdcompile.recipes import CompileOptions, Recipe

POINTS = 8
_MOST = 100  # points; more cannot be told apart
_UNKNOWN = 0.1  # least share where no table of prices tells what is reachable
_ABOVE = 1.001  # of the least reachable share: the sum of the cheapest candidates is within it
_ALIKE = 0.02  # budgets that differ by less give the same plan
_ANY_DROP = "100%"  # a point of a sweep shows what its budget costs, whatever it is


def sweep(
    module: nn.Module,
    inputs: Sequence[Any] | Mapping[str, Any] | Tensor,
    *,
    points: int = POINTS,
    data: Task | Given = None,
    recipe: str | Path | Recipe | None = None,
    workspace: str | Path | None = None,
    resume: bool = False,
    watch: Hook | None = None,
    notes: Sequence[Diagnostic] = (),
    **options: Unpack[CompileOptions],
) -> Sweep:
    """Compile a network at several budgets, and measure each: the front of quality against latency and size.

    Calibration, scores, prices and errors are computed once. Each point is then chosen, factorised, refitted, tuned if
    asked, exported, verified and measured. The budgets are evenly spaced from the least reachable share of the dense
    cost, or the share in ``budget``, up to the dense network.

    Args:
        module: see ``compile``.
        inputs: see ``compile``.
        points: number of budgets, at most 100.
        data: see ``compile``.
        recipe: see ``compile``.
        workspace: a folder that keeps the shared state and the finished points; by default nothing is kept.
        resume: continue from the state in the workspace, if there is one. It must belong to the same sweep.
        watch: a hook that observes every pass.
        notes: see ``compile``.
        **options: fields of ``Recipe``; ``budget={"latency": 0.3}`` names the cost and its least share, by default
            latency down to what is reachable.

    Raises:
        InputError: an argument cannot be used, or an option has no effect in a sweep.
        BudgetError: no budget gave a model.
        UnavailableError: the target's execution provider does not load.
    """
    start = time.perf_counter()
    if watch is not None:
        check_hooks([watch])
    if resume and workspace is None:
        raise InputError("resume=True has no effect without a workspace, the folder that keeps the state of a sweep")
    asked, name, least = sweep_recipe(resolved_call(recipe, options), points)
    check_is_network(module)
    own = Path(tempfile.mkdtemp(prefix="tdcompile-"))
    try:
        with FreeThreads() as threads, evaluating(module):
            program = prepare(module, inputs, asked.data if data is None else data, asked, notes)
            pipeline = asked.steps()
            pipeline.check(program.facts, planned=True)
            check_training_samples(pipeline, program.task)
            folder = own if workspace is None else Path(workspace)
            state = Checkpoint(folder, {**key_parts(program, asked), "points": json.dumps([points, least])})
            source = asked.source or type(unwrapped(module)).__name__
            compilation = Compilation(asked, pipeline, source, own, state, threads, start)
            ledger = _Ledger(folder / "points", fresh=not resume)
            work = _Sweeping(compilation, ledger, name, [] if watch is None else [watch])
            return work.run(program, points, least, resume=resume)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def sweep_recipe(recipe: Recipe, points: int) -> tuple[Recipe, str, float | None]:
    """Return the recipe of every point, the cost that is swept, and its least share if one is given.

    Raises:
        InputError: an option has no effect in a sweep, or the number of points does not fit.
    """
    if isinstance(points, bool) or not isinstance(points, int) or not 2 <= points <= _MOST:
        raise InputError(f"a sweep has 2 to {_MOST} points, not {points!r}")
    for option, why in (("goal", "it tries budgets itself"), ("plan", "it makes a plan for each budget")):
        if getattr(recipe, option) is not None:
            raise InputError(f"'{option}' has no effect in a sweep, because {why}: leave it out")
    for option in ("max_drop", "min_speedup"):
        if getattr(recipe, option) is not None:
            raise InputError(f"'{option}' has no effect in a sweep, which shows what every budget costs: leave it out")
    given = dict(recipe.budget) if "budget" in recipe.model_fields_set else {}
    if len(given) > 1:
        raise InputError(f"a sweep varies one cost, and the budget names {' and '.join(given)}: give one of them")
    name, least = next(iter(given.items()), ("latency", None))
    if least == 1.0:
        raise InputError(f"budget {name}=1 leaves nothing to sweep: it is the least share, e.g. {name}=0.3")
    changes = {"budget": {name: 1.0}, "max_drop": _ANY_DROP, "min_speedup": None}
    return recipe.model_copy(update=changes), name, least


@dataclass
class _Learned(Hook):
    """Keeps the candidates with the prices that the last point corrected."""

    table: Candidates | None = None

    def finished(self, step: Pass, program: Program, seconds: float) -> None:
        """Keep the candidates of a pass that gives a plan."""
        if RankPlan in step.gives:
            self.table = program.facts.get(Candidates)


@dataclass(frozen=True)
class _Record:
    """A finished point on disk: budget, plan as text, all models of its compilation, and what they are judged by."""

    share: float
    kept: float
    plan: str
    measure: About | None
    models: tuple[SweepModel, ...]
    seconds: float


_RECORD: TypeAdapter[_Record] = TypeAdapter(_Record)


class _Ledger:
    """The finished points of a sweep, one file each.

    Args:
        folder: the folder, made when the first point is written.
        fresh: delete what an earlier sweep left.
    """

    def __init__(self, folder: Path, *, fresh: bool) -> None:
        self._folder = folder
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)

    def get(self, number: int) -> _Record | None:
        """Return a finished point; None if there is none, or its file cannot be read."""
        try:
            return _RECORD.validate_json(self._file(number).read_bytes())
        except (OSError, ValidationError):
            return None

    def add(self, number: int, record: _Record) -> None:
        """Write a point; the file is whole or absent."""
        self._folder.mkdir(parents=True, exist_ok=True)
        draft = self._file(number).with_suffix(".draft")
        draft.write_bytes(_RECORD.dump_json(record))
        draft.replace(self._file(number))

    def _file(self, number: int) -> Path:
        return self._folder / f"{number}.json"


@dataclass(frozen=True)
class _Sweeping:
    """One call of ``sweep``.

    Attributes:
        compilation: the recipe of all points; its checkpoint keeps the shared state.
        ledger: the finished points.
        name: the cost that is swept, as in a budget.
        watch: hooks that observe the passes.
        notes: budgets that gave no model.
    """

    compilation: Compilation
    ledger: _Ledger
    name: str
    watch: Sequence[Hook]
    notes: list[str] = field(default_factory=list)

    def run(self, program: Program, points: int, least: float | None, *, resume: bool) -> Sweep:
        """Run the shared passes, then every point."""
        start = self.compilation.start
        passes = after_exact(self.compilation.pipeline, program.task)
        place = _first_planner(passes)
        shared, rest = Pipeline(passes.steps[:place]), Pipeline(passes.steps[place:])
        checkpoint = self.compilation.checkpoint
        assert checkpoint is not None  # ``sweep`` gives one
        record = RunRecord(start=start)
        hooks = self.compilation.hooks(record, self.watch, resume=resume)
        program = shared.run(program.with_(workspace=checkpoint.folder), hooks)
        program.facts.derived(Shared, Shared)  # all points start from these facts
        seconds = {"shared": time.perf_counter() - start}
        records = list(self._records(program, rest, points, least))
        if not records:
            raise BudgetError(f"no budget gave a model: {'; '.join(self.notes)}")
        records.sort(key=lambda one: one.share)
        dense, compiled = joined([one.models for one in records])
        made = tuple(
            SweepPoint(number, {self.name: one.share}, RankPlan.from_json(one.plan), models, one.seconds)
            for number, (one, models) in enumerate(zip(records, compiled, strict=True), start=1)
        )
        seconds |= {"points": sum(one.seconds for one in records), "total": time.perf_counter() - start}
        source, measure = self.compilation.source, records[0].measure
        return Sweep(source, measure, dense, made, seconds, environment(program.target), tuple(self.notes))

    def _records(self, program: Program, rest: Pipeline, points: int, least: float | None) -> Iterator[_Record]:
        """Yield the finished points: the least budget first, which tells what the graph can reach."""
        low, high = _range(program, self.name)
        low = max(low, least or 0.0)
        learned = _Learned()
        for number in range(points):
            if number and high - low < _ALIKE * high:
                self.notes.append(
                    f"there is one point, because no budget tells plans apart: {self.name} reaches {low:.3g} of the "
                    f"dense network's at least and {high:.3g} at most"
                )
                return
            share = low + (high - low) * number / points
            known = self.ledger.get(number)
            if known is None:
                known = self._built(_with_prices(program, learned.table), rest, share, learned)
                if known is None:
                    continue
                self.ledger.add(number, known)
            if number == 0 and least is None:
                low = min(max(known.share, known.kept), high)
            yield known

    def _built(self, program: Program, rest: Pipeline, share: float, learned: _Learned) -> _Record | None:
        """Compile at a share of the dense cost; None, with a note, if that gives no model."""
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="tdcompile-") as folder:
            one = replace(self.compilation, folder=Path(folder), checkpoint=None, start=began)
            try:
                planned = program.with_(budget=Budget(**{self.name: share}))
                compiled = one.run(planned, rest, [*self.watch, learned])
            except (BudgetError, ParityError) as error:
                self.notes.append(f"{self.name}={share:.3g}: {error}")
                return None
            measure, models = models_of(compiled.report)
        plan, cost = compiled.plan, LIMITED[self.name]
        kept = getattr(plan.predicted, cost) / (getattr(plan.dense, cost) or 1.0)
        return _Record(share, kept, plan.to_json(), measure, models, time.perf_counter() - began)


def _first_planner(passes: Pipeline) -> int:
    """Return the place of the first pass that makes a plan.

    Raises:
        InputError: a pass before it trains, which every point would have to repeat.
    """
    for place, step in enumerate(passes.steps):
        if RankPlan in step.gives:
            return place
        if step.trains:
            raise InputError(f"the pipeline '{passes}' trains in '{step.name}' before it makes a plan: it has no sweep")
    raise InputError(f"the pipeline '{passes}' makes no plan: it needs a pass such as 'choose'")


def _range(program: Program, name: str) -> tuple[float, float]:
    """Return the least share of a cost that the candidates reach, and that of the dense network in their precision."""
    candidates, floats = program.facts.get(Candidates), program.facts.get(FloatCandidates)
    if candidates is None:
        return _UNKNOWN, 1.0
    cost, budget = LIMITED[name], Budget(**{name: 1.0})
    low = lowest_shares(candidates, budget)[name] * _ABOVE
    dense = getattr(candidates.dense, cost) / getattr(candidates.whole, cost)
    return min(low, 1.0), 1.0 if floats is not None and floats.candidates is not None else min(dense, 1.0)


def _with_prices(program: Program, learned: Candidates | None) -> Program:
    """Return the program with the prices that an earlier point corrected, in their own precision."""
    own = program.facts.get(Candidates)
    if learned is None or own is None or own.precision != learned.precision:
        return program
    return program.with_(facts=program.facts.having(learned))

"""``compile``: a network in, a verified ONNX model and its report out; the one engine behind command and API."""

from __future__ import annotations

import fnmatch
import json
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, fx, nn

from tdcompile.artifact.checkpoint import Checkpoint
from tdcompile.artifact.folder import check_out, save_weights, write_folder
from tdcompile.artifact.measure import measure
from tdcompile.artifact.report import Report, render_html
from tdcompile.artifact.summary import Run, summarise
from tdcompile.backend.session import open_probe
from tdcompile.core.passes import AnalysisPass, TunePass
from tdcompile.core.pipeline import Pipeline, Silent, Watch, run_step
from tdcompile.core.plugin import Plugin
from tdcompile.data.loading import Given
from tdcompile.data.task import Task, accuracy
from tdcompile.errors import InputError, nearest
from tdcompile.frontend.half_precision import samples_cast_like
from tdcompile.frontend.tracing import check_is_network, trace
from tdcompile.ir.diagnostics import Diagnostic
from tdcompile.ir.facts import Fact
from tdcompile.ir.modules import evaluating, outputs_of
from tdcompile.ir.plan import RankPlan
from tdcompile.ir.program import Program, sites
from tdcompile.ir.target import Budget
from tdcompile.planning.plan_file import adopt
from tdcompile.recipes import Recipe, known_beside, load_recipe
from tdcompile.training.distributed import from_first, is_first, no_gpu
from tdcompile.training.run_state import Saved, kept_in, key_of

T = TypeVar("T")


@dataclass(frozen=True)
class Compiled:
    """What ``compile`` made.

    Attributes:
        module: the compiled network in PyTorch, batch norm folded, in eval mode.
        report: every figure.
        plan: what became of every layer.
        folder: holds ``model.onnx`` and ``dense.onnx`` as long as this object lives; ``save`` keeps them. Of several
            processes it is that of the first, who is the one to save it; the others have the module as it was trained.
    """

    module: fx.GraphModule
    report: Report
    plan: RankPlan
    folder: Path
    _checkpoint: Checkpoint | None = field(repr=False, default=None)

    @property
    def onnx(self) -> Path:
        """The compiled model's file."""
        return self.folder / "model.onnx"

    def save(self, out: str | Path, command: Sequence[str] = ()) -> Path:
        """Write the artefact folder: models, weights, plan, report and manifest; whole or not at all.

        Args:
            out: the folder; one that exists must be empty or an earlier one of ours.
            command: the command line, for the manifest.

        Raises:
            InputError: the folder is somebody else's, or cannot be written.
        """
        check_out(Path(out))
        weights = self.folder / "weights.safetensors"
        save_weights(self.module, weights, {"source": self.report.source})
        files: dict[str, bytes | str | Path] = {
            "model.onnx": self.onnx,
            "dense.onnx": self.folder / "dense.onnx",
            "weights.safetensors": weights,
            "plan.json": self.plan.to_json(),
            "report.json": self.report.to_json(),
            "report.html": render_html(self.report),
        }
        info = {
            "versions": self.report.environment,
            "command": list(command),
            "seed": self.report.seed,
            "pipeline": self.report.pipeline,
        }
        written = write_folder(Path(out), files, info=info)
        if self._checkpoint is not None:
            self._checkpoint.drop()  # not before: a disk that is full now must not cost the run
        return written


def compile(  # the field's word, as in torch.compile
    module: nn.Module,
    inputs: Sequence[Any] | Mapping[str, Any] | Tensor,
    *,
    data: Task | Given = None,
    recipe: str | Path | Recipe | None = None,
    workspace: str | Path | None = None,
    resume: bool = False,
    watch: Watch | None = None,
    **options: Any,
) -> Compiled:
    """Compile a network: trace, choose forms and ranks, factorise, tune, export, verify, measure.

    Args:
        module: the network; it is not changed.
        inputs: example inputs: a tensor, ``forward``'s arguments in order, or a mapping of them by name.
        data: training samples, or a pair of (training, test) samples: as a torch ``Dataset`` or ``DataLoader``, arrays
            ``(x, y)``, ``Samples``, or a text as of ``--data`` (see ``data.given``); or a ``Task``. None takes what the
            recipe names; all but training and the scores that read samples runs without.
        recipe: a shipped recipe's name, a TOML file, or a ``Recipe``; ``options`` override it.
        workspace: a folder that keeps the state between passes, until the result is saved; none by default.
        resume: go on from the state in the workspace, where there is one; it must be of this very compilation, but for
            the gates, ``eval`` and ``jobs``.
        watch: told of every pass.
        **options: fields of ``Recipe``: ``budget={"latency": 0.5}``, ``target="cpu"``, ``tune="epochs=5"``, ...; a
            ``Budget``, a ``Pipeline`` and a ``RankPlan`` (that of another ``Compiled``) are taken as they are.

    Raises:
        InputError: something given cannot be used.
        BudgetError: no plan meets the budget.
        ParityError: an exported model does not compute what its PyTorch network computes.
        UnavailableError: the target's execution provider does not load.
    """
    start = time.perf_counter()
    chosen = resolve(recipe, options)
    if not isinstance(recipe, Recipe) and (lost := [name for name in ("weights", "input") if getattr(chosen, name)]):
        raise InputError(
            f"'{lost[0]}' is for the command: here the network and its example inputs are given themselves"
        )
    pipeline = chosen.steps()
    check_is_network(module)
    with evaluating(module):  # a network that cannot be copied is traced itself
        program = prepare(module, inputs, chosen.data if data is None else data, chosen)
        pipeline.check(program.facts, planned=True)
        _check_trainable(pipeline, program)
        _check_testable(chosen, program)
        folder = Path(tempfile.mkdtemp(prefix="tdcompile-"))
        try:
            home = None if workspace is None else Path(workspace)
            named = chosen.source or type(module).__name__
            compiled = _compiled(program, named, chosen, pipeline, folder, home, resume, watch or Silent(), start)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    weakref.finalize(compiled, shutil.rmtree, folder, ignore_errors=True)
    return compiled


def _compiled(
    program: Program,
    named: str,
    chosen: Recipe,
    pipeline: Pipeline,
    folder: Path,
    workspace: Path | None,
    resume: bool,
    watch: Watch,
    start: float,
) -> Compiled:
    """Run the pipeline, then export, verify and measure into ``folder``; of several processes the first alone does."""
    driver = _Driver(
        pipeline,
        watch,
        Checkpoint(workspace, _key(program, chosen)) if workspace else None,
        {"trace": time.perf_counter() - start},
    )
    program = driver.run(program.with_(workspace=workspace or folder), resume)
    made: list[fx.GraphModule] = []

    def verified() -> tuple[Report, Path]:
        began = time.perf_counter()
        stamp = {
            "producer": f"tdcompile {version('tdcompile')}",
            "source": named,
            "plan": _stamp(program),
        }
        outcome = measure(program, folder, stamp=stamp)
        seconds = {**driver.seconds, "verify": time.perf_counter() - began}
        before = outcome.compiled.accuracy if driver.before_tuning is None else driver.before_tuning
        run = Run(
            named,
            str(pipeline),
            seconds,
            time.perf_counter() - start,
            before,
            max_drop=chosen.max_drop,
            min_speedup=chosen.min_speedup,
        )
        made.append(outcome.compiled.module)
        return summarise(program, outcome, run), folder

    report, where = driver.first(verified)
    module = made[0] if made else program.graph
    return Compiled(module, report, program.facts[RankPlan], where, driver.checkpoint)


def resolve(recipe: str | Path | Recipe | None, options: Mapping[str, Any]) -> Recipe:
    """One recipe out of a recipe and the options that override it.

    Raises:
        InputError: an unknown recipe or option, or a value of the wrong kind.
    """
    given = {key: _plain(value) for key, value in options.items()}
    if isinstance(recipe, Recipe):
        return load_recipe(None, {**known_beside(recipe.model_dump(exclude_unset=True), given), **given})
    return load_recipe(None if recipe is None else str(recipe), given)


def _plain(value: Any) -> Any:
    """An option as a recipe holds it: our own objects are taken too."""
    if isinstance(value, Budget):
        return value.shares
    if isinstance(value, RankPlan):
        return value.to_json()
    if isinstance(value, Path | Pipeline):
        return str(value)
    return tuple(value) if isinstance(value, list) else value


def prepare(
    module: nn.Module,
    inputs: Sequence[Any] | Mapping[str, Any] | Tensor,
    data: Task | Given,
    recipe: Recipe,
) -> Program:
    """The program that the passes of a recipe run on.

    Raises:
        InputError: wrong inputs, weights with NaN, a pattern that matches no layer, a plan for another network.
        UnavailableError: the target's execution provider does not load.
    """
    target = recipe.device()
    budget = recipe.shares()
    open_probe(target)  # before any work
    program = trace(
        module, inputs, frontend=recipe.frontend, dynamic_batch=recipe.dynamic_batch, dynamic=recipe.dynamic
    )
    task = recipe.task(data, program.inputs[0])
    train, test = (samples_cast_like(samples, program.inputs) for samples in (task.train, task.test))
    task = replace(task, train=train, test=test)
    program = program.with_(task=task, target=target, budget=budget, seed=recipe.seed)
    program = program.with_(keep_dense=_kept(program, recipe.keep_dense))
    _check_samples(program)
    _check_labels(program)
    return adopt(program, recipe.plan) if recipe.plan else program


@dataclass
class _Driver:
    """Runs the steps, times them, keeps the state after each, and tests the network before the first training pass.

    Of several processes the first alone analyses, and keeps the state; all of them rewrite and tune.
    """

    pipeline: Pipeline
    watch: Watch
    checkpoint: Checkpoint | None
    seconds: dict[str, float]
    before_tuning: float | None = None
    cpu: bool = True

    def run(self, program: Program, resume: bool) -> Program:
        done, self.cpu = 0, no_gpu(program.target.device)
        if self.checkpoint and resume and (restored := self.checkpoint.restore(program)):
            program, done, self.seconds, self.before_tuning = restored
        if self.first(lambda: done) != done:
            raise InputError("to resume in several processes they all need the folder with the state: share it")
        steps = self.pipeline.steps
        for step in steps if self.checkpoint and is_first() and not resume else ():
            _forget(program, step)
        for position in range(done, len(steps)):
            step = steps[position]
            if isinstance(step, TunePass) and step.trains and self.before_tuning is None:
                self.before_tuning = self.first(partial(_tested, program))
            began = time.perf_counter()
            work = partial(run_step, step, program, self.watch, position, len(steps))
            if isinstance(step, AnalysisPass):
                program = program.with_(facts=program.facts.having(*self.first(partial(_given, step, work))))
            else:
                program = work()
            self.seconds[step.name] = self.seconds.get(step.name, 0.0) + time.perf_counter() - began
            if self.checkpoint and is_first():
                self.checkpoint.save(program, position + 1, self.seconds, self.before_tuning)
            if self.checkpoint is None or is_first():  # not before: a full disk would cost the training
                _forget(program, step)
        return program

    def first(self, work: Callable[[], T]) -> T:
        """What the work gives in the first process, in all of them."""
        return from_first(work, self.cpu)


def _forget(program: Program, step: Plugin) -> None:
    """Drop the state of its training, of a pass that trains."""
    if isinstance(step, TunePass):
        Saved(kept_in(program.workspace, step), "").clear()


def _given(step: AnalysisPass, work: Callable[[], Program]) -> list[Fact]:
    """What the pass has found, and nothing else: what is known already need not be sent again."""
    program = work()
    return [program.facts[kind] for kind in step.gives]


def _tested(program: Program) -> float | None:
    return accuracy(program.graph, program.task.test, program.task.evaluate)


def _kept(program: Program, patterns: Sequence[str]) -> dict[str, str]:
    """The layers that patterns leave dense.

    Raises:
        InputError: a pattern matches no layer, or there is none to match.
    """
    found = sites(program)
    if not found:
        said = "; ".join(entry.text for entry in program.history if isinstance(entry, Diagnostic))
        raise InputError(f"the network has no convolution or linear layer to factorise{f': {said}' if said else ''}")
    kept: dict[str, str] = {}
    for pattern in patterns:
        matched = fnmatch.filter(found, pattern)
        if not matched:
            raise InputError(f"--keep-dense '{pattern}' matches no layer: {nearest(pattern, found)}")
        kept |= dict.fromkeys(matched, f"left alone as asked by '{pattern}'")
    return kept


def _check_trainable(pipeline: Pipeline, program: Program) -> None:
    """Who asks for training is to have something to train on.

    Raises:
        InputError: there is a pass that trains, and there are no training samples.
    """
    if pipeline.trainer and program.task.train is None:
        raise InputError(f"'{pipeline.trainer}' trains, and there is nothing to train on: give data")


def _check_testable(recipe: Recipe, program: Program) -> None:
    """Who bounds the loss of accuracy is to have something to tell it by.

    Raises:
        InputError: there is a bound, and there are no labelled test samples.
    """
    test = program.task.test
    if recipe.max_drop is not None and (test is None or test.classes is None or not len(test)):
        raise InputError(
            f"max_drop={recipe.max_drop:g} bounds the loss of accuracy, and there are no labelled test samples to tell "
            "it by: give data that have them"
        )


def _check_samples(program: Program) -> None:
    """A sample is to have as many parts as the network has example inputs.

    Raises:
        InputError: it has fewer or more.
    """
    for samples, what in ((program.task.train, "training"), (program.task.test, "test")):
        if samples is not None and len(samples):
            count = len(next(samples.batches(1, limit=1)).inputs)
            if count != len(program.inputs):
                raise InputError(
                    f"a {what} sample has {count} input(s), and the network was given {len(program.inputs)}"
                )


def _check_labels(program: Program) -> None:
    """Labels must be classes that the network has.

    Raises:
        InputError: there are more classes than outputs.
    """
    classes = max((s.classes or 0 for s in (program.task.train, program.task.test) if s is not None), default=0)
    if not classes:
        return
    scores = outputs_of(program.graph, program.inputs)[0]
    if scores.dim() != 2 or classes > scores.shape[1]:
        shape = "x".join(map(str, scores.shape))
        raise InputError(
            f"the labels go up to {classes - 1}, and the network's output is {shape}: expected a score for each class"
        )


def _stamp(program: Program) -> str:
    plan = program.facts[RankPlan]
    return json.dumps({name: [choice.decomposition, *choice.ranks] for name, choice in plan.choices.items()})


def _key(program: Program, recipe: Recipe) -> dict[str, str]:
    """What makes two compilations the same one, part by part: options, network, example inputs, data, a given plan.

    What changes no pass's result is left out: where things came from, gates, how the end is tested, and the jobs.
    """
    task, plan = program.task, program.facts.get(RankPlan)
    inputs = [(tuple(x.shape), str(x.dtype)) for x in program.inputs]
    data = [samples.fingerprint() for samples in (task.train, task.test) if samples is not None and len(samples)]
    return {
        **{name: json.dumps(value, sort_keys=True) for name, value in recipe.deciding().items()},
        "network": key_of([program.dense], program.dense.code),
        "example inputs": key_of([], inputs, str(program.axes)),
        "samples": key_of([], task.source, data),
        "plan": key_of([], plan.to_json()) if plan else "none",
    }

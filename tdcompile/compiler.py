"""``compile``: prepare a network, run the pipeline, export, verify, measure and report; command and API both use it."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Unpack

from torch import Tensor, fx, nn

from tdcompile.artifact.checkpoint import Checkpoint, SaveCheckpoint
from tdcompile.artifact.folder import check_out, save_weights, write_folder
from tdcompile.artifact.report import Report, render_html
from tdcompile.artifact.summary import Run, summarise
from tdcompile.backend.evaluation import check_answers
from tdcompile.backend.export_and_measure import measure
from tdcompile.backend.session import open_probe
from tdcompile.core.free_threads import FreeThreads
from tdcompile.core.hooks import Hook, KeepBefore, RunRecord, StepTimer
from tdcompile.core.passes import Pass, RewritePass
from tdcompile.core.pipeline import Pipeline, check_hooks
from tdcompile.core.plan import Candidates, RankPlan, dense_of
from tdcompile.core.registry import declaring, make
from tdcompile.data.loading import Given
from tdcompile.data.task import Task
from tdcompile.errors import InputError
from tdcompile.frontend.half_precision import samples_cast_like
from tdcompile.frontend.tracing import check_is_network, trace
from tdcompile.frontend.wrappers import unwrapped
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode, Reason
from tdcompile.ir.modules import evaluating
from tdcompile.ir.program import Change, Program
from tdcompile.ir.scoring import scoring
from tdcompile.ir.target import Budget, Precision, total
from tdcompile.planning.allocation import keeps_counts
from tdcompile.planning.input_checks import (
    calibrated,
    check_class_names,
    check_not_quantised,
    check_outputs_to_judge,
    check_precision,
    check_sample_inputs,
    check_samples_to_judge,
    check_training_samples,
    equal_samples_warnings,
    float_layers,
    matched_layers,
    scale_warnings,
)
from tdcompile.planning.plan_file import adopt, read_plan
from tdcompile.planning.synthetic_data import BringSamples, cautions, check_synthetic, makers, offer
from tdcompile.recipes import CompileOptions, Recipe, load_recipe, not_replaced
from tdcompile.support.allowed_drop import AllowedDrop
from tdcompile.support.spec import parse_spec
from tdcompile.training.distributed import from_first, is_first, no_gpu
from tdcompile.training.hooks import DeleteTrainingState, FirstProcessDecides, ScoreBeforeTraining
from tdcompile.training.run_state import key_of

_FACTORS = "factorize"  # the first pass that depends on the plan
# Before the passes of every pipeline that change more than exact rewrites: a network that has no ONNX form is refused
# at once.
EXPORT_FIRST = "export-dense"


@dataclass(frozen=True)
class Compiled:
    """The result of ``compile``.

    Attributes:
        module: the compiled network in PyTorch, batch norm folded, in eval mode. In several processes only the first
            has it so; the others have the network as it was trained.
        report: all figures.
        plan: the decomposition and ranks of every layer.
        folder: contains ``model.onnx`` and ``dense.onnx``; it is deleted with this object, so call ``save``. In several
            processes it is the folder of the first.
    """

    module: fx.GraphModule
    report: Report
    plan: RankPlan
    folder: Path
    _checkpoint: Checkpoint | None = field(repr=False, default=None)

    @property
    def onnx(self) -> Path:
        """The file of the compiled model."""
        return self.folder / "model.onnx"

    def save(self, out: str | Path, command: Sequence[str] = ()) -> Path:
        """Write the artefact folder atomically: models, weights, plan, report and manifest.

        Args:
            out: the folder; an existing one must be empty or an earlier artefact folder.
            command: the command line, for the manifest.

        Raises:
            InputError: the folder has other files, or cannot be written.
        """
        check_out(Path(out))
        weights = self.folder / "weights.safetensors"
        save_weights(self.module, weights, {"source": self.report.source})
        models = ("model.onnx", "dense.onnx", *(one.file for one in self.report.variants))
        files: dict[str, bytes | str | Path] = {
            **{name: self.folder / name for name in models},
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
            self._checkpoint.drop()  # last: if the disk is full, the run can still be resumed
        return written


def compile(  # the field's word, as in torch.compile
    module: nn.Module,
    inputs: Sequence[Any] | Mapping[str, Any] | Tensor,
    *,
    data: Task | Given = None,
    recipe: str | Path | Recipe | None = None,
    workspace: str | Path | None = None,
    resume: bool = False,
    watch: Hook | None = None,
    notes: Sequence[Diagnostic] = (),
    **options: Unpack[CompileOptions],
) -> Compiled:
    """Compile a network: trace, choose decompositions and ranks, factorise, tune, export, verify, measure.

    Args:
        module: the network; it is not changed.
        inputs: example inputs: a tensor, the arguments of ``forward`` in order, or a mapping of them by name.
        data: training samples, or a pair of (training, test) samples: as a torch ``Dataset`` or ``DataLoader``, arrays
            ``(x, y)``, ``Samples``, or a text as of ``--data`` (see ``data.given``); or a ``Task``. ``synthetic``, also
            in place of the training samples of a pair, makes them from the statistics of batch norm. None takes the
            data that the recipe names; without data, only training and the scores that read samples are unavailable.
        recipe: the name of a shipped recipe, a TOML file, or a ``Recipe``; ``options`` override it.
        workspace: a folder that keeps the state between passes until the result is saved; by default nothing is kept.
        resume: continue from the state in the workspace, if there is one. It must belong to the same compilation; only
            the gates, ``eval`` and ``jobs`` may differ.
        watch: a hook that observes every pass.
        notes: messages about the network for the report, such as those that ``load_weights`` returns.
        **options: fields of ``Recipe``: ``budget={"latency": 0.5}``, ``target="cpu"``, ``tune="epochs=5"``, ...; a
            ``Budget``, a ``Pipeline`` and a ``RankPlan`` (that of another ``Compiled``) are also accepted.

    Raises:
        InputError: an argument cannot be used.
        BudgetError: no plan meets the budget.
        RuinedError: without targets, the outputs differ from the dense network's by as much as those vary.
        ParityError: the outputs of an exported model differ from those of its PyTorch network.
        UnavailableError: the target's execution provider does not load.
    """
    start = time.perf_counter()
    if watch is not None:
        check_hooks([watch])
    if resume and workspace is None:
        raise InputError("resume=True has no effect without a workspace, the folder that keeps the state of a run")
    chosen = resolved_call(recipe, options)
    pipeline = chosen.steps()
    check_is_network(module)
    with FreeThreads() as threads, evaluating(module):  # a network that cannot be copied is traced itself
        program = prepare(module, inputs, chosen.data if data is None else data, chosen, notes)
        pipeline.check(program.facts, planned=True)
        check_training_samples(pipeline, program.task)
        check_samples_to_judge(chosen.max_drop, program.task)
        if chosen.max_drop is not None:
            check_outputs_to_judge(f"max_drop={chosen.max_drop}", program)
        folder = Path(tempfile.mkdtemp(prefix="tdcompile-"))
        try:
            source = chosen.source or type(unwrapped(module)).__name__
            state = None if workspace is None else Checkpoint(Path(workspace), key_parts(program, chosen))
            compilation = Compilation(chosen, pipeline, source, folder, state, threads, start)
            compiled = compilation.run(
                program, after_exact(pipeline, program.task), [] if watch is None else [watch], resume=resume
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    weakref.finalize(compiled, shutil.rmtree, folder, ignore_errors=True)
    return compiled


def after_exact(pipeline: Pipeline, task: Task) -> Pipeline:
    """Return the steps on a prepared program: synthetic samples, the dense export, then all but exact rewrites."""
    return Pipeline((*makers(task), make(Pass, EXPORT_FIRST), *pipeline.split_exact()[1].steps))


@dataclass(frozen=True)
class Compilation:
    """From a prepared program to a compiled network; a sweep makes one of each of its points.

    Attributes:
        recipe: all options.
        pipeline: the passes that the recipe describes.
        source: the origin of the network, or the name of its class.
        folder: the exported models go here.
        checkpoint: keeps the state between passes; None keeps nothing.
        threads: fits torch's threads to the machine.
        start: the time at which ``compile`` was called.
    """

    recipe: Recipe
    pipeline: Pipeline
    source: str
    folder: Path
    checkpoint: Checkpoint | None
    threads: FreeThreads
    start: float

    def run(self, program: Program, passes: Pipeline, watch: Sequence[Hook] = (), *, resume: bool = False) -> Compiled:
        """Run passes in all processes; export, verify and measure in the first.

        Args:
            program: prepared, and with the facts of earlier passes.
            passes: the steps that are left.
            watch: hooks that observe the passes.
            resume: start from the state in ``checkpoint``.
        """
        workspace = self.folder if self.checkpoint is None else self.checkpoint.folder
        record = RunRecord({"trace": time.perf_counter() - self.start}, start=self.start)
        rewrites, before = rewrites_of(program), KeepBefore(_FACTORS)
        hooks = [*self.hooks(record, watch, resume=resume), before]
        program = passes.run(program.with_(workspace=program.workspace or workspace), hooks)
        result = self._first_process(program, record)
        again = self._without_slower(before.program, result.slower)
        if again is not None:
            rest = Pipeline(passes.steps[before.position :])
            program = rest.run(again, [self.threads, FirstProcessDecides(), StepTimer(record)])
            result = self._first_process(program, record)
        plan = replace(self._in_precision(program).facts[RankPlan], rewrites=rewrites)
        return Compiled(result.module, result.report, plan, result.folder, self.checkpoint)

    def _without_slower(self, program: Program | None, slower: Mapping[str, Reason]) -> Program | None:
        """Return the program before its factors with slower layers dense; None if they have to stay.

        They stay in a given plan, beside a limit on parameters or MACs that they keep, and after training, which would
        have to be repeated. The report then names them.
        """
        given = self.recipe.plan is not None or self.pipeline.trainer is not None
        if not slower or given or program is None or Candidates not in program.facts:
            return None
        again = _put_back(program, slower)
        return again if keeps_counts(again.facts[RankPlan], program.budget) else None

    def _first_process(self, program: Program, record: RunRecord) -> _Result:
        """Export, verify and measure in the first process; the others get all but the network."""
        program = self._in_precision(program)
        modules = [program.graph]

        def export_and_measure() -> tuple[Report, Path, Mapping[str, Reason]]:
            try:
                report, module, slower = self._export_and_measure(program, record)
            except BaseException:
                if self.checkpoint is not None:
                    self.checkpoint.note(record)
                raise
            modules.append(module)  # not returned: the other processes get the report only
            return report, self.folder, slower

        report, folder, slower = from_first(export_and_measure, no_gpu(program.target.device))
        return _Result(report, modules[-1], folder, slower)

    def _in_precision(self, program: Program) -> Program:
        """Return the program with a plan of the precision that was asked for: passes may make plans without one."""
        plan, precision = program.facts.get(RankPlan), program.target.precision
        if plan is None or self.recipe.precision == "auto" or plan.precision == precision:
            return program
        return program.with_(facts=program.facts.having(replace(plan, precision=precision)))

    def hooks(self, record: RunRecord, watch: Sequence[Hook], *, resume: bool) -> list[Hook]:
        """Return the hooks, outermost first: training state is deleted after the checkpoint that replaces it."""
        hooks: list[Hook] = [self.threads]
        if self.checkpoint is None or is_first():  # processes share the folder of a checkpoint; the first cleans it
            hooks.append(DeleteTrainingState(fresh=not resume))
        if self.checkpoint is not None:
            hooks.append(SaveCheckpoint(self.checkpoint, record, resume=resume))
        hooks += [BringSamples(), ScoreBeforeTraining(record), FirstProcessDecides(), StepTimer(record)]
        return [*hooks, *watch]

    def _export_and_measure(
        self, program: Program, record: RunRecord
    ) -> tuple[Report, fx.GraphModule, Mapping[str, Reason]]:
        """Return the report, the compiled network with batch norm folded, and the layers that are not faster in it."""
        began = time.perf_counter()
        if self.recipe.max_drop is None:
            check_answers(program)
        names = self.recipe.class_names()
        labels = {"labels": json.dumps(names, ensure_ascii=False)} if names else {}
        own = {"producer": f"tdcompile {version('tdcompile')}", "source": self.source, "plan": _stamp(program)}
        stamp = {**self.recipe.metadata, **labels, **own}
        outcome = measure(program, self.folder, stamp=stamp)
        record.add("verify", time.perf_counter() - began)
        run = Run(
            self.source,
            str(self.pipeline),
            dict(record.seconds),
            record.total,
            outcome.compiled.score if record.before_tuning is None else record.before_tuning,
            max_drop=None if self.recipe.max_drop is None else AllowedDrop.parse(self.recipe.max_drop),
            min_speedup=self.recipe.min_speedup,
            peak_memory_mb=record.peak_memory_mb,
            metadata=self.recipe.metadata,
            labels=names,
        )
        return summarise(program, outcome, run), outcome.compiled.module, outcome.slower


class _Result(NamedTuple):
    """What a compilation exported: see ``Compiled``; ``slower`` has the layers that are not faster than dense."""

    report: Report
    module: fx.GraphModule
    folder: Path
    slower: Mapping[str, Reason]


def _put_back(program: Program, slower: Mapping[str, Reason]) -> Program:
    """Return a program whose plan leaves layers dense."""
    plan, layers = program.facts[RankPlan], program.facts[Candidates].layers
    choices = {n: dense_of(layers[n]) if n in slower else choice for n, choice in plan.choices.items()}
    more = total([choices[name].cost - plan.choices[name].cost for name in slower])
    plan = replace(plan, choices=choices, predicted=plan.predicted + more, reasons={**plan.reasons, **slower})
    return program.with_(facts=program.facts.having(plan))


def resolve(recipe: str | Path | Recipe | None, options: Mapping[str, Any]) -> Recipe:
    """Return a recipe with options that override it.

    Raises:
        InputError: the recipe or an option is unknown, or a value has the wrong type.
    """
    given = {key: _plain(value) for key, value in options.items()}
    if isinstance(recipe, Recipe):
        return load_recipe(None, {**not_replaced(recipe.model_dump(exclude_unset=True), given), **given})
    return load_recipe(None if recipe is None else str(recipe), given)


def resolved_call(recipe: str | Path | Recipe | None, options: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a call from Python, which passes the network and its example inputs itself.

    Raises:
        InputError: see ``resolve``; or an option names weights or inputs.
    """
    chosen = resolve(recipe, options)
    lost = [name for name in ("weights", "input", "example") if getattr(chosen, name)]
    if lost and not isinstance(recipe, Recipe):
        raise InputError(
            f"'{lost[0]}' is an option of the command: pass the network and its example inputs instead"
            + ("; tdcompile.load_weights(network, FILE) loads a file" if "weights" in lost else "")
        )
    return chosen


def _plain(value: Any) -> Any:
    """Convert an option given as an object of this package to the form in a recipe."""
    if isinstance(value, Budget):
        return value.shares
    if isinstance(value, RankPlan):
        return value.to_json()
    if isinstance(value, Pipeline):
        return _text_of(value)
    if isinstance(value, Path):
        return str(value)
    return tuple(value) if isinstance(value, list) else value


def _text_of(pipeline: Pipeline) -> str:
    """Return the text form of a pipeline.

    Raises:
        InputError: the pipeline is empty, or its text reads back to another pipeline.
    """
    if not pipeline.steps:
        raise InputError("the pipeline has no passes")
    for step in pipeline.steps:
        try:
            alike = Pipeline.parse(str(step.spec())).steps == (step,)
        except InputError:
            alike = False
        if not alike:
            raise InputError(
                f"the pass {step!r} has no text form that reads back: its class needs a name of its own, and its "
                "options texts without commas and braces (lists without '+'); or run the pipeline by Pipeline.run"
            )
    return str(pipeline)


def prepare(
    module: nn.Module,
    inputs: Sequence[Any] | Mapping[str, Any] | Tensor,
    data: Task | Given,
    recipe: Recipe,
    notes: Sequence[Diagnostic] = (),
) -> Program:
    """Trace a network, rewrite it exactly, and check data, labels, patterns and plan of a recipe against it.

    The exact rewrites are those that the recipe's pipeline begins with, and those before which a given plan was made.
    ``notes`` are messages about the network, which its history then begins with.

    Raises:
        InputError: wrong inputs, weights with NaN, a pattern that matches no layer, a plan for another network.
        UnavailableError: the target's execution provider does not load.
    """
    target = recipe.device()
    given = None if recipe.plan is None else read_plan(recipe.plan).precision
    if given is not None and ("precision" not in recipe.model_fields_set or recipe.precision == "auto"):
        target = replace(target, precision=given)
    budget = recipe.shares()
    form, names = recipe.onnx(), recipe.class_names()
    check_precision(target, form)
    open_probe(target, form)  # before any work
    program = trace(
        module,
        inputs,
        frontend=recipe.frontend,
        dynamic_batch=recipe.dynamic_batch,
        dynamic=recipe.dynamic,
        batch_axis=recipe.batch_axis,
    )
    program = _exact_rewrites(recipe).run(program)
    task = recipe.make_task(data, program.inputs, program.input_names)
    said = [note for samples in (task.train, task.test) if samples is not None for note in samples.notes]
    train, test = (samples_cast_like(samples, program.inputs) for samples in (task.train, task.test))
    program = program.with_(seed=recipe.seed)
    task = replace(task, train=train, test=test)
    if any(step.selects for step in recipe.steps().steps):
        task = task.selecting(program.generator("selection"))
    task = task.holding_out(program.generator("held out"))
    target, unquantised = calibrated(target, task, asked=recipe.precision)
    program = program.with_(task=task, target=target, budget=budget, onnx=form)
    program = program.with_(keep_dense=matched_layers(program, recipe.keep_dense))
    program = program.with_(keep_fp32=float_layers(program, recipe.keep_fp32))
    check_not_quantised(program)
    check_synthetic(program, recipe.max_drop)
    check_sample_inputs(program)
    scored = scoring(program).notes
    check_class_names(program, names)
    if recipe.plan is not None:
        program = adopt(program, recipe.plan)
    said += scored
    read = [Diagnostic("warning" if note.warning else "info", DiagnosticCode.DATA, note.text) for note in said]
    told = (
        *notes,
        *_other_precision(given, program.target.precision),
        *read,
        *unquantised,
        *equal_samples_warnings(program),
        *scale_warnings(program),
        *offer(program),
        *cautions(task, recipe.steps().trainer),
    )
    return program.with_(history=(*told, *program.history))


def _other_precision(planned: Precision | None, precision: Precision) -> Iterator[Diagnostic]:
    if planned not in (None, precision):
        text = f"the plan was made for {planned} and is compiled in {precision}, as asked: its ranks may not fit"
        yield Diagnostic("info", DiagnosticCode.PRECISION, text)


def _exact_rewrites(recipe: Recipe) -> Pipeline:
    """Return the exact passes that rewrite the network before anything is counted, priced or exported.

    Raises:
        InputError: the given plan cannot be read, or names a pass that is not exact.
    """
    first, _ = recipe.steps().split_exact()
    if recipe.plan is None:
        return first
    earlier = Pipeline([parse_spec(text) for text in read_plan(recipe.plan).rewrites])
    if others := earlier.split_exact()[1].steps:
        raise InputError(f"the plan rewrites the network by '{others[0].name}', which does not keep its function")
    return Pipeline((*earlier.steps, *(step for step in first.steps if step not in earlier.steps)))


def rewrites_of(program: Program) -> tuple[str, ...]:
    """Return the exact passes that have changed a prepared program, in text form, for its plan."""
    exact = {kind.name for kind in declaring(RewritePass, "exact")}
    steps = [entry.step for entry in program.history if isinstance(entry, Change)]
    return tuple(dict.fromkeys(step for step in steps if step in exact))


def _stamp(program: Program) -> str:
    """Return decompositions and ranks as JSON, for the metadata of the models."""
    plan = program.facts[RankPlan]
    return json.dumps({name: [choice.form, *choice.ranks] for name, choice in plan.choices.items()})


def key_parts(program: Program, recipe: Recipe) -> dict[str, str]:
    """Return the parts that identify a compilation: options, network, example inputs, data and a given plan.

    Options that change no result of a pass are left out: origins of network and data, gates, ``eval`` and ``jobs``.
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

"""The work of ``compile``, ``plan`` and ``demo``: from a recipe to the output folder and its tables."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from tdcompile.artifact.folder import check_out
from tdcompile.artifact.report import tables
from tdcompile.backend.quantized_form import form_of
from tdcompile.cli.console import Answer, watching
from tdcompile.cli.interruption import was_interrupted
from tdcompile.cli.load_job import load_job, recipe_of, source_of, to_toml
from tdcompile.compiler import compile as compile_module
from tdcompile.compiler import prepare, rewrites_of
from tdcompile.core.free_threads import FreeThreads
from tdcompile.core.pipeline import Pipeline
from tdcompile.core.plan import RankPlan
from tdcompile.errors import BudgetError, InputError, RuinedError, UnwrittenError
from tdcompile.ir.target import Target
from tdcompile.planning.synthetic_data import BringSamples, makers
from tdcompile.recipes import Recipe
from tdcompile.support.folder_lock import only_writer
from tdcompile.support.formatting import count, milliseconds, percent
from tdcompile.training.distributed import from_first, is_first, no_gpu

log = logging.getLogger("tdcompile")


@dataclass(frozen=True)
class Output:
    """Where a command writes, and how.

    Attributes:
        out: the folder; None takes a default.
        resume: continue an interrupted run.
        as_json: write JSON to stdout instead of tables.
        quiet: show no progress.
        command: the command line.
    """

    out: Path | None
    resume: bool
    as_json: bool
    quiet: bool
    command: tuple[str, ...]

    @property
    def resumed(self) -> str:
        """The command line that continues this one."""
        return shlex.join([*self.command, *([] if "--resume" in self.command else ["--resume"])])


# Shares of the dense latency in fp32 that the demo asks for. The dense network in int8 takes 0.3 of it.
_DEMO_INT8, _DEMO_FP32 = 0.18, 0.5


def compile_network(recipe: Recipe, output: Output) -> Answer:
    """Compile, and write the output folder.

    Raises:
        TdcompileError: see ``tdcompile.compiler.compile``.
        KeyboardInterrupt: the run was interrupted; the message says how to continue it.
    """
    return _compile(recipe, output.out or Path("out") / name_of(source_of(recipe)), output)


def compile_demo(flags: Mapping[str, Any], output: Output) -> Answer:
    """Compile the network that ships with its weights: to int8 where the processor multiplies bytes, else to fp32."""
    asked = {name: value for name, value in flags.items() if value not in (None, [])}
    bytewise = form_of(Target()).family == "x64" and asked.get("target", "cpu") == "cpu"
    precision = str(asked.get("precision", "int8" if bytewise and "budget" not in asked else "fp32"))
    share = _DEMO_INT8 if precision == "int8" else _DEMO_FP32
    given = {"budget": [f"latency={share:g}"], "tune": "epochs=1", "precision": precision, **asked}
    return _compile(recipe_of({**given, "source": "digits_net"}), output.out or Path("out/demo"), output)


def make_plan(recipe: Recipe, out: Path | None, *, as_json: bool, quiet: bool) -> Answer:
    """Run the passes up to the plan, and write it."""
    _check_file(out)
    _, steps = recipe.steps().split_exact()  # ``prepare`` applies the exact rewrites
    steps = _up_to_the_plan(steps, planned=recipe.plan is not None)
    job = load_job(recipe)
    with FreeThreads() as threads, tempfile.TemporaryDirectory(prefix="tdcompile-") as folder:
        program = prepare(job.module, job.inputs, job.task, recipe, job.notes).with_(workspace=Path(folder))
        rewrites = rewrites_of(program)
        steps = Pipeline((*makers(program.task), *steps.steps))
        with watching(quiet=quiet) as watch:
            program = steps.run(program, [threads, BringSamples(), *([watch] if watch else [])])
    made = replace(program.facts[RankPlan], rewrites=rewrites)
    _write(out, made.to_json())
    return Answer((made.to_json(),)) if out is None or as_json else Answer((_choices(made), f"plan: {out}"))


def _up_to_the_plan(pipeline: Pipeline, *, planned: bool) -> Pipeline:
    """Return the passes before the first that applies the plan.

    Raises:
        InputError: the pipeline trains before it has a plan, or makes none.
    """
    for place, step in enumerate(pipeline.steps):
        if planned and not step.decides:
            return Pipeline(pipeline.steps[:place])
        if step.trains:
            raise InputError(f"the pipeline '{pipeline}' has no plan before '{step.name}' has trained: compile it")
        planned = planned or RankPlan in step.gives
    if not planned:
        raise InputError(f"the pipeline '{pipeline}' makes no plan: it needs a pass such as 'choose'")
    return pipeline


def name_of(source: str) -> str:
    """Return the default name of the output folder: ``net-build`` for ``net.py:build``."""
    place, _, name = source.rpartition(":")
    if not place:
        return Path(name.partition("{")[0]).name
    return f"{Path(place).stem if place.endswith('.py') else place}-{name}"


def workspace_of(out: Path) -> Path:
    """Return the folder in which an interrupted run of this output folder keeps its state."""
    return out.with_name(f".{out.name}.work")


def _compile(recipe: Recipe, out: Path, output: Output) -> Answer:
    out = out.resolve() if ".." in out.parts else out  # ``a/..`` exists only once ``a`` does
    check_out(out)
    with only_writer(out) if is_first() else nullcontext():
        return _compile_alone(recipe, out, output)


def _compile_alone(recipe: Recipe, out: Path, output: Output) -> Answer:
    """Compile while no other process writes to the output folder."""
    workspace = workspace_of(out.absolute())
    fresh = not workspace.exists()
    if output.resume and not (workspace / "state").exists():
        log.warning("there is no interrupted run of %s: starting anew", out)
    job, compiled = load_job(recipe), None
    try:
        with watching(quiet=output.quiet or not is_first(), then="export, verify, measure") as watch:
            compiled = compile_module(
                job.module,
                job.inputs,
                data=job.task,
                recipe=recipe,
                notes=job.notes,
                workspace=workspace,
                resume=output.resume,
                watch=watch,
            )
        from_first(partial(compiled.save, out, output.command), no_gpu(recipe.device().device))
    except (Exception, KeyboardInterrupt) as error:
        # The state of an earlier run stays. This run's state stays only if it can be resumed: after a full disk it can,
        # after a wrong input it cannot. If the network is compiled, only the place to write it to was wrong.
        unwritten = isinstance(error, UnwrittenError) or (isinstance(error, InputError) and compiled is not None)
        hopeless = isinstance(error, InputError | BudgetError) and compiled is None and not unwritten
        hopeless = hopeless and not isinstance(error, RuinedError)  # --max-drop lets the same run go on
        if fresh and is_first() and (hopeless or not (workspace / "state").exists()):
            shutil.rmtree(workspace, ignore_errors=True)
        go_on = f"go on with: {output.resumed}" if (workspace / "state").exists() else "nothing was written"
        if was_interrupted(error):
            raise KeyboardInterrupt(go_on) from error
        if isinstance(error, OSError):
            raise InputError(f"cannot write {error.filename or out}: {error.strerror or error}; {go_on}") from error
        if unwritten:
            raise InputError(f"{error}; {go_on}") from error
        raise
    report = compiled.report
    if not is_first():
        return Answer(code=0)
    code = 0 if report.met else BudgetError.exit_code
    if output.as_json:
        return Answer((report.to_json(),), code)
    layers_last = reversed(tables(report))  # the totals come last, where a terminal shows them
    return Answer((*layers_last, *report.notes, report.verdict, f"report: {out / 'report.html'}"), code)


def describe(recipe: Recipe, *, as_json: bool) -> Answer:
    """Show the recipe and its pipeline."""
    pipeline = str(recipe.steps())
    if as_json:
        return Answer((json.dumps({"recipe": recipe.model_dump(mode="json"), "pipeline": pipeline}, indent=1),))
    return Answer((to_toml(recipe), f"# the passes: {pipeline}"))


def _choices(plan: RankPlan) -> Table:
    table = Table(title=f"plan by {plan.selector}", title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("form")
    for heading in ("error", "params", "MACs", "ms"):
        table.add_column(heading, justify="right")
    for name, choice in plan.choices.items():
        form, cost = " ".join((choice.form, "×".join(map(str, choice.ranks)))).strip(), choice.cost
        figures = percent(choice.error), count(cost.params), count(cost.macs), milliseconds(cost.seconds * 1e3 or None)
        table.add_row(*map(Text, (name, form, *figures)))
    for name, cost in (("dense network", plan.dense), ("planned network", plan.predicted)):
        table.add_row(name, "", "", count(cost.params), count(cost.macs), milliseconds(cost.seconds * 1e3 or None))
    return table


def _check_file(out: Path | None) -> None:
    """Require, before any work, that this file can be written."""
    if out is None:
        return
    if out.is_dir():
        raise InputError(f"{out} is a folder; give -o a file, e.g. {out / 'plan.json'}")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise InputError(f"cannot write into {parent}; give an -o in a folder that you may write to")


def _write(out: Path | None, text: str) -> None:
    """Write the whole file, or leave the old one."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        draft.write_text(text)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)

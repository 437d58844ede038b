"""``tdcompile compile``, ``plan`` and ``demo``: from flags to the output folder, and the tables that tell about it."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from tdcompile.artifact.folder import check_out
from tdcompile.artifact.report import tables
from tdcompile.cli.console import Answer, watching
from tdcompile.cli.interruption import was_interrupted
from tdcompile.cli.load_job import load_job, recipe_of, to_toml
from tdcompile.compiler import compile as compile_module
from tdcompile.compiler import prepare
from tdcompile.core.pipeline import Pipeline
from tdcompile.errors import BudgetError, InputError, UnwrittenError
from tdcompile.ir.plan import RankPlan
from tdcompile.recipes import Recipe
from tdcompile.support.formatting import count, milliseconds, percent
from tdcompile.training.distributed import from_first, is_first, no_gpu

log = logging.getLogger("tdcompile")


def compile_network(given: Mapping[str, Any]) -> Answer:
    """Compile, and write the output folder.

    Raises:
        TdcompileError: see ``tdcompile.compiler.compile``.
        KeyboardInterrupt: it was interrupted; the message says how to go on.
    """
    recipe = recipe_of(given)
    if given["dry_run"]:
        return _told(recipe, as_json=given["json"])
    if recipe.source is None:
        raise InputError("give a SOURCE: file.py:callable, package.module:callable, or one of 'tdcompile list models'")
    return _compile(recipe, given["out"] or Path("out") / name_of(recipe.source), given)


def demo(given: Mapping[str, Any]) -> Answer:
    """Compile the network that ships with its weights."""
    flags = {"budget": ["latency=0.5"], "tune": "epochs=1", **{k: v for k, v in given.items() if v}}
    return _compile(recipe_of({**flags, "source": "digits_net"}), given["out"] or Path("out/demo"), given)


def plan(given: Mapping[str, Any]) -> Answer:
    """Run the passes that only look, and write the plan they end in."""
    recipe, out = recipe_of(given), given["out"]
    _check_file(out)
    steps = _up_to_the_plan(recipe.steps(), planned=recipe.plan is not None)
    job = load_job(recipe)
    program = prepare(job.module, job.inputs, job.task, recipe)
    with tempfile.TemporaryDirectory(prefix="tdcompile-") as folder, watching(quiet=given["quiet"]) as watch:
        program = steps.run(program.with_(workspace=Path(folder)), [watch] if watch else [])
    made = program.facts[RankPlan]
    _write(out, made.to_json())
    return Answer((made.to_json(),)) if out is None or given["json"] else Answer((_choices(made), f"plan: {out}"))


def _up_to_the_plan(pipeline: Pipeline, *, planned: bool) -> Pipeline:
    """The passes up to the first that takes a plan's word for what it changes.

    Raises:
        InputError: the pipeline trains before there is a plan, or makes none.
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
    """What the output folder is called by default: ``net.py:build`` gives ``net-build``."""
    place, _, name = source.rpartition(":")
    return f"{Path(place).stem if place.endswith('.py') else place}-{name}" if place else name.partition("{")[0]


def workspace_of(out: Path) -> Path:
    """Where an interrupted run of this output folder keeps its state."""
    return out.with_name(f".{out.name}.work")


def _compile(recipe: Recipe, out: Path, given: Mapping[str, Any]) -> Answer:
    check_out(out)
    workspace, command = workspace_of(out.absolute()), given["command"]
    fresh = not workspace.exists()
    if given["resume"] and not (workspace / "state").exists():
        log.warning("there is no interrupted run of %s: starting anew", out)
    job, compiled = load_job(recipe), None
    try:
        with watching(quiet=given["quiet"] or not is_first(), then="export, verify, measure") as watch:
            compiled = compile_module(
                job.module,
                job.inputs,
                data=job.task,
                recipe=recipe,
                workspace=workspace,
                resume=given["resume"],
                watch=watch,
            )
        from_first(partial(compiled.save, out, command), no_gpu(recipe.device().device))
    except (Exception, KeyboardInterrupt) as error:
        # What an earlier run has kept stays. Of this one nothing stays that could not be gone on with: from a mistake
        # one cannot, but from a full disk; where everything is compiled, only the place to write it to was wrong.
        unwritten = isinstance(error, UnwrittenError) or (isinstance(error, InputError) and compiled is not None)
        hopeless = isinstance(error, InputError | BudgetError) and compiled is None and not unwritten
        if fresh and is_first() and (hopeless or not (workspace / "state").exists()):
            shutil.rmtree(workspace, ignore_errors=True)
        go_on = f"go on with: {_resumed(command)}" if (workspace / "state").exists() else "nothing was written"
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
    if given["json"]:
        return Answer((report.to_json(),), code)
    layers_last = reversed(tables(report))  # what counts stands at the end, where the eye is
    return Answer((*layers_last, *report.notes, report.verdict, f"report: {out / 'report.html'}"), code)


def _resumed(command: Sequence[str]) -> str:
    """The command line that goes on with this one."""
    return shlex.join([*command, *([] if "--resume" in command else ["--resume"])])


def _told(recipe: Recipe, *, as_json: bool) -> Answer:
    """What would be done."""
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
        form, cost = " ".join((choice.decomposition, "×".join(map(str, choice.ranks)))).strip(), choice.cost
        figures = percent(choice.error), count(cost.params), count(cost.macs), milliseconds(cost.seconds * 1e3 or None)
        table.add_row(*map(Text, (name, form, *figures)))
    for name, cost in (("dense network", plan.dense), ("planned network", plan.predicted)):
        table.add_row(name, "", "", count(cost.params), count(cost.macs), milliseconds(cost.seconds * 1e3 or None))
    return table


def _check_file(out: Path | None) -> None:
    """Before any work: can this file be written?"""
    if out is None:
        return
    if out.is_dir():
        raise InputError(f"{out} is a folder; give -o a file, e.g. {out / 'plan.json'}")
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise InputError(f"cannot write into {parent}; give an -o in a folder that you may write to")


def _write(out: Path | None, text: str) -> None:
    """Whole or not at all."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        draft.write_text(text)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)

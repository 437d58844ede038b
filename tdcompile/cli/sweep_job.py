"""The work of ``sweep``: from a recipe to the folder with the front, its page and its plans."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from tdcompile.artifact.folder import check_out
from tdcompile.artifact.front import Sweep
from tdcompile.budget_sweep import sweep, sweep_recipe
from tdcompile.cli.compile_job import Output, name_of, workspace_of
from tdcompile.cli.console import Answer, watching
from tdcompile.cli.interruption import was_interrupted
from tdcompile.cli.load_job import load_job, source_of
from tdcompile.errors import InputError
from tdcompile.recipes import Recipe
from tdcompile.support.folder_lock import only_writer

log = logging.getLogger("tdcompile")


def run_sweep(recipe: Recipe, points: int, output: Output) -> Answer:
    """Compile at every budget, and write the folder.

    Raises:
        TdcompileError: see ``tdcompile.sweep``.
        KeyboardInterrupt: the run was interrupted; the message says how to continue it.
    """
    sweep_recipe(recipe, points)  # before the network is loaded
    out = output.out or Path("out") / f"{name_of(source_of(recipe))}-sweep"
    out = out.resolve() if ".." in out.parts else out
    check_out(out)
    with only_writer(out):
        made = _swept(recipe, points, out, output)
    if output.as_json:
        return Answer((made.to_json(),))
    return Answer((made.table(), *made.notes, f"report: {out / 'sweep.html'}"))


def _swept(recipe: Recipe, points: int, out: Path, output: Output) -> Sweep:
    """Sweep and save; the state is deleted once the folder is written, and kept if the run can be continued."""
    workspace = workspace_of(out.absolute())
    if output.resume and not (workspace / "state").exists():
        log.warning("there is no interrupted sweep of %s: starting anew", out)
    job = load_job(recipe)
    try:
        with watching(quiet=output.quiet) as watch:
            made = sweep(
                job.module,
                job.inputs,
                points=points,
                data=job.task,
                recipe=recipe,
                notes=job.notes,
                workspace=workspace,
                resume=output.resume,
                watch=watch,
            )
        made.save(out, output.command)
    except (Exception, KeyboardInterrupt) as error:
        go_on = f"go on with: {output.resumed}" if (workspace / "state").exists() else "nothing was written"
        if was_interrupted(error):
            raise KeyboardInterrupt(go_on) from error
        if isinstance(error, OSError):
            raise InputError(f"cannot write {error.filename or out}: {error.strerror or error}; {go_on}") from error
        raise
    shutil.rmtree(workspace, ignore_errors=True)
    return made

"""``tdcompile study``: from flags to the cells of an approximation-error study, its tables and its page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tdcompile.cli.compile import name_of
from tdcompile.cli.console import Answer, tell
from tdcompile.cli.interruption import was_interrupted
from tdcompile.cli.load_job import load_job, recipe_of
from tdcompile.core.spec import split
from tdcompile.errors import InputError
from tdcompile.recipes import Recipe
from tdcompile.studies.cell import Subject
from tdcompile.studies.experiment import COMPRESSIONS, METHODS, Grid, run
from tdcompile.studies.findings import Cell, Failure, level_name, notes, tables
from tdcompile.studies.ledger import NAME
from tdcompile.support.formatting import percent


def study(given: Mapping[str, Any]) -> Answer:
    """Measure the cells, and say how the errors rank them.

    Raises:
        InputError: something given cannot be used.
        UnavailableError: Ray, or the device, is not there.
        KeyboardInterrupt: it was interrupted; the message says how to go on.
    """
    recipe = recipe_of(given)
    if recipe.source is None:
        raise InputError("give a SOURCE: file.py:callable, package.module:callable, or one of 'tdcompile list models'")
    if recipe.data is None:
        raise InputError("a study measures accuracy and averages over training samples: give --data")
    grid = Grid(
        methods=tuple(split(given["methods"])) if given["methods"] else METHODS,
        compressions=_shares(given["compressions"]) if given["compressions"] else COMPRESSIONS,
        layers=tuple(given["layers"] or ()),
        seeds=given["seeds"],
        seed=recipe.seed,
        tune=recipe.tune or "none",
    )
    out = given["out"] or Path("out") / f"{name_of(recipe.source)}-study"
    try:
        findings = run(
            partial(_subject, recipe),
            grid,
            source=recipe.source,
            target=recipe.device(),
            out=out,
            jobs=recipe.jobs,
            ray=given["ray"],
            resume=given["resume"],
            told=None if given["quiet"] else _told,
        )
    except (Exception, KeyboardInterrupt) as error:
        if was_interrupted(error):
            raise KeyboardInterrupt(_how_to_go_on(out, given["command"])) from error
        raise
    if given["json"]:
        return Answer((findings.to_json(),))
    return Answer((*tables(findings), *notes(findings), f"report: {out / 'study.html'}"))


def _subject(recipe: Recipe) -> Subject:
    job = load_job(recipe)
    return Subject(job.module, job.inputs, job.task, recipe.frontend)


def _shares(text: str) -> tuple[float, ...]:
    """Read ``0.5,0.75``.

    Raises:
        InputError: a part is no number.
    """
    try:
        return tuple(float(part) for part in split(text))
    except ValueError as error:
        raise InputError(f"--compressions '{text}' is not a list of shares such as 0.5,0.75,0.9") from error


def _told(done: int, of: int, outcome: Cell | Failure) -> None:
    tell(f"[{done:>{len(str(of))}}/{of}] {_line(outcome)}")


def _line(outcome: Cell | Failure) -> str:
    where = f"{outcome.layer} {outcome.method}, {level_name(outcome.compression)}, seed {outcome.seed}"
    if isinstance(outcome, Failure):
        return f"{where}: {outcome.reason}"
    after = "" if outcome.accuracy_after is None else f" → {percent(outcome.accuracy_after)}"
    return f"{where}: {percent(outcome.accuracy_before)}{after}, {outcome.seconds:.1f} s"


def _how_to_go_on(out: Path, command: tuple[str, ...]) -> str:
    if not (out / NAME).exists():
        return "nothing was written"
    return f"go on with: {shlex.join([*command, *([] if '--resume' in command else ['--resume'])])}"

"""The work of ``study``: from a recipe to the cells of an approximation-error study, its tables and its page."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from tdcompile.cli.compile_job import Output, name_of
from tdcompile.cli.console import Answer, tell
from tdcompile.cli.interruption import was_interrupted
from tdcompile.cli.load_job import load_job, source_of
from tdcompile.data.synthetic import is_synthetic
from tdcompile.errors import InputError
from tdcompile.recipes import Recipe
from tdcompile.studies.cell import Subject
from tdcompile.studies.experiment import COMPRESSIONS, METHODS, Grid, run
from tdcompile.studies.findings import Cell, Failure, level_name, notes, tables
from tdcompile.studies.ledger import NAME
from tdcompile.support.folder_lock import only_writer
from tdcompile.support.spec import split

log = logging.getLogger("tdcompile")


def grid_of(recipe: Recipe, methods: str | None, compressions: str | None, layers: tuple[str, ...], seeds: int) -> Grid:
    """Return the cells to measure.

    Raises:
        InputError: the recipe names no network or no data, or a value does not fit.
    """
    source_of(recipe)
    if recipe.data is None or is_synthetic(recipe.data):
        raise InputError("a study measures a metric and averages over training samples: give --data with real ones")
    return Grid(
        methods=tuple(split(methods)) if methods is not None else METHODS,
        compressions=_shares(compressions) if compressions is not None else COMPRESSIONS,
        layers=layers,
        seeds=seeds,
        seed=recipe.seed,
        tune=recipe.tune or "none",
    )


def run_study(recipe: Recipe, grid: Grid, output: Output, *, ray: bool) -> Answer:
    """Measure the cells, and show how the errors rank them.

    Raises:
        InputError: an option cannot be used.
        UnavailableError: Ray, or the device, is missing.
        KeyboardInterrupt: the run was interrupted; the message says how to continue it.
    """
    source = source_of(recipe)
    out = output.out or Path("out") / f"{name_of(source)}-study"
    try:
        with only_writer(out):
            findings = run(
                partial(_subject, recipe),
                grid,
                source=source,
                target=recipe.device(),
                out=out,
                jobs=recipe.jobs,
                ray=ray,
                resume=output.resume,
                told=None if output.quiet else _told,
            )
    except (Exception, KeyboardInterrupt) as error:
        if was_interrupted(error):
            raise KeyboardInterrupt(_how_to_go_on(out, output)) from error
        raise
    if output.as_json:
        return Answer((findings.to_json(),))
    return Answer((*tables(findings), *notes(findings), f"report: {out / 'study.html'}"))


def _subject(recipe: Recipe) -> Subject:
    job = load_job(recipe)
    for note in job.notes:
        log.warning("%s", note.text)
    return Subject(job.module, job.inputs, job.task, recipe.frontend)


def _shares(text: str) -> tuple[float, ...]:
    """Read ``0.5,0.75``.

    Raises:
        InputError: a part is not a number.
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
    after = "" if outcome.score_after is None else f" → {_short(outcome.score_after)}"
    return f"{where}: {_short(outcome.score_before)}{after}, {outcome.seconds:.1f} s"


def _short(score: float) -> str:
    return f"{score:.4g}"


def _how_to_go_on(out: Path, output: Output) -> str:
    return f"go on with: {output.resumed}" if (out / NAME).exists() else "nothing was written"

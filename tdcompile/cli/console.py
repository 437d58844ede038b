"""Terminal output: results on stdout; progress and messages on stderr, as bars on a terminal, else one line a pass."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from tdcompile.core.hooks import Hook

if TYPE_CHECKING:  # the command prints its help without loading torch, which passes import
    from tdcompile.core.passes import Pass
    from tdcompile.ir.program import Program

WIDTH = 140  # columns of a table in a file or a pipe, which have no width of their own


@dataclass(frozen=True)
class Answer:
    """The result of a command: texts and tables for stdout, in order, and the exit code."""

    parts: tuple[str | Table, ...] = ()
    code: int = 0

    def show(self) -> None:
        """Write everything to stdout."""
        console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else WIDTH)
        for part in self.parts:
            if isinstance(part, str):  # rich would read brackets as markup and wrap long lines
                sys.stdout.write(part if part.endswith("\n") else part + "\n")
            else:
                console.print(part)
        sys.stdout.flush()


@contextlib.contextmanager
def watching(*, quiet: bool, then: str = "") -> Iterator[Hook | None]:
    """Yield a hook that shows the progress of passes on stderr; None if quiet.

    Args:
        quiet: show nothing.
        then: the stage after the last pass, shown until the context ends.
    """
    if quiet:
        yield None
    elif sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            yield Bars(progress, then)
    else:
        yield Lines(then)


class Lines(Hook):
    """Write one line for each finished pass, for logs."""

    def __init__(self, then: str = "") -> None:
        self._then = then
        self._place = ""
        self._last = False

    def started(self, step: Pass, position: int, of: int) -> None:
        """Remember the place of the pass."""
        self._place = f"[{position + 1:>{len(str(of))}}/{of}]"
        self._last = position + 1 == of

    def finished(self, step: Pass, program: Program, seconds: float) -> None:
        """Write the line; after the last pass also the stage that follows."""
        tell(f"{self._place} {step.name}: {seconds:.1f} s")
        if self._last and self._then:
            tell(self._then)


class Bars(Hook):
    """Draw one live bar for each pass."""

    def __init__(self, progress: Progress, then: str = "") -> None:
        self._progress, self._then = progress, then
        self._task: TaskID | None = None
        self._last = False

    def started(self, step: Pass, position: int, of: int) -> None:
        """Add a bar."""
        self._task = self._progress.add_task(step.name, total=None, note="")
        self._last = position + 1 == of

    def advanced(self, step: Pass, done: int, of: int, note: str) -> None:
        """Move the bar."""
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=of, note=note)

    def finished(self, step: Pass, program: Program, seconds: float) -> None:
        """Fill the bar; after the last pass add one for the stage that follows."""
        if self._task is not None:
            task = next(task for task in self._progress.tasks if task.id == self._task)
            total = task.total or 1
            self._progress.update(self._task, completed=total, total=total, note="")
        if self._last and self._then:
            self._progress.add_task(self._then, total=None, note="")


def tell(message: str) -> None:
    """Write one line to stderr."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


@contextlib.contextmanager
def messages(*, verbose: bool, quiet: bool) -> Iterator[None]:
    """Write tdcompile's log to stderr within this context: warnings, all records if verbose, only errors if quiet.

    Python warnings are shown only if verbose: libraries address them to programmers.
    """
    log, handler = logging.getLogger("tdcompile"), _Told()
    before = log.level, log.propagate
    log.setLevel(logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING)
    log.propagate = False
    log.addHandler(handler)
    try:
        with warnings.catch_warnings():
            if not verbose:
                warnings.simplefilter("ignore")
            yield
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before


class _Told(logging.Handler):
    """Write to the current ``sys.stderr``: a live bar replaces it for a time."""

    def emit(self, record: logging.LogRecord) -> None:
        tell(f"{record.levelname.lower()}: {self.format(record)}")

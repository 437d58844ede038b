"""What people see: results on stdout, progress and messages on stderr; live on a terminal, else one line a stage."""

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

if TYPE_CHECKING:  # the command prints its help without loading torch, on which passes stand
    from tdcompile.core.passes import Pass
    from tdcompile.core.pipeline import Watch
    from tdcompile.ir.program import Program

WIDTH = 140  # of a table that goes into a file or a pipe


@dataclass(frozen=True)
class Answer:
    """What a command found: texts and tables for stdout, in order, and the exit code."""

    parts: tuple[str | Table, ...] = ()
    code: int = 0

    def show(self) -> None:
        """Write everything to stdout."""
        console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else WIDTH)
        for part in self.parts:
            if isinstance(part, str):  # not through rich, which would take brackets for markup and wrap long lines
                sys.stdout.write(part if part.endswith("\n") else part + "\n")
            else:
                console.print(part)
        sys.stdout.flush()


@contextlib.contextmanager
def watching(*, quiet: bool, then: str = "") -> Iterator[Watch | None]:
    """A watcher of passes that draws on stderr; None where nothing is to be drawn.

    Args:
        quiet: draw nothing.
        then: what follows the last pass, shown until the watch ends.
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


class Lines:
    """One line a stage, for logs."""

    def __init__(self, then: str = "") -> None:
        self._then = then
        self._place = ""
        self._last = False

    def started(self, step: Pass, position: int, of: int) -> None:
        """A pass begins."""
        self._place = f"[{position + 1:>{len(str(of))}}/{of}]"
        self._last = position + 1 == of

    def advanced(self, step: Pass, done: int, of: int, note: str) -> None:
        """A long pass has got so far."""

    def finished(self, step: Pass, program: Program, seconds: float) -> None:
        """A pass has ended with this program."""
        tell(f"{self._place} {step.name}: {seconds:.1f} s")
        if self._last and self._then:
            tell(self._then)


class Bars:
    """A bar a stage, live."""

    def __init__(self, progress: Progress, then: str = "") -> None:
        self._progress, self._then = progress, then
        self._task: TaskID | None = None
        self._last = False

    def started(self, step: Pass, position: int, of: int) -> None:
        """A pass begins."""
        self._task = self._progress.add_task(step.name, total=None, note="")
        self._last = position + 1 == of

    def advanced(self, step: Pass, done: int, of: int, note: str) -> None:
        """A long pass has got so far."""
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=of, note=note)

    def finished(self, step: Pass, program: Program, seconds: float) -> None:
        """A pass has ended with this program."""
        if self._task is not None:
            task = next(task for task in self._progress.tasks if task.id == self._task)
            total = task.total or 1
            self._progress.update(self._task, completed=total, total=total, note="")
        if self._last and self._then:
            self._progress.add_task(self._then, total=None, note="")


def tell(message: str) -> None:
    """One line on stderr."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


@contextlib.contextmanager
def messages(*, verbose: bool, quiet: bool) -> Iterator[None]:
    """While it lasts, tdcompile's log goes to stderr: warnings, everything if verbose, errors alone if quiet.

    Python's warnings, which are libraries talking to their programmers, are shown if verbose.
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
    """Writes to what stderr is at that moment: a live bar puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        tell(f"{record.levelname.lower()}: {self.format(record)}")

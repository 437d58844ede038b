"""``Hook``: code that surrounds or observes the steps of a pipeline; the timer, and the figures that hooks collect."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:  # the command subclasses Hook and prints its help without loading torch
    from tdcompile.core.passes import Pass
    from tdcompile.ir.program import Program

Work: TypeAlias = "Callable[[], Program]"


class Hook:
    """Base class of hooks: subclass it and override what you need; the defaults change nothing.

    ``Pipeline.run`` calls ``begin`` once. For each step it calls ``around``, and within it ``started``, ``advanced``
    and ``finished``. The first hook of a list is the outermost: its ``around`` encloses all other hooks.
    """

    def begin(self, program: Program, steps: Sequence[Pass], done: int) -> tuple[Program, int]:
        """Return the program to start from and the number of steps already done, for example from a checkpoint.

        Args:
            program: the program to start from so far.
            steps: all steps of the pipeline.
            done: the number of steps already done so far.
        """
        return program, done

    def around(self, step: Pass, position: int, program: Program, work: Work) -> Program:
        """Call ``work`` and return its program.

        Args:
            step: the pass that ``work`` runs.
            position: the index of the step in the pipeline.
            program: the program before the step.
            work: runs the step with the remaining hooks.
        """
        return work()

    def started(self, step: Pass, position: int, of: int) -> None:
        """Observe the start of a pass: step ``position``, counted from 0, ``of`` the number of steps."""

    def advanced(self, step: Pass, done: int, of: int, note: str) -> None:
        """Observe progress: a pass has finished ``done`` ``of`` its parts; ``note`` names the part, e.g. a layer."""

    def finished(self, step: Pass, program: Program, seconds: float) -> None:
        """Observe the program that a pass returned."""


@dataclass
class RunRecord:
    """Figures that hooks collect during a run and a checkpoint saves; a resumed run adds to those of earlier runs.

    Attributes:
        seconds: the duration of each pass by name, summed over passes of one name.
        before_tuning: the metric on test samples before the first pass that trains; None before that.
        earlier: seconds that earlier runs took in total.
        peak_memory_mb: the highest memory of earlier runs, in MB.
        start: the time by ``time.perf_counter`` at which this run started.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    before_tuning: float | None = None
    earlier: float = 0.0
    peak_memory_mb: float = 0.0
    start: float = field(default_factory=time.perf_counter)

    @property
    def total(self) -> float:
        """Seconds of all runs up to now."""
        return self.earlier + time.perf_counter() - self.start

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to the sum of a pass."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class StepTimer(Hook):
    """Add the duration of every pass to a record."""

    def __init__(self, record: RunRecord) -> None:
        self._record = record

    def finished(self, step: Pass, program: Program, seconds: float) -> None:
        """Add the seconds to the sum of this pass's name."""
        self._record.add(step.name, seconds)


class KeepBefore(Hook):
    """Keep the program before the first step of a name, so that the steps from there can run again.

    Attributes:
        program: the program before the step; None if the step has not run, as in a resumed run.
        position: the index of the step.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.program: Program | None = None
        self.position = 0

    def around(self, step: Pass, position: int, program: Program, work: Work) -> Program:
        """Keep the program if the step has the name."""
        if step.name == self._name and self.program is None:
            self.program, self.position = program, position
        return work()

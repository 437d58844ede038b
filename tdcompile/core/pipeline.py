"""``Pipeline``: a list of passes with a text form; checks the plan in milliseconds, then runs the steps."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from tdcompile.core.passes import Pass, TunePass
from tdcompile.core.registry import find, make
from tdcompile.core.spec import Spec, parse_specs
from tdcompile.errors import InputError, during
from tdcompile.ir.facts import Facts
from tdcompile.ir.modules import separate_attention
from tdcompile.ir.plan import RankPlan
from tdcompile.ir.program import Program
from tdcompile.support.heap import keep_freed_memory
from tdcompile.support.progress import progress


class Watch(Protocol):
    """What progress, timing, saving for resume and drawing hang on."""

    def started(self, step: Pass, position: int, of: int) -> None:
        """A pass begins."""

    def advanced(self, step: Pass, done: int, of: int, note: str) -> None:
        """A long pass has got so far."""

    def finished(self, step: Pass, program: Program, seconds: float) -> None:
        """A pass has ended with this program."""


class Silent:
    """Watches nothing; a base for watchers that want only some of the calls."""

    def started(self, step: Pass, position: int, of: int) -> None:
        """A pass begins."""

    def advanced(self, step: Pass, done: int, of: int, note: str) -> None:
        """A long pass has got so far."""

    def finished(self, step: Pass, program: Program, seconds: float) -> None:
        """A pass has ended with this program."""


@dataclass(frozen=True)
class Pipeline:
    """Passes in order; ``str(pipeline)`` reads back to an equal one."""

    steps: tuple[Pass, ...]

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read ``calibrate,propose,choose{by=knapsack},factorize``.

        Raises:
            InputError: malformed text, an unknown pass or an unknown option.
        """
        return cls.of(parse_specs(text))

    @classmethod
    def of(cls, steps: Iterable[Pass | Spec]) -> Pipeline:
        """From passes, specs, or both."""
        return cls(tuple(step if isinstance(step, Pass) else make(Pass, step) for step in steps))

    def __str__(self) -> str:
        return ",".join(str(step.spec()) for step in self.steps)

    def check(self, facts: Facts | None = None, *, planned: bool = False) -> None:
        """Find an unmet need before any work is done.

        Args:
            facts: what is known beforehand.
            planned: whether there is to be a plan at the end, as whoever compiles needs.

        Raises:
            InputError: a pass needs a fact that no earlier pass gives, or that one in between makes untrue; or there
                is to be a plan, and no pass gives one.
        """
        known = {type(fact) for fact in facts or ()}
        for position, step in enumerate(self.steps):
            for need in step.needs:
                if need not in known:
                    raise InputError(
                        f"step {position + 1} '{step.name}' needs {need.__name__}, which no step before it leaves: "
                        f"put one that gives it in front ({self._givers(need) or 'no pass does'})"
                    )
            known = {kind for kind in known if not kind.reads & step.touches} | set(step.gives)
        if planned and RankPlan not in known:
            raise InputError(
                f"the pipeline '{self}' makes no plan: add a pass that gives one ({self._givers(RankPlan)}), "
                "or give a plan that is made already"
            )

    def _givers(self, need: type) -> str:
        return ", ".join(name for name, kind in find(Pass).items() if need in kind.gives and need not in kind.needs)

    @property
    def trainer(self) -> str | None:
        """The name of the first pass that trains."""
        return next((step.name for step in self.steps if isinstance(step, TunePass) and step.trains), None)

    def run(self, program: Program, watch: Watch | None = None, skip: int = 0) -> Program:
        """Run the steps on a program.

        Args:
            watch: told of every start, advance and end.
            skip: how many steps are already done (see resume).

        Raises:
            InputError: see ``check``.
        """
        self.check(program.facts) if not skip else None
        watch = watch or Silent()
        for position, step in enumerate(self.steps[skip:], start=skip):
            program = run_step(step, program, watch, position, len(self.steps))
        return program


def run_step(step: Pass, program: Program, watch: Watch, position: int = 0, of: int = 1) -> Program:
    """Run one pass under a watcher."""
    watch.started(step, position, of)
    token = progress.set(lambda done, total, note: watch.advanced(step, done, total, note))
    start = time.perf_counter()
    try:
        with separate_attention(), keep_freed_memory(), during(f"in the pass '{step.name}'"):
            program = step.run(program)
    finally:
        progress.reset(token)
    watch.finished(step, program, time.perf_counter() - start)
    return program

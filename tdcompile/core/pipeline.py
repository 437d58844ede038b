"""``Pipeline``: a list of passes with a text form; checks what passes need in milliseconds, then runs them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from tdcompile.core.hooks import Hook, Work
from tdcompile.core.passes import Pass, RewritePass
from tdcompile.core.plan import RankPlan
from tdcompile.core.registry import find, make, only
from tdcompile.errors import InputError, TdcompileError, during
from tdcompile.ir.facts import Facts
from tdcompile.ir.modules import separate_attention
from tdcompile.ir.program import Program
from tdcompile.support.heap import keep_freed_memory
from tdcompile.support.progress import progress
from tdcompile.support.spec import Spec, parse_options, parse_specs


def fine_tuner(options: str) -> Pass:
    """Return the pass that fine-tunes, with options in text form such as ``epochs=5``.

    Raises:
        InputError: an option is unknown or does not fit.
    """
    return only(Pass, "fine_tunes").from_options(parse_options(options))


@dataclass(frozen=True, init=False)
class Pipeline:
    """Passes in order; ``Pipeline.parse(str(pipeline))`` equals the pipeline.

    Args:
        steps: passes as objects, e.g. ``[Calibrate(), Propose(grain=8)]``, or specs of passes, or both.

    Raises:
        InputError: a step is not a pass, or a spec names an unknown pass or option.
    """

    steps: tuple[Pass, ...]

    def __init__(self, steps: Iterable[Pass | Spec]) -> None:
        object.__setattr__(self, "steps", tuple(map(_step, steps)))

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """Read ``calibrate,propose,choose{by=knapsack},factorize``.

        Raises:
            InputError: the text is malformed, or names an unknown pass or option.
        """
        return cls(parse_specs(text))

    def __str__(self) -> str:
        return ",".join(str(step.spec()) for step in self.steps)

    def check(self, facts: Facts | None = None, *, planned: bool = False) -> None:
        """Check, before any pass runs, that every pass gets the facts that it needs.

        Args:
            facts: facts known before the first pass.
            planned: whether the pipeline must end with a ``RankPlan``, as a compilation requires.

        Raises:
            InputError: no earlier pass gives a fact that a pass needs, or a pass in between invalidates the fact.
                Also raised if the pipeline must end with a plan and does not.
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

    def split_exact(self) -> tuple[Pipeline, Pipeline]:
        """Return the exact rewrites that the pipeline begins with, and the other steps."""
        rest = list(itertools.dropwhile(_is_exact, self.steps))
        return Pipeline(self.steps[: len(self.steps) - len(rest)]), Pipeline(rest)

    @property
    def trainer(self) -> str | None:
        """The name of the first pass that trains; None if no pass trains."""
        return next((step.name for step in self.steps if step.trains), None)

    def run(self, program: Program, hooks: Sequence[Hook] = ()) -> Program:
        """Run the steps on a program.

        Args:
            program: the program before the first step.
            hooks: surround and observe the steps; the first is the outermost.

        Raises:
            InputError: see ``check``; or a hook is not a ``Hook`` object.
            TdcompileError: a pass or a hook does not return a program.
        """
        check_hooks(hooks)
        self.check(program.facts)
        done = 0
        for hook in hooks:
            program, done = _begun(hook, program, self.steps, done)
        for position in range(done, len(self.steps)):
            step = self.steps[position]
            work: Work = partial(self._run_step, position, program, hooks)
            for hook in reversed(hooks):
                work = partial(_surrounded, hook, step, position, program, work)
            program = work()
        return program

    def _run_step(self, position: int, program: Program, hooks: Sequence[Hook]) -> Program:
        """Run one pass, and tell the hooks of its start, progress and end."""
        step = self.steps[position]
        for hook in hooks:
            hook.started(step, position, len(self.steps))

        def advanced(done: int, of: int, note: str) -> None:
            for hook in hooks:
                hook.advanced(step, done, of, note)

        token = progress.set(advanced)
        start = time.perf_counter()
        try:
            with separate_attention(), keep_freed_memory(), during(f"in the pass '{step.name}'"):
                program = _program(step.run(program), f"'run' of the pass '{step.name}'")
        finally:
            progress.reset(token)
        seconds = time.perf_counter() - start
        for hook in hooks:
            hook.finished(step, program, seconds)
        return program


def _is_exact(step: Pass) -> bool:
    return isinstance(step, RewritePass) and step.exact


def check_hooks(hooks: object) -> None:
    """Require a list of ``Hook`` objects.

    Raises:
        InputError: it is none; the message names the wrong member.
    """
    if not isinstance(hooks, Sequence) or isinstance(hooks, str):
        raise InputError(f"hooks are a list of Hook objects, not {hooks!r}")
    for hook in hooks:
        if isinstance(hook, type) and issubclass(hook, Hook):
            raise InputError(f"{hook.__name__} is a class of hooks: give the object {hook.__name__}()")
        if not isinstance(hook, Hook):
            raise InputError(f"a hook is an object of a subclass of tdcompile.Hook, not {hook!r}")


def _begun(hook: Hook, program: Program, steps: Sequence[Pass], done: int) -> tuple[Program, int]:
    """Call ``begin``.

    Raises:
        TdcompileError: it does not return a program and a number of steps.
    """
    match hook.begin(program, steps, done):
        case (Program() as begun, int(place)) if 0 <= place <= len(steps):
            return begun, place
        case other:
            raise TdcompileError(
                f"'begin' of the hook {type(hook).__name__} must return the program and the number of steps done, "
                f"from 0 to {len(steps)}; it returned {type(other).__name__}"
            )


def _surrounded(hook: Hook, step: Pass, position: int, program: Program, work: Work) -> Program:
    """Call ``around``."""
    return _program(hook.around(step, position, program, work), f"'around' of the hook {type(hook).__name__}")


def _program(made: object, source: str) -> Program:
    """Require a program.

    Raises:
        TdcompileError: it is something else, as a rule because a ``return`` is missing.
    """
    if not isinstance(made, Program):
        raise TdcompileError(f"{source} must return a Program; it returned {type(made).__name__}")
    return made


def _step(step: object) -> Pass:
    if isinstance(step, Pass):
        return step
    if isinstance(step, Spec):
        return make(Pass, step)
    if isinstance(step, type) and issubclass(step, Pass):
        raise InputError(f"{step.__name__} is a class of passes: put the object {step.__name__}() into the pipeline")
    raise InputError(f"a step of a pipeline is a pass, not {step!r}; Pipeline.parse reads a pipeline from text")

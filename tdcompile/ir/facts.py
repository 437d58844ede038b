"""``Facts``: results of analysis passes by type, immutable, dropped when a pass changes what they were read from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, TypeVar, cast

from tdcompile.errors import TdcompileError
from tdcompile.ir.diagnostics import Diagnostic


class Aspect(Enum):
    """A part of the program that a pass can change and a fact can be read from."""

    TOPOLOGY = "topology"
    WEIGHTS = "weights"
    STATISTICS = "statistics"


@dataclass(frozen=True)
class Fact:
    """A typed result of an analysis; ``reads`` names the aspects of the program that it was read from."""

    reads: ClassVar[frozenset[Aspect]] = frozenset()

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Return messages for the report; the pass that gives the fact adds them to the history."""
        return ()


@dataclass(frozen=True)
class Shared(Fact):
    """Results on the dense network that several plans need. A search or sweep adds this derived fact before them.

    Passes add to its values: it is a cache, and nothing that a pass returns depends on it.

    Attributes:
        values: by a key that names the pass and all that the result depends on.
    """

    values: dict[object, Any] = field(default_factory=dict)


F = TypeVar("F", bound=Fact)


class Facts:
    """An immutable set of facts, at most one of each type; ``facts[RankPlan]`` is a ``RankPlan``.

    Derived facts are cached beside the set: see ``derived``. Iteration, ``in`` and ``len`` do not see them, so they are
    neither saved in a checkpoint nor sent to another process.
    """

    def __init__(self, *facts: Fact) -> None:
        self._facts = {type(fact): fact for fact in facts}
        self._derived: dict[type[Fact], Fact] = {}

    def __getitem__(self, kind: type[F]) -> F:
        """Return the fact of a type.

        Raises:
            TdcompileError: no pass has given it.
        """
        if kind not in self._facts:
            known = ", ".join(sorted(k.__name__ for k in self._facts)) or "none"
            raise TdcompileError(f"no pass has given {kind.__name__} yet (known facts: {known})")
        return cast(F, self._facts[kind])

    def get(self, kind: type[F]) -> F | None:
        """Return the fact of a type, or None."""
        return cast("F | None", self._facts.get(kind))

    def __contains__(self, kind: object) -> bool:
        return kind in self._facts

    def __iter__(self) -> Iterator[Fact]:
        return iter(self._facts.values())

    def __len__(self) -> int:
        return len(self._facts)

    def having(self, *facts: Fact) -> Facts:
        """Return these facts with the given ones, which replace facts of their types."""
        both = Facts(*self, *facts)
        both._derived = self._derived  # shared: both describe one graph
        return both

    def after(self, touched: frozenset[Aspect]) -> Facts:
        """Return the facts that stay true once these aspects of the program have changed."""
        kept = Facts(*(fact for fact in self if not fact.reads & touched))
        kept._derived = {kind: fact for kind, fact in self._derived.items() if not fact.reads & touched}
        return kept

    def without_derived(self) -> Facts:
        """Return the same facts for another graph or other inputs: derived facts are computed again."""
        return Facts(*self)

    def derived(self, kind: type[F], compute: Callable[[], F]) -> F:
        """Return a fact that follows from the graph and the example inputs; compute it only if it is not cached."""
        if kind not in self._derived:
            self._derived[kind] = compute()
        return cast(F, self._derived[kind])

"""``Facts``: what analysis passes have learnt, keyed by type, immutable, dropped when what they read is touched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, TypeVar, cast

from tdcompile.errors import TdcompileError


class Aspect(Enum):
    """What a pass can touch and a fact can have been read from."""

    TOPOLOGY = "topology"
    WEIGHTS = "weights"
    STATISTICS = "statistics"


@dataclass(frozen=True)
class Fact:
    """A typed result of an analysis pass; ``reads`` names the aspects of the program it was read from."""

    reads: ClassVar[frozenset[Aspect]] = frozenset()


F = TypeVar("F", bound=Fact)


class Facts:
    """An immutable set of facts, at most one of each type; ``facts[RankPlan]`` is a ``RankPlan``."""

    def __init__(self, *facts: Fact) -> None:
        self._facts = {type(fact): fact for fact in facts}

    def __getitem__(self, kind: type[F]) -> F:
        """The fact of that type.

        Raises:
            TdcompileError: no pass has given it.
        """
        if kind not in self._facts:
            known = ", ".join(sorted(k.__name__ for k in self._facts)) or "none"
            raise TdcompileError(f"no pass has given {kind.__name__} yet (known facts: {known})")
        return cast(F, self._facts[kind])

    def get(self, kind: type[F]) -> F | None:
        """The fact of that type, or None."""
        return cast("F | None", self._facts.get(kind))

    def __contains__(self, kind: object) -> bool:
        return kind in self._facts

    def __iter__(self) -> Iterator[Fact]:
        return iter(self._facts.values())

    def __len__(self) -> int:
        return len(self._facts)

    def having(self, *facts: Fact) -> Facts:
        """These facts and the given ones, which replace those of their type."""
        return Facts(*self, *facts)

    def after(self, touched: frozenset[Aspect]) -> Facts:
        """The facts that stay true once these aspects of the program have changed."""
        return Facts(*(fact for fact in self if not fact.reads & touched))

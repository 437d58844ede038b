"""``guard_violations``: sizes of the open axes at which a network goes another way than the one that was traced."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product

import sympy
from sympy.logic.boolalg import Boolean
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tdcompile.ir.dynamic_shapes import LARGEST_SIZE, limits, open_symbols

# Sizes next to the example's, and small ones, that are looked at for every condition.
_NEIGHBOURS = 16
# How many ways of each kind of breaking a condition are told: a network may refuse the first of them.
_VIOLATIONS_PER_KIND = 4
# Combinations of sizes of several axes that are looked at together.
_COMBINATIONS = 400

Sizes = Mapping[str, int]


def guard_violations(
    program: ExportedProgram, opened: Sequence[Mapping[int, str]], example: Sizes
) -> list[list[dict[str, int]]]:
    """Sizes of open axes that break a condition which the trace was made under: a few for each, the smallest first.

    ``torch.export`` notes every comparison of sizes that it met, in the network's own code (``if x.shape[1] > 16``) or
    in torch's (whether a tensor is contiguous, say). Most of the latter change nothing: what differs is for the caller
    to find out, by running both. Two axes of different names that torch takes for one are a condition too.

    Sizes are looked for near the example's, among the small ones, among doublings of the example's and among the
    numbers that a condition names, their sums and differences with one another and with the example's sizes: of each
    axis alone, and of several axes at once at fewer. A condition that holds at all of these is left out.

    Args:
        program: as ``torch.export`` made it, not decomposed: decomposing loses the conditions.
        opened: for each input that is a tensor, the names of its open axes.
        example: the size of each of these names in the example.
    """
    names: dict[sympy.Symbol, str] = {}
    found: list[list[dict[str, int]]] = []
    for size, name in open_symbols(program, opened):
        if not isinstance(size, sympy.Symbol) or names.setdefault(size, name) != name:
            found.append([{name: example[name] + 1}])  # torch takes it for another axis, or for a multiple of one
    known, conditions = limits(program, opened), list[tuple[Boolean, bool]]()
    for size, name in names.items():
        least, largest = known.get(name, (1, None))
        conditions += [(size >= least, True)] if least > 2 else []
        conditions += [(size <= largest, True)] if largest is not None else []
    conditions += [(guard.expr, False) for guard in _shape_environment(program).guards]
    for condition, bound in dict.fromkeys(conditions):
        if condition.free_symbols and condition.free_symbols <= names.keys():
            # sizes beyond a bound break that one, and what else is true of them says nothing
            ways = _violations(condition, names, example, {} if bound else known)
            ways.sort(key=lambda changed: math.prod(size / example[name] for name, size in changed.items()))
            found += [ways] if ways and ways not in found else []
    return found


def _violations(
    condition: Boolean, names: Mapping[sympy.Symbol, str], example: Sizes, known: Mapping[str, tuple[int, int | None]]
) -> list[dict[str, int]]:
    """Sizes at which a condition does not hold, some of each kind: 1 only if there are no others."""
    used = list(dict.fromkeys(names[symbol] for symbol in sorted(condition.free_symbols, key=str)))
    numbers = {abs(int(number)) for number in condition.atoms(sympy.Integer)} | {example[name] for name in used}
    near = {name: _candidate_sizes(numbers, example[name], *known.get(name, (1, None))) for name in used}

    def breaks(changed: Sizes) -> bool:
        sizes = {symbol: sympy.Integer(changed.get(name, example[name])) for symbol, name in names.items()}
        try:
            return bool(condition.xreplace(sizes) == sympy.false)
        except Exception:  # noqa: BLE001  # torch's functions assert, divide and overflow at sizes they do not allow for
            return False

    found: list[dict[str, int]] = []
    for kind in (_single_axis(near), _all_axes_grown(used, example, near)):
        found += islice(filter(breaks, kind), _VIOLATIONS_PER_KIND)
    for kind in (_combined_axes(near), ({name: 1} for name in used)):
        found += [] if found else islice(filter(breaks, kind), _VIOLATIONS_PER_KIND)
    return [{name: size for name, size in changed.items() if size != example[name]} for changed in found]


def _single_axis(near: Mapping[str, Sequence[int]]) -> Iterator[dict[str, int]]:
    return ({name: size} for name, sizes in near.items() for size in sizes)


def _all_axes_grown(used: Sequence[str], example: Sizes, near: Mapping[str, Sequence[int]]) -> Iterator[dict[str, int]]:
    """All axes twice as long, four times, ...; and all as long as one another."""
    if len(used) > 1:
        yield from ({name: example[name] * 2**times for name in used} for times in range(1, 12))
        yield from (dict.fromkeys(used, size) for size in near[used[0]])


def _combined_axes(near: Mapping[str, Sequence[int]]) -> Iterator[dict[str, int]]:
    each = max(2, int(_COMBINATIONS ** (1 / len(near))))
    if len(near) > 1:
        yield from islice(
            (dict(zip(near, sizes, strict=True)) for sizes in product(*(s[:each] for s in near.values()))),
            _COMBINATIONS,
        )


def _candidate_sizes(numbers: set[int], size: int, least: int, largest: int | None) -> list[int]:
    """Sizes of one axis to look at, those nearest to the example first; not 1, which torch takes for a constant."""
    named = {number for number in numbers if number <= LARGEST_SIZE}
    sums = {a + sign * b for a in named for b in named for sign in (-1, 1)} if len(named) <= 8 else set()
    sizes = {
        *range(size - _NEIGHBOURS, size + _NEIGHBOURS + 1),
        *range(2, _NEIGHBOURS + 1),
        *(size * 2**times for times in range(1, 12)),
    }
    sizes |= {number + by for number in named | sums for by in (-1, 0, 1)}
    allowed = (n for n in sizes if max(2, least) <= n <= (LARGEST_SIZE if largest is None else largest) and n != size)
    return sorted(allowed, key=lambda other: abs(other - size))


def _shape_environment(program: ExportedProgram) -> ShapeEnv:
    """What torch knows of the sizes in a program; of one without symbols, nothing."""
    values = (node.meta.get("val") for node in program.graph.nodes)
    fakes = (getattr(value, "fake_mode", None) for value in values)
    return next((fake.shape_env for fake in fakes if fake is not None and fake.shape_env is not None), ShapeEnv())

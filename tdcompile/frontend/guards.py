"""Find sizes of dynamic axes that violate a guard of the trace, at which the network may compute something else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product

import sympy
from sympy.logic.boolalg import Boolean
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tdcompile.ir.dynamic_shapes import LARGEST_SIZE, limits, open_symbols

# Number of sizes next to the example's, and of small ones, that are tried for every guard.
_NEIGHBOURS = 16
# Violations of each kind that are returned for a guard: the network may reject the first of them.
_VIOLATIONS_PER_KIND = 4
# Combinations of sizes of several axes that are tried.
_COMBINATIONS = 400

Sizes = Mapping[str, int]


def guard_violations(
    program: ExportedProgram, opened: Sequence[Mapping[int, str]], example: Sizes
) -> list[list[dict[str, int]]]:
    """Return sizes of dynamic axes that violate a guard of the trace: a few for each guard, the smallest first.

    ``torch.export`` records every comparison of sizes, in the network's code (``if x.shape[1] > 16``) and in torch's
    (whether a tensor is contiguous). Most of torch's guards change nothing; the caller finds out by running both. Two
    axes of different names that torch treats as one count as a guard too.

    Candidates are sizes near the example's, small sizes, and doublings of the example's. Further candidates are the
    numbers in a guard, with their sums and differences with each other and the example's sizes. Each axis is tried by
    itself, several axes together at fewer sizes. A guard that holds at all candidates is omitted.

    Args:
        program: the result of ``torch.export``, not decomposed: decomposition loses the guards.
        opened: for each input tensor, names of dynamic axes by axis.
        example: size of each named axis in the example.
    """
    names: dict[sympy.Symbol, str] = {}
    found: list[list[dict[str, int]]] = []
    for size, name in open_symbols(program, opened):
        if not isinstance(size, sympy.Symbol) or names.setdefault(size, name) != name:
            found.append([{name: example[name] + 1}])  # torch treats it as another axis, or as a multiple of one
    known, conditions = limits(program, opened), list[tuple[Boolean, bool]]()
    for size, name in names.items():
        least, largest = known.get(name, (1, None))
        conditions += [(size >= least, True)] if least > 2 else []
        conditions += [(size <= largest, True)] if largest is not None else []
    conditions += [(guard.expr, False) for guard in _shape_environment(program).guards]
    for condition, bound in dict.fromkeys(conditions):
        if condition.free_symbols and condition.free_symbols <= names.keys():
            # sizes outside a bound violate the bound itself, so that other guards are not evaluated there
            ways = _violations(condition, names, example, {} if bound else known)
            ways.sort(key=lambda changed: math.prod(size / example[name] for name, size in changed.items()))
            found += [ways] if ways and ways not in found else []
    return found


def _violations(
    condition: Boolean, names: Mapping[sympy.Symbol, str], example: Sizes, known: Mapping[str, tuple[int, int | None]]
) -> list[dict[str, int]]:
    """Return sizes at which a guard does not hold, some of each kind; a size of 1 only if there are no others."""
    used = list(dict.fromkeys(names[symbol] for symbol in sorted(condition.free_symbols, key=str)))
    numbers = {abs(int(number)) for number in condition.atoms(sympy.Integer)} | {example[name] for name in used}
    near = {name: _candidate_sizes(numbers, example[name], *known.get(name, (1, None))) for name in used}

    def breaks(changed: Sizes) -> bool:
        sizes = {symbol: sympy.Integer(changed.get(name, example[name])) for symbol, name in names.items()}
        try:
            return bool(condition.xreplace(sizes) == sympy.false)
        except Exception:  # noqa: BLE001  # torch's functions assert, divide by zero or overflow at sizes they do not support
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
    """Yield all axes doubled, quadrupled, ..., then all axes at an equal size."""
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
    """Return candidate sizes of one axis, nearest to the example first; not 1, which torch treats as a constant."""
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
    """Return the program's shape environment, an empty one if the program has no symbolic sizes."""
    values = (node.meta.get("val") for node in program.graph.nodes)
    fakes = (getattr(value, "fake_mode", None) for value in values)
    return next((fake.shape_env for fake in fakes if fake is not None and fake.shape_env is not None), ShapeEnv())

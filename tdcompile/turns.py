"""``turns``: sizes of the open axes at which a network goes another way than the one that was traced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, product

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

# A bound above is torch's own, so that sizes fit in their integers.
_LARGEST = 2**20
# How far from the example a size is looked for, beside the numbers that a condition names.
_REACH = 64
# Sizes of each axis that are looked at together where a condition is of several.
_TOGETHER = 24

Sizes = Mapping[str, int]


def limits(program: ExportedProgram, opened: Sequence[Mapping[int, str]]) -> dict[str, tuple[int, int | None]]:
    """By the name of an open axis the sizes, from and to, at which a network goes the way that was traced.

    Args:
        program: what ``torch.export`` made.
        opened: for each input that is a tensor, the names of its open axes.
    """
    found: dict[str, tuple[int, int | None]] = {}
    for size, name in _open(program, opened):
        known = program.range_constraints.get(size)
        if known is not None:
            found[name] = (int(known.lower), int(known.upper) if known.upper <= _LARGEST else None)
    return found


def turns(program: ExportedProgram, opened: Sequence[Mapping[int, str]], example: Sizes) -> list[dict[str, int]]:
    """Sizes of open axes, each of which breaks a condition that the trace was made under, nearest the example first.

    ``torch.export`` notes every comparison of sizes that it met, in the network's own code (``if x.shape[1] > 16``) or
    in torch's (whether a tensor is contiguous, say). Most of the latter change nothing: what differs is for the caller
    to find out, by running both. A condition that holds at every size looked at is left out: each axis by itself is
    looked at up to 64 from its example and next to every number in the condition, several axes together at fewer.

    Args:
        program: as ``torch.export`` made it, not decomposed: decomposing loses the conditions.
        opened: for each input that is a tensor, the names of its open axes.
        example: the size of each of these names in the example.
    """
    names = {size: name for size, name in _open(program, opened) if isinstance(size, sympy.Symbol)}
    known = limits(program, opened)
    conditions = [guard.expr for guard in _environment(program).guards]
    for size, name in names.items():
        least, largest = known.get(name, (1, None))
        conditions += [size >= least] if least > 2 else []
        conditions += [size <= largest] if largest is not None else []
    found: list[dict[str, int]] = []
    for condition in conditions:
        if not condition.free_symbols or not condition.free_symbols <= names.keys():
            continue
        broken = next(_breaking(condition, names, example), None)
        if broken is not None and broken not in found:
            found.append(broken)
    return found


def _breaking(condition: Boolean, names: Mapping[sympy.Symbol, str], example: Sizes) -> Iterator[dict[str, int]]:
    """Sizes at which a condition does not hold: of one axis if that is enough, and 1 only if nothing else is."""
    used = list(dict.fromkeys(names[symbol] for symbol in sorted(condition.free_symbols, key=str)))
    near = {name: _near(condition, example[name]) for name in used}
    alone: Iterator[dict[str, int]] = ({name: size} for name in used for size in near[name])
    together = (dict(zip(used, sizes, strict=True)) for sizes in product(*(near[n][:_TOGETHER] for n in used)))
    ones = ({name: 1} for name in used)
    for changed in chain(alone, together if len(used) > 1 else (), ones):
        sizes = {symbol: sympy.Integer(changed.get(name, example[name])) for symbol, name in names.items()}
        try:
            holds = condition.xreplace(sizes)
        except (ZeroDivisionError, ValueError, TypeError):  # a size that the condition itself does not allow for
            continue
        if holds == sympy.false:
            yield {name: size for name, size in changed.items() if size != example[name]}


def _near(condition: Boolean, size: int) -> list[int]:
    """Sizes of one axis to look at, those nearest to the example first; not 1, which torch takes for a constant."""
    named = {int(number) + by for number in condition.atoms(sympy.Integer) for by in (-1, 0, 1)}
    sizes = {*range(2, size + _REACH), *(number for number in named if 2 <= number <= _LARGEST)}
    return sorted(sizes, key=lambda other: abs(other - size))


def _open(program: ExportedProgram, opened: Sequence[Mapping[int, str]]) -> Iterator[tuple[sympy.Expr, str]]:
    """The open axes: what torch calls them, and their names."""
    given = set(program.graph_signature.user_inputs)
    inputs = [n for n in program.graph.nodes if n.name in given and isinstance(n.meta.get("val"), Tensor)]
    for node, axes in zip(inputs, opened, strict=True):
        shape = node.meta["val"].shape
        for axis, name in axes.items():
            if axis < len(shape) and isinstance(shape[axis], torch.SymInt):
                yield shape[axis].node.expr, name


def _environment(program: ExportedProgram) -> ShapeEnv:
    """What torch knows of the sizes in a program; of one without symbols, nothing."""
    values = (node.meta.get("val") for node in program.graph.nodes)
    fakes = (getattr(value, "fake_mode", None) for value in values)
    return next((fake.shape_env for fake in fakes if fake is not None and fake.shape_env is not None), ShapeEnv())

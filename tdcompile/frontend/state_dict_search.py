"""Find a network's state dict in a checkpoint: under which keys, and behind which prefix of the names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from tdcompile.errors import InputError, nearest
from tdcompile.support.formatting import join_first

_DEPTH = 4  # nested mappings that are searched: checkpoints nest two or three, and a pickle may hold itself
# Tensors that torch creates if a file lacks them.
_OPTIONAL = "num_batches_tracked"
# Names of weight norm before torch's parametrizations; torch converts them when it loads.
_FORMER = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


@dataclass(frozen=True)
class Expected:
    """The tensors that a network needs.

    Attributes:
        shapes: shape of the tensor of every name that a file may use.
        needed: for each tensor its names; a file holds one of them at least.
    """

    shapes: Mapping[str, torch.Size]
    needed: Sequence[Set[str]]

    @classmethod
    def by(cls, module: nn.Module) -> Expected:
        """Return what a network needs; tied weights count as one tensor."""
        own = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
        names = {name: {name, *_former_names(name)} for name in own}
        for tied in tied_names(module):
            for name in tied & set(own):
                names[name] |= tied
        shapes = {other: own[name].shape for name, others in names.items() for other in others}
        needed = {frozenset(others) for name, others in names.items() if name.rpartition(".")[2] != _OPTIONAL}
        return cls(shapes, sorted(needed, key=sorted))

    def lacking(self, names: Set[str]) -> list[str]:
        """Return the names of the tensors that are not among these names."""
        return [min(group, key=len) for group in self.needed if group.isdisjoint(names)]


@dataclass(frozen=True)
class Found:
    """A state dict in a checkpoint.

    Attributes:
        keys: the keys that lead to it in the file.
        prefix: the prefix of all its names in the file, ``model.``, or nothing.
        weights: its tensors, by names without the prefix.
        beside: names of tensors under the same keys that are left out.
    """

    keys: tuple[str, ...]
    prefix: str
    weights: Mapping[str, Tensor]
    beside: Sequence[str] = ()

    @property
    def place(self) -> str:
        """The text after ``FILE#`` that chooses this state dict."""
        return ".".join((*self.keys, *filter(None, [self.prefix.removesuffix(".")])))

    def described(self) -> str:
        """Return where it was found, or nothing if the file holds only its names."""
        under = f"under '{'.'.join(self.keys)}'" if self.keys else ""
        return ", ".join(filter(None, [under, f"without the prefix '{self.prefix}'" if self.prefix else ""]))


def tied_names(module: nn.Module) -> list[set[str]]:
    """Return the names of all parameters and buffers, grouped by tensor."""
    names: dict[int, set[str]] = {}
    parameters, buffers = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    for name, tensor in (*parameters, *buffers):
        names.setdefault(id(tensor), set()).add(name)
    return list(names.values())


def find_state_dict(held: object, expected: Expected, file: str, key: str | None) -> Found:
    """Return the state dict that fits the network, or the one that is most like it if none fits.

    Args:
        held: the content of the file.
        expected: what the network needs.
        file: what messages call the file.
        key: the keys, and the prefix, that the user chose after ``FILE#``; None searches the whole file.

    Raises:
        InputError: the file holds no tensors by name, nothing under this key, or several state dicts that fit.
    """
    flat = dict(_flat_state_dicts(held))
    if not flat:
        keys = f", and has the keys {join_first(list(map(str, held)), ', ', 12)}" if isinstance(held, Mapping) else ""
        raise InputError(f"'{file}' holds no state dict, a mapping from names to tensors{keys}")
    candidates = _candidates(flat, expected)
    fitting = _fitting(candidates, expected)
    if key is not None:
        fitting = _at(fitting, key)
        candidates = fitting or _at(candidates, key) or _behind(flat, key)
    if not candidates:
        known = {found.place for found in _candidates(flat, expected)} - {""}
        raise InputError(f"'{file}' holds no weights under '{key}': {nearest(str(key), known)}")
    distinct = fitting[:1] + [other for other in fitting[1:] if not _equal(other.weights, fitting[0].weights)]
    if len(distinct) > 1:
        places = " and ".join(f"under '{one.place}'" if one.place else "without a prefix" for one in distinct)
        choices = " or ".join(f"--weights {file}#{one.place}" for one in distinct)
        raise InputError(f"'{file}' holds weights that fit the network {places}: write {choices}")
    return (fitting or candidates)[0]


def top_level_keys(held: object) -> str:
    """Return a checkpoint's top-level keys as text; nothing if it is a state dict itself."""
    if not isinstance(held, Mapping) or all(isinstance(value, Tensor) for value in held.values()):
        return ""
    return join_first([str(key) for key in held], ", ", 12)


def _flat_state_dicts(held: object, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield the keys and the tensors of every mapping that holds tensors by name, outermost first."""
    if not isinstance(held, Mapping) or len(keys) > _DEPTH:
        return
    tensors = {name: value for name, value in held.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if tensors:
        yield keys, tensors
    for name, value in held.items():
        if isinstance(name, str):
            yield from _flat_state_dicts(value, (*keys, name))


def _candidates(flat: Mapping[tuple[str, ...], dict[str, Tensor]], expected: Expected) -> list[Found]:
    """Return state dicts with and without prefixes, those that hold most names of the network first."""
    scored: list[tuple[int, Found]] = []
    enough = len(expected.needed) / 2  # a prefix that fewer names follow is chance
    for keys, tensors in flat.items():
        votes = Counter({"": 0})
        for name in tensors:
            votes.update(prefix for prefix in _prefixes(name) if name.removeprefix(prefix) in expected.shapes)
        for prefix, count in votes.items():
            shared = not prefix or all(name.startswith(prefix) for name in tensors)
            if shared or count >= enough:
                scored.append((count, _part(keys, tensors, prefix)))
    scored.sort(key=lambda pair: (-pair[0], len(pair[1].prefix), -len(pair[1].weights)))
    return [found for _, found in scored]


def _prefixes(name: str) -> list[str]:
    """Return ``""``, ``a.`` and ``a.b.`` of ``a.b.weight``."""
    return ["", *accumulate(f"{part}." for part in name.split(".")[:-1])]


def _part(keys: tuple[str, ...], tensors: Mapping[str, Tensor], prefix: str) -> Found:
    weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return Found(keys, prefix, weights, [name for name in tensors if not name.startswith(prefix)])


def _at(candidates: Sequence[Found], key: str) -> list[Found]:
    """Return the candidates at the place that a user chose, or else those below it."""
    exact = [found for found in candidates if found.place == key]
    return exact or [found for found in candidates if key and found.place.startswith(f"{key}.")]


def _behind(flat: Mapping[tuple[str, ...], dict[str, Tensor]], key: str) -> list[Found]:
    """Return the tensors behind a prefix that the user chose and that fits hardly a name: a message says what lacks."""
    for keys, tensors in flat.items():
        path = "".join(f"{part}." for part in keys)
        prefix = f"{key}.".removeprefix(path)
        if key and f"{key}.".startswith(path) and any(name.startswith(prefix) for name in tensors):
            return [_part(keys, tensors, prefix)]
    return []


def _fitting(candidates: list[Found], expected: Expected) -> list[Found]:
    """Return the candidates that hold all that the network needs, in its shapes, and no more.

    Names behind the prefix of another such candidate count as left out, not as more.
    """
    whole = [found for found in candidates if _covers(found.weights, expected)]
    fitting = []
    for found in whole:
        inner = [
            other.prefix.removeprefix(found.prefix)
            for other in whole
            if other.keys == found.keys and other.prefix != found.prefix and other.prefix.startswith(found.prefix)
        ]
        weights, beside = dict(found.weights), list(found.beside)
        for name in [name for name in weights if name not in expected.shapes and name.startswith(tuple(inner))]:
            del weights[name]
            beside.append(found.prefix + name)
        if set(weights) <= set(expected.shapes):
            fitting.append(Found(found.keys, found.prefix, weights, beside))
    return fitting


def _covers(weights: Mapping[str, Tensor], expected: Expected) -> bool:
    return not expected.lacking(set(weights)) and all(
        expected.shapes[name] == value.shape for name, value in weights.items() if name in expected.shapes
    )


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return set(one) == set(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def _former_names(name: str) -> list[str]:
    return [name.removesuffix(new) + old for new, old in _FORMER.items() if _ends_with(name, new)]


def _ends_with(name: str, path: str) -> bool:
    return name == path or name.endswith(f".{path}")

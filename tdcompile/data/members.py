"""``split_sample``: which members of a sample are the network's inputs, and which are targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdcompile.data.images import takes_integers, to_input, to_tensor
from tdcompile.data.nesting import map_tensors
from tdcompile.data.network_input import NetworkInput, SampleFields
from tdcompile.errors import InputError, nearest

# Keys that tokenizers and tables put beside inputs, and that are never what a network should answer.
NO_TARGETS = ("attention_mask", "token_type_ids", "position_ids", "special_tokens_mask", "idx", "id", "index")
_TARGETS = ("label", "labels", "target", "targets", "y", "mask", "class")  # usual keys of targets
_PADDED_TARGET = -100  # does not count in a loss of torch
# In a sequence that holds one of them, each member is a target; a sequence of numbers is one target.
_NESTED = (Tensor, Mapping, tuple, list)
_MASK = "mask"  # a part of the names of inputs that mask padding


def split_sample(item: Any, fields: SampleFields, where: str) -> tuple[list[Any], Any]:
    """Return the inputs in argument order, and the targets, of one sample or of one batch.

    The members of a mapping are inputs if their key is the name of an input. Those of a sequence are inputs first, then
    targets; a sequence or mapping in the first place holds all inputs. A missing mask of padding is None.

    Args:
        item: an array, a sequence, or a mapping.
        fields: the network's inputs.
        where: what messages call the sample.

    Raises:
        InputError: an input is missing, or no member can be told to be one.
    """
    if isinstance(item, Mapping):
        return _split_mapping(item, fields, where)
    parts = list(item) if isinstance(item, tuple | list) else [item]
    if fields.targets is not None and not (parts and isinstance(parts[0], Mapping)):
        raise no_keys(fields.targets, where)
    if parts and isinstance(parts[0], Mapping | tuple | list):
        inner = parts[0]
        if isinstance(inner, Mapping):
            alone = len(parts) == 1
            inputs, more = _split_mapping(inner, fields if alone else replace(fields, targets=None), where)
            if alone:
                return inputs, more
        else:
            inputs = list(inner)
            if len(inputs) != len(fields.names):
                raise InputError(f"{where} has {len(inputs)} inputs; the network takes {_names(fields)}")
        return inputs, _targets(parts[1:])
    count = len(fields.names)
    if len(parts) < count:
        raise InputError(f"{where} has {len(parts)} members; the network takes {_names(fields)}")
    return parts[:count], _targets(parts[count:])


def no_keys(targets: str, where: str) -> InputError:
    """Return the error of targets chosen by key among samples without keys."""
    return InputError(f"--targets '{targets}' has no effect on {where}, which has no keys: leave it out")


def _targets(rest: Sequence[Any]) -> Any:
    return None if not rest else rest[0] if len(rest) == 1 else tuple(rest)


def _split_mapping(item: Mapping[Any, Any], fields: SampleFields, where: str) -> tuple[list[Any], Any]:
    keys = [str(key) for key in item]
    held = dict(zip(keys, item.values(), strict=True))
    if fields.targets is not None and fields.targets not in held:
        raise InputError(f"--targets: {where} has no '{fields.targets}': {nearest(fields.targets, keys)}")
    names = _input_keys(held, fields, where)
    inputs = [held.get(name) for name in names]
    if fields.targets is not None:
        return inputs, held[fields.targets]
    left = {key: value for key, value in held.items() if key not in names and key not in NO_TARGETS}
    texts = [key for key, value in left.items() if isinstance(value, str | bytes)]
    if texts and len(left) > 1:
        others = ", ".join(key for key in left if key != texts[0])
        raise InputError(f"{where} has text under '{texts[0]}' beside {others}: choose the targets by --targets KEY")
    return inputs, None if not left else next(iter(left.values())) if len(left) == 1 else left


def _input_keys(held: Mapping[str, Any], fields: SampleFields, where: str) -> list[str]:
    """Return the key of each input: its name; of a single input also the only key that cannot be a target."""
    missing = [name for name in fields.names if name not in held and _MASK not in name]
    if not missing:
        return list(fields.names)
    others = [key for key in held if key != fields.targets and key not in NO_TARGETS and key not in fields.names]
    if fields.targets is None:
        others = [key for key in others if key not in _TARGETS]
    if len(fields.names) == 1 and len(others) == 1:
        return others
    raise InputError(
        f"{where} has the keys {', '.join(held)}, and the network takes {_names(fields)}: rename the key of that "
        f"input to '{missing[0]}'"
    )


def _names(fields: SampleFields) -> str:
    count = len(fields.names)
    return f"{count} input{'' if count == 1 else 's'} ({', '.join(fields.names)})"


def converted(inputs: Sequence[Any], fields: SampleFields, where: str) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Return the inputs of one sample, each ``(1, *shape)``, and the mask of padding if tokens were padded.

    Tokens that are shorter than the network's input are padded with 0 if it has an input that masks padding.

    Raises:
        InputError: an input has no numbers, or cannot be fitted.
    """
    made: list[Tensor | None] = []
    kept: Tensor | None = None
    masked = [place for place, name in enumerate(fields.names) if _MASK in name]
    for place, (value, name, wanted) in enumerate(zip(inputs, fields.names, fields.inputs, strict=True)):
        if value is None:
            made.append(None)
            continue
        x = to_tensor(value, f"'{name}' of {where}")[None]
        short = (
            x.dim() == 2 and len(wanted.shape) == 1 and takes_integers(wanted.dtype) and x.shape[1] < wanted.shape[0]
        )
        if short and masked:
            length = x.shape[1]
            x = torch.nn.functional.pad(x, (0, wanted.shape[0] - length))
            if place not in masked:
                kept = (torch.arange(wanted.shape[0]) < length)[None]
        made.append(_fitted(x, wanted, name, where))
    for place, value in enumerate(made):
        if value is None:
            shape, dtype = fields.inputs[place].shape, fields.inputs[place].dtype or torch.int64
            made[place] = (torch.ones(1, *shape, dtype=torch.bool) if kept is None else kept).to(dtype)
    return tuple(x for x in made if x is not None), kept


def _fitted(x: Tensor, wanted: NetworkInput, name: str, where: str) -> Tensor:
    try:
        return to_input(x, wanted.shape, dtype=wanted.dtype)
    except InputError as error:
        raise InputError(f"{where}, input '{name}': {error}") from error


def target_tensors(targets: Any, where: str, kept: Tensor | None = None) -> Any:
    """Return targets of one sample as tensors ``(1, ...)``; those of padded tokens are padded with -100.

    Raises:
        InputError: a target holds no numbers.
    """

    def one(y: Tensor) -> Tensor:
        y = y[None]
        if kept is not None and y.dim() == 2 and takes_integers(y.dtype) and y.shape[1] == int(kept.sum()):
            y = torch.nn.functional.pad(y, (0, kept.shape[1] - y.shape[1]), value=_PADDED_TARGET)
        return y

    if isinstance(targets, str | bytes):
        return targets
    return map_tensors(one, as_tensors(targets, f"the target of {where}"))


def batch_tensors(
    inputs: Sequence[Any], targets: Any, fields: SampleFields, where: str
) -> tuple[tuple[Tensor, ...], Any]:
    """Return the inputs, each ``(n, *shape)``, and the targets of a batch that a ``collate_fn`` made.

    Raises:
        InputError: they hold no numbers, cannot be fitted, or their counts differ.
    """
    made = []
    for value, name, wanted in zip(inputs, fields.names, fields.inputs, strict=True):
        if value is None:
            raise InputError(f"{where} has no '{name}', which the network takes")
        made.append(_fitted(to_tensor(value, f"'{name}' of {where}"), wanted, name, where))
    wanted_targets = as_tensors(targets, f"the targets of {where}")
    counts = {len(x) if x.dim() else 0 for x in made}
    map_tensors(lambda y: counts.add(len(y) if y.dim() else 0), wanted_targets)
    if len(counts) != 1:
        raise InputError(f"{where} has members of different counts: {sorted(counts)}")
    return tuple(made), wanted_targets


def as_tensors(targets: Any, what: str) -> Any:
    """Return targets with every array, number or list of numbers in them as a tensor; None stays.

    Args:
        targets: an array, or sequences and mappings of arrays.
        what: what messages call the targets.

    Raises:
        InputError: a target holds no numbers.
    """
    if targets is None:
        return None
    if isinstance(targets, Mapping):
        return {str(key): as_tensors(value, f"'{key}' of {what}") for key, value in targets.items()}
    nested = (*_NESTED, np.ndarray) if isinstance(targets, tuple) else _NESTED  # a list of arrays is one stacked target
    if isinstance(targets, tuple | list) and any(isinstance(part, nested) for part in targets):
        return tuple(as_tensors(part, what) for part in targets)
    return to_tensor(targets, what)

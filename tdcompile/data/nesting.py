"""Tensors nested in sequences and mappings: list them, apply a function, take rows, join samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return a nesting of lists, tuples and mappings with every tensor replaced; other values stay."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(map_tensors(function, item) for item in value)
    return value


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield in order the tensors nested in sequences, mappings, dataclasses and torch's registered trees."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif type(value) in pytree.SUPPORTED_NODES:
        for item in pytree.tree_leaves(value):
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def first_not_finite(x: Tensor) -> int | None:
    """Return the place of the first sample of ``(N, ...)`` that holds NaN or Inf; None if none does."""
    if not x.is_floating_point() or bool(torch.isfinite(x).all()):
        return None
    return int((~torch.isfinite(x).reshape(len(x), -1).all(1)).nonzero()[0])


def rows(value: Any, indices: Sequence[int] | Tensor) -> Any:
    """Return some samples of a nesting of tensors ``(N, ...)``."""
    places = torch.as_tensor(indices)
    return map_tensors(lambda x: x[places.to(x.device)], value)


def concatenated(values: Sequence[Any]) -> Any:
    """Join nestings of one structure along the first axis of their tensors.

    Raises:
        ValueError: the structures or the shapes differ.
    """
    first = values[0]
    if isinstance(first, Tensor):
        try:
            return torch.cat(list(values))
        except (RuntimeError, TypeError) as error:
            raise ValueError(str(error)) from error
    if isinstance(first, Mapping):
        if any(not isinstance(value, Mapping) or set(value) != set(first) for value in values):
            raise ValueError("the keys differ")
        return {key: concatenated([value[key] for value in values]) for key in first}
    if isinstance(first, list | tuple):
        if any(not isinstance(value, list | tuple) or len(value) != len(first) for value in values):
            raise ValueError("the numbers of members differ")
        return tuple(concatenated([value[place] for value in values]) for place in range(len(first)))
    if any(value is not None for value in values):
        raise ValueError(f"a {type(first).__name__} is not a tensor")
    return None

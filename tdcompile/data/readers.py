"""Readers of raw samples: from an array, from encoded images, from a user's torch data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from tdcompile.data.images import decode, to_input, to_tensor
from tdcompile.data.network_input import NetworkInput
from tdcompile.errors import InputError, TdcompileError

# Limit on the decoded images kept in memory for one split, in bytes (all of CIFAR-10 is 184 MB). Decoding again costs
# ten times as much as reading, but a set of large images must not fill the memory.
_KEEP = 512 * 2**20


class Reader(Protocol):
    """Random access to samples, converted to the network's input but not normalised."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Tensor:
        """Return the samples at these indices, ``(n, *shape)``."""


class ArrayReader:
    """Reads samples of one array ``(n, ...)``; see ``to_input`` for the conversion."""

    def __init__(self, x: Tensor, wanted: NetworkInput, *, stretch: bool = False) -> None:
        self._x, self._wanted, self._stretch = x, wanted, stretch

    def __len__(self) -> int:
        return len(self._x)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Return the samples at these indices, ``(n, *shape)``."""
        rows = self._x[torch.as_tensor(indices)]
        return to_input(rows, self._wanted.shape, stretch=self._stretch, dtype=self._wanted.dtype)


class EncodedReader:
    """Reads encoded images from files or memory. Decoded images stay in memory as uint8 if all of them fit.

    Args:
        count: number of images.
        fetch: returns the encoded image at an index, or the path of its file.
        wanted: the network's input.
    """

    def __init__(self, count: int, fetch: Callable[[int], bytes | Path], wanted: NetworkInput) -> None:
        self._count, self._fetch, self._wanted = count, fetch, wanted
        kept = count if count * int(np.prod(wanted.shape)) <= _KEEP else 0
        self._pixels: NDArray[np.uint8] = np.empty((kept, *wanted.shape), np.uint8)  # takes no memory until written
        self._known: NDArray[np.bool_] = np.zeros(kept, np.bool_)

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Sequence[int]) -> Tensor:
        """Return the samples at these indices, ``(n, *shape)``."""
        places = np.asarray(indices)
        if not len(self._known):
            return self._to_input(np.stack([self._decode(int(i)) for i in places]))
        for i in places[~self._known[places]]:
            self._pixels[i] = self._decode(int(i))
            self._known[i] = True
        return self._to_input(self._pixels[places])

    def _to_input(self, pixels: NDArray[np.uint8]) -> Tensor:
        return to_input(torch.from_numpy(pixels), self._wanted.shape, dtype=self._wanted.dtype)

    def _decode(self, index: int) -> NDArray[np.uint8]:
        image = self._fetch(index)
        try:
            return decode(image, self._wanted.shape)
        except InputError as error:
            place = f" ('{image}')" if isinstance(image, Path) else ""
            raise InputError(f"sample {index}{place}: {error}") from error


class DatasetReader:
    """Reads a user's map-style torch data set with items ``x`` or ``(x, y)``."""

    def __init__(self, dataset: Dataset[Any], wanted: NetworkInput) -> None:
        # streams, which have no length, are read by ``read_stream``
        self._dataset, self._wanted, self._count = dataset, wanted, len(dataset)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Sequence[int]) -> Tensor:
        """Return the samples at these indices, ``(n, *shape)``."""
        rows = [to_tensor(self._item(int(i))[0], f"sample {i}")[None] for i in indices]
        return torch.cat([to_input(row, self._wanted.shape, dtype=self._wanted.dtype) for row in rows])

    def labels(self) -> Sequence[object] | None:
        """Return all labels: ``targets`` of the data set if no transform changes them, else those of every item."""
        if not self._count or len(self._item(0)) == 1:
            return None
        targets = self._targets()
        return [self._item(i)[1] for i in range(self._count)] if targets is None else targets

    def _targets(self) -> list[Any] | None:
        """Return the ``targets`` of the data set, if it has them and no transform changes them."""
        targets = getattr(self._dataset, "targets", None)
        return None if targets is None or getattr(self._dataset, "target_transform", None) is not None else [*targets]

    def _raw(self, index: int) -> Any:
        try:
            return self._dataset[index]
        except TdcompileError:
            raise
        except Exception as error:
            raise InputError(f"sample {index} cannot be read: {type(error).__name__}: {error}") from error

    def _item(self, index: int) -> tuple[object, ...]:
        item = self._raw(index)
        if isinstance(item, Mapping):
            keys = ", ".join(map(str, item))
            raise InputError(f"sample {index} is a {type(item).__name__} of {keys}; items are x or (x, y)")
        parts = tuple(item) if isinstance(item, tuple | list) else (item,)
        if len(parts) not in (1, 2):
            raise InputError(f"sample {index} has {len(parts)} members; x or (x, y) is needed")
        return parts

"""Samples of a torch ``DataLoader``: those that its sampler chooses, as its ``collate_fn`` makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from tdcompile.data.images import to_input, to_tensor
from tdcompile.data.network_input import NetworkInput
from tdcompile.data.readers import DatasetReader
from tdcompile.data.samples import Split
from tdcompile.data.structured import collate_of, read_structured
from tdcompile.data.task import Note, Samples
from tdcompile.errors import InputError, TdcompileError

_BATCH = 64  # items that are collated at a time if the loader has no batch size


def read_loader(loader: DataLoader[Any], name: str, wanted: NetworkInput, seed: int) -> Split | Samples:
    """Read the samples of a loader by index.

    A ``collate_fn`` is applied to the items of each batch that is read. A sampler chooses the samples, and is drawn
    once. ``Samples`` are returned as they are: they make their batches.

    Args:
        name: what messages call the samples.
        seed: seeds the draw of a random sampler.

    Raises:
        InputError: its samples, labels or indices cannot be used, or a sampler chooses among
            ``Samples``.
    """
    dataset: Any = loader.dataset
    indices, notes = _chosen(loader, seed, name)
    if isinstance(dataset, Samples):
        if indices is not None:
            raise InputError(f"{notes[-1].text}: give the Samples themselves, and their subset(indices) for a part")
        return dataset
    if indices is not None:
        dataset = _Part(dataset, indices)
    return _read_items(dataset, name, wanted, loader, tuple(notes))


def _read_items(
    dataset: Any, name: str, wanted: NetworkInput, loader: DataLoader[Any], notes: tuple[Note, ...]
) -> Split | Samples:
    collate = collate_of(loader)
    samples = read_structured(dataset, name, wanted, collate)
    if samples is not None:
        return samples.told(notes)
    if collate is None:
        reader: DatasetReader = DatasetReader(dataset, wanted)
    else:
        reader = CollatedReader(dataset, wanted, collate, loader.batch_size or _BATCH)
    return Split.checked(name, reader, reader.labels(), notes)


class CollatedReader(DatasetReader):
    """Reads a data set through a function that makes a batch ``x`` or ``(x, y)`` of a list of items."""

    def __init__(
        self, dataset: Dataset[Any], wanted: NetworkInput, collate: Callable[[list[Any]], Any], size: int
    ) -> None:
        super().__init__(dataset, wanted)
        self._collate, self._size = collate, size
        self._given: list[Any] | None = None  # labels of ``targets``, to which those of a batch are compared

    def read(self, indices: Sequence[int]) -> Tensor:
        """Return the samples at these indices, ``(n, *shape)``."""
        x, y = self._batch(indices)
        if self._given is not None and y != [self._given[int(i)] for i in indices]:
            raise InputError("collate_fn gives other labels than the data set's 'targets', which were read for all")
        return to_input(x, self._wanted.shape, dtype=self._wanted.dtype)

    def labels(self) -> Sequence[object] | None:
        """Return all labels: ``targets`` of the data set if the first batch has them, else those of every batch."""
        if not len(self):
            return None
        first = self._batch(range(min(self._size, len(self))))[1]
        if first is None:
            return None
        targets = self._targets()
        if targets is not None and [_plain(y) for y in targets[: len(first)]] == first:
            self._given = [_plain(y) for y in targets]
            return self._given
        rest = range(len(first), len(self), self._size)
        batches = (self._batch(range(start, min(start + self._size, len(self))))[1] for start in rest)
        return [*first, *chain.from_iterable(batch or () for batch in batches)]

    def _batch(self, indices: Sequence[int]) -> tuple[Tensor, list[Any] | None]:
        """Return the inputs of a batch, and its labels as plain values."""
        items = [self._raw(int(i)) for i in indices]
        try:
            made = self._collate(items)
        except TdcompileError:
            raise
        except Exception as error:
            raise InputError(f"collate_fn failed: {type(error).__name__}: {error}") from error
        parts = made if isinstance(made, tuple | list) else (made,)
        if isinstance(made, Mapping) or len(parts) not in (1, 2):
            held = f" of {', '.join(map(str, made))}" if isinstance(made, Mapping) else f" of {len(parts)} members"
            raise InputError(f"collate_fn returned a {type(made).__name__}{held}; a batch x or (x, y) is needed")
        x = to_tensor(parts[0], "the input that collate_fn returned")
        y = None if len(parts) == 1 else [_plain(label) for label in parts[1]]
        if not x.dim() or len(x) != len(items) or (y is not None and len(y) != len(items)):
            shape = f"an input of shape {tuple(x.shape)}" + ("" if y is None else f" and {len(y)} labels")
            raise InputError(f"collate_fn made {shape} of {len(items)} items")
        return x, y


class _Part(Dataset[Any]):
    """The samples of a data set at some indices, with its ``targets`` if it has them."""

    def __init__(self, whole: Any, indices: Sequence[int]) -> None:
        self._whole, self._indices = whole, indices
        self.targets = None
        self.target_transform = getattr(whole, "target_transform", None)
        if getattr(whole, "targets", None) is not None:
            self.targets = [whole.targets[i] for i in indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        return self._whole[self._indices[index]]


def _chosen(loader: DataLoader[Any], seed: int, name: str) -> tuple[list[int] | None, list[Note]]:
    """Return the indices that a loader's sampler chooses, None for all, and what a user may not expect.

    Raises:
        InputError: the sampler has no length, or its indices are no places in the data set.
    """
    count = len(loader.dataset)  # type: ignore[arg-type]  # a map-style data set
    batches = loader.batch_sampler
    plain = batches if type(batches) is BatchSampler else None
    notes = []
    if plain is not None and plain.drop_last and count % plain.batch_size:
        notes.append(Note(f"{name}: drop_last of the loader is not applied; every sample counts"))
    source: Any = plain.sampler if plain is not None else batches or loader.sampler
    if type(source) is SequentialSampler or (
        type(source) is RandomSampler and not source.replacement and source.num_samples == count
    ):
        return None, notes
    if type(source) is DistributedSampler:
        notes.append(Note(f"{name}: the loader's DistributedSampler is not applied; all {count} samples are read"))
        return None, notes
    if type(source) is SubsetRandomSampler:
        indices = sorted(map(int, source.indices))
    else:
        indices = _drawn(source, seed, batched=source is batches)
    if not indices or min(indices) < 0 or max(indices) >= count:
        raise InputError(f"the loader's {type(source).__name__} chooses no places of 0 to {count - 1}")
    kind = f"{len(indices)} samples, {len(set(indices))} of {count} distinct ones"
    notes.append(Note(f"{name}: the loader's {type(source).__name__} chooses {kind}"))
    return indices, notes


def _drawn(sampler: Any, seed: int, *, batched: bool) -> list[int]:
    """Return the indices of one epoch of a sampler; its random state and torch's stay as they are.

    Raises:
        InputError: it has no length, fails, or yields something else than indices.
    """
    what = f"the loader's {type(sampler).__name__}"
    generator = getattr(sampler, "generator", None)
    state = generator.get_state() if isinstance(generator, torch.Generator) else None
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drawn: Iterable[Any] = islice(sampler, len(sampler))  # without a bound, some yield for ever
            return [int(i) for i in (chain.from_iterable(drawn) if batched else drawn)]
    except Exception as error:  # the user's code
        raise InputError(f"{what} cannot be drawn: {type(error).__name__}: {error}") from error
    finally:
        if state is not None:
            generator.set_state(state)  # type: ignore[union-attr]


def _plain(label: object) -> Any:
    """Return a label as a value of Python; an array of several stays as it is."""
    if isinstance(label, Tensor):
        return label.item() if label.numel() == 1 else label
    return label.item() if isinstance(label, np.generic | np.ndarray) and label.size == 1 else label

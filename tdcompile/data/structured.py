"""Samples of several inputs or any targets: from data sets, loaders, streams and arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate, default_convert

from tdcompile.data.images import Normalisation, to_tensor
from tdcompile.data.labels import Labels, described
from tdcompile.data.members import as_tensors, batch_tensors, converted, split_sample, target_tensors
from tdcompile.data.nesting import concatenated, first_not_finite, map_tensors, tensors_in
from tdcompile.data.network_input import NetworkInput
from tdcompile.data.task import Batch, Note, Samples, Tensors, is_whole, one_class
from tdcompile.errors import InputError, TdcompileError

# A stream is read until its samples take this many bytes.
_STREAM_BYTES = 2 * 2**30


class StructuredSamples(Samples):
    """Samples of a map-style data set whose items are sequences or mappings of inputs and targets.

    Args:
        name: what messages call the samples.
        items: returns the item at an index.
        count: number of items.
        wanted: the network's inputs.
        collate: makes a batch of a list of items; None converts each item by itself.
    """

    def __init__(
        self,
        name: str,
        items: Callable[[int], Any],
        count: int,
        wanted: NetworkInput,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        if not count:
            raise InputError(f"{name} holds no samples")
        self._name, self._items, self._count = name, items, count
        self._fields, self._collate = wanted.members, collate
        self._normalisation = Normalisation()
        self._labels: Labels | None = None
        self._told: tuple[Note, ...] = ()
        if isinstance(self._read([0])[1], str | bytes):
            self._labels = Labels.of([self._text(place) for place in range(count)], name)

    def normalised(self, normalisation: Normalisation) -> StructuredSamples:
        """Normalise the first input from now on, and return the samples."""
        self._normalisation = normalisation
        return self

    def told(self, notes: tuple[Note, ...]) -> StructuredSamples:
        """Add messages for the report, and return the samples."""
        self._told += notes
        return self

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the samples at these indices.

        Raises:
            InputError: one cannot be read or fitted, holds NaN or Inf, or differs from the others in its structure.
        """
        places = [int(i) for i in indices]
        if self._collate is None:
            parts = [self._read([place]) for place in places]
            try:
                inputs = concatenated([part[0] for part in parts])
                targets = concatenated([part[1] for part in parts]) if self._labels is None else None
            except ValueError as error:
                raise InputError(
                    f"{self._name}: samples {places[0]} to {places[-1]} do not fit together: {error}"
                ) from error
        else:
            inputs, targets = self._read(places)
        members = [(f"input '{name}'", x) for name, x in zip(self._fields.names, inputs, strict=True)]
        for what, x in (*members, *(("the target", y) for y in tensors_in(targets))):
            if (bad := first_not_finite(x)) is not None:
                raise InputError(f"{self._name}: {what} of sample {places[bad]} holds NaN or Inf")
        if self._labels is not None:
            targets = self._labels.numbers[torch.as_tensor(places)]
        first = self._normalisation.apply(inputs[0])
        return Batch((first, *inputs[1:]), targets)

    @property
    def classes(self) -> int | None:
        """Number of classes if the targets are text."""
        return None if self._labels is None else len(self._labels.names)

    @property
    def notes(self) -> tuple[Note, ...]:
        """How text became class numbers."""
        if self._labels is None:
            return self._told
        told = f"the labels of {self._name} are text; their sorted values are the classes: "
        return (*self._told, Note(told + described(self._labels.names)), *one_class(self._labels.numbers, self._name))

    def _read(self, places: list[int]) -> tuple[tuple[Tensor, ...], Any]:
        if self._collate is not None:
            where = f"the batch that collate_fn of {self._name} made"
            made = _collated(self._collate, [self._item(place) for place in places])
            return batch_tensors(*split_sample(made, self._fields, where), self._fields, where)
        where = f"sample {places[0]} of {self._name}"
        given, targets = split_sample(self._item(places[0]), self._fields, where)
        inputs, kept = converted(given, self._fields, where)
        return inputs, target_tensors(targets, where, kept)

    def _item(self, place: int) -> Any:
        try:
            return self._items(place)
        except TdcompileError:
            raise
        except Exception as error:  # the user's code
            raise InputError(f"sample {place} cannot be read: {type(error).__name__}: {error}") from error

    def _text(self, place: int) -> Any:
        return split_sample(self._item(place), self._fields, f"sample {place} of {self._name}")[1]


def read_structured(
    dataset: Any, name: str, wanted: NetworkInput, collate: Callable[[list[Any]], Any] | None = None
) -> StructuredSamples | None:
    """Return the samples of a map-style data set with several inputs or targets; None if they are ``x`` or ``(x, y)``.

    Args:
        dataset: the data set.
        name: what messages call it.
        wanted: the network's inputs.
        collate: the ``collate_fn`` of its loader, if it has its own.

    Raises:
        InputError: the first sample cannot be read, or does not fit.
    """
    if not len(dataset):
        return None
    try:
        first = dataset[0]
    except TdcompileError:
        raise
    except Exception as error:  # the user's code
        raise InputError(f"sample 0 cannot be read: {type(error).__name__}: {error}") from error
    made = first if collate is None else _collated(collate, [first])
    if not is_structured(made, wanted, batched=collate is not None):
        return None
    return StructuredSamples(name, dataset.__getitem__, len(dataset), wanted, collate)


def is_structured(item: Any, wanted: NetworkInput, *, batched: bool = False) -> bool:
    """Return whether an item is more than an input ``x``, or an input and a class number or text ``(x, y)``.

    Args:
        item: a sample, or a batch that a ``collate_fn`` made.
        wanted: the network's inputs.
        batched: it is a batch.
    """
    if isinstance(item, Mapping) or len(wanted.members.names) > 1:
        return True
    if not isinstance(item, tuple | list):
        return False
    if len(item) not in (1, 2) or isinstance(item[0], Mapping | tuple | list):
        return True
    return len(item) == 2 and not (are_labels(item[1]) if batched else _is_label(item[1]))


def _is_label(value: Any) -> bool:
    """Return whether a target is text or one whole number, not in an array of several axes."""
    if value is None or isinstance(value, str | bytes):
        return True  # a missing label is refused where all labels are read
    if isinstance(value, Mapping) or (isinstance(value, list | tuple) and not all(isinstance(x, int) for x in value)):
        return False
    y = to_tensor(value, "a target")
    return y.numel() == 1 and y.dim() <= 1 and is_whole(y)


def are_labels(values: Any) -> bool:
    """Return whether the targets of a batch are texts or whole numbers, one for each sample."""
    if isinstance(values, list | tuple):
        return all(_is_label(value) for value in values)
    if isinstance(values, np.ndarray) and values.dtype.kind in "SUO":
        return True
    y = to_tensor(values, "the targets")
    return is_whole(y) and (y.dim() < 2 or (y.dim() == 2 and y.shape[1] == 1))


class StreamSamples(Tensors):
    """The first samples of a stream, in memory.

    Args:
        inputs: see ``Tensors``.
        targets: see ``Tensors``.
        told: how much of the stream was read.
    """

    def __init__(self, inputs: Sequence[Tensor], targets: Any, told: Note) -> None:
        super().__init__(inputs, targets)
        self._told, self._normalisation = told, Normalisation()

    def normalised(self, normalisation: Normalisation) -> StreamSamples:
        """Normalise the first input from now on, and return the samples."""
        self._normalisation = normalisation
        return self

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the samples at these indices.

        Raises:
            InputError: one holds NaN or Inf.
        """
        inputs, targets = super().batch(indices)
        for x in (*inputs, *tensors_in(targets)):
            if (bad := first_not_finite(x)) is not None:
                raise InputError(f"sample {list(indices)[bad]} of a stream holds NaN or Inf")
        return Batch((self._normalisation.apply(inputs[0]), *inputs[1:]), targets)

    @property
    def notes(self) -> tuple[Note, ...]:
        """How much was read, and a caution if all samples are of one class."""
        return (self._told, *super().notes)


def read_stream(data: Any, name: str, wanted: NetworkInput, limit: int) -> StreamSamples:
    """Read the first samples of a stream into memory: an iterable data set, or a loader of one.

    Args:
        data: the stream.
        name: what messages call it.
        wanted: the network's inputs.
        limit: samples to read.

    Raises:
        InputError: it holds no samples, or one cannot be used.
    """
    fields = wanted.members
    batches: list[tuple[tuple[Tensor, ...], Any]] = []
    count, held, ended = 0, 0, True
    loader = isinstance(data, DataLoader)
    batched = loader and data.batch_size is not None
    for place, item in enumerate(_iterated(data, name)):
        where = f"{'batch' if batched else 'sample'} {place} of {name}"
        given, targets = split_sample(item, fields, where)
        if batched:
            made = batch_tensors(given, targets, fields, where)
        else:
            inputs, kept = converted(given, fields, where)
            made = inputs, target_tensors(targets, where, kept)
        batches.append(made)
        count += len(made[0][0])
        held += sum(x.nbytes for x in tensors_in(made))
        if count >= limit or held >= _STREAM_BYTES:
            ended = False
            break
    if not batches:
        raise InputError(f"{name} is a stream without samples")
    try:
        inputs = concatenated([batch[0] for batch in batches])
        targets = concatenated([batch[1] for batch in batches])
    except ValueError as error:
        raise InputError(f"the samples of {name} do not fit together: {error}") from error
    part = "all" if ended else "the first"
    return StreamSamples(inputs, targets, Note(f"{name} is a stream, of which {part} {count} samples are read"))


def _iterated(data: Any, name: str) -> Iterable[Any]:
    try:
        yield from data
    except TdcompileError:
        raise
    except Exception as error:  # the user's code
        raise InputError(f"{name} cannot be read: {type(error).__name__}: {error}") from error


def is_stream(data: object) -> bool:
    """Return whether data can only be read from its beginning."""
    dataset = data.dataset if isinstance(data, DataLoader) else data
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__")


def collate_of(loader: DataLoader[Any]) -> Callable[[list[Any]], Any] | None:
    """Return a loader's own ``collate_fn``, or None for torch's."""
    collate = loader.collate_fn
    return None if collate in (default_collate, default_convert) else collate


def array_samples(name: str, arrays: Any, wanted: NetworkInput) -> StructuredSamples:
    """Return samples of arrays ``(N, ...)``: a mapping, or a sequence of inputs and targets.

    Raises:
        InputError: an array is no array, or the counts differ.
    """
    fields = wanted.members
    given, targets = split_sample(arrays, fields, name)
    kept = [to_tensor(x, f"'{key}' of {name}") for key, x in zip(fields.names, given, strict=True) if x is not None]
    answers = as_tensors(targets, f"the targets of {name}")
    counts = {len(x) if x.dim() else 0 for x in (*kept, *tensors_in(answers))}
    if len(counts) != 1 or counts == {0}:
        raise InputError(f"{name}: inputs and targets need one count above 0; their counts are {sorted(counts)}")

    def item(place: int) -> Any:
        inputs = [None if x is None else to_tensor(x, name)[place] for x in given]
        row = {key: x for key, x in zip(fields.names, inputs, strict=True) if x is not None}
        return (row,) if answers is None else (row, map_tensors(lambda y: y[place], answers))

    return StructuredSamples(name, item, next(iter(counts)), wanted)


def _collated(collate: Callable[[list[Any]], Any], items: list[Any]) -> Any:
    try:
        return collate(items)
    except TdcompileError:
        raise
    except Exception as error:  # the user's code
        raise InputError(f"collate_fn failed: {type(error).__name__}: {error}") from error

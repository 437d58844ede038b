"""``Split``: the raw samples of a data reader; ``Loaded``: normalised ``Samples`` of a split, checked when read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdcompile.data.images import Normalisation
from tdcompile.data.labels import Labels
from tdcompile.data.nesting import first_not_finite
from tdcompile.data.readers import Reader
from tdcompile.data.task import Batch, Note, Samples, one_class
from tdcompile.errors import InputError


@dataclass(frozen=True)
class Split:
    """Raw samples.

    Attributes:
        name: what messages call the split.
        labels: class numbers ``(n,)``, or None.
        names: the text of each class, if the labels were text.
        notes: messages for the report.
    """

    name: str
    reader: Reader
    labels: Tensor | None
    names: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()

    @classmethod
    def checked(cls, name: str, reader: Reader, labels: object | None, notes: tuple[Note, ...] = ()) -> Split:
        """Make a split and check that it holds samples and that its labels are class numbers.

        Args:
            name: what messages call the split.
            reader: reads the samples.
            labels: class numbers, texts, ``Labels``, or None.
            notes: messages for the report.

        Raises:
            InputError: the split is empty, or its labels have another count, are not integers, or are negative.
        """
        if len(reader) == 0:
            raise InputError(f"{name} holds no samples")
        if labels is None:
            return cls(name, reader, None, (), notes)
        made = labels if isinstance(labels, Labels) else Labels.of(labels, name)
        classes = made.numbers
        if classes.numel() != len(reader) or classes.shape[0] != len(reader):
            raise InputError(f"{name} has {len(reader)} samples but labels of shape {tuple(classes.shape)}")
        classes = classes.reshape(-1).long()
        if int(classes.min()) < 0:
            place = int((classes < 0).nonzero()[0])
            raise InputError(f"the label of sample {place} of {name} is {int(classes[place])}; classes count from 0")
        return cls(name, reader, classes, made.names, notes)

    @property
    def classes(self) -> int:
        """The largest label plus one; 0 without labels."""
        return 0 if self.labels is None else max(int(self.labels.max()) + 1, len(self.names))


class Loaded(Samples):
    """Normalised samples of a split. Reading one that holds NaN or Inf raises ``InputError``.

    Args:
        split: the raw samples.
        classes: number of classes over train and test.
        normalisation: applied last.
    """

    def __init__(self, split: Split, classes: int, normalisation: Normalisation) -> None:
        self._split, self._normalisation = split, normalisation
        self._classes = None if split.labels is None else classes

    def __len__(self) -> int:
        return len(self._split.reader)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the samples at these indices.

        Raises:
            InputError: one cannot be read or fitted to the input, or holds NaN or Inf.
        """
        try:
            x = self._split.reader.read(indices)
        except InputError as error:
            raise InputError(f"{self._split.name}: {error}") from error
        if (place := first_not_finite(x)) is not None:
            raise InputError(f"{self._split.name}: sample {indices[place]} holds NaN or Inf")
        labels = None if self._split.labels is None else self._split.labels[torch.as_tensor(indices)]
        return Batch((self._normalisation.apply(x),), labels)

    @property
    def classes(self) -> int | None:
        """Number of classes over train and test; None without labels."""
        return self._classes

    @property
    def notes(self) -> tuple[Note, ...]:
        """What the reader tells, and a caution if all samples are of one class."""
        labels, name = self._split.labels, self._split.name
        return (*self._split.notes, *(() if labels is None else one_class(labels, name)))

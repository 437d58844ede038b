"""``Split``: the raw samples of a data reader; ``Loaded``: normalised ``Samples`` of a split, checked when read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdcompile.data.images import Normalisation, to_tensor
from tdcompile.data.readers import Reader
from tdcompile.data.task import Batch, Samples
from tdcompile.errors import InputError


@dataclass(frozen=True)
class Split:
    """Raw samples.

    Attributes:
        name: what messages call the split.
        labels: class numbers ``(n,)``, or None.
    """

    name: str
    reader: Reader
    labels: Tensor | None

    @classmethod
    def checked(cls, name: str, reader: Reader, labels: object | None) -> Split:
        """Make a split and check that it holds samples and that its labels are class numbers.

        Raises:
            InputError: the split is empty, or its labels have another count, are not integers, or are negative.
        """
        if len(reader) == 0:
            raise InputError(f"{name} holds no samples")
        if labels is None:
            return cls(name, reader, None)
        classes = to_tensor(labels, f"the labels of {name}")
        if classes.is_floating_point() or classes.dtype is torch.bool:
            raise InputError(f"the labels of {name} are {classes.dtype}; class numbers, integers from 0, are needed")
        if classes.numel() != len(reader) or classes.shape[0] != len(reader):
            raise InputError(f"{name} has {len(reader)} samples but labels of shape {tuple(classes.shape)}")
        classes = classes.reshape(-1).long()
        if int(classes.min()) < 0:
            place = int((classes < 0).nonzero()[0])
            raise InputError(f"the label of sample {place} of {name} is {int(classes[place])}; classes count from 0")
        return cls(name, reader, classes)

    @property
    def classes(self) -> int:
        """The largest label plus one; 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1


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
        finite = torch.isfinite(x)
        if not finite.all():
            place = int((~finite.flatten(1).all(1)).nonzero()[0])
            raise InputError(f"{self._split.name}: sample {indices[place]} holds NaN or Inf")
        labels = None if self._split.labels is None else self._split.labels[torch.as_tensor(indices)]
        return Batch((self._normalisation.apply(x),), labels)

    @property
    def classes(self) -> int | None:
        """Number of classes over train and test; None without labels."""
        return self._classes

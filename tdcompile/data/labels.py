"""Class numbers of labels: integers as they are, text by the sorted order of its values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tdcompile.data.images import to_tensor
from tdcompile.errors import InputError, nearest
from tdcompile.support.formatting import join_first

_SHOWN = 10  # classes that a message lists


@dataclass(frozen=True)
class Labels:
    """Labels of samples.

    Attributes:
        numbers: class numbers ``(n,)``.
        names: the text of each class, if the labels are text.
    """

    numbers: Tensor
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, values: object, name: str) -> Labels:
        """Make labels of numbers or texts; texts become the places of their values in sorted order.

        Args:
            name: what messages call the samples.

        Raises:
            InputError: the values are neither integers nor texts, or texts that are numbers in another order.
        """
        texts = _texts(values, name)
        if texts is None:
            numbers = to_tensor(values, f"the labels of {name}")
            if numbers.is_floating_point() or numbers.is_complex() or numbers.dtype is torch.bool:
                raise InputError(
                    f"the labels of {name} are {numbers.dtype}; class numbers, integers from 0, are needed"
                )
            return cls(numbers)
        names = tuple(sorted(set(texts)))
        if all(text.removeprefix("-").isdecimal() for text in names) and list(map(int, names)) != [*range(len(names))]:
            raise InputError(
                f"the labels of {name} are numbers written as text, such as '{texts[0]}': store them as integers"
            )
        places = {text: place for place, text in enumerate(names)}
        return cls(to_tensor(np.array([places[text] for text in texts], np.int64), name), names)

    def __getitem__(self, chosen: Tensor) -> Labels:
        """Return the labels of some samples, with the names of all."""
        return Labels(self.numbers[chosen], self.names)

    def __len__(self) -> int:
        return len(self.numbers) if self.numbers.dim() else 1


def renumbered(numbers: Tensor, names: tuple[str, ...], known: tuple[str, ...], what: str) -> Tensor:
    """Return the class numbers of labels with other names, in the order of ``known``.

    Raises:
        InputError: a name is not known.
    """
    for name in names:
        if name not in known:
            raise InputError(f"{what}: the label '{name}' is no class of the training samples: {nearest(name, known)}")
    return to_tensor(np.array([known.index(name) for name in names], np.int64), what)[numbers]


def described(names: tuple[str, ...]) -> str:
    """Return the classes of text labels as text: ``0 = cat, 1 = dog``."""
    return join_first([f"{place} = {name}" for place, name in enumerate(names)], ", ", _SHOWN)


def _texts(values: Any, name: str) -> list[str] | None:
    """Return labels that are texts; None if they are numbers.

    Raises:
        InputError: some are texts and some are not.
    """
    if isinstance(values, np.ndarray) and values.dtype.kind in "SUO":
        values = values.reshape(-1).tolist()
    if not isinstance(values, list | tuple) or not any(isinstance(value, str | bytes) for value in values):
        return None
    other = next((place for place, value in enumerate(values) if not isinstance(value, str | bytes)), None)
    if other is not None:
        raise InputError(f"the label of sample {other} of {name} is {values[other]!r}, where others are text")
    try:
        return [value.decode() if isinstance(value, bytes) else str(value) for value in values]
    except UnicodeDecodeError as error:
        raise InputError(f"the labels of {name} are bytes that are no UTF-8 text") from error

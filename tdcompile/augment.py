"""``Augmented``: images shifted and mirrored at random while a network is tuned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tdcompile.errors import InputError
from tdcompile.task import Batch, Samples

Augment = Literal["none", "shift", "shift-flip"]
_SHIFT = 8  # up to an eighth of the side: the customary 4 pixels of 32


class Augmented(Samples):
    """A view of image samples in which every reading draws anew.

    Args:
        samples: whose inputs are images ``(n, C, H, W)``.
        augment: ``shift`` by up to an eighth of each side, the border reflected; ``shift-flip`` mirrors half as well.
        generator: all randomness comes from it.
    """

    def __init__(self, samples: Samples, augment: Augment, generator: torch.Generator) -> None:
        self._samples, self._augment, self._generator = samples, augment, generator

    def __len__(self) -> int:
        return len(self._samples)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples at these places, each with a shift and flip of its own.

        Raises:
            InputError: an input is no image.
        """
        batch = self._samples.batch(indices)
        if self._augment == "none":
            return batch
        return Batch(tuple(self._moved(x) for x in batch.inputs), batch.labels)

    @property
    def classes(self) -> int | None:
        """As of the samples."""
        return self._samples.classes

    def _moved(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise InputError(f"augment={self._augment} needs images; an input has the shape {tuple(x.shape[1:])}")
        n, channels, height, width = x.shape
        rows, columns = self._places(n, height), self._places(n, width)
        if self._augment == "shift-flip":
            flip = torch.rand(n, 1, generator=self._generator) < 0.5
            columns = torch.where(flip, columns.flip(1), columns)
        places = (rows[:, :, None] * width + columns[:, None, :]).view(n, 1, -1).expand(-1, channels, -1)
        return x.flatten(2).gather(2, places.to(x.device)).view_as(x)

    def _places(self, n: int, side: int) -> Tensor:
        """Where each of ``side`` pixels is taken from, ``(n, side)``: moved, and reflected at both ends."""
        reach = side // _SHIFT
        shift = torch.randint(-reach, reach + 1, (n, 1), generator=self._generator)
        moved = (torch.arange(side) + shift).abs()
        return side - 1 - (side - 1 - moved).abs()

"""Augment images by random shifts and mirroring while a network is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tdcompile.data.nesting import map_tensors
from tdcompile.data.objective import Objective
from tdcompile.data.task import Batch, Samples
from tdcompile.errors import InputError

Augment = Literal["none", "shift", "shift-flip"]
AugmentOption = Literal["auto", Augment]
_SHIFT = 8  # a shift is at most an eighth of the side: the customary 4 of 32 pixels
_SHIFTABLE = 16  # pixels a side; in a smaller image a shift moves the object out of the image


def resolve_augment(asked: AugmentOption, inputs: Sequence[Tensor], objective: Objective | None = None) -> Augment:
    """Resolve ``auto``: shift images of at least 16 pixels a side, and mirror colour images too.

    Targets that are numbers may change with the image in an unknown way: ``auto`` then moves nothing.
    """
    if asked != "auto":
        return asked
    if objective is not None and not objective.kind.shiftable:
        return "none"
    if not all(x.ndim == 4 and min(x.shape[2:]) >= _SHIFTABLE for x in inputs):
        return "none"
    return "shift-flip" if all(x.shape[1] == 3 for x in inputs) else "shift"


class Augmented(Samples):
    """A view of image samples, each with its own random shift and flip until ``redraw`` draws new ones.

    The draw of a sample depends on its index and the seed only, not on its batch or the order of reading. Hence
    processes that split a batch see the images that one process would.

    Args:
        samples: samples whose inputs are images ``(n, C, H, W)``.
        augment: ``shift`` by up to an eighth of each side, the border reflected; ``shift-flip`` also mirrors half.
        seed: seeds the first draw.
        objective: if its targets have places, ``(n, H, W)`` or ``(n, C, H, W)``, they move with their image.
    """

    def __init__(self, samples: Samples, augment: Augment, seed: int = 0, objective: Objective | None = None) -> None:
        self._samples, self._augment = samples, augment
        self._spatial = objective is not None and objective.kind.spatial
        self.redraw(seed)

    def redraw(self, seed: int) -> None:
        """Draw new shifts and flips for all samples, as at the start of an epoch."""
        self._draws = torch.rand(len(self._samples), 3, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self._samples)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the samples at these indices, each with its own shift and flip.

        Raises:
            InputError: an input is not an image batch ``(n, C, H, W)``, or a target of places has another size.
        """
        batch = self._samples.batch(indices)
        if self._augment == "none":
            return batch
        draws = self._draws[torch.as_tensor(indices)]
        moved = tuple(self._moved(x, draws) for x in batch.inputs)
        if not self._spatial or batch.targets is None:
            return Batch(moved, batch.targets)
        size = batch.inputs[0].shape[-2:]
        return Batch(moved, map_tensors(lambda y: self._moved_target(y, draws, size), batch.targets))

    @property
    def classes(self) -> int | None:
        """Return the number of classes of the samples, None without labels."""
        return self._samples.classes

    def _moved_target(self, y: Tensor, draws: Tensor, size: torch.Size) -> Tensor:
        if y.shape[-2:] != size:
            raise InputError(
                f"augment={self._augment} moves targets of the images' size {tuple(size)}, not {tuple(y.shape[-2:])}: "
                "take augment=none"
            )
        return self._moved(y[:, None] if y.dim() == 3 else y, draws).view_as(y)

    def _moved(self, x: Tensor, draws: Tensor) -> Tensor:
        if x.ndim != 4:
            raise InputError(f"augment={self._augment} needs images; an input has the shape {tuple(x.shape[1:])}")
        n, channels, height, width = x.shape
        rows, columns = _source_positions(draws[:, :1], height), _source_positions(draws[:, 1:2], width)
        if self._augment == "shift-flip":
            columns = torch.where(draws[:, 2:] < 0.5, columns.flip(1), columns)
        places = (rows[:, :, None] * width + columns[:, None, :]).view(n, 1, -1).expand(-1, channels, -1)
        return x.flatten(2).gather(2, places.to(x.device)).view_as(x)


def _source_positions(draws: Tensor, side: int) -> Tensor:
    """Return the source position of each of ``side`` pixels, ``(n, side)``: shifted and reflected at both ends."""
    reach = side // _SHIFT
    moved = (torch.arange(side) + (draws * (2 * reach + 1)).long() - reach).abs()
    return side - 1 - (side - 1 - moved).abs()

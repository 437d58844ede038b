"""``NetworkInput``: the shape and dtype that samples are converted to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tdcompile.data.images import Shape, takes_integers


@dataclass(frozen=True)
class NetworkInput:
    """The first input of a network.

    Attributes:
        shape: shape of the input, without the batch.
        dtype: None if it is unknown.
    """

    shape: Shape
    dtype: torch.dtype | None = None

    @property
    def integer(self) -> bool:
        """Whether the input takes integers, for example the bytes of an image."""
        return takes_integers(self.dtype)

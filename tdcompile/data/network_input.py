"""``NetworkInput`` and ``SampleFields``: what samples are converted to, and how their members are told apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tdcompile.data.images import Shape, takes_integers

# Samples that a stream is read for where nothing else says how many are needed.
_STREAM = 4096
_STREAM_TEST = 10_000


@dataclass(frozen=True)
class NetworkInput:
    """An input of a network; readers of one input get the first, with the fields of all.

    Attributes:
        shape: shape of the input, without the batch.
        dtype: None if it is unknown.
        fields: all inputs by name; None if only this one is known.
    """

    shape: Shape
    dtype: torch.dtype | None = None
    fields: SampleFields | None = None

    @property
    def integer(self) -> bool:
        """Whether the input takes integers, for example the bytes of an image."""
        return takes_integers(self.dtype)

    @property
    def members(self) -> SampleFields:
        """All inputs of the network; this one alone, named ``x``, if no other is known."""
        return self.fields or SampleFields(("x",), (self,))


@dataclass(frozen=True)
class SampleFields:
    """How the members of a sample are told apart.

    Attributes:
        names: names of the network's inputs, in argument order.
        inputs: the inputs, without ``fields``.
        targets: key of the targets in samples that are dicts; None takes all that is no input.
        tokenizer: file of a tokenizer for text.
        stream: training samples to read of a stream.
        stream_test: test samples to read of a stream.
    """

    names: tuple[str, ...]
    inputs: tuple[NetworkInput, ...]
    targets: str | None = None
    tokenizer: str | None = None
    stream: int = _STREAM
    stream_test: int = _STREAM_TEST

    @classmethod
    def of(cls, tensors: tuple[Tensor, ...], names: tuple[str, ...], **others: object) -> SampleFields:
        """Return the fields of example inputs, each ``(N, ...)``."""
        inputs = tuple(NetworkInput(tuple(x.shape[1:]), x.dtype) for x in tensors)
        return cls(names, inputs, **others)  # type: ignore[arg-type]  # the names are attributes of this class

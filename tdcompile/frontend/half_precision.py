"""Conversion of half-precision networks and data to float32, for which onnxruntime has kernels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain, zip_longest

import torch
from torch import Tensor, nn

from tdcompile.data.images import cast_exactly, takes_integers
from tdcompile.data.task import Batch, Samples
from tdcompile.errors import InputError

HALF = (torch.float16, torch.bfloat16)


def to_single_precision(module: nn.Module) -> nn.Module:
    """Return the network, or a float32 copy with equal values if a parameter or buffer is fp16 or bf16.

    onnxruntime has no bf16 kernels on a CPU and few fp16 kernels, and half precision does not resolve the spectra that
    factors are computed from.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if not any(tensor.dtype in HALF for tensor in tensors):
        return module
    known: dict[int, object] = {}
    for tensor in tensors:
        if isinstance(tensor, nn.Parameter) and tensor.dtype in HALF:
            known[id(tensor)] = nn.Parameter(tensor.detach().float(), requires_grad=tensor.requires_grad)
        else:
            known[id(tensor)] = tensor.float() if tensor.dtype in HALF else tensor
    single = copy.deepcopy(module, known)
    for part in single.modules():  # dtypes that a module uses for tensors it creates
        for name, value in vars(part).items():
            if isinstance(value, torch.dtype) and value in HALF:
                setattr(part, name, torch.float32)
    return single


def inputs_to_single_precision(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the inputs with fp16 and bf16 tensors cast to float32."""
    return tuple(x.float() if x.dtype in HALF else x for x in tensors)


def samples_cast_like(samples: Samples | None, examples: tuple[Tensor, ...]) -> Samples | None:
    """Return samples cast to the example inputs' dtypes: files may hold fp16 or fp64, layers accept only theirs.

    Reading a sample raises ``InputError`` if it has integers where the network takes floats, or values that an integer
    input cannot hold.
    """
    return None if samples is None else _CastSamples(samples, examples)


class _CastSamples(Samples):
    def __init__(self, whole: Samples, examples: tuple[Tensor, ...]) -> None:
        self._whole, self._kinds = whole, [x.dtype for x in examples]

    def __len__(self) -> int:
        return len(self._whole)

    def batch(self, indices: Sequence[int]) -> Batch:
        inputs, labels = self._whole.batch(indices)
        pairs = zip_longest(inputs, self._kinds[: len(inputs)])
        return Batch(tuple(_cast(x, kind, place) for place, (x, kind) in enumerate(pairs)), labels)

    @property
    def classes(self) -> int | None:
        return self._whole.classes


def _cast(x: Tensor, kind: torch.dtype | None, place: int) -> Tensor:
    if kind is None or x.dtype is kind:
        return x
    if takes_integers(kind):
        try:
            return cast_exactly(x, kind)
        except InputError as error:
            raise InputError(f"input {place} of a sample: {error}") from error
    if x.is_floating_point() and kind.is_floating_point:
        return x.to(kind)
    have, want = (str(dtype).removeprefix("torch.") for dtype in (x.dtype, kind))
    raise InputError(f"input {place} of a sample is {have}, and the network's input is {want}: convert the samples")


def half_dtypes(module: nn.Module) -> str:
    """Return the half-precision dtypes of a network as text, such as ``bfloat16 and float16``."""
    kinds = {tensor.dtype for tensor in chain(module.parameters(), module.buffers())} & set(HALF)
    return " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))

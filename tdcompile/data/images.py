"""Conversion of images to a network's input: decoding, layout, colour, size, normalisation."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tdcompile.errors import InputError
from tdcompile.support.optional_import import import_optional

Shape = tuple[int, ...]
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as pillow's "L"
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_MARGIN = 256 / 224  # shorter side over crop: the usual test-time view of ImageNet networks
_MARGIN_FROM = 128  # smallest crop with a margin; a smaller one has no pixels to spare
_NAMED = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}


@dataclass(frozen=True)
class Normalisation:
    """``(x - mean) / std``: one pair for each channel of an image, one pair for other inputs, none if empty."""

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str, shape: Shape, dtype: torch.dtype | None = None) -> Self:
        """Read ``none``, ``imagenet`` or ``m,m,m/s,s,s`` for an input of this shape (without the batch).

        Raises:
            InputError: the text has another form, or another count than the input has channels, or the input is of
                integers.
        """
        if text == "none":
            return cls()
        if takes_integers(dtype):
            raise InputError(
                f"--normalize '{text}' makes floats, and the network's input is {_word(dtype)}: leave it out, because "
                "the network takes the integers as they are"
            )
        mean, std = _NAMED.get(text) or _numbers(text)
        channels = shape[0] if len(shape) == 3 else 1
        if len(mean) != channels or len(std) != channels:
            raise InputError(
                f"--normalize '{text}' has {len(mean)} means and {len(std)} deviations; "
                f"an input of shape {shape} takes {channels} of each"
            )
        if not all(map(math.isfinite, mean + std)) or min(std) <= 0:
            raise InputError(f"--normalize '{text}': means are finite numbers, deviations positive ones")
        return cls(mean, std)

    def apply(self, x: Tensor) -> Tensor:
        """Normalise a batch ``(n, *shape)``."""
        if not self.mean:
            return x
        shape = (-1, *(1,) * (x.ndim - 2)) if x.ndim > 1 else (-1,)
        return (x - torch.tensor(self.mean).view(shape)) / torch.tensor(self.std).view(shape)


def takes_integers(dtype: torch.dtype | None) -> bool:
    """Return whether an input of this dtype takes integers or booleans; an unknown one does not."""
    return dtype is not None and not dtype.is_floating_point and not dtype.is_complex


def to_input(x: Tensor, shape: Shape, *, stretch: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """Convert raw samples ``(n, ...)`` to the network's input ``(n, *shape)``.

    uint8 is scaled to [0, 1]. Images (three axes) are converted to channels first and to the input's channels. Other
    integers stay integers, because they may be tokens, unless ``dtype`` is floating. If ``dtype`` is of integers, uint8
    keeps its values, 0 to 255, and floats are cast only if they are integers.

    Args:
        x: the samples.
        shape: shape of the network's input, without the batch.
        stretch: resize images to the input's size, whatever their proportions.
        dtype: dtype of the network's input; None if it is unknown.

    Raises:
        InputError: the samples cannot be fitted to the input.
    """
    found = tuple(x.shape[1:])
    if found != shape and (len(shape) != 3 or len(found) not in (2, 3)):
        raise InputError(f"samples of shape {found} do not fit the input {shape}")
    if dtype is not None and takes_integers(dtype):
        kind = x.dtype
        fitted = x if found == shape else _fitted(x, shape, stretch)
        # Grey values and sizes between pixels are not whole; only those of integers may be rounded.
        return cast_exactly(
            fitted.round() if fitted.is_floating_point() and not kind.is_floating_point else fitted, dtype
        )
    if x.dtype is torch.uint8:
        x = x.float() / 255
    elif x.is_floating_point() or x.dtype is torch.bool:
        x = x.float()
    elif x.is_complex() or len(shape) == 3:
        raise InputError(f"samples of type {_word(x.dtype)}: images are uint8 or float")
    elif dtype is not None and dtype.is_floating_point:
        x = x.float()
    return x if found == shape else _fitted(x, shape, stretch)


def cast_exactly(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to a dtype of integers, or booleans.

    Raises:
        InputError: a value would change.
    """
    if x.dtype is dtype:
        return x
    wide = x.double()
    low, high = (0, 1) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    kept = (wide >= low) & (wide < high + 1) & (wide == wide.round())
    if not kept.all():
        value = wide[~kept][0].item()
        raise InputError(
            f"the samples are {_word(x.dtype)} with values such as {value:.4g}, and the network's input is "
            f"{_word(dtype)}: give integers in its range (images as uint8)"
        )
    return x.to(dtype)


def _word(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _fitted(x: Tensor, shape: Shape, stretch: bool) -> Tensor:
    """Return images ``(n, ...)`` in the input's layout, channels and size.

    Raises:
        InputError: they cannot be fitted to the input.
    """
    x = _coloured(_channels_first(x, shape), shape)
    if x.shape[2:] != shape[1:]:
        if not stretch:
            have, want = ("x".join(map(str, size)) for size in (x.shape[2:], shape[1:]))
            raise InputError(
                f"the images are {have}, the input is {want}: give --input 1x{shape[0]}x{have} (example inputs of that "
                f"size in Python), or resize the images to {want}"
            )
        x = nn.functional.interpolate(x.float(), size=shape[1:], mode="bilinear", align_corners=False, antialias=True)
    return x


def decode(image: bytes | Path, shape: Shape) -> NDArray[np.uint8]:
    """Decode one image to uint8 ``(C, H, W)`` of the input's shape.

    An image of another size is resized with its proportions until it covers the input, with the usual margin if the
    input is large enough. Then its centre is cut out.

    Raises:
        InputError: the input is no image, or the image cannot be decoded.
        UnavailableError: pillow is missing.
    """
    pillow = import_optional("PIL.Image")
    if len(shape) != 3 or shape[0] not in _MODES:
        raise InputError(f"an image does not fit the input {shape}: (1, H, W), (3, H, W) or (4, H, W) would")
    try:
        with pillow.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            picture = _cut(_in_mode(opened, _MODES[shape[0]], pillow), shape[1], shape[2], pillow)
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        raise InputError(f"the image cannot be decoded: {error}") from error
    pixels: NDArray[np.uint8] = np.asarray(picture, dtype=np.uint8).reshape(shape[1], shape[2], shape[0])
    return pixels.transpose(2, 0, 1)


def to_tensor(values: object, what: str) -> Tensor:
    """Convert an array, tensor or picture to a tensor of its own dtype (float64 to float32).

    Raises:
        InputError: the value is none of these, or holds no numbers.
    """
    if isinstance(values, Tensor):
        return values.detach().cpu()
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise InputError(f"{what} is a {type(values).__name__} of {array.dtype}; it must hold numbers")
    if array.dtype.kind == "f" and array.dtype.itemsize > 4:
        with np.errstate(over="ignore"):  # becomes Inf, which is found when it is read
            array = array.astype(np.float32)
    native = array.astype(array.dtype.newbyteorder("="), copy=not array.flags.writeable)
    return torch.from_numpy(np.ascontiguousarray(native).reshape(array.shape))  # a 0-d one gains an axis


def _numbers(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    try:
        means, deviations = (tuple(float(part) for part in side.split(",")) for side in text.split("/"))
    except ValueError as error:
        known = ", ".join(["none", *_NAMED])
        raise InputError(f"--normalize '{text}' is none of {known}, and not m,m,m/s,s,s") from error
    return means, deviations


def _channels_first(x: Tensor, shape: Shape) -> Tensor:
    if x.ndim == 3:
        return x[:, None]
    for fits in ({shape[0]}, set(_MODES)):
        if x.shape[1] in fits:
            return x
        if x.shape[3] in fits:
            return x.permute(0, 3, 1, 2)
    raise InputError(f"samples of shape {tuple(x.shape[1:])} have no axis of channels that fits the input {shape}")


def _coloured(x: Tensor, shape: Shape) -> Tensor:
    have, want = x.shape[1], shape[0]
    if have == want:
        return x
    if have == 1 and want == 3:
        return x.repeat(1, 3, 1, 1)
    if have == 4 and want == 3:
        return x[:, :3]
    if have in (3, 4) and want == 1:
        return (x[:, :3] * torch.tensor(_LUMA).view(3, 1, 1)).sum(1, keepdim=True)
    raise InputError(f"images of {have} channels do not fit the input {shape}")


def _in_mode(picture: Any, mode: str, pillow: Any) -> Any:
    if picture.mode.startswith("I;16"):  # pillow would clip to 255 where scaling is meant
        picture = pillow.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        raise InputError(f"the image is of pillow's mode '{picture.mode}'; 8 or 16 bits a channel can be read")
    return picture.convert(mode)


def _cut(picture: Any, height: int, width: int, pillow: Any) -> Any:
    if picture.size == (width, height):
        return picture
    margin = _MARGIN if min(height, width) >= _MARGIN_FROM else 1.0
    scale = max(round(height * margin) / picture.height, round(width * margin) / picture.width)
    size = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    picture = picture.resize(size, pillow.Resampling.BILINEAR)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return picture.crop((left, top, left + width, top + height))

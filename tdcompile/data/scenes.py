"""Scenes for segmentation: scikit-learn's digits in front of its photographs, with a class for each pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tdcompile.data.arrays import read_digits
from tdcompile.data.images import to_tensor
from tdcompile.data.network_input import NetworkInput
from tdcompile.data.structured import array_samples
from tdcompile.data.task import Samples
from tdcompile.errors import InputError
from tdcompile.support.optional_import import import_optional

SIZE = 48  # pixels a side
CLASSES = 11  # the background is class 0, the digit d is class d + 1
_TRAIN, _TEST = 1000, 200
_DIGITS = (1, 4)  # the fewest and the most digits in a scene
_SIDES = (14, 26)  # pixels a side of a digit
_INK = 0.35  # of the darkness of a digit's pixels, above which a pixel belongs to the digit


def read_scenes(argument: str, wanted: NetworkInput, seed: int) -> tuple[Samples, Samples]:
    """Draw scenes ``(3, 48, 48)`` and masks ``(48, 48)``: digits of any size and colour in front of a photograph.

    Train and test scenes have the digits of scikit-learn's own train and test part here, and are equal for every seed.

    Raises:
        InputError: the network's input has another shape.
        UnavailableError: scikit-learn or pillow is missing.
    """
    if wanted.shape != (3, SIZE, SIZE):
        raise InputError(f"scenes: the images are 3x{SIZE}x{SIZE}, and the network's input is {wanted.shape}")
    pictures = [to_tensor(x, "a photograph").float() / 255 for x in _photographs()]
    parts = read_digits("", NetworkInput((1, 8, 8)), seed)
    made = []
    for split, count, name, salt in ((parts[0], _TRAIN, "train", 1), (parts[1], _TEST, "test", 2)):
        assert split is not None  # ``read_digits`` returns both
        assert split.labels is not None
        digits = split.reader.read(range(len(split.reader)))[:, 0]
        drawn = [
            _scene(pictures, digits, split.labels, torch.Generator().manual_seed(1000 * salt + i)) for i in range(count)
        ]
        images, masks = (torch.stack(list(column)) for column in zip(*drawn, strict=True))
        made.append(array_samples(f"{name} of 'scenes'", (images, masks), wanted))
    return made[0], made[1]


def _photographs() -> list[object]:
    return list(import_optional("sklearn.datasets").load_sample_images().images)


def _scene(pictures: list[Tensor], digits: Tensor, labels: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return an image ``(3, 48, 48)`` in [0, 1] and its mask ``(48, 48)``."""

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    picture = pictures[number(0, len(pictures))]
    top, left = number(0, picture.shape[0] - SIZE), number(0, picture.shape[1] - SIZE)
    image = picture[top : top + SIZE, left : left + SIZE].permute(2, 0, 1).clone()
    mask = torch.zeros(SIZE, SIZE, dtype=torch.int64)
    for _ in range(number(_DIGITS[0], _DIGITS[1] + 1)):
        place, side = number(0, len(digits)), number(*_SIDES)
        ink = F.interpolate(digits[place][None, None], size=(side, side), mode="bilinear", align_corners=False)[0, 0]
        y, x = number(0, SIZE - side), number(0, SIZE - side)
        colour = torch.rand(3, 1, 1, generator=draw)
        window = (slice(y, y + side), slice(x, x + side))
        image[:, *window] = (1 - ink) * image[:, *window] + ink * colour
        mask[window] = torch.where(ink > _INK, int(labels[place]) + 1, mask[window])
    return image, mask

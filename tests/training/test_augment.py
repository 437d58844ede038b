from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tdcompile.data.task import Tensors
from tdcompile.errors import InputError
from tdcompile.training.augment import Augment, Augmented


def augmented(x: Tensor, augment: Augment, seed: int = 0) -> Augmented:
    return Augmented(Tensors(x, torch.arange(len(x))), augment, seed)


@pytest.mark.parametrize("augment", ["shift", "shift-flip"])
def test_each_image_is_a_reflected_shift_of_its_own(augment: Augment) -> None:
    x = torch.rand(1, 3, 16, 24)
    images = augmented(x.expand(400, -1, -1, -1), augment).batch(range(400)).inputs[0]
    padded = torch.nn.functional.pad(x, (3, 3, 2, 2), mode="reflect")[0]
    plain = [padded[:, t : t + 16, left : left + 24] for t in range(5) for left in range(7)]
    allowed = {image.numpy().tobytes() for image in plain}
    if augment == "shift-flip":
        allowed |= {image.flip(2).numpy().tobytes() for image in plain}
    seen = {image.numpy().tobytes() for image in images}
    assert seen <= allowed
    assert len(seen) > len(allowed) * 0.9  # every one of them does come up


def test_the_seed_decides() -> None:
    x = torch.rand(8, 1, 16, 16)
    first, again, other = (augmented(x, "shift-flip", seed).batch(range(8)).inputs[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    both = augmented(x, "shift-flip")
    before = both.batch(range(8)).inputs[0]
    both.redraw(5)
    assert not torch.equal(before, both.batch(range(8)).inputs[0])


def test_an_image_is_moved_the_same_whoever_reads_it_in_whatever_batch() -> None:
    x = torch.rand(8, 1, 16, 16)
    whole = augmented(x, "shift-flip").batch(range(8)).inputs[0]
    parts = augmented(x, "shift-flip")
    assert torch.equal(parts.batch([5, 2]).inputs[0], whole[[5, 2]])
    assert torch.equal(parts.batch([2]).inputs[0], whole[[2]])


def test_none_leaves_images_alone_and_labels_always_stay() -> None:
    x = torch.rand(4, 3, 8, 8)
    assert torch.equal(augmented(x, "none").batch([3, 1]).inputs[0], x[[3, 1]])
    moved = augmented(x, "shift")
    assert moved.batch([3, 1]).targets.tolist() == [3, 1]  # type: ignore[union-attr]
    assert (len(moved), moved.classes) == (4, 4)


def test_a_small_image_is_not_shifted() -> None:
    x = torch.rand(4, 1, 7, 7)
    assert torch.equal(augmented(x, "shift").batch(range(4)).inputs[0], x)


def test_inputs_that_are_no_images_are_refused() -> None:
    with pytest.raises(InputError, match=r"needs images; an input has the shape \(5,\)"):
        augmented(torch.rand(4, 5), "shift").batch([0])
    augmented(torch.rand(4, 5), "none").batch([0])

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tdcompile.data.images import Normalisation, to_input
from tdcompile.errors import InputError


@settings(deadline=None)  # the first resize is slow
@given(
    sides=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    have=st.sampled_from([1, 3, 4]),
    want=st.sampled_from([1, 3]),
    last=st.booleans(),
    kind=st.sampled_from([torch.uint8, torch.float32, torch.float64]),
)
def test_every_layout_comes_to_the_input(
    sides: tuple[int, int], have: int, want: int, last: bool, kind: torch.dtype
) -> None:
    grey = torch.randint(0, 256, (2, 1, *sides))
    x = grey.expand(-1, have, -1, -1)
    x = x.to(torch.uint8) if kind is torch.uint8 else x.to(kind) / 255
    made = to_input(x.permute(0, 2, 3, 1) if last else x, (want, *sides))
    assert made.dtype is torch.float32
    torch.testing.assert_close(made, (grey / 255).expand(-1, want, -1, -1))
    assert to_input(x, (want, 6, 7), stretch=True).shape == (2, want, 6, 7)


def test_grey_is_the_luma_and_a_flat_image_is_grey() -> None:
    red = torch.zeros(1, 3, 2, 2)
    red[:, 0] = 1
    assert to_input(red, (1, 2, 2)).unique().tolist() == pytest.approx([0.299])
    assert to_input(torch.ones(2, 5, 6), (3, 5, 6)).shape == (2, 3, 5, 6)


def test_channels_first_wins_where_both_ends_fit() -> None:
    x = torch.rand(1, 3, 5, 3)
    assert torch.equal(to_input(x, (3, 5, 3)), x)
    assert to_input(x.permute(0, 2, 3, 1), (3, 5, 3)).equal(x)


def test_images_of_another_size_are_refused_with_both_sizes_unless_they_may_be_stretched() -> None:
    x = torch.rand(2, 28, 20, 3)
    with pytest.raises(
        InputError, match=r"are 28x20, the input is 32x24: give --input 1x1x28x20 .*, or resize .* 32x24"
    ):
        to_input(x, (1, 32, 24))
    assert to_input(x, (1, 32, 24), stretch=True).shape == (2, 1, 32, 24)
    assert to_input(x, (1, 28, 20)).shape == (2, 1, 28, 20)


@pytest.mark.parametrize(
    ("kind", "wanted", "becomes"),
    [
        (torch.int64, None, torch.int64),
        (torch.int64, torch.int64, torch.int64),
        (torch.int64, torch.float32, torch.float32),
        (torch.int32, torch.float16, torch.float32),
        (torch.float64, torch.float32, torch.float32),
    ],
)
def test_integers_become_numbers_where_the_input_is_known_to_be_of_them(
    kind: torch.dtype, wanted: torch.dtype | None, becomes: torch.dtype
) -> None:
    x = torch.arange(6).reshape(2, 3).to(kind)
    made = to_input(x, (3,), dtype=wanted)
    assert made.dtype is becomes
    assert made.tolist() == x.tolist()


@pytest.mark.parametrize(("have", "want"), [(3, 4), (1, 4), (3, 2), (1, 2)])
def test_colours_that_cannot_be_made_are_refused(have: int, want: int) -> None:
    with pytest.raises(InputError, match="do not fit the input"):
        to_input(torch.rand(1, have, 5, 5), (want, 5, 5))


def test_normalisation() -> None:
    x = torch.rand(2, 3, 4, 4)
    assert Normalisation.parse("none", (3, 4, 4)).apply(x) is x
    made = Normalisation.parse("imagenet", (3, 4, 4)).apply(x)
    torch.testing.assert_close(made[:, 1], (x[:, 1] - 0.456) / 0.224)


@pytest.mark.parametrize(
    ("text", "shape", "says"),
    [
        ("imagenet", (1, 8, 8), "has 3 means and 3 deviations.* takes 1 of each"),
        ("0.5/0.5", (3, 8, 8), "takes 3 of each"),
        ("0.5,0.5,0.5/0.5", (3, 8, 8), "has 3 means and 1 dev"),
        ("0.5,0.5,0.5/0.5,0,0.5", (3, 8, 8), "deviations positive"),
        ("nan,0.5,0.5/0.5,1,0.5", (3, 8, 8), "finite"),
        ("imagenette", (3, 8, 8), "is none of none, imagenet"),
        ("1,2,3", (3, 8, 8), "not m,m,m/s,s,s"),
    ],
)
def test_a_normalisation_that_does_not_fit_is_refused(text: str, shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Normalisation.parse(text, shape)

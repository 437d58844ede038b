"""Networks that take integers are fed integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

import tdcompile
from tdcompile.data.images import cast_exactly, to_input
from tdcompile.data.loading import given, load_data
from tdcompile.errors import InputError

RGB = (3, 8, 8)
BYTES = torch.arange(2 * 8 * 8 * 3).remainder(256).to(torch.uint8).reshape(2, 8, 8, 3)
INTEGERS = [torch.uint8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("last", [True, False])
def test_bytes_of_arrays_keep_their_values(dtype: torch.dtype, last: bool) -> None:
    first = BYTES.permute(0, 3, 1, 2)
    made = to_input(BYTES if last else first, RGB, dtype=dtype)
    assert made.dtype is dtype
    assert torch.equal(made.long(), first.long())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_bytes_of_files_tables_and_data_sets_keep_their_values(tmp_path: Path, dtype: torch.dtype) -> None:
    (tmp_path / "train/a").mkdir(parents=True)
    for place, pixels in enumerate(BYTES):
        Image.fromarray(pixels.numpy()).save(tmp_path / f"train/a/{place}.png")
    np.savez(tmp_path / "set.npz", x=BYTES.numpy(), x_test=BYTES.numpy())
    want = sorted(BYTES.permute(0, 3, 1, 2).flatten(1).tolist())
    for data in (f"imagefolder:{tmp_path}", f"npz:{tmp_path}/set.npz", TensorDataset(BYTES), BYTES):
        train, _ = given(data, RGB, dtype=dtype)
        assert train is not None
        x = train.batch([0, 1]).inputs[0]
        assert x.dtype is dtype
        assert sorted(x.flatten(1).tolist()) == want


def test_digits_become_bytes() -> None:
    x = load_data("digits", (1, 8, 8), dtype=torch.uint8)[0].batch(range(50)).inputs[0]
    plain = load_data("digits", (1, 8, 8))[0].batch(range(50)).inputs[0]
    assert x.dtype is torch.uint8
    torch.testing.assert_close(x.float() / 255, plain, atol=0.501 / 255, rtol=0)


def test_grey_of_bytes_is_rounded() -> None:
    made = to_input(torch.full((1, 3, 2, 2), 7, dtype=torch.uint8), (1, 2, 2), dtype=torch.uint8)
    assert made.unique().tolist() == [7]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_floats_are_cast_only_where_no_value_changes(dtype: torch.dtype) -> None:
    assert to_input(torch.tensor([[0.0, 1.0]]), (2,), dtype=dtype).dtype is dtype
    with pytest.raises(InputError, match=r"are float32 with values such as 0\.5, and the network's input is"):
        to_input(torch.tensor([[1.0, 0.5]]), (2,), dtype=dtype)
    with pytest.raises(InputError, match="values such as nan"):
        to_input(torch.tensor([[1.0, float("nan")]]), (2,), dtype=dtype)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [([256], torch.uint8), ([-1], torch.uint8), ([2], torch.bool), ([2**31], torch.int32), ([128], torch.int8)],
)
def test_integers_outside_the_range_are_refused(values: list[int], dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match="give integers in its range"):
        cast_exactly(torch.tensor(values), dtype)
    assert cast_exactly(torch.tensor(values) // 2**30 % 2, dtype).dtype is dtype


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("data", ["digits", BYTES])
def test_normalize_is_refused(dtype: torch.dtype, data: Any) -> None:
    with pytest.raises(InputError, match=r"'0\.5/0\.5' makes floats, and the network's input is"):
        given(data, (1, 8, 8), "0.5/0.5", dtype=dtype)


class Bytes(nn.Module):
    """A network that scales bytes itself, and records what it is fed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten())
        self.head = nn.Linear(512, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(image.float() / 255))


def test_a_network_of_bytes_is_calibrated_on_bytes_and_judged_on_them() -> None:
    network = Bytes().eval()
    x = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8)
    y = network(x).argmax(1)
    compiled = tdcompile.compile(
        network, x[:1], data=((x, y), (x, y)), budget={"macs": 0.9}, decompose=("svd", "channel")
    )
    assert compiled.report.dense.score == 1.0


@pytest.mark.parametrize(
    ("x", "example", "says"),
    [
        (torch.rand(4, 3, 8, 8), torch.uint8, "input 0 of a sample: the samples are float32 with values such as"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.float32, "is uint8, and the network's input is float32"),
    ],
)
def test_samples_of_another_kind_than_the_input_are_refused(x: torch.Tensor, example: torch.dtype, says: str) -> None:
    samples = tdcompile.Tensors(x)
    with pytest.raises(InputError, match=says):
        tdcompile.compile(Bytes().eval(), torch.zeros(1, 3, 8, 8).to(example), data=samples, budget={"macs": 0.6})

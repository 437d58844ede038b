"""Labels: text becomes classes, and labels that cannot be used are refused or told, in every kind of data."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

import tdcompile
from tdcompile.data.loading import given, load_data
from tdcompile.data.task import Batch, Samples
from tdcompile.errors import InputError

RGB = (3, 8, 8)
TEXTS = ["dog", "cat", "owl", "cat"]
NUMBERS = [1, 0, 2, 0]


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "png")
    return stream.getvalue()


def parquet(folder: Path, split: str, **columns: Any) -> str:
    count = len(next(iter(columns.values()))) if columns else 4
    pq.write_table(pa.table({"image": [png()] * count, **columns}), folder / f"{split}.parquet")
    return f"parquet:{folder}"


class Items(Dataset[Any]):
    def __init__(self, labels: list[Any]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        return torch.zeros(3, 8, 8), self.labels[i]


def labels(samples: Samples | None) -> list[int]:
    assert samples is not None
    batch = samples.batch(range(len(samples)))
    assert batch.targets is not None
    return batch.targets.tolist()


def notes(*parts: Samples | None) -> list[str]:
    return [note.text for samples in parts if samples is not None for note in samples.notes]


CLASSES = "are text; their sorted values are the classes: 0 = cat, 1 = dog, 2 = owl"


@pytest.mark.parametrize(
    "column",
    [TEXTS, pa.array(TEXTS, pa.large_string()), pa.array(TEXTS).dictionary_encode()],
    ids=["s", "large", "dict"],
)
@pytest.mark.parametrize("name", ["label", "class", "target"])
def test_a_column_of_text(tmp_path: Path, column: Any, name: str) -> None:
    parquet(tmp_path, "train", **{name: column, "id": [7, 8, 9, 10]})
    train, test = load_data(parquet(tmp_path, "test", **{name: ["owl", "dog"]}), RGB)
    assert labels(train) == NUMBERS
    assert labels(test) == [2, 1]
    assert train.classes == 3
    assert len(notes(train, test)) == 1
    assert CLASSES in notes(train)[0]


@pytest.mark.parametrize("kind", [str, "S3"])
def test_text_in_an_npz(tmp_path: Path, kind: Any) -> None:
    y = np.array(TEXTS, kind)
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 5)), y=y, x_test=np.zeros((2, 5)), y_test=y[1:3])
    train, test = load_data(f"npz:{tmp_path}/a.npz", (5,))
    assert (labels(train), labels(test)) == (NUMBERS, [0, 2])
    np.savez(tmp_path / "b.npz", x=np.zeros((4, 5)), y=y)
    train, test = load_data(f"npz:{tmp_path}/b.npz", (5,))
    assert train.classes == 3  # also those that only the held-out samples have
    assert sorted(labels(train) + labels(test)) == sorted(NUMBERS)


@pytest.mark.parametrize("made", [TEXTS, tuple(TEXTS), np.array(TEXTS), np.array(TEXTS, object)])
def test_text_from_python(made: Any) -> None:
    train, _ = given((np.zeros((4, 3, 8, 8), np.float32), made), RGB)
    assert labels(train) == NUMBERS
    assert CLASSES in notes(train)[0]
    assert labels(given(Items(list(made)), RGB)[0]) == NUMBERS


def test_digits_as_text_are_classes_in_their_order_and_other_numbers_are_refused() -> None:
    assert labels(given(Items(["0", "2", "1"]), RGB)[0]) == [0, 2, 1]
    with pytest.raises(InputError, match="are numbers written as text, such as '1': store them as integers"):
        given(Items(["1", "2"]), RGB)


def test_text_of_test_samples_that_is_no_class_is_refused(tmp_path: Path) -> None:
    parquet(tmp_path, "train", label=TEXTS)
    with pytest.raises(InputError, match="label 'owls' is no class of the training samples: did you mean 'owl'"):
        load_data(parquet(tmp_path, "test", label=["owls"]), RGB)
    with pytest.raises(InputError, match="of the data are text, and those of the test data are numbers"):
        given((Items(TEXTS), Items(NUMBERS)), RGB)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (["a", None], "label of sample 1 of the data is None, where others are text"),
        (["a", 1], "label of sample 1 of the data is 1, where others are text"),
        ([0, -100], "classes count from 0"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(made: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        given(Items(made), RGB)


@pytest.mark.parametrize("column", [[0.5, 1.0], [True, False], [[1, 2], [3]]])
def test_a_label_column_that_cannot_be_used_is_refused(tmp_path: Path, column: Any) -> None:
    with pytest.raises(InputError, match=r"the column 'label' holds .*, and labels are integers from 0 or text"):
        load_data(parquet(tmp_path, "train", label=column, id=[1, 2]), RGB)


def test_a_table_without_labels_is_told(tmp_path: Path) -> None:
    train, _ = load_data(parquet(tmp_path, "train", caption=["a cat", "a dog"], score=[0.1, 0.2]), RGB)
    assert train.classes is None
    assert "there are no labels, because none of the columns caption, score is named label" in notes(train)[0]
    train, _ = load_data(parquet(tmp_path, "train"), RGB)
    assert notes(train) == []  # there is nothing that could be meant
    train, _ = load_data(parquet(tmp_path, "train", kind=[1, 0]), RGB)
    assert "the labels are read from the column 'kind'" in notes(train)[0]


def pictures(folder: Path, count: int = 3) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (8, 8)).save(folder / f"{i}.png")


@pytest.mark.parametrize("place", ["", "train"])
def test_a_folder_without_classes_has_no_labels(tmp_path: Path, place: str) -> None:
    pictures(tmp_path / place)
    (tmp_path / place / "._0.png").write_bytes(b"hidden")
    train, test = load_data(f"imagefolder:{tmp_path}", RGB)
    assert (len(train), train.classes, test) == (3, None, None)
    assert "has no class folders: its 3 images have no labels" in notes(train)[0]


def test_images_beside_class_folders_are_told_or_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pictures(tmp_path / "train" / name)
    assert notes(load_data(f"imagefolder:{tmp_path}", RGB)[0]) == []
    pictures(tmp_path / "train", 2)
    assert "2 images outside the class folders are left out" in notes(load_data(f"imagefolder:{tmp_path}", RGB)[0])[0]
    pictures(tmp_path / "other")
    pictures(tmp_path / "other" / "below")
    with pytest.raises(InputError, match="has folders, such as 'below', beside images without a class folder"):
        load_data(f"imagefolder:{tmp_path}/other", RGB)
    for name in ("a", "b"):
        pictures(tmp_path / "only" / name)
    with pytest.raises(InputError, match="holds the folders a, b"):
        load_data(f"imagefolder:{tmp_path}/only", RGB)


@pytest.mark.parametrize("made", [Items([1, 1, 1]), tdcompile.Tensors(torch.zeros(3, 3, 8, 8), torch.ones(3).long())])
def test_samples_of_one_class_are_cautioned(made: Any) -> None:
    train, _ = given(made, RGB)
    assert [(note.warning, "samples" in note.text) for note in train.notes] == [(True, True)]  # type: ignore[union-attr]
    assert "of class 1" in notes(train)[0]
    assert notes(train.subset([0, 1])) == notes(train)  # type: ignore[union-attr]
    assert notes(given(Items([1, 0]), RGB)[0], given(Items([1]), RGB)[0]) == []


# Against the network


class Odd(Samples):
    def __init__(self, labels: Tensor | None, classes: int | None) -> None:
        self._labels, self._classes = labels, classes

    def __len__(self) -> int:
        return 4

    def batch(self, indices: Any) -> Batch:
        return Batch((torch.zeros(len(indices), 48),), None if self._labels is None else self._labels[list(indices)])

    @property
    def classes(self) -> int | None:
        return self._classes


NETWORK = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 3)).eval()
ONE = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 1)).eval()


@pytest.mark.parametrize(
    ("network", "data", "says"),
    [
        (NETWORK, (torch.zeros(4, 48), torch.tensor([0, 1, 2, 3])), "labels go up to 3, and the network's output is"),
        (NETWORK, ((torch.zeros(4, 48), NUMBERS), (torch.zeros(1, 48), [255])), "labels go up to 255"),
        (ONE, (torch.zeros(4, 48), torch.tensor([0, 1, 2, 1])), "labels go up to 2, and the network's output is 4x1"),
        (NETWORK, Odd(torch.tensor([0, 1, 2, 3]), 4), "labels go up to 3, and the network's output is"),
        (NETWORK, Odd(torch.tensor([0, -1, 2, 1]), 3), "counts classes from 0, and a target is -1"),
        (NETWORK, Odd(torch.rand(4) + 0.1, None), "float32 of shape .4,., and the network's output is 4x3"),
        (NETWORK, Odd(torch.zeros(4, 3, 2).long(), None), "int64 of shape .4, 3, 2., and the network's output is 4x3"),
    ],
)
def test_labels_that_do_not_fit_the_network_are_refused(network: nn.Module, data: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        tdcompile.compile(network, torch.zeros(1, 48), data=data, budget={"macs": 0.6})


def test_the_report_tells_how_labels_were_read() -> None:
    x = torch.randn(8, 48)
    compiled = tdcompile.compile(NETWORK, x[:1], data=((x, TEXTS * 2), (x, ["owl"] * 8)), budget={"macs": 0.6})
    assert CLASSES in compiled.report.notes[0]
    assert "all 8 samples of the test data are of class 2" in compiled.report.notes[1]

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tdcompile.data import readers
from tdcompile.data.loading import given, kinds, load_data
from tdcompile.data.task import Batch, Samples
from tdcompile.errors import InputError, UnavailableError

RGB = (3, 8, 8)


def pictures(n: int, height: int = 8, width: int = 8, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), np.uint8)


def png(pixels: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes | Path]:
    """The images that were decoded."""
    seen: list[bytes | Path] = []
    real = readers.decode

    def decode(image: bytes | Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        seen.append(image)
        return real(image, shape)

    monkeypatch.setattr(readers, "decode", decode)
    return seen


def everything(samples: Samples) -> Batch:
    return samples.batch(range(len(samples)))


def refused(spec: object, shape: tuple[int, ...] = RGB, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_data(str(spec), shape, **options)
    return str(caught.value)


def npz(folder: Path, **arrays: Any) -> str:
    np.savez(folder / "set.npz", **arrays)
    return f"npz:{folder / 'set.npz'}"


def parquet(folder: Path, name: str, columns: dict[str, Any]) -> str:
    pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return f"parquet:{folder}"


# Digits


def test_digits_are_split_by_class_the_same_way_for_every_seed() -> None:
    train, test = load_data("digits", (1, 8, 8), seed=1)
    assert test is not None
    again, _ = load_data("digits", (1, 8, 8), seed=2)
    x, y = everything(train).inputs[0], everything(train).targets
    assert y is not None
    assert torch.equal(x, everything(again).inputs[0])
    assert train.classes == test.classes == 10
    assert len(train) + len(test) == 1797
    assert (float(x.min()), float(x.max())) == (0, 1)
    held = everything(test).targets
    assert held is not None
    for label in range(10):
        of_class = int((y == label).sum()), int((held == label).sum())
        assert of_class[1] == sum(of_class) // 5
    rows = torch.cat([x, everything(test).inputs[0]]).flatten(1)
    assert len(rows.unique(dim=0)) == len(rows)  # no digit is in both


def test_digits_are_brought_to_the_input() -> None:
    train, _ = load_data("digits", (3, 32, 32), "0.5,0.5,0.5/0.25,0.25,0.25")
    x = train.batch([0, 5]).inputs[0]
    assert x.shape == (2, 3, 32, 32)
    assert x.dtype is torch.float32
    assert torch.equal(x[:, 0], x[:, 2])
    assert float(x.min()) >= -2
    assert float(x.max()) <= 2


# Arrays


def test_an_npz_with_test_samples(tmp_path: Path) -> None:
    spec = npz(tmp_path, x=pictures(6), y=np.arange(6) % 3, x_test=pictures(2, seed=1), y_test=np.array([[4], [1]]))
    train, test = load_data(spec, RGB)
    assert test is not None
    assert train.classes == test.classes == 5  # over both
    batch = train.batch([4, 1])
    assert torch.equal(batch.inputs[0], torch.from_numpy(pictures(6)[[4, 1]]).permute(0, 3, 1, 2) / 255)
    assert batch.targets is not None
    assert batch.targets.tolist() == [1, 1]
    assert everything(test).targets.tolist() == [4, 1]  # type: ignore[union-attr]


def test_an_npz_without_test_samples_holds_a_tenth_out_by_the_seed(tmp_path: Path) -> None:
    spec = npz(tmp_path, x=np.arange(40.0)[:, None].repeat(3, 1), y=np.zeros(40, np.uint8))
    parts = [load_data(spec, (3,), seed=seed) for seed in (0, 0, 1)]
    held = [everything(test).inputs[0][:, 0].tolist() for _, test in parts if test is not None]
    kept = everything(parts[0][0]).inputs[0][:, 0].tolist()
    assert len(held[0]) == 4
    assert sorted(held[0] + kept) == list(range(40))
    assert held[0] == held[1] != held[2]


def test_an_npz_without_labels_has_no_classes(tmp_path: Path) -> None:
    train, test = load_data(npz(tmp_path, x=np.zeros((4, 5)), x_test=np.zeros((1, 5)), y_test=np.zeros(1, int)), (5,))
    assert test is not None
    assert train.classes is None
    assert train.batch([0]).targets is None
    assert test.classes == 1


def test_inputs_that_are_no_images_pass_through(tmp_path: Path) -> None:
    train, _ = load_data(npz(tmp_path, x=np.arange(24, dtype=np.int64).reshape(6, 4)), (4,))
    assert train.batch([0]).inputs[0].dtype is torch.int64  # tokens
    train, _ = load_data(npz(tmp_path, x=np.full((6, 4), 255, np.uint8)), (4,), "0.5/0.5")
    assert train.batch([0]).inputs[0].tolist() == [[1, 1, 1, 1]]
    train, _ = load_data(npz(tmp_path, x=np.arange(24, dtype=np.int64).reshape(6, 4)), (4,), dtype=torch.float32)
    assert train.batch([0]).inputs[0].dtype is torch.float32
    assert "do not fit the input (5,)" in refused(npz(tmp_path, x=np.zeros((6, 4))), (5,))


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"y": np.zeros(3)}, "has no array 'x'"),
        ({"x": np.zeros((0, 3, 8, 8)), "x_test": pictures(1)}, "holds no samples"),
        ({"x": pictures(1)}, "holds 1 sample; two at least"),
        ({"x": pictures(0)}, "holds 0 samples; two at least"),
        ({"x": np.array(3.0)}, "a single number"),
        ({"x": pictures(4, 9, 7)}, "train of .*: the images are 9x7, the input is 8x8: give --input 1x3x9x7"),
        ({"x": pictures(4), "x_test": pictures(4, 9, 7)}, "test of .*: the images are 9x7"),
        ({"x": np.array(3.0), "x_test": pictures(1)}, "a single number"),
        ({"x": np.zeros((4, 3, 8, 8), "U1")}, "it must hold numbers"),
        ({"x": np.array([{}, {}])}, "not an archive of plain arrays"),
        ({"x": np.zeros((4, 8, 8, 3), np.int64)}, "images are uint8 or float"),
        ({"x": np.zeros((4, 8, 8, 5))}, "no axis of channels"),
        ({"x": np.zeros((4, 1, 2, 8, 8))}, "do not fit the input"),
        ({"x": pictures(4), "y": np.zeros(3, int)}, "4 samples but 3 labels"),
        ({"x": pictures(4), "x_test": pictures(4), "y": np.zeros((5, 2))}, "their counts are .4, 5."),
        ({"x": pictures(4), "x_test": pictures(4), "y": np.array([0, 1, -1, 2])}, "label of sample 2 .* is -1"),
        ({"x": pictures(4), "y": np.zeros((3, 2))}, "4 samples but targets of shape"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(tmp_path: Path, arrays: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_data(npz(tmp_path, **arrays), RGB)


def test_what_is_no_npz_is_refused(tmp_path: Path) -> None:
    assert "there is no file" in refused(f"npz:{tmp_path}/gone.npz")
    for name, content in [("a.npz", b""), ("b.npz", b"text"), ("c.npz", b"PK\x03\x04xx")]:
        (tmp_path / name).write_bytes(content)
        assert "is cut off or no npz" in refused(f"npz:{tmp_path / name}")
    whole = Path(npz(tmp_path, x=pictures(4)).removeprefix("npz:"))
    whole.write_bytes(whole.read_bytes()[:-30])
    assert "is cut off or no npz" in refused(f"npz:{whole}")
    whole = Path(npz(tmp_path, x=pictures(4)).removeprefix("npz:"))
    content = bytearray(whole.read_bytes())
    content[400] ^= 1
    whole.write_bytes(content)
    assert "cannot be read: Bad CRC-32" in refused(f"npz:{whole}")
    np.save(tmp_path / "d.npy", pictures(2))
    assert "d.npy' is a .npy of one array: save x and y in an .npz" in refused(f"npz:{tmp_path / 'd.npy'}")


def test_nan_and_infinity_are_found_when_a_batch_is_read(tmp_path: Path) -> None:
    x = np.zeros((10, 4), np.float64)
    x[7, 2] = np.nan
    x[3, 0] = 1e300  # more than float32 holds
    train, _ = load_data(npz(tmp_path, x=x, x_test=x[:2]), (4,))
    train.batch([0, 1])
    for place in (7, 3):
        with pytest.raises(InputError, match=f"sample {place} holds NaN or Inf"):
            train.subset([1, place, 2]).batch([0, 1, 2])


# Parquet


@pytest.mark.parametrize("form", ["struct", "binary", "large_binary"])
def test_parquet_columns_are_found_by_type(tmp_path: Path, form: str) -> None:
    x = pictures(5)
    images = [png(pixels) for pixels in x]
    column: Any = (
        [{"bytes": b, "path": None} for b in images] if form == "struct" else pa.array(images, getattr(pa, form)())
    )
    columns = {"what": pa.array([2, 0, 1, 2, 0], pa.uint8()), "name": list("abcde"), "shot": column}
    parquet(tmp_path, "train-00001-of-2", columns)
    parquet(tmp_path, "train-00000-of-2", columns)
    spec = parquet(tmp_path, "validation", columns)
    train, test = load_data(spec, RGB)
    assert test is not None
    assert (len(train), len(test), train.classes) == (10, 5, 3)
    first = train.batch([6, 0])
    assert torch.equal(first.inputs[0], torch.from_numpy(x[[1, 0]]).permute(0, 3, 1, 2) / 255)
    assert first.targets is not None
    assert first.targets.tolist() == [0, 2]


def test_parquet_without_labels_or_test_samples(tmp_path: Path) -> None:
    train, test = load_data(parquet(tmp_path, "train", {"image": [png(pictures(1)[0])]}), (1, 4, 4))
    assert test is None
    assert train.classes is None
    assert train.batch([0]).inputs[0].shape == (1, 1, 4, 4)


def test_parquet_names_decide_between_columns_of_one_type(tmp_path: Path) -> None:
    image = [png(pictures(1)[0])]
    columns = {"img": image, "__index_level_0__": [7], "coarse_label": [3], "fine_label": [5]}
    train, _ = load_data(parquet(tmp_path, "train", columns), RGB)
    assert train.classes == 6
    assert "several columns of labels (a, b)" in refused(parquet(tmp_path, "train", {"img": image, "a": [7], "b": [3]}))


def test_parquet_may_name_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png(pictures(1)[0]))
    column = pa.array([{"bytes": None, "path": "one.png"}], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    train, _ = load_data(parquet(tmp_path, "train", {"image": column}), RGB)
    assert torch.equal(train.batch([0]).inputs[0][0], torch.from_numpy(pictures(1)[0]).permute(2, 0, 1) / 255)


def test_parquet_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    assert "is not a folder" in refused(f"parquet:{tmp_path}/gone")
    assert "no train*.parquet" in refused(f"parquet:{tmp_path}")
    spec = parquet(tmp_path, "train", {"label": [1], "text": ["a"]})
    assert f"write its folder, parquet:{tmp_path}" in refused(f"{spec}/train.parquet")
    assert "no column of images" in refused(spec)
    image = png(pictures(1)[0])
    assert "values of the column 'label' are missing" in refused(
        parquet(tmp_path, "train", {"image": [image], "label": pa.array([None], pa.int64())})
    )
    assert "sample 0 has no image" in refused(parquet(tmp_path, "train", {"image": pa.array([None], pa.binary())}))
    assert "sample 0: the image cannot be decoded" in refused(parquet(tmp_path, "train", {"image": [b"not one"]}))
    assert "holds no samples" in refused(parquet(tmp_path, "train", {"image": pa.array([], pa.binary())}))
    assert "an image does not fit" in refused(parquet(tmp_path, "train", {"image": [image]}), (192,))
    (tmp_path / "train.parquet").write_bytes(b"not one")
    assert "cannot be read as parquet" in refused(spec)


@pytest.mark.parametrize(("room", "times"), [(3 * 3 * 8 * 8, 1), (3 * 3 * 8 * 8 - 1, 2), (0, 2)])
def test_images_are_decoded_once_where_all_of_them_can_be_kept_and_else_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[bytes | Path], room: int, times: int
) -> None:
    x = pictures(3)
    images = [png(pixels) for pixels in x]
    monkeypatch.setattr(readers, "_KEEP", room)
    train, _ = load_data(parquet(tmp_path, "train", {"image": images}), RGB)
    decoded.clear()  # the first was read to see whether it fits
    for _ in range(2):
        assert torch.equal(train.batch([2, 1]).inputs[0], torch.from_numpy(x[[2, 1]]).permute(0, 3, 1, 2) / 255)
    assert decoded == [images[2], images[1]] * times


# Folders


def folder(root: Path, layout: dict[str, int], height: int = 8, width: int = 8) -> str:
    for place, count in layout.items():
        (root / place).mkdir(parents=True)
        for i, pixels in enumerate(pictures(count, height, width, seed=len(place))):
            Image.fromarray(pixels).save(root / place / f"{i}.png")
    return f"imagefolder:{root}"


def test_a_folder_by_class(tmp_path: Path) -> None:
    spec = folder(tmp_path, {"train/b": 3, "train/a/deeper": 2, "val/b": 1})
    (tmp_path / "train/a/notes.txt").write_text("no image")
    train, test = load_data(spec, RGB)
    assert test is not None
    labels = everything(train).targets
    assert labels is not None
    assert sorted(labels.tolist()) == [0, 0, 1, 1, 1]
    assert everything(test).targets.tolist() == [1]  # type: ignore[union-attr]
    assert torch.equal(everything(load_data(spec, RGB, seed=3)[0]).inputs[0], everything(train).inputs[0])


def test_a_folder_is_not_read_class_by_class(tmp_path: Path) -> None:
    train, _ = load_data(folder(tmp_path, {"train/a": 20, "train/b": 20}, 2, 2), (3, 2, 2))
    labels = train.batch(range(20)).targets
    assert labels is not None
    assert labels.unique().tolist() == [0, 1]


@pytest.mark.parametrize("hidden", ["train/.ipynb_checkpoints", "train/a/.cache", "test/.thumbnails"])
@pytest.mark.parametrize("count", [0, 2])
def test_hidden_folders_and_files_are_no_classes_and_no_samples(tmp_path: Path, hidden: str, count: int) -> None:
    spec = folder(tmp_path, {"train/a": 2, "train/b": 1, "test/b": 3, hidden: count})
    (tmp_path / "train/b/._0.png").write_bytes(b"what a file manager remembers")
    train, test = load_data(spec, RGB)
    assert test is not None
    assert train.classes == test.classes == 2
    assert sorted(everything(train).targets.tolist()) == [0, 0, 1]  # type: ignore[union-attr]
    assert everything(test).targets.tolist() == [1, 1, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize("empty", ["train/b", "test/b"])
def test_an_empty_class_folder_is_refused_by_name(tmp_path: Path, empty: str) -> None:
    spec = folder(tmp_path, {"train/a": 1, "train/b": 1, "train/c": 1, "test/a": 1} | {empty: 0})
    (tmp_path / empty / "notes.txt").write_text("no image")
    assert f"the class folder '{tmp_path / empty}' holds no images" in refused(spec)


def test_a_test_set_may_lack_classes_and_keeps_the_labels_of_train(tmp_path: Path) -> None:
    train, test = load_data(folder(tmp_path, {"train/a": 1, "train/b": 1, "train/c": 1, "test/c": 2}), RGB)
    assert test is not None
    assert everything(test).targets.tolist() == [2, 2]  # type: ignore[union-attr]
    assert train.classes == test.classes == 3


def test_test_is_taken_before_val(tmp_path: Path) -> None:
    _, test = load_data(folder(tmp_path, {"train/a": 1, "val/a": 2, "test/a": 3}), RGB)
    assert test is not None
    assert len(test) == 3


@pytest.mark.parametrize(("side", "margin"), [(16, 1.0), (224, 256 / 224)])
def test_images_of_another_size_keep_their_proportions(tmp_path: Path, side: int, margin: float) -> None:
    height, width = 120, 180
    ramp = np.broadcast_to(np.linspace(0, 255, width, dtype=np.uint8)[None, :, None], (height, width, 3))
    (tmp_path / "train/a").mkdir(parents=True)
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "train/a/ramp.png")
    train, _ = load_data(f"imagefolder:{tmp_path}", (3, side, side))
    x = train.batch([0]).inputs[0]
    assert x.shape == (1, 3, side, side)
    # The centre square of the shorter side, less the margin, is this part of the ramp.
    seen = float(x[0, 0, 0, -1] - x[0, 0, 0, 0])
    assert seen == pytest.approx(height / width / margin, abs=0.05)


def test_pictures_of_other_modes_are_converted(tmp_path: Path) -> None:
    (tmp_path / "train/a").mkdir(parents=True)
    made = [
        Image.new("L", (8, 8), 51),
        Image.new("RGBA", (8, 8), (51, 51, 51, 9)),
        Image.new("1", (8, 8), 0),
        Image.fromarray(np.full((8, 8), 51 * 256, np.uint16)),
    ]
    for i, picture in enumerate(made):
        picture.save(tmp_path / f"train/a/{i}.png")
    train, _ = load_data(f"imagefolder:{tmp_path}", RGB)
    values = everything(train).inputs[0].flatten(1).unique(dim=1)
    assert sorted(values[:, 0].tolist()) == pytest.approx([0, 0.2, 0.2, 0.2])
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "train/a/4.tiff")
    with pytest.raises(InputError, match=r"4\.tiff.*mode 'F'"):
        everything(load_data(f"imagefolder:{tmp_path}", RGB)[0])


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    assert "there is no folder" in refused(f"imagefolder:{tmp_path}/gone")
    (tmp_path / "a/train").mkdir(parents=True)
    assert "holds no samples" in refused(f"imagefolder:{tmp_path}/a")
    (tmp_path / "a/train/cat").mkdir()
    spec = folder(tmp_path / "b", {"train/cat": 1, "test/cats": 1})
    assert "is no class of train: did you mean 'cat'" in refused(spec)
    (tmp_path / "a/train/cat/x.png").write_bytes(b"\x89PNG\r\n\x1a\nxx")
    assert "x.png'): the image cannot be decoded" in refused(f"imagefolder:{tmp_path}/a")


# The hub


def hub(monkeypatch: pytest.MonkeyPatch, made: Any) -> list[tuple[Any, ...]]:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*arguments: Any) -> Any:
        asked.append(arguments)
        if isinstance(made, Exception):
            raise made
        return made

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def hub_table(labels: Sequence[int]) -> datasets.Dataset:
    features = datasets.Features(
        {"id": datasets.Value("int64"), "kind": datasets.ClassLabel(num_classes=4), "photo": datasets.Image()}
    )
    rows = [{"bytes": png(pixels), "path": None} for pixels in pictures(len(labels))]
    columns = {"id": list(range(len(labels))), "kind": list(labels), "photo": rows}
    return datasets.Dataset.from_dict(columns, features=features)


def test_a_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"train": hub_table([2, 0, 1]), "test": hub_table([-1, -1]), "validation": hub_table([1])}
    asked = hub(monkeypatch, datasets.DatasetDict(splits))
    train, test = load_data("hub:someone/birds:small", RGB)
    assert asked == [("someone/birds", "small")]
    assert test is not None
    assert len(test) == 1  # the labels of its test split are secret
    batch = train.batch([2, 0])
    assert batch.targets is not None
    assert batch.targets.tolist() == [1, 2]
    assert torch.equal(batch.inputs[0], torch.from_numpy(pictures(3)[[2, 0]]).permute(0, 3, 1, 2) / 255)


def test_a_set_of_the_hub_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, datasets.DatasetDict({"training": hub_table([0])}))
    assert "did you mean 'training'" in refused("hub:x")
    hub(monkeypatch, datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}))
    assert "no column of images ({bytes, path} or binary), only text" in refused("hub:x")
    hub(monkeypatch, FileNotFoundError("Dataset 'x' doesn't exist"))
    assert "doesn't exist" in refused("hub:x")
    hub(monkeypatch, ConnectionError("Couldn't reach 'x' on the Hub"))
    with pytest.raises(UnavailableError, match="'x' cannot be fetched: ConnectionError"):
        load_data("hub:x", RGB)


# The user's own


USERS = """
import numpy as np, torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from tdcompile.data.task import Batch, Samples

class Own(Samples):
    classes = 2
    def __len__(self): return 4
    def batch(self, indices): return Batch((torch.ones(len(indices), 3, 8, 8),), torch.zeros(len(indices)).long())

class Listed(Dataset):
    targets = [3, 1, 2, 0, 1, 1]
    read = 0
    def __len__(self): return 6
    def __getitem__(self, i):
        Listed.read += 1
        return np.full((8, 8, 3), i, np.uint8), self.targets[i]

class Bare(Dataset):
    def __len__(self): return 3
    def __getitem__(self, i): return torch.full((3, 8, 8), float(i))

class Fails(Bare):
    def __getitem__(self, i): return 1 / 0

class Triple(Bare):
    def __getitem__(self, i): return 1, 2, 3

class Named(Bare):
    def __getitem__(self, i): return {"image": torch.zeros(3, 8, 8), "label": 1}

class Small(Bare):
    def __getitem__(self, i): return torch.zeros(3, 4, 5)

class Stream(IterableDataset):
    def __iter__(self): return iter(())

images, labels = np.zeros((4, 8, 8, 3), np.uint8), [0, 1, 2, 1]
def arrays(): return (images, labels), (torch.zeros(2, 3, 8, 8), torch.tensor([5, 1]))
def own(): return Own(), None
def listed(): return Listed(), None
def tensors(): return TensorDataset(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 1])), Bare()
def fails(): return Fails(), None
def triple(): return Triple(), None
def stream(): return Stream(), None
def named(): return Bare(), Named()
def small(): return Small(), None
def shrunk(): return images[:, :6], labels
def single(): return images
def labelled(): return images, labels
def alone(): return TensorDataset(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 1]))
def text(): return "images"
def triplet(): return images, labels, 3
def texts(): return "images", "labels"
"""


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_data.py").write_text(USERS)
    return f"{tmp_path}/own_data.py"


def test_a_callable_may_return_arrays_data_sets_or_samples(users: str, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = load_data(f"{users}:arrays", RGB)
    assert test is not None
    assert train.classes == test.classes == 6
    train, test = load_data(f"{users}:tensors", RGB)
    assert test is not None
    assert train.classes == 3
    assert test.classes is None
    assert everything(train).targets.tolist() == [0, 1, 2, 1]  # type: ignore[union-attr]
    train, test = load_data(f"{users}:own", RGB)
    assert test is None
    assert train.classes == 2
    for name, classes in (("labelled", 3), ("single", None), ("alone", 3)):  # as ``compile(data=...)`` takes them
        train, test = load_data(f"{users}:{name}", RGB)
        assert (len(train), train.classes, test) == (4, classes, None)
    monkeypatch.chdir(Path(users).parent)
    train, _ = load_data("own_data:listed", RGB)
    assert sys.modules["own_data"].Listed.read <= 3  # its targets are known without reading it
    assert train.classes == 4
    assert train.batch([2]).inputs[0].unique().tolist() == pytest.approx([2 / 255])
    del sys.modules["own_data"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fails", "^train of '.*own_data.py:fails': sample 0 cannot be read: ZeroDivisionError"),
        ("triple", r"^sample 0 of train of '.*:triple', input 'x': samples of shape \(\) do not fit the input"),
        ("stream", "^train of '.*:stream' is a stream without samples"),
        ("small", "^train of .*: the images are 4x5, the input is 8x8"),
        ("shrunk", "^train of .*: the images are 6x8, the input is 8x8"),
        ("text", r"returned a str; a pair \(train, test\) is needed, test may be None, or arrays \(x, y\)"),
        ("triplet", "^train of '.*:triplet': inputs and targets need one count above 0"),
        ("texts", "train of .* is a str; Samples, a torch Dataset"),
        ("nothing", "has no 'nothing'"),
    ],
)
def test_a_callable_that_gives_no_data_is_refused(users: str, name: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_data(f"{users}:{name}", RGB)


def test_samples_of_the_users_own_are_held_to_the_input(users: str) -> None:
    assert "normalise themselves" in refused(f"{users}:own", normalize="imagenet")
    assert "have the shape (3, 8, 8), the input is (3, 9, 9)" in refused(f"{users}:own", (3, 9, 9))


# Specs


X, Y = torch.rand(12, 3, 6, 6), torch.arange(12) % 5


class Own(Samples):
    classes = None

    def __len__(self) -> int:
        return 4

    def batch(self, indices: Sequence[int]) -> Batch:
        return Batch((torch.zeros(len(indices), 9), torch.ones(len(indices), 2)), None)


@pytest.mark.parametrize(
    "handed",
    [
        (X, Y),
        [X.numpy(), Y.numpy()],
        TensorDataset(X, Y),
        DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True),
        ((X, Y), None),
        (TensorDataset(X, Y), (X[:3], Y[:3])),
    ],
)
def test_python_may_hand_over_arrays_data_sets_and_loaders(handed: Any) -> None:
    train, test = given(handed, (3, 6, 6), "imagenet" if isinstance(handed, DataLoader) else "none")
    assert train is not None
    batch = train.batch([7, 2])
    means = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviations = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    wanted = (X[[7, 2]] - means) / deviations if isinstance(handed, DataLoader) else X[[7, 2]]
    torch.testing.assert_close(batch.inputs[0], wanted)
    assert batch.targets is not None
    assert batch.targets.tolist() == [2, 2]
    assert (len(train), train.classes) == (12, 5)
    held = isinstance(handed, tuple) and isinstance(handed[0], TensorDataset)
    assert (test is not None and len(test) == 3 and test.classes == 5) if held else test is None


def test_python_may_hand_over_samples_as_they_are_an_array_a_text_and_nothing() -> None:
    own = Own()
    assert given(own, (7,)) == (own, None)
    assert given((own, own), (7,)) == (own, own)
    alone, _ = given(X, (3, 6, 6))
    assert alone is not None
    assert (len(alone), alone.classes) == (12, None)
    assert given(None, (3, 6, 6)) == (None, None)
    with pytest.raises(InputError, match="no data to normalise by 'imagenet'"):
        given(None, (3, 6, 6), "imagenet")
    digits, held = given("digits", (1, 8, 8))
    assert digits is not None
    assert held is not None
    with pytest.raises(InputError, match="the data: the images are 6x6, the input is 9x9: give --input 1x3x6x6"):
        given((X, Y), (3, 9, 9))
    assert given(torch.arange(6).reshape(2, 3), (3,), dtype=torch.float32)[0].batch([1]).inputs[0].tolist() == [  # type: ignore[union-attr]
        [3.0, 4.0, 5.0]
    ]
    for wrong, says in [(7, "is a int; Samples"), ((X, Y[:3]), "labels of shape"), ([], "is a list")]:
        with pytest.raises(InputError, match=says):
            given(wrong, (3, 6, 6))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="they normalise themselves"):
        given(own, (3, 6, 6), "imagenet")


def test_every_kind_says_what_it_reads() -> None:
    assert list(kinds()) == [
        "digits",
        "scenes",
        "parquet:DIR",
        "imagefolder:DIR",
        "npz:FILE",
        "text:FILE",
        "hub:NAME",
        "file.py:callable",
        "synthetic",
    ]
    assert all(kinds().values())


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("parket:here", "unknown kind of data 'parket': did you mean 'parquet'"),
        ("digit", "did you mean 'digits'"),
        ("", "unknown kind of data ''"),
        ("digits:all", "is not of the form digits"),
        ("digits:", "is not of the form digits"),
        ("npz", "is not of the form npz:FILE"),
        ("npz:", "is not of the form npz:FILE"),
        ("gone.py:f", "there is no file 'gone.py'"),
        ("tdcompile.gone:f", "there is no module 'tdcompile.gone'"),
    ],
)
def test_a_spec_of_another_form_is_refused(spec: str, says: str) -> None:
    assert says in refused(spec)


@pytest.mark.parametrize(
    ("missing", "spec"), [("sklearn", "digits"), ("datasets", "hub:x"), ("datasets", "parquet:{}")]
)
def test_a_missing_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, spec: str
) -> None:
    parquet(tmp_path, "train", {"image": [b""]})
    for module in [name for name in sys.modules if name == missing or name.startswith(f"{missing}.")]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setitem(sys.modules, f"{missing}.datasets", None)
    with pytest.raises(UnavailableError, match=rf"'{missing}' cannot be imported.*pip install 'tdcompile\[data\]'"):
        load_data(spec.format(tmp_path), RGB)


def test_batches_are_fresh_tensors(tmp_path: Path) -> None:
    train, _ = load_data(npz(tmp_path, x=torch.ones(4, 3, 8, 8).numpy(), x_test=pictures(1)), RGB)
    x: Tensor = train.batch([0, 1]).inputs[0]
    x.zero_()
    assert float(train.batch([0]).inputs[0].min()) == 1

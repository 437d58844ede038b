"""Samples of several inputs and any targets: items, batches, streams and arrays give what a user means."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tdcompile.data.loading import given, load_data
from tdcompile.data.network_input import SampleFields
from tdcompile.data.task import Batch, Samples
from tdcompile.errors import InputError

X = torch.rand(12, 3, 8, 8)
MASKS = torch.randint(0, 4, (12, 8, 8))
IDS = torch.randint(1, 50, (12, 6))
KEEP = torch.ones(12, 6, dtype=torch.int64)
IMAGE = SampleFields.of((X[:2],), ("image",))
TOKENS = SampleFields.of((IDS[:2], KEEP[:2]), ("input_ids", "attention_mask"))
PAIR = SampleFields.of((X[:2], X[:2]), ("left", "right"))


class Items(Dataset[Any]):
    """A map-style data set of given items."""

    def __init__(self, items: list[Any]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, place: int) -> Any:
        return self._items[place]


class Stream(IterableDataset[Any]):
    """A stream of given items."""

    def __init__(self, items: list[Any]) -> None:
        self._items = items
        self.read = 0

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self.read += 1
            yield item


def read(data: Any, fields: SampleFields, **options: Any) -> Samples:
    train, _ = given(data, fields.inputs[0].shape, dtype=fields.inputs[0].dtype, fields=fields, **options)
    assert train is not None
    return train


def everything(samples: Samples) -> Batch:
    return samples.batch(range(len(samples)))


def same(batch: Batch, inputs: tuple[Tensor, ...], targets: Any) -> None:
    for found, wanted in zip(batch.inputs, inputs, strict=True):
        torch.testing.assert_close(found, wanted)
    if isinstance(targets, dict):
        assert batch.targets.keys() == targets.keys()
        for key, wanted in targets.items():
            torch.testing.assert_close(batch.targets[key], wanted)
    elif isinstance(targets, tuple):
        for found, wanted in zip(batch.targets, targets, strict=True):
            torch.testing.assert_close(found, wanted)
    elif targets is None:
        assert batch.targets is None
    else:
        torch.testing.assert_close(batch.targets, targets)


def collate_dict(items: list[Any]) -> dict[str, Tensor]:
    return {"image": torch.stack([item[0] for item in items]), "mask": torch.stack([item[1] for item in items])}


SEGMENTED = [(x, y) for x, y in zip(X, MASKS, strict=True)]
NAMED = [{"image": x, "segmentation": y} for x, y in SEGMENTED]


@pytest.mark.parametrize(
    ("data", "fields", "inputs", "targets"),
    [
        (Items(SEGMENTED), IMAGE, (X,), MASKS),
        (Items(NAMED), IMAGE, (X,), MASKS),
        (SEGMENTED, IMAGE, (X,), MASKS),  # lists of samples
        (NAMED, IMAGE, (X,), MASKS),
        ([(x, 0.5) for x in X], IMAGE, (X,), torch.full((12,), 0.5)),
        ([(x, x + 1, 0.5) for x in X], PAIR, (X, X + 1), torch.full((12,), 0.5)),
        (Items([{"pixels": x, "label": y} for x, y in SEGMENTED]), IMAGE, (X,), MASKS),
        (Items([(x, y, 1.0) for x, y in SEGMENTED]), IMAGE, (X,), (MASKS, torch.ones(12))),
        (
            Items([{**one, "area": 2.0} for one in NAMED]),
            IMAGE,
            (X,),
            {"segmentation": MASKS, "area": torch.full((12,), 2.0)},
        ),
        (Items([(x, x + 1, 0.5) for x in X]), PAIR, (X, X + 1), torch.full((12,), 0.5)),
        (Items([((x, x + 1), 0.5) for x in X]), PAIR, (X, X + 1), torch.full((12,), 0.5)),
        (Items([({"left": x, "right": x + 1}, 0.5) for x in X]), PAIR, (X, X + 1), torch.full((12,), 0.5)),
        (
            Items([(x, {"mask": y, "area": 2.0}) for x, y in SEGMENTED]),
            IMAGE,
            (X,),
            {"mask": MASKS, "area": torch.full((12,), 2.0)},
        ),
        (DataLoader(Items(SEGMENTED), batch_size=4), IMAGE, (X,), MASKS),
        (DataLoader(Items(SEGMENTED), batch_size=4, collate_fn=collate_dict), IMAGE, (X,), MASKS),
        (DataLoader(Items(NAMED), batch_size=4), IMAGE, (X,), MASKS),
        (Stream(SEGMENTED), IMAGE, (X,), MASKS),
        (DataLoader(Stream(NAMED), batch_size=5), IMAGE, (X,), MASKS),
        ((X, MASKS), IMAGE, (X,), MASKS),
        ((X, torch.rand(12).tolist()), IMAGE, (X,), None),
        ({"image": X.numpy(), "depth": X[:, 0].numpy()}, IMAGE, (X,), X[:, 0]),
        ({"input_ids": IDS, "attention_mask": KEEP, "labels": IDS}, TOKENS, (IDS, KEEP), IDS),
        ({"input_ids": IDS, "labels": IDS}, TOKENS, (IDS, KEEP), IDS),
    ],
)
def test_what_users_have_is_read(data: Any, fields: SampleFields, inputs: tuple[Tensor, ...], targets: Any) -> None:
    batch = everything(read(data, fields))
    same(batch, inputs, batch.targets if targets is None else targets)
    assert batch.targets is not None


def test_a_key_chooses_the_targets() -> None:
    fields = SampleFields.of((X[:2],), ("image",), targets="depth")
    held = {"image": X, "depth": X[:, :1], "other": MASKS}
    same(everything(read(held, fields)), (X,), X[:, :1])
    with pytest.raises(InputError, match=r"--targets: .* has no 'depth': .*'depht'"):
        read({"image": X, "depht": X}, fields)


def test_text_targets_become_classes() -> None:
    words = ["cat", "dog", "owl"] * 4
    samples = read(Items([{"image": x, "kind": word} for x, word in zip(X, words, strict=True)]), IMAGE)
    assert samples.classes == 3
    assert everything(samples).targets.tolist() == [0, 1, 2] * 4
    assert "0 = cat, 1 = dog, 2 = owl" in samples.notes[0].text


def test_a_stream_is_read_only_as_far_as_needed() -> None:
    stream = Stream([(x, 0.5) for x in X] * 100)
    samples = read(stream, SampleFields.of((X[:2],), ("image",), stream=30))
    assert (len(samples), stream.read) == (30, 30)
    assert "is a stream, of which the first 30 samples are read" in samples.notes[0].text


def test_tokens_of_several_lengths_are_padded_where_a_mask_tells() -> None:
    items = [{"input_ids": row[: 3 + place % 4], "labels": row[: 3 + place % 4]} for place, row in enumerate(IDS)]
    batch = everything(read(Items(items), TOKENS))
    assert batch.inputs[0].shape == batch.inputs[1].shape == batch.targets.shape == (12, 6)
    lengths = torch.tensor([3 + place % 4 for place in range(12)])
    assert batch.inputs[1].sum(1).tolist() == lengths.tolist()
    assert ((batch.targets == -100).sum(1) == 6 - lengths).all()
    alone = SampleFields.of((IDS[:2],), ("input_ids",))
    with pytest.raises(InputError, match=r"samples of shape \(3,\) do not fit the input \(6,\)"):
        read(Items(items), alone)


KEYED = SampleFields.of((X[:2],), ("image",), targets="depth")


@pytest.mark.parametrize(
    ("data", "fields", "says"),
    [
        (
            Items([{"picture": x, "other": y} for x, y in SEGMENTED]),
            IMAGE,
            "keys picture, other, and the network takes",
        ),
        (Items([(x,) for x in X]), PAIR, "has 1 members; the network takes 2 inputs .left, right."),
        (Items([((x, x, x), 1) for x in X]), PAIR, "has 3 inputs; the network takes 2 inputs"),
        (
            Items([(x, MASKS[0, : 3 + place]) for place, x in enumerate(X[:4])]),
            IMAGE,
            "samples 0 to 3 do not fit together",
        ),
        (Items([(x * float("nan"), MASKS[0]) for x in X]), IMAGE, "input 'image' of sample 0 holds NaN or Inf"),
        (Items([(x, x * float("inf")) for x in X]), IMAGE, "the target of sample 0 holds NaN or Inf"),
        (DataLoader(Items(SEGMENTED), collate_fn=lambda items: items[7]), IMAGE, "collate_fn failed: IndexError"),
        (
            Items([{"image": x, "mask": y, "path": "a.png"} for x, y in SEGMENTED]),
            IMAGE,
            "has text under 'path' beside mask",
        ),
        (Stream([]), IMAGE, "is a stream without samples"),
        ({"image": X, "mask": MASKS[:5]}, IMAGE, "their counts are .5, 12."),
        ((Items(SEGMENTED),) * 3, IMAGE, "holds 3 data sets; a pair"),
        ((X, MASKS), KEYED, "--targets 'depth' has no effect on .*, which has no keys"),
        (Items(SEGMENTED), KEYED, "--targets 'depth' has no effect on"),
        (Items([(x, 1) for x in X]), KEYED, "--targets 'depth' has no effect on"),
    ],
)
def test_what_cannot_be_meant_is_refused(data: Any, fields: SampleFields, says: str) -> None:
    with pytest.raises(InputError, match=says):
        everything(read(data, fields))


def test_an_npz_holds_targets_of_any_shape_and_several_inputs(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X.numpy(), y=MASKS.numpy())
    train, test = load_data(f"npz:{tmp_path / 'a.npz'}", (3, 8, 8), fields=IMAGE)
    assert test is not None
    assert (len(train), len(test)) == (11, 1)
    row = everything(test)
    place = int((row.inputs[0] == X).flatten(1).all(1).nonzero()[0])
    torch.testing.assert_close(row.targets[0], MASKS[place])
    np.savez(
        tmp_path / "b.npz",
        input_ids=IDS.numpy(),
        labels=IDS.numpy(),
        input_ids_test=IDS[:4].numpy(),
        labels_test=IDS[:4].numpy(),
    )
    train, test = load_data(f"npz:{tmp_path / 'b.npz'}", (6,), dtype=torch.int64, fields=TOKENS)
    assert test is not None
    same(everything(train), (IDS, KEEP), IDS)
    same(everything(test), (IDS[:4], KEEP[:4]), IDS[:4])
    np.savez(tmp_path / "c.npz", x=X.numpy(), y_test=MASKS.numpy())
    with pytest.raises(InputError, match="has 'y_test' and no 'x_test'"):
        load_data(f"npz:{tmp_path / 'c.npz'}", (3, 8, 8))

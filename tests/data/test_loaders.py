"""Loaders: their collate function and sampler are applied, or told, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import tdcompile
from tdcompile.data.loading import given
from tdcompile.data.task import Samples
from tdcompile.errors import InputError

X, Y = torch.arange(20.0)[:, None].repeat(1, 4), torch.arange(20) % 3


class Items(Dataset[Any]):
    """Items that only a collate function can make a batch of."""

    reads = 0

    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> dict[str, Any]:
        type(self).reads += 1
        return {"x": X[i], "label": int(Y[i])}


class Targets(Items):
    targets = Y.tolist()


def collate(items: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    return torch.stack([item["x"] for item in items]) * 10, torch.tensor([item["label"] for item in items])


def read(loader: Any) -> Samples:
    train, _ = given(loader, (4,), dtype=torch.float32)
    assert train is not None
    return train


def values(samples: Samples) -> list[float]:
    return samples.batch(range(len(samples))).inputs[0][:, 0].tolist()


def notes(samples: Samples) -> str:
    return "; ".join(note.text for note in samples.notes)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_collate_function_is_applied(size: int) -> None:
    samples = read(DataLoader(Items(), batch_size=size, collate_fn=collate))
    batch = samples.batch([3, 11])
    assert batch.inputs[0][:, 0].tolist() == [30, 110]
    assert batch.targets is not None
    assert batch.targets.tolist() == [0, 2]
    assert (len(samples), samples.classes) == (20, 3)
    assert notes(samples) == ""


def test_a_batch_may_be_inputs_alone_and_labels_may_be_text() -> None:
    alone = read(DataLoader(Items(), collate_fn=lambda items: collate(items)[0]))
    assert alone.batch([0]).targets is None
    text = read(DataLoader(Items(), collate_fn=lambda items: (collate(items)[0], ["cdu"[i["label"]] for i in items])))
    assert text.batch([2, 0]).targets.tolist() == [2, 0]  # type: ignore[union-attr]


def test_known_targets_spare_reading_all_samples_and_are_compared() -> None:
    Targets.reads = 0
    samples = read(DataLoader(Targets(), batch_size=4, collate_fn=collate))
    assert Targets.reads < 10
    assert samples.batch([5]).targets.tolist() == [2]  # type: ignore[union-attr]

    def shifts(items: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        x, y = collate(items)
        return x, torch.where(x[:, 0] > 100, (y + 1) % 3, y)

    samples = read(DataLoader(Targets(), batch_size=4, collate_fn=shifts))
    samples.batch([5])
    with pytest.raises(InputError, match="collate_fn gives other labels than the data set's 'targets'"):
        samples.batch([15])
    changed = read(
        DataLoader(Targets(), batch_size=4, collate_fn=lambda items: (collate(items)[0], 2 - collate(items)[1]))
    )
    assert changed.batch([0]).targets.tolist() == [2]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda items: 1 / 0, "the data: collate_fn failed: ZeroDivisionError"),
        (
            lambda items: {"x": 1, "label": 2},
            r"collate_fn of the data made, input 'x': samples of shape \(\) do not fit",
        ),
        (lambda items: (1, 2, 3), r"collate_fn of the data made, input 'x': samples of shape \(\) do not fit"),
        (lambda items: collate(items[1:] or items * 2), "collate_fn made an input of shape"),
        (lambda items: (collate(items)[0], torch.rand(len(items) + 1, 3)), "has members of different counts"),
        (lambda items: (collate(items)[0][:, :2], collate(items)[1]), r"samples of shape \(2,\) do not fit"),
    ],
)
def test_a_collate_function_that_makes_no_batch_is_refused(function: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read(DataLoader(Items(), batch_size=4, collate_fn=function))


class Endless(Sampler[int]):
    def __init__(self, length: int | None) -> None:
        if length is not None:
            self.__class__ = _Measured
            self.length = length

    def __iter__(self) -> Iterator[int]:
        i = 0
        while True:
            yield i % 20
            i += 3


class _Measured(Endless):
    def __len__(self) -> int:
        return self.length


@pytest.mark.parametrize("collates", [True, False])
@pytest.mark.parametrize(
    ("sampler", "chosen", "told"),
    [
        (lambda: SubsetRandomSampler([7, 2, 5]), [2, 5, 7], "SubsetRandomSampler chooses 3 samples, 3 of 20 distinct"),
        (lambda: Endless(4), [0, 3, 6, 9], "_Measured chooses 4 samples, 4 of 20 distinct"),
        (lambda: WeightedRandomSampler([0.0] * 19 + [1.0], 6), [19] * 6, "chooses 6 samples, 1 of 20 distinct"),
    ],
)
def test_a_sampler_chooses_the_samples(collates: bool, sampler: Any, chosen: list[int], told: str) -> None:
    scale = 10 if collates else 1
    dataset = Items() if collates else TensorDataset(X, Y)
    how = {"collate_fn": collate} if collates else {}
    plain = read(DataLoader(dataset, batch_size=2, sampler=sampler(), **how))
    batched = read(DataLoader(dataset, batch_sampler=BatchSampler(sampler(), 2, drop_last=False), **how))
    for samples in (plain, batched):
        assert values(samples) == [scale * i for i in chosen]
        assert told in notes(samples)


def test_a_batch_sampler_of_the_users_own() -> None:
    class Pairs(Sampler[list[int]]):
        def __len__(self) -> int:
            return 2

        def __iter__(self) -> Iterator[list[int]]:
            return iter([[1, 9], [4, 4]])

    samples = read(DataLoader(TensorDataset(X, Y), batch_sampler=Pairs()))
    assert values(samples) == [1, 9, 4, 4]
    assert "Pairs chooses 4 samples, 3 of 20 distinct" in notes(samples)


def test_a_random_draw_is_that_of_the_seed_and_leaves_the_random_state() -> None:
    own = torch.Generator().manual_seed(5)
    for generator in (None, own):
        loader = DataLoader(TensorDataset(X, Y), sampler=RandomSampler(X, num_samples=6, generator=generator))
        torch.manual_seed(1)
        before = torch.get_rng_state(), own.get_state()
        once, again = (values(given(loader, (4,), seed=3)[0]) for _ in range(2))  # type: ignore[arg-type]
        assert once == again
        assert torch.equal(before[0], torch.get_rng_state())
        assert torch.equal(before[1], own.get_state())


@pytest.mark.parametrize("options", [{"shuffle": True}, {"batch_size": 5, "drop_last": True}, {"num_workers": 2}])
def test_all_samples_count_where_a_loader_only_orders_them(options: Any) -> None:
    samples = read(DataLoader(TensorDataset(X, Y), **options))
    assert values(samples) == X[:, 0].tolist()
    assert notes(samples) == ""


def test_what_is_not_applied_is_told() -> None:
    samples = read(DataLoader(TensorDataset(X, Y), batch_size=6, drop_last=True))
    assert len(samples) == 20
    assert "drop_last of the loader is not applied" in notes(samples)
    sampler = DistributedSampler(TensorDataset(X, Y), num_replicas=2, rank=0)
    samples = read(DataLoader(TensorDataset(X, Y), sampler=sampler))
    assert len(samples) == 20
    assert "DistributedSampler is not applied; all 20 samples are read" in notes(samples)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(X, Y, strict=True))


class Measured(Stream):
    def __len__(self) -> int:
        return 20


@pytest.mark.parametrize(
    ("loader", "says"),
    [
        (lambda: DataLoader(TensorDataset(X, Y), sampler=Endless(None)), "Endless cannot be drawn: TypeError"),
        (lambda: DataLoader(TensorDataset(X, Y), sampler=SubsetRandomSampler([20])), "chooses no places of 0 to 19"),
        (lambda: DataLoader(TensorDataset(X, Y), sampler=SubsetRandomSampler([])), "chooses no places of 0 to 19"),
        (
            lambda: DataLoader(tdcompile.Tensors(X, Y), sampler=SubsetRandomSampler([1])),
            r"give the Samples themselves, and their subset\(indices\)",
        ),
    ],
)
def test_a_loader_that_cannot_be_read_by_index_is_refused(loader: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        read(loader())


@pytest.mark.parametrize("stream", [Stream, Measured, lambda: DataLoader(Stream(), batch_size=3)])
def test_a_stream_is_read_from_its_beginning(stream: Any) -> None:
    samples = read(stream())
    torch.testing.assert_close(samples.batch(range(20)).inputs[0], X)
    assert samples.batch([5]).targets.tolist() == [int(Y[5])]  # type: ignore[union-attr]
    assert "is a stream, of which all 20 samples are read" in samples.notes[0].text


def test_samples_in_a_loader_are_the_samples() -> None:
    samples = tdcompile.Tensors(X, Y)
    assert read(DataLoader(samples, batch_size=4, shuffle=True, collate_fn=lambda batch: batch)) is samples

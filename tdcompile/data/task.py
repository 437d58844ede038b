"""``Task``: what the network is for: samples to calibrate, tune and test on, the loss, and the metric."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tdcompile.errors import InputError
from tdcompile.support.heap import keep_freed_memory


class Batch(NamedTuple):
    """Inputs of the network in its argument order, each ``(N, ...)``, and class labels ``(N,)`` where there are any."""

    inputs: tuple[Tensor, ...]
    labels: Tensor | None

    def copies(self) -> tuple[Tensor, ...]:
        """The inputs for a network that may work in place, where the batch is needed again afterwards."""
        return tuple(x.clone() for x in self.inputs)

    def on(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(tuple(x.to(device) for x in self.inputs), None if self.labels is None else self.labels.to(device))


class Samples(Dataset[Batch], ABC):
    """A set of samples that can be read a batch at a time; also a map-style data set for ``DataLoader``."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples at these places, normalised, as float tensors."""

    @property
    @abstractmethod
    def classes(self) -> int | None:
        """How many classes the labels name; None without labels."""

    def __getitem__(self, index: int) -> Batch:
        return self.batch([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        """One call a batch: give ``DataLoader`` ``collate_fn=lambda batch: batch``."""
        return self.batch(indices)

    def subset(self, indices: Sequence[int]) -> Samples:
        """A view of some of the samples."""
        return _Subset(self, list(indices))

    def batches(self, size: int = 256, limit: int | None = None) -> Iterator[Batch]:
        """The first ``limit`` samples in order, ``size`` at a time."""
        count = len(self) if limit is None else min(limit, len(self))
        for start in range(0, count, size):
            yield self.batch(range(start, min(start + size, count)))

    def fingerprint(self) -> tuple[int, str]:
        """How many there are, and a digest of the first of them as the network sees them, normalised.

        No digest of samples that are drawn anew at each reading, which it would call others each time.
        """
        once, again = (_digest(next(self.batches(8, limit=8))) for _ in range(2))
        return len(self), once if once == again else ""

    def shuffled(self, generator: torch.Generator) -> Samples:
        """All samples in a random order drawn from the generator."""
        return self.subset(torch.randperm(len(self), generator=generator).tolist())


class _Subset(Samples):
    def __init__(self, whole: Samples, indices: list[int]) -> None:
        self._whole, self._indices = whole, indices

    def __len__(self) -> int:
        return len(self._indices)

    def batch(self, indices: Sequence[int]) -> Batch:
        return self._whole.batch([self._indices[i] for i in indices])

    @property
    def classes(self) -> int | None:
        return self._whole.classes


class Tensors(Samples):
    """Samples held in memory, for networks of any number of inputs.

    Args:
        inputs: of the network in its argument order, each ``(N, ...)``; a tensor where it has one.
        labels: class numbers from 0 ``(N,)``.
        classes: how many there are; none takes the largest label and one.

    Raises:
        InputError: there is no sample, the counts differ, or a label is no class number below ``classes``.
    """

    def __init__(
        self, inputs: Tensor | Sequence[Tensor], labels: Tensor | None = None, classes: int | None = None
    ) -> None:
        self.inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        self.labels = labels
        counts = {len(x) for x in (*self.inputs, *(() if labels is None else (labels,)))}
        if len(counts) != 1 or counts == {0}:
            raise InputError(f"inputs and labels are to be of one count above 0, and are of {sorted(counts)}")
        self._classes: int | None = None
        if labels is not None:
            known = int(labels.max()) + 1
            self._classes = known if classes is None else classes
            if labels.ndim != 1 or labels.is_floating_point() or int(labels.min()) < 0 or known > self._classes:
                raise InputError(
                    f"labels are class numbers (N,) from 0 to {self._classes - 1}; these are {labels.dtype} of shape "
                    f"{tuple(labels.shape)} from {labels.min().item()} to {labels.max().item()}"
                )

    def __len__(self) -> int:
        return len(self.inputs[0])

    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples at these places."""
        places = list(indices)
        return Batch(tuple(x[places] for x in self.inputs), None if self.labels is None else self.labels[places])

    @property
    def classes(self) -> int | None:
        """How many classes the labels name; None without labels."""
        return self._classes


@dataclass(frozen=True)
class Task:
    """Data for one compilation, all optional.

    Attributes:
        train: calibration, tuning and every choice use this alone.
        test: gives the final figure and nothing else.
        calibrate: how many training samples calibration reads.
        evaluate: how many test samples the final figure uses; None is all.
        source: where the data came from, in words.
    """

    train: Samples | None = None
    test: Samples | None = None
    calibrate: int = 1024
    evaluate: int | None = None
    source: str = "none"

    def __post_init__(self) -> None:
        """Raises InputError where what is given for samples is something else, such as a pair of arrays."""
        for name, given in (("train", self.train), ("test", self.test)):
            if given is not None and not isinstance(given, Samples):
                raise InputError(
                    f"Task({name}=...) is a {type(given).__name__}; Samples are needed: Tensors(x, y) makes them of "
                    "tensors"
                )


def _digest(batch: Batch) -> str:
    content = hashlib.sha256(repr(None if batch.labels is None else batch.labels.tolist()).encode())
    for x in batch.inputs:
        content.update(f"{x.dtype}{tuple(x.shape)}".encode())
        content.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


@torch.no_grad()
@keep_freed_memory()
def accuracy(module: nn.Module, samples: Samples | None, limit: int | None = None) -> float | None:
    """Top-1 accuracy in [0, 1] in eval mode; None without samples or labels. The module's mode is put back."""
    if samples is None or samples.classes is None or len(samples) == 0:
        return None
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    training, right, seen = module.training, 0, 0
    module.eval()
    for batch in samples.batches(limit=limit):
        assert batch.labels is not None  # ``classes`` says that there are labels
        scores = logits(module(*(x.to(device) for x in batch.inputs)))
        right += int((scores.argmax(1).cpu() == batch.labels).sum())
        seen += len(batch.labels)
    module.train(training)
    return right / seen


def logits(output: object) -> Tensor:
    """The class scores in what a network returns: a tensor, or the first tensor of a sequence or mapping."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    assert isinstance(values, Iterable)  # a network returns tensors, or a nesting of them
    return logits(next(iter(values)))


def classified(output: Tensor) -> bool:
    """Whether an output reads as class scores, ``(N, classes)``; what has more axes has no axis known to be classes."""
    return output.dim() == 2 and output.shape[1] > 1

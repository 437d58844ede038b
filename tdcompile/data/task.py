"""``Task`` and ``Samples``: the data to calibrate, tune and test on."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tdcompile.data.nesting import map_tensors, rows, tensors_in
from tdcompile.errors import InputError

# Without test samples an eighth of the training samples is held out, at most 256: the share of agreeing samples then
# has a standard error below 3 points. Fewer than ``FEW`` samples are no measure.
_SHARE = 8
_HELD_OUT = 256
FEW = 8
# A search that judges plans by a point of accuracy sets more aside: if 3 % of 2,048 samples change their class, the
# accuracy has a standard error of 0.4 points.
_SELECTION = 2048
# Of few samples up to a quarter is set aside: on 8 samples the correlation of a network for speech fell by less than
# 2 %, and on 64 others by 6.6 %.
LEAST_SELECTION = 32
# The fewest training samples of which some are held out.
ENOUGH = _SHARE * FEW


class Batch(NamedTuple):
    """Samples as the network takes them.

    Attributes:
        inputs: inputs of the network in argument order, each ``(N, ...)``.
        targets: what the network should answer: a tensor ``(N, ...)``, such as class numbers ``(N,)``, or sequences and
            mappings of tensors; None without targets.
    """

    inputs: tuple[Tensor, ...]
    targets: Any

    def copies(self) -> tuple[Tensor, ...]:
        """Return copies of the inputs, for a network that may change them in place."""
        return tuple(x.clone() for x in self.inputs)

    def on(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(tuple(x.to(device) for x in self.inputs), map_tensors(lambda y: y.to(device), self.targets))

    def first(self, count: int) -> Batch:
        """Return the first samples of the batch."""
        return Batch(tuple(x[:count] for x in self.inputs), map_tensors(lambda y: y[:count], self.targets))


class Note(NamedTuple):
    """A message about samples, for the report; a warning if the result may differ from what the user expects."""

    text: str
    warning: bool = False


class Samples(Dataset[Batch], ABC):
    """Samples that are read a batch at a time; also a map-style data set for ``DataLoader``."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the samples at these indices, normalised, as float tensors."""

    @property
    def classes(self) -> int | None:
        """Number of classes if the targets are class numbers ``(N,)``; None by default."""
        return None

    @property
    def notes(self) -> tuple[Note, ...]:
        """Messages for the report, such as how text became class numbers; none by default."""
        return ()

    def __getitem__(self, index: int) -> Batch:
        return self.batch([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        """Read a batch in one call: give ``DataLoader`` ``collate_fn=lambda batch: batch``."""
        return self.batch(indices)

    def subset(self, indices: Sequence[int]) -> Samples:
        """Return a view of some of the samples."""
        return _Subset(self, list(indices))

    def batches(self, size: int = 256, limit: int | None = None) -> Iterator[Batch]:
        """Yield the first ``limit`` samples in order, ``size`` at a time."""
        count = len(self) if limit is None else min(limit, len(self))
        for start in range(0, count, size):
            yield self.batch(range(start, min(start + size, count)))

    def fingerprint(self) -> tuple[int, str]:
        """Return the number of samples and a digest of the first eight, normalised.

        The digest is empty if two readings differ, as they do for augmented samples.
        """
        once, again = (_digest(next(self.batches(8, limit=8))) for _ in range(2))
        return len(self), once if once == again else ""

    def shuffled(self, generator: torch.Generator) -> Samples:
        """Return all samples in a random order drawn from the generator."""
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

    @property
    def notes(self) -> tuple[Note, ...]:
        return self._whole.notes


class Tensors(Samples):
    """Samples held in memory, for networks of any number of inputs and any targets.

    Args:
        inputs: inputs of the network in argument order, each ``(N, ...)``; one tensor if it has one input.
        targets: a tensor ``(N, ...)``, or sequences and mappings of tensors. Integers ``(N,)`` are class numbers from
            0; regression targets are floats.
        classes: number of classes; None takes the largest class number plus one.

    Raises:
        InputError: there is no sample, the counts differ, or a class number is negative or not below ``classes``.
    """

    def __init__(self, inputs: Tensor | Sequence[Tensor], targets: Any = None, classes: int | None = None) -> None:
        self.inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        self.targets = targets
        counts = {len(x) if x.dim() else 0 for x in (*self.inputs, *tensors_in(targets))}
        if len(counts) != 1 or counts == {0}:
            raise InputError(f"inputs and targets need one count above 0; their counts are {sorted(counts)}")
        self._classes = _classes_of(targets, classes)

    def __len__(self) -> int:
        return len(self.inputs[0])

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the samples at these indices."""
        places = list(indices)
        return Batch(tuple(x[places] for x in self.inputs), rows(self.targets, places))

    @property
    def classes(self) -> int | None:
        """Number of classes; None if the targets are not class numbers."""
        return self._classes

    @property
    def notes(self) -> tuple[Note, ...]:
        """A caution if all samples are of one class."""
        return one_class(self.targets, "the samples given") if self._classes is not None else ()


def _classes_of(targets: Any, classes: int | None) -> int | None:
    """Return the number of classes of class numbers ``(N,)``, or None for other targets.

    Raises:
        InputError: a class number is negative or not below ``classes``, or ``classes`` is given for other targets.
    """
    numbers = isinstance(targets, Tensor) and targets.dim() == 1 and is_whole(targets)
    if not numbers:
        if classes is not None:
            found = f"{targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
            raise InputError(f"classes={classes} needs class numbers, integers (N,), as targets; these are {found}")
        return None
    known = int(targets.max()) + 1
    most = known if classes is None else classes
    if int(targets.min()) < 0 or known > most:
        raise InputError(
            f"class numbers (N,) go from 0 to {most - 1}; these go from {int(targets.min())} to {known - 1} (targets "
            "of a regression are floats)"
        )
    return most


@dataclass(frozen=True)
class Task:
    """Data for one compilation, all optional.

    Attributes:
        train: samples for calibration, tuning and every choice.
        test: samples for the final accuracy, used for nothing else.
        calibrate: number of training samples that calibration reads.
        evaluate: number of test samples for the final accuracy; None takes all.
        source: where the data came from, as text.
        heldout: without test samples, training samples that no pass reads: the outputs are compared on them.
        synthetic: the pass that makes the training samples from the network, in text form; empty if they are real.
        kind: name of a built-in task (``data/task_kinds.py``); None guesses it from the targets.
        loss: loss of one's own: a function (outputs, targets) -> scalar, or its text ``file.py:callable``.
        metric: metric of one's own: such a function, a torchmetrics metric, or the text form of either.
        output: name or number of the output that is scored, of several.
        selection: training samples on which a search judges plans, and that nothing else reads.
    """

    train: Samples | None = None
    test: Samples | None = None
    calibrate: int = 1024
    evaluate: int | None = None
    source: str = "none"
    heldout: Samples | None = None
    synthetic: str = ""
    kind: str | None = None
    loss: Any = None
    metric: Any = None
    output: str | int | None = None
    selection: Samples | None = None

    @property
    def trainable(self) -> bool:
        """Whether there are training samples, or will be once synthetic ones are made."""
        return bool(self.synthetic) or (self.train is not None and len(self.train) > 0)

    @property
    def tested(self) -> bool:
        """Whether there are test samples."""
        return self.test is not None and len(self.test) > 0

    @property
    def judges(self) -> Samples | None:
        """The samples on which outputs are compared: the test samples, else those held out."""
        return self.test if self.tested else self.heldout

    def holding_out(self, generator: torch.Generator) -> Task:
        """Return the task with part of the training samples held out if it has no test samples."""
        if self.tested or self.heldout is not None or self.train is None or len(self.train) < ENOUGH:
            return self
        rest, aside = _parted(self.train, min(_HELD_OUT, len(self.train) // _SHARE), generator)
        return replace(self, train=rest, heldout=aside)

    def selecting(self, generator: torch.Generator) -> Task:
        """Return the task with part of the training samples set aside to judge plans by.

        Raises:
            InputError: there are no training samples, or too few.
        """
        if self.selection is not None:
            return self
        count = 0 if self.train is None else len(self.train)
        if self.train is None or count < ENOUGH:
            has = f"{count} are too few" if count else "there are none"
            raise InputError(f"a goal sets training samples aside to judge plans by, and {has}: give at least {ENOUGH}")
        wanted = max(count // _SHARE, min(LEAST_SELECTION, count // 4))
        rest, aside = _parted(self.train, min(_SELECTION, wanted), generator)
        return replace(self, train=rest, selection=aside)

    def __post_init__(self) -> None:
        """Raise InputError if ``train`` or ``test`` is not ``Samples``, but for example a pair of arrays."""
        for name, given in (
            ("train", self.train),
            ("test", self.test),
            ("heldout", self.heldout),
            ("selection", self.selection),
        ):
            if given is not None and not isinstance(given, Samples):
                raise InputError(
                    f"Task({name}=...) is a {type(given).__name__}; give Samples: Tensors(x, y) makes them from tensors"
                )


def lacking(samples: Samples | None) -> str:
    """Return why there are too few training samples to fit anything to, which takes two; empty if there are enough."""
    if samples is None or len(samples) == 0:
        return "there are no training samples"
    return "there is only one training sample" if len(samples) == 1 else ""


def is_whole(x: Tensor) -> bool:
    """Return whether a tensor holds integers, not booleans."""
    return not (x.is_floating_point() or x.is_complex() or x.dtype is torch.bool)


def _parted(samples: Samples, count: int, generator: torch.Generator) -> tuple[Samples, Samples]:
    """Return the other samples, and ``count`` that are drawn at random."""
    order = torch.randperm(len(samples), generator=generator).tolist()
    return samples.subset(order[count:]), samples.subset(order[:count])


def one_class(labels: Tensor, name: str) -> tuple[Note, ...]:
    """Return a caution if several samples are all of one class."""
    if len(labels) < 2 or bool((labels != labels[0]).any()):
        return ()
    return (Note(f"all {len(labels)} samples of {name} are of class {int(labels[0])}", warning=True),)


def _digest(batch: Batch) -> str:
    content = hashlib.sha256(repr(map_tensors(lambda y: y.tolist(), batch.targets)).encode())
    for x in batch.inputs:
        content.update(f"{x.dtype}{tuple(x.shape)}".encode())
        content.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()

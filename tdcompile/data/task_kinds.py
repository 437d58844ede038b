"""Built-in tasks: how targets are compared with the scored output, their losses, and their metrics of torchmetrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from tdcompile.data.metric import Meter, Metric, TorchMeter
from tdcompile.data.nesting import tensors_in
from tdcompile.data.task import Batch, is_whole
from tdcompile.errors import InputError

OWN = "own"
# Class numbers of targets that count neither for loss nor for metric: torch's default, and the usual one of masks.
IGNORED = (-100, 255)
_SUM = 1e-4  # allowed deviation of a row of probabilities from the sum 1


class UnfitError(InputError):
    """Targets and outputs do not fit a task; the message says why."""


@dataclass(frozen=True)
class TaskKind(ABC):
    """A built-in task: how targets are compared with the scored output.

    Subclasses are made by ``fit``, which looks at example outputs and targets.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    class_axis: ClassVar[int | None] = None
    """Axis of the class scores in the scored output; None without classes."""

    trains: ClassVar[bool] = True
    """There is a loss."""
    shiftable: ClassVar[bool] = False
    """A shift or a flip of an image changes no target, or moves it along."""
    spatial: ClassVar[bool] = False
    """Targets have places ``(..., H, W)`` that move with the image."""

    @classmethod
    @abstractmethod
    def fit(cls, output: Tensor, batch: Batch) -> Self:
        """Return the task for an output and the targets of the same samples.

        Raises:
            UnfitError: they do not fit this task.
        """

    @abstractmethod
    def pair(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return predictions and targets as loss and metric take them."""

    @abstractmethod
    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss over the batch."""

    @abstractmethod
    def metric(self) -> Metric:
        """Return the usual metric of the task."""

    @property
    def classes(self) -> int | None:
        """Number of classes, for tasks that have one class for each sample."""
        return None

    @property
    def needs_no_targets(self) -> bool:
        """Whether the inputs are the targets, as the next tokens of a language are."""
        return False

    def logits_axis(self, output: Tensor) -> int | None:
        """Return the axis of class logits in an output; None if it holds other values, or probabilities."""
        return self.class_axis if self.class_axis is not None and output.dim() > self.class_axis else None

    def told(self) -> str:
        """Return what the task makes of the targets, for the report."""
        return self.about


@dataclass(frozen=True)
class Classification(TaskKind):
    """One class for each sample: class numbers ``(N,)``, or one-hot rows or probabilities ``(N, C)``.

    Attributes:
        scores: number of class scores; 1 for binary scores.
        probabilities: binary scores are probabilities, not logits.
    """

    name: ClassVar[str] = "classification"
    about: ClassVar[str] = "one class for each sample"
    class_axis: ClassVar[int | None] = 1
    shiftable: ClassVar[bool] = True
    scores: int
    probabilities: bool = False

    @classmethod
    def fit(cls, output: Tensor, batch: Batch) -> Self:
        """See ``TaskKind``."""
        y = _one_tensor(batch.targets, cls.name)
        if y.is_complex():
            raise UnfitError(f"{cls.name} takes class numbers, not {shape_of(y)}")
        binary = output.dim() == 1 or (output.dim() == 2 and output.shape[1] == 1)
        if y.dim() == 2 and y.shape[1] == 1:
            y = y[:, 0]
        if y.dim() == 2 and output.dim() == 2 and y.shape[1] == output.shape[1] and one_hot(y):
            return cls(output.shape[1])
        if y.dim() != 1:
            raise UnfitError(f"{cls.name} takes class numbers (N,) or one-hot rows (N, C), not {shape_of(y)}")
        whole = is_whole(y) or y.dtype is torch.bool or bool((y == y.round()).all())
        if binary and whole and bool(((y == 0) | (y == 1)).all()):
            return cls(1, bool(((output >= 0) & (output <= 1)).all()))
        if not (is_whole(y) or y.dtype is torch.bool):
            raise UnfitError(f"{cls.name} takes class numbers, integers (N,), not {shape_of(y)}")
        if y.dtype is not torch.bool and int(y.min()) < 0:
            raise UnfitError(f"{cls.name} counts classes from 0, and a target is {int(y.min())}")
        most = int(y.max())
        if output.dim() != 2 or max(most, 1) >= output.shape[1]:
            raise UnfitError(
                f"the labels go up to {most}, and the network's output is {size_of(output)}: expected a score for each "
                "class"
            )
        return cls(output.shape[1])

    def pair(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """See ``TaskKind``: scores ``(N, C)`` and class numbers ``(N,)``, or probabilities ``(N, C)``."""
        y = next(tensors_in(batch.targets)).to(output.device)
        if y.dim() == 2 and y.shape[1] == 1:
            y = y[:, 0]
        if self.scores == 1:
            return output.reshape(len(output)), y.long()
        if y.dim() == 2:
            if not one_hot(y):
                raise InputError("a target is a row that is neither one-hot nor holds probabilities")
            return output, y.to(output.dtype)
        y = y.long()
        most = int(y.max())
        if most >= self.scores or int(y.min()) < 0:
            raise InputError(
                f"a class number is {most if most >= self.scores else int(y.min())}: classes are 0 to {self.scores - 1}"
            )
        return output, y

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy."""
        if self.scores > 1:
            return F.cross_entropy(prediction, target)
        loss = F.binary_cross_entropy if self.probabilities else F.binary_cross_entropy_with_logits
        return loss(prediction, target.to(prediction.dtype))

    def logits_axis(self, output: Tensor) -> int | None:
        """See ``TaskKind``."""
        return None if self.probabilities else super().logits_axis(output)

    def metric(self) -> Metric:
        """Return top-1 accuracy."""
        return Metric("accuracy", True, partial(_accuracy, self.scores, self.probabilities), "%")

    @property
    def classes(self) -> int | None:
        """Number of classes."""
        return max(self.scores, 2)


@dataclass(frozen=True)
class Multilabel(TaskKind):
    """Any number of labels for each sample: rows ``(N, L)`` of zeros and ones, and as many scores."""

    name: ClassVar[str] = "multilabel"
    about: ClassVar[str] = "any number of labels for each sample"
    shiftable: ClassVar[bool] = True
    labels: int
    probabilities: bool = False

    @classmethod
    def fit(cls, output: Tensor, batch: Batch) -> Self:
        """See ``TaskKind``."""
        y = _one_tensor(batch.targets, cls.name)
        if y.dim() != 2 or output.shape != y.shape or not bool(((y == 0) | (y == 1)).all()):
            raise UnfitError(
                f"{cls.name} takes zeros and ones (N, L) and as many scores, not {shape_of(y)} for an output "
                f"{size_of(output)}"
            )
        return cls(y.shape[1], bool(((output >= 0) & (output <= 1)).all()))

    def pair(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """See ``TaskKind``: scores and labels, both ``(N, L)``."""
        return output, next(tensors_in(batch.targets)).to(output.device).long()

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the binary cross-entropy."""
        loss = F.binary_cross_entropy if self.probabilities else F.binary_cross_entropy_with_logits
        return loss(prediction, target.to(prediction.dtype))

    def metric(self) -> Metric:
        """Return the F1 score over all labels of all samples (micro average)."""
        return Metric("F1", True, partial(_f1, self.labels, self.probabilities), "%")


@dataclass(frozen=True)
class Segmentation(TaskKind):
    """A class for each place: class numbers ``(N, ...)`` and scores ``(N, C, ...)``; ignored places have -100 or 255.

    Attributes:
        scores: number of class scores; 1 for binary scores.
        ignore: the class number that is ignored.
        probabilities: binary scores are probabilities, not logits.
    """

    name: ClassVar[str] = "segmentation"
    about: ClassVar[str] = "a class for each place"
    class_axis: ClassVar[int | None] = 1
    shiftable: ClassVar[bool] = True
    spatial: ClassVar[bool] = True
    scores: int
    ignore: int = IGNORED[0]
    probabilities: bool = False

    @classmethod
    def fit(cls, output: Tensor, batch: Batch) -> Self:
        """See ``TaskKind``."""
        y = _one_tensor(batch.targets, cls.name)
        if y.dim() == output.dim() and y.shape[1] == 1 and output.dim() > 2:
            y = y[:, 0]
        whole = is_whole(y) or y.dtype is torch.bool or bool((y == y.round()).all())
        if output.dim() < 3 or not whole or tuple(y.shape) != (len(output), *output.shape[2:]):
            raise UnfitError(
                f"{cls.name} takes a class number for each place of an output (N, C, ...), not {shape_of(y)} for an "
                f"output {size_of(output)}"
            )
        scores = output.shape[1]
        known = [value for value in IGNORED if bool((y == value).any()) and not 0 <= value < scores]
        counted = y[~torch.isin(y.long(), torch.tensor(known))] if known else y
        if not counted.numel():
            raise UnfitError(f"no target counts: all of the first samples are {known[0]}")
        least, most = int(counted.min()), int(counted.max())
        if least < 0 or most >= max(scores, 2):
            wrong = least if least < 0 else most
            raise UnfitError(
                f"a target is {wrong}, and the network's output {size_of(output)} has {scores} class scores (targets "
                f"that do not count are {' or '.join(map(str, IGNORED))})"
            )
        # 255 is ignored unless it is a class; a mask without ignored places may have them in samples to come.
        ignore = known[0] if known else IGNORED[1] if scores <= IGNORED[1] else IGNORED[0]
        return cls(scores, ignore, bool(((output >= 0) & (output <= 1)).all()) and scores == 1)

    def pair(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """See ``TaskKind``: scores ``(N, C, ...)`` and class numbers ``(N, ...)``; binary scores lose their axis."""
        y = next(tensors_in(batch.targets)).to(output.device).long()
        if y.dim() == output.dim():
            y = y[:, 0]
        wrong = ((y < 0) | (y >= max(self.scores, 2))) & (y != self.ignore)
        if bool(wrong.any()):
            place = int(wrong.flatten(1).any(1).nonzero()[0])
            raise InputError(
                f"the target of sample {place} of a batch is {int(y[wrong][0])} somewhere: the network has "
                f"{max(self.scores, 2)} classes, and {self.ignore} does not count"
            )
        return (output[:, 0] if self.scores == 1 else output), y

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy over the places that count."""
        if self.scores > 1:
            return F.cross_entropy(prediction, target, ignore_index=self.ignore)
        counted = target != self.ignore
        loss = F.binary_cross_entropy if self.probabilities else F.binary_cross_entropy_with_logits
        return loss(prediction[counted], target[counted].to(prediction.dtype))

    def logits_axis(self, output: Tensor) -> int | None:
        """See ``TaskKind``."""
        return None if self.probabilities else super().logits_axis(output)

    def metric(self) -> Metric:
        """Return the mean intersection over union of the classes."""
        return Metric("mIoU", True, partial(_iou, self.scores, self.ignore, self.probabilities), "%")

    def told(self) -> str:
        """See ``TaskKind``."""
        return f"{self.about}, of which {self.ignore} is ignored"


@dataclass(frozen=True)
class Regression(TaskKind):
    """Numbers of the output's shape."""

    name: ClassVar[str] = "regression"
    about: ClassVar[str] = "numbers for each sample"

    @classmethod
    def fit(cls, output: Tensor, batch: Batch) -> Self:
        """See ``TaskKind``."""
        y = _one_tensor(batch.targets, cls.name)
        if y.is_complex() or _like(y, output) is None:
            raise UnfitError(f"{cls.name} takes targets of the output's shape {size_of(output)}, not {shape_of(y)}")
        return cls()

    def pair(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """See ``TaskKind``: both of the output's shape."""
        y = _like(next(tensors_in(batch.targets)), output)
        if y is None:
            raise InputError(f"a target does not fit the network's output {size_of(output)}")
        return output.contiguous(), y.to(output)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the squared error over the energy of the targets, which has no unit."""
        return F.mse_loss(prediction, target) / target.square().mean().clamp_min(torch.finfo(target.dtype).tiny)

    def metric(self) -> Metric:
        """Return the mean absolute error."""
        return Metric("MAE", False, _mae)


@dataclass(frozen=True)
class Restoration(Regression):
    """An image for each image.

    Attributes:
        peak: difference of the largest and the smallest value of the targets.
    """

    name: ClassVar[str] = "restoration"
    about: ClassVar[str] = "an image for each image"
    spatial: ClassVar[bool] = True
    peak: float = 1.0

    @classmethod
    def fit(cls, output: Tensor, batch: Batch) -> Self:
        """See ``TaskKind``."""
        y = _one_tensor(batch.targets, cls.name)
        if output.dim() != 4 or y.shape != output.shape or not y.is_floating_point():
            raise UnfitError(
                f"{cls.name} takes float images (N, C, H, W) of the output's shape {size_of(output)}, not {shape_of(y)}"
            )
        inside = bool(((y >= 0) & (y <= 1)).all())
        return cls(1.0 if inside else float(y.max() - y.min()))

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the absolute error over the size of the targets; absolute errors are usual in restoration."""
        return F.l1_loss(prediction, target) / target.abs().mean().clamp_min(torch.finfo(target.dtype).tiny)

    def metric(self) -> Metric:
        """Return the peak signal-to-noise ratio over all pixels."""
        return Metric("PSNR", True, partial(_psnr, self.peak), "dB")

    def told(self) -> str:
        """See ``TaskKind``."""
        return f"{self.about}, values over a range of {self.peak:.4g}"


@dataclass(frozen=True)
class Language(TaskKind):
    """A token for each place: scores ``(N, L, V)``; targets ``(N, L)``, in which -100 does not count.

    Without targets, or if the targets are the tokens themselves, the target of each place is the next token.

    Attributes:
        shifted: scores are compared with the next place's target.
        padded: index of an input of zeros and ones that masks padding; None without one.
        tokens: index of the input of tokens.
    """

    name: ClassVar[str] = "language"
    about: ClassVar[str] = "a token for each place"
    class_axis: ClassVar[int | None] = 2
    shifted: bool = False
    tokens: int = 0
    padded: int | None = None

    @classmethod
    def fit(cls, output: Tensor, batch: Batch) -> Self:
        """See ``TaskKind``."""
        whole = [place for place, x in enumerate(batch.inputs) if is_whole(x) and x.dim() == 2]
        if output.dim() != 3 or not whole:
            raise UnfitError(
                f"{cls.name} takes tokens (N, L) and an output (N, L, V) of scores for each, not {size_of(output)}"
            )
        masks = [place for place in whole if bool(((batch.inputs[place] == 0) | (batch.inputs[place] == 1)).all())]
        tokens = next((place for place in whole if place not in masks), whole[0])
        padded = next(
            (place for place in masks if place != tokens and batch.inputs[place].shape == batch.inputs[tokens].shape),
            None,
        )
        x = batch.inputs[tokens]
        if tuple(x.shape) != tuple(output.shape[:2]):
            raise UnfitError(
                f"{cls.name} needs a score for each token: {tuple(x.shape)} tokens, output {size_of(output)}"
            )
        if batch.targets is None:
            return cls(True, tokens, padded)
        y = _one_tensor(batch.targets, cls.name)
        if not is_whole(y) or y.shape != x.shape:
            raise UnfitError(f"{cls.name} takes a token for each place {tuple(x.shape)}, not {shape_of(y)}")
        if int(y.max()) >= output.shape[2] or bool(((y < 0) & (y != IGNORED[0])).any()):
            wrong = int(y.max()) if int(y.max()) >= output.shape[2] else int(y.min())
            raise UnfitError(
                f"a target is {wrong}, and the tokens are 0 to {output.shape[2] - 1} (-100 does not count)"
            )
        counted = y != IGNORED[0]
        if not bool(counted.any()):
            raise UnfitError(f"no target counts: all of the first samples are {IGNORED[0]}")
        return cls(bool((y == x)[counted].all()), tokens, padded)

    def pair(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """See ``TaskKind``: scores ``(N, L', V)`` and tokens ``(N, L')``."""
        x = batch.inputs[self.tokens]
        y = (x if batch.targets is None else next(tensors_in(batch.targets))).to(output.device).long()
        if batch.targets is None and self.padded is not None:
            y = y.masked_fill(batch.inputs[self.padded].to(output.device) == 0, IGNORED[0])
        return (output[:, :-1], y[:, 1:]) if self.shifted else (output, y)

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy over the tokens that count."""
        return F.cross_entropy(prediction.flatten(0, 1), target.flatten(), ignore_index=IGNORED[0])

    def metric(self) -> Metric:
        """Return the perplexity."""
        return Metric("perplexity", False, _perplexity)

    @property
    def needs_no_targets(self) -> bool:
        """See ``TaskKind``."""
        return self.shifted

    def told(self) -> str:
        """See ``TaskKind``."""
        return "the next token for each place" if self.shifted else self.about


@dataclass(frozen=True)
class Own(TaskKind):
    """Targets that only the user's own loss and metric read."""

    name: ClassVar[str] = OWN
    about: ClassVar[str] = "targets of a loss or metric of one's own"
    trains: ClassVar[bool] = False

    @classmethod
    def fit(cls, output: Tensor, batch: Batch) -> Self:
        """See ``TaskKind``."""
        return cls()

    def pair(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return output and targets as they are."""
        return output, batch.targets

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Raise: there is no loss for any targets.

        Raises:
            InputError: always.
        """
        raise InputError("the targets have no built-in loss: give --loss file.py:callable, or --task")

    def metric(self) -> Metric:
        """Raise: there is no metric for any targets.

        Raises:
            InputError: always.
        """
        raise InputError("the targets have no built-in metric: give --metric file.py:callable, or --task")


KINDS: dict[str, type[TaskKind]] = {
    kind.name: kind for kind in (Classification, Multilabel, Segmentation, Restoration, Regression, Language)
}


def _one_tensor(targets: Any, kind: str) -> Tensor:
    found = list(tensors_in(targets))
    if len(found) != 1:
        raise UnfitError(f"{kind} takes one target, and the data have {len(found)} ({described(targets)})")
    return found[0]


def one_hot(y: Tensor) -> bool:
    """Return whether rows are one-hot, or probabilities."""
    if y.shape[1] < 2:
        return False
    values = y.double()
    return bool((values >= 0).all()) and torch.allclose(
        values.sum(1), torch.ones(len(y), dtype=torch.float64), atol=1e-4
    )


def _like(y: Tensor, output: Tensor) -> Tensor | None:
    """Return targets in the output's shape if they differ by axes of length 1 only, else None."""
    if [size for size in y.shape[1:] if size != 1] != [size for size in output.shape[1:] if size != 1]:
        return None
    return y.reshape(output.shape) if len(y) == len(output) else None


def shape_of(x: Tensor) -> str:
    """Return dtype and shape as text."""
    return f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"


def size_of(x: Tensor) -> str:
    """Return a shape as text: ``8x10``."""
    return "x".join(map(str, x.shape)) if x.dim() else "a single number"


def described(targets: Any) -> str:
    """Return what targets are, as text: keys or type."""
    if isinstance(targets, dict):
        return ", ".join(map(str, targets))
    return f"a {type(targets).__name__}"


def _sigmoid(x: Tensor, probabilities: bool) -> Tensor:
    return x if probabilities else x.sigmoid()


class _Binary:
    """A metric of torchmetrics for binary scores, which always gets probabilities: it guesses by batch otherwise."""

    def __init__(self, metric: Any, probabilities: bool) -> None:
        self._meter, self._probabilities = TorchMeter(metric), probabilities

    def update(self, outputs: Any, targets: Any) -> None:
        self._meter.update(_sigmoid(outputs, self._probabilities), targets.long())

    def compute(self) -> float:
        return self._meter.compute()


class _ClassNumbers:
    """A metric of class numbers that also takes one-hot rows and probabilities as targets."""

    def __init__(self, metric: Any) -> None:
        self._meter = TorchMeter(metric)

    def update(self, outputs: Any, targets: Any) -> None:
        self._meter.update(outputs, targets.argmax(1) if targets.dim() == outputs.dim() else targets)

    def compute(self) -> float:
        return self._meter.compute()


def _accuracy(scores: int, probabilities: bool) -> Meter:
    from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy  # takes seconds to import

    if scores == 1:
        return _Binary(BinaryAccuracy(validate_args=False), probabilities)
    return _ClassNumbers(MulticlassAccuracy(scores, average="micro", validate_args=False))


def _f1(labels: int, probabilities: bool) -> Meter:
    from torchmetrics.classification import MultilabelF1Score

    return _Binary(MultilabelF1Score(labels, average="micro", validate_args=False), probabilities)


def _iou(scores: int, ignore: int, probabilities: bool) -> Meter:
    from torchmetrics.classification import BinaryJaccardIndex, MulticlassJaccardIndex

    if scores == 1:
        return _Binary(BinaryJaccardIndex(ignore_index=ignore, validate_args=False), probabilities)
    return TorchMeter(MulticlassJaccardIndex(scores, ignore_index=ignore, validate_args=False))


def _mae() -> Meter:
    from torchmetrics.regression import MeanAbsoluteError

    return TorchMeter(MeanAbsoluteError())


def _psnr(peak: float) -> Meter:
    from torchmetrics.image import PeakSignalNoiseRatio

    return TorchMeter(PeakSignalNoiseRatio(data_range=peak))


def _perplexity() -> Meter:
    from torchmetrics.text import Perplexity

    return TorchMeter(Perplexity(ignore_index=IGNORED[0]))

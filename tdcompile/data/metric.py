"""``Metric``: a figure of quality with its direction and unit; of torchmetrics, or a user's own function."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from tdcompile.data.nesting import first_not_finite, map_tensors, rows, tensors_in
from tdcompile.errors import InputError, nearest
from tdcompile.support.spec import Spec, parse_spec
from tdcompile.support.user_code import load_callable

# torchmetrics keeps most metrics in these modules; the first two hold those that need no other package.
_HOMES = ("torchmetrics", "torchmetrics.classification", "torchmetrics.regression", "torchmetrics.image",
          "torchmetrics.audio", "torchmetrics.text", "torchmetrics.segmentation", "torchmetrics.retrieval")  # fmt: skip
_DECLARED = ("higher", "unit", "name")  # what a text form declares beside the options of the metric itself
_PERCENT = "%"


class Meter(Protocol):
    """Accumulates a metric over batches."""

    def update(self, outputs: Any, targets: Any) -> None:
        """Add a batch: the scored output (or a tuple of all outputs) and the targets."""

    def compute(self) -> float:
        """Return the metric over all batches; NaN if it is undefined."""


@dataclass(frozen=True)
class Metric:
    """A figure of quality.

    Attributes:
        name: its name in reports, such as ``accuracy``.
        higher_is_better: its direction.
        make: returns a meter that has seen nothing.
        unit: unit in reports. A metric in ``%`` is computed as a share and shown as percent; it differs by points.
        raw: the meter takes the outputs and the targets as they are, not the pair that a built-in task makes of them.
    """

    name: str
    higher_is_better: bool
    make: Callable[[], Meter]
    unit: str = ""
    raw: bool = False

    @property
    def about(self) -> About:
        """Name, direction and unit."""
        return About(self.name, self.higher_is_better, self.unit)


@dataclass(frozen=True)
class About:
    """How the values of a metric are read and shown.

    Attributes:
        name: its name in reports.
        higher_is_better: its direction.
        unit: its unit; values in ``%`` are shares and shown as percent.
    """

    name: str
    higher_is_better: bool
    unit: str = ""

    @property
    def scale(self) -> float:
        """What a value is multiplied by when it is shown."""
        return 100.0 if self.unit == _PERCENT else 1.0

    @property
    def points(self) -> str:
        """The unit of a difference: ``points`` for percent."""
        return "points" if self.unit == _PERCENT else self.unit

    def drop(self, dense: float, compiled: float) -> float:
        """Return how much worse a value is than the dense network's, in the shown unit; negative if it is better."""
        return (dense - compiled) * self.scale * (1 if self.higher_is_better else -1)

    def text(self, value: float | None) -> str:
        """Return a value as text: ``88.34 %``, ``31.2 dB``; an empty text for None."""
        if value is None:
            return ""
        shown = value * self.scale
        number = f"{shown:.2f}" if self.unit == _PERCENT or abs(shown) >= 10 else f"{shown:.4g}"
        return f"{number} {self.unit}".rstrip()

    def change(self, dense: float, compiled: float) -> str:
        """Return the change from dense to compiled, with its sign: ``-0.33 points``."""
        shown = (compiled - dense) * self.scale
        number = f"{shown:+.2f}" if self.unit == _PERCENT or abs(shown) >= 10 else f"{shown:+.4g}"
        return f"{number} {self.points}".rstrip()

    def dropping(self, drop: float) -> str:
        """Return a loss of quality as a phrase: ``accuracy drops by 0.33 points``, ``MAE rises by 0.2``."""
        word = "drops" if self.higher_is_better else "rises"
        number = f"{drop:.2f}" if self.unit == _PERCENT or abs(drop) >= 10 else f"{drop:.4g}"
        return f"{self.name} {word} by {number} {self.points}".rstrip()


def metric_of(given: object, what: str = "--metric") -> Metric:
    """Return the metric that a user gave.

    Args:
        given: a ``Metric``; the name of a class of torchmetrics with its options, ``F1Score{task=multiclass,...}``; a
            text ``file.py:callable{higher=true,unit=%}``; a metric of torchmetrics, or its class; or a function of
            (outputs, targets). A function returns the mean over the batch or a value for each sample, and declares its
            direction by ``higher_is_better``, as an attribute of the function or in the braces of the text.
        what: the option, for messages.

    Raises:
        InputError: there is no such metric, its options do not fit, or it does not say whether higher is better.
    """
    if isinstance(given, Metric):
        return given
    if isinstance(given, str):
        return _of_text(given, what)
    return _of_object(given, {}, _name_of(given), what)


def _of_text(text: str, what: str) -> Metric:
    place, brace, options = text.partition("{")
    if ":" in place:
        parsed = parse_spec(f"own{brace}{options}")
        found: object = load_callable(place.strip())
        other = [key for key in parsed.options if key not in _DECLARED]
        if other and not inspect.isclass(found):
            raise InputError(f"{what} '{text}': '{other[0]}' is no option of a function; {', '.join(_DECLARED)} are")
    else:
        parsed = parse_spec(text)
        found = _of_torchmetrics(parsed, what)
    if inspect.isclass(found):
        found = _instance(found, {k: _value(v) for k, v in parsed.options.items() if k not in _DECLARED}, text, what)
    declared = {key: parsed.options[key] for key in _DECLARED if key in parsed.options}
    return _of_object(found, declared, _name_of(found), what)


def _of_torchmetrics(spec: Spec, what: str) -> object:
    modules = [import_module(home) for home in _HOMES]
    for module in modules:
        if inspect.isclass(getattr(module, spec.name, None)):
            return getattr(module, spec.name)
    known = sorted({name for module in modules for name in getattr(module, "__all__", ()) if name[0].isupper()})
    raise InputError(
        f"{what}: torchmetrics has no '{spec.name}': {nearest(spec.name, known)}; your own is file.py:callable"
    )


def _instance(kind: type, options: dict[str, Any], text: str, what: str) -> object:
    try:
        return kind(**options)
    except (TypeError, ValueError, ModuleNotFoundError) as error:
        raise InputError(f"{what} '{text}' cannot be made: {error}") from error


def _value(text: str) -> Any:
    """Return an option's text as a number, truth value, None or text."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _of_object(given: object, declared: dict[str, str], name: str, what: str) -> Metric:
    import torchmetrics

    if inspect.isclass(given) and issubclass(given, torchmetrics.Metric):
        given = _instance(given, {}, name, what)
    if not callable(given):
        raise InputError(f"{what} is a {type(given).__name__}; a function, or a metric of torchmetrics, is needed")
    direction = declared.get("higher", getattr(given, "higher_is_better", None))
    if isinstance(direction, str):
        if direction.lower() not in ("true", "false"):
            raise InputError(f"{what}: higher={direction} must be true or false")
        direction = direction.lower() == "true"
    if not isinstance(direction, bool):
        raise InputError(
            f"{what}: '{name}' does not say whether higher is better: write {name}{{higher=true}} or {{higher=false}}, "
            "or set its attribute higher_is_better"
        )
    unit = str(declared.get("unit", getattr(given, "unit", "")))
    name = declared.get("name", getattr(given, "name", None) or name)
    if isinstance(given, torchmetrics.Metric):
        original = given
        return Metric(name, direction, lambda: TorchMeter(copy.deepcopy(original)), unit)
    function = given
    return Metric(name, direction, lambda: FunctionMeter(function, name), unit, raw=True)


def _name_of(given: object) -> str:
    return str(getattr(given, "__name__", type(given).__name__))


class TorchMeter:
    """A metric of torchmetrics.

    Args:
        metric: the metric; it is reset.
    """

    def __init__(self, metric: Any) -> None:
        self._metric = metric
        # One process measures alone, while the others wait for its figure: the metric must not wait for theirs.
        self._metric.distributed_available_fn = _never
        self._metric.reset()

    def update(self, outputs: Any, targets: Any) -> None:
        """See ``Meter``.

        Raises:
            InputError: the metric refuses outputs or targets.
        """
        device = next((x.device for x in tensors_in(outputs)), torch.device("cpu"))
        try:
            self._metric.to(device)
            self._metric.update(outputs, map_tensors(lambda y: y.to(device), targets))
        except Exception as error:  # the user's code, or torchmetrics on what it was given
            raise self._failure(error) from error

    def compute(self) -> float:
        """See ``Meter``.

        Raises:
            InputError: the metric fails, or is not one number.
        """
        try:
            value = self._metric.compute()
        except Exception as error:  # the user's code, or torchmetrics on what it was given
            raise self._failure(error) from error
        if isinstance(value, int | float):
            return float(value)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"the metric {type(self._metric).__name__} gives {shape}; one number is needed")
        # Without the digits that fp32 does not have, 77 right of 100 are 0.77, and a drop of one point is one point.
        return float(value) if value.dtype is torch.float64 else float(f"{float(value):.7g}")

    def _failure(self, error: Exception) -> InputError:
        return InputError(f"the metric {type(self._metric).__name__} failed: {type(error).__name__}: {error}")


def _never() -> bool:
    return False


class FunctionMeter:
    """The mean over the samples of a function's values.

    Args:
        function: maps (outputs, targets) to the mean over the batch, or to a value for each sample.
        name: the metric's name, for messages.
    """

    def __init__(self, function: Callable[[Any, Any], Any], name: str) -> None:
        self._function, self._name = function, name
        self._total, self._samples = 0.0, 0

    def update(self, outputs: Any, targets: Any) -> None:
        """See ``Meter``.

        Raises:
            InputError: the function fails, or gives NaN, or neither one number nor one for each sample.
        """
        count = next(len(output) for output in tensors_in(outputs) if output.ndim)
        mean = self._mean(outputs, targets, count)
        if math.isnan(mean):
            raise InputError(
                f"the metric '{self._name}' is NaN on sample {self._samples + self._first_nan(outputs, targets, count)}"
            )
        self._total, self._samples = self._total + mean * count, self._samples + count

    def compute(self) -> float:
        """See ``Meter``."""
        return self._total / self._samples if self._samples else math.nan

    def _mean(self, outputs: Any, targets: Any, count: int) -> float:
        try:
            value = torch.as_tensor(self._function(outputs, targets)).detach().double()
        except Exception as error:  # the user's code
            raise InputError(f"the metric '{self._name}' failed: {type(error).__name__}: {error}") from error
        if value.numel() not in (1, count):
            raise InputError(
                f"the metric '{self._name}' gives {tuple(value.shape)} for {count} samples: one number, or one for "
                "each sample, is needed"
            )
        return float(value.mean())

    def _first_nan(self, outputs: Any, targets: Any, count: int) -> int:
        for place in range(count):
            if math.isnan(self._mean(rows(outputs, [place]), rows(targets, [place]), 1)):
                return place
        return 0


def loss_of(given: object, what: str = "--loss") -> Callable[[Any, Any], Tensor]:
    """Return the loss that a user gave: a function (outputs, targets) -> scalar, or its text ``file.py:callable``.

    A class without required arguments, such as a loss module of torch, is instantiated.

    Raises:
        InputError: it cannot be loaded, or is not callable.
    """
    found = load_callable(given) if isinstance(given, str) else given
    if inspect.isclass(found):
        found = _instance(found, {}, _name_of(found), what)
    if not callable(found):
        raise InputError(f"{what} is a {type(found).__name__}; a function (outputs, targets) -> scalar is needed")
    return found


def checked_loss(loss: Callable[[Any, Any], Any], outputs: Any, targets: Any, what: str = "--loss") -> Tensor:
    """Return a loss of one's own on a batch.

    Raises:
        InputError: it fails, or is not one number with a gradient.
    """
    try:
        value = loss(outputs, targets)
    except Exception as error:  # the user's code
        raise InputError(f"{what} failed: {type(error).__name__}: {error}") from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"{what} gives {found}; a tensor of one number is needed")
    finite = all(first_not_finite(y) is None for y in tensors_in(outputs))
    if finite and not bool(torch.isfinite(value).all()):
        raise InputError(f"{what} gives {value.item()} on finite outputs")
    return value.reshape(())

"""Check an ONNX model in onnxruntime against the PyTorch network it came from, or against another model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tdcompile.backend.rounding import own_deviation
from tdcompile.backend.session import infer, open_session
from tdcompile.errors import InputError, ParityError, first_line
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode
from tdcompile.ir.dynamic_shapes import Axis, BatchAxes, batch_size, resized
from tdcompile.ir.modules import outputs_of
from tdcompile.ir.target import Target

Outputs = list[NDArray[np.generic]]

# (relative, absolute). fp32: both sides round to 2⁻²⁴ and sum in a different order, which a deep network amplifies to
# about 1e-5 of its output's scale; a wrong operator is off by far more than 1e-3. fp16: one rounding is 2⁻¹¹ ≈ 5e-4 of
# the value, and each layer adds one.
TOLERANCE = {"fp32": (1e-3, 1e-4), "fp16": (2e-2, 2e-3)}

# A network amplifies rounding if its own fp32 and fp64 differ by this share of what it differs from the model.
_COMPARABLE = 0.1

AXIS_GROWTH = (0, 1, 3)  # sizes added to the dynamic axes of the example

_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}


@dataclass(frozen=True)
class Parity:
    """Agreement of two models.

    Attributes:
        max_abs: the largest difference of any output value.
        max_rel: the largest difference of an output, divided by the reference's largest value of that output.
        cases: ``(batch, seed, max_abs)`` for each run; the seed is None for the example inputs themselves.
        notes: differences where a mask leaves nothing of a row, which is not held against the model.
    """

    provider: str
    max_abs: float
    max_rel: float
    cases: tuple[tuple[int, int | None, float], ...]
    notes: tuple[Diagnostic, ...] = ()


def check_parity(
    model: Path,
    reference: nn.Module,
    inputs: Sequence[Tensor],
    target: Target,
    *,
    axes: Sequence[Axis] = (),
    batch_axes: BatchAxes | None = None,
    batches: Sequence[int] = (1, 2, 5),
    seeds: int = 3,
    rtol: float | None = None,
    atol: float | None = None,
    seed: int = 0,
    values: Sequence[Tensor | None] = (),
) -> Parity:
    """Compare a model with the PyTorch network it came from, on the example inputs and on random ones like them.

    Rows of masks that mask everything, or nothing, are tried too; a difference there becomes a note. A model with a
    fixed batch is run at that batch only. The first batch size is run with every seed, the others with one. Dynamic
    axes are run at their length in the example and longer by the numbers of steps in ``AXIS_GROWTH``, all together;
    axes that may grow alone do so, too.

    Args:
        model: the ONNX file.
        reference: the network, run in eval mode on its own device.
        inputs: example inputs, in the order of ``forward``.
        axes: dynamic axes other than the batch axis.
        batch_axes: dynamic batch axis of each input, or None; by default the first where the model leaves it open.
        target: provider to run on; TF32 is off.
        batches: batch sizes to try.
        seeds: number of random draws.
        rtol: a difference up to ``atol + rtol * max|reference|`` is allowed; default ``TOLERANCE``.
        atol: see ``rtol``.
        seed: seed of the first draw.
        values: for each input, the values to draw from if it is an integer; default those of the example.

    Raises:
        ParityError: outputs differ in number, shape or value, or are not finite.
        InputError: the inputs do not fit the model.
    """
    session = open_session(model, target, tf32=False)
    device = next((t.device for t in (*reference.parameters(), *reference.buffers())), torch.device("cpu"))

    def refer(drawn: Sequence[Tensor]) -> Outputs:
        return [output.cpu().numpy() for output in outputs_of(reference, [x.to(device) for x in drawn])]

    judge = _Comparison(f"{model.name} and the PyTorch network", session, target, rtol, atol)
    samples = tuple(_open_first_axes(session) if batch_axes is None else batch_axes)
    judge = replace(judge, values=tuple(values), samples=samples)
    if batch_size(inputs, samples) is None:  # the runs are then named by the length of the first input
        batches = [next((len(x) for x in inputs if x.dim()), 1)]
    plan = [*_plan_runs(batches, seeds, seed), *_longer_runs(batches[-1], seed, axes)]
    try:
        found = judge.run(refer, inputs, plan)
        batch, most, relative = judge.as_given(refer, inputs)
        return replace(
            found,
            max_abs=max(found.max_abs, most),
            max_rel=max(found.max_rel, relative),
            cases=(*found.cases, (batch, None, most)),
            notes=tuple(judge.masked(refer, inputs, seed)),
        )
    except ParityError as error:
        as_written = replace(judge, session=open_session(model, target, tf32=False, optimised=False))
        try:
            as_written.run(refer, inputs, plan)
            as_written.as_given(refer, inputs)
        except ParityError:
            raise _explained(error, reference, device) from None
        raise ParityError(
            f"{error}; without onnxruntime's own optimisations of the graph they agree: the model is right, and "
            "onnxruntime computes it wrongly on this machine"
        ) from error


class _DeviationError(ParityError):
    """An output that deviates: which one, by how much, and on which inputs.

    Attributes:
        inputs: the inputs of the run, in order.
    """

    def __init__(self, text: str, output: int, most: float) -> None:
        super().__init__(text)
        self.output, self.most = output, most
        self.inputs: Sequence[Tensor] = ()


def _explained(error: ParityError, reference: nn.Module, device: torch.device) -> ParityError:
    """Return the error; if the network's own fp32 and fp64 outputs differ as much, the message says so."""
    if not isinstance(error, _DeviationError) or not error.inputs:
        return error
    own = own_deviation(reference, [x.to(device) for x in error.inputs], error.output)
    if own is None or own < _COMPARABLE * error.most:
        return error
    return ParityError(
        f"{error}; the network itself amplifies rounding: the outputs of its PyTorch graph in fp32 and in fp64 differ "
        f"by {own:.3g} there, so two correct programs do not agree either, and its answers mean nothing; "
        "`tdcompile validate --localise` names the layer where they part"
    )


def compare_models(
    a: Path,
    b: Path,
    target: Target,
    *,
    inputs: Sequence[Tensor] | None = None,
    batches: Sequence[int] = (1, 2, 5),
    seeds: int = 3,
    rtol: float | None = None,
    atol: float | None = None,
    seed: int = 0,
) -> Parity:
    """Compare an ONNX model with a reference ONNX model on equal random inputs.

    Args:
        a: the model to check.
        b: the reference.
        target: provider to run both on; TF32 is off.
        inputs: example inputs; by default made from the model's input types and shapes.
        batches: as in ``check_parity``.
        seeds: as in ``check_parity``.
        rtol: as in ``check_parity``.
        atol: as in ``check_parity``.
        seed: as in ``check_parity``.

    Raises:
        ParityError: outputs differ in shape or value, or are not finite.
        InputError: the models differ in inputs or number of outputs, or no inputs are given and an axis other than the
            batch is dynamic.
    """
    session, other = (open_session(path, target, tf32=False) for path in (a, b))
    if _signature(session) != _signature(other):
        raise InputError(
            f"{a.name} and {b.name} are not interchangeable: {_describe(session)} against {_describe(other)}"
        )
    samples = tuple(_open_first_axes(session))
    judge = _Comparison(f"{a.name} and {b.name}", session, target, rtol, atol, samples=samples)
    examples = inputs or [_example(value) for value in session.get_inputs()]
    plan = _plan_runs(_fixed_batch(session, batches), seeds, seed)
    return judge.run(lambda drawn: infer(other, drawn), examples, plan)


@dataclass(frozen=True)
class _Run:
    """One comparison: the batch, the seed of the inputs, and the axes that are longer, by a number of their steps."""

    batch: int
    seed: int
    axes: Sequence[Axis] = ()
    more: int = 0

    def __str__(self) -> str:
        names = ", ".join(dict.fromkeys(axis.name for axis in self.axes))
        longer = f", open axes ({names}) longer by {self.more} steps" if self.axes else ""
        return f"at batch {self.batch}, seed {self.seed}{longer}"


def _open_first_axes(session: ort.InferenceSession) -> list[int | None]:
    shapes = [value.shape for value in session.get_inputs()]
    return [0 if shape and not isinstance(shape[0], int) else None for shape in shapes]


def _fixed_batch(session: ort.InferenceSession, batches: Sequence[int]) -> Sequence[int]:
    """Return the batch size of the model alone if it is fixed, otherwise the given ones."""
    sizes = [value.shape[0] for value in session.get_inputs() if value.shape]
    return sizes[:1] if sizes and all(isinstance(size, int) for size in sizes) else batches


def _plan_runs(batches: Sequence[int], seeds: int, seed: int) -> list[_Run]:
    return [_Run(batches[0], seed + draw) for draw in range(seeds)] + [_Run(batch, seed) for batch in batches[1:]]


def _longer_runs(batch: int, seed: int, axes: Sequence[Axis]) -> list[_Run]:
    """Return runs with all dynamic axes longer, and with each that may grow alone, if there are several names."""
    together = [_Run(batch, seed, axes, more) for more in AXIS_GROWTH if more and axes]
    names = dict.fromkeys(axis.name for axis in axes)
    alone = [[axis for axis in axes if axis.name == name and axis.alone] for name in (names if len(names) > 1 else ())]
    return together + [_Run(batch, seed, own, max(AXIS_GROWTH)) for own in alone if own]


@dataclass(frozen=True)
class _Comparison:
    """Compares a session with a reference, within a tolerance."""

    what: str
    session: ort.InferenceSession
    target: Target
    rtol: float | None
    atol: float | None
    values: tuple[Tensor | None, ...] = ()
    samples: tuple[int | None, ...] = ()

    def as_given(
        self, refer: Callable[[Sequence[Tensor]], Outputs], inputs: Sequence[Tensor]
    ) -> tuple[int, float, float]:
        """Compare on the example inputs; return their batch and the largest difference, absolute and relative."""
        where = "on the example inputs"
        most, relative = self._compare(inputs, refer, where)
        return next((len(x) for x in inputs if x.dim()), 1), most, relative

    def masked(
        self, refer: Callable[[Sequence[Tensor]], Outputs], inputs: Sequence[Tensor], seed: int
    ) -> Iterator[Diagnostic]:
        """Yield what differs where the first sample of a mask, one after another, has one value everywhere."""
        wanted = self.session.get_inputs()
        drawn = self._drawn(inputs, 2, torch.Generator().manual_seed(seed))
        for place, value in enumerate(wanted):
            for fill in _mask_fills(inputs[place]):
                special = [x.clone() for x in drawn]
                special[place][0] = fill
                said = self._difference(special, refer)
                if said:
                    text = f"where a whole row of the mask '{value.name}' is {fill}, {said}"
                    yield Diagnostic("warning", DiagnosticCode.MASKED_ROW, text)

    def _difference(self, drawn: Sequence[Tensor], refer: Callable[[Sequence[Tensor]], Outputs]) -> str:
        """Return how the model and the network differ on these inputs; empty if they agree, NaN included."""
        try:
            expected = refer(drawn)
        except Exception as error:  # noqa: BLE001  # a network may refuse such a mask by any error
            return f"the network does not run ({first_line(error)}); what the model gives there is not checked"
        try:
            got = infer(self.session, drawn)
        except InputError as error:
            return f"the model does not run, and the network does: {first_line(error)}"
        for value, left, right in zip(self.session.get_outputs(), got, expected, strict=True):
            a, b = left.astype(np.float64), right.astype(np.float64)
            if a.shape != b.shape:
                return f"the model gives '{value.name}' in the shape {a.shape}, and the network in {b.shape}"
            if (np.isfinite(a) != np.isfinite(b)).any():
                which = "model" if np.isfinite(b).all() else "network"
                return f"'{value.name}' of the {which} is not finite, unlike that of the other"
            a, b = a[np.isfinite(a)], b[np.isfinite(b)]
            most, scale = float(np.abs(a - b).max(initial=0.0)), float(np.abs(b).max(initial=0.0))
            if most > self._allowed(scale):
                return f"'{value.name}' of the model and of the network differ by {most:.3g} on a scale of {scale:.3g}"
        return ""

    def _drawn(self, inputs: Sequence[Tensor], batch: int, generator: torch.Generator) -> list[Tensor]:
        """Draw inputs, of this batch along the batch axes."""
        pools = self.values or (None,) * len(inputs)
        return [
            _draw(x, None if along is None else batch, generator, pool, along or 0)
            for x, pool, along in zip(inputs, pools, self.samples, strict=True)
        ]

    def _allowed(self, scale: float) -> float:
        rtol, atol = TOLERANCE[self.target.precision]
        return (atol if self.atol is None else self.atol) + (rtol if self.rtol is None else self.rtol) * scale

    def run(
        self,
        refer: Callable[[Sequence[Tensor]], Outputs],
        inputs: Sequence[Tensor],
        plan: Sequence[_Run],
    ) -> Parity:
        wanted = self.session.get_inputs()
        if len(wanted) != len(inputs):
            raise InputError(f"the model takes {len(wanted)} inputs, and {len(inputs)} example inputs are given")
        cases, worst = [], 0.0
        for case in plan:
            generator = torch.Generator().manual_seed(case.seed)
            drawn = self._drawn(resized(inputs, case.axes, case.more), case.batch, generator)
            most, relative = self._compare(drawn, refer, str(case))
            cases.append((case.batch, case.seed, most))
            worst = max(worst, relative)
        return Parity(self.session.get_providers()[0], max(case[2] for case in cases), worst, tuple(cases))

    def _compare(
        self, drawn: Sequence[Tensor], refer: Callable[[Sequence[Tensor]], Outputs], where: str
    ) -> tuple[float, float]:
        got, expected = infer(self.session, drawn), refer(drawn)
        if len(got) != len(expected):
            raise ParityError(f"{self.what} give {len(got)} and {len(expected)} outputs")
        try:
            found = [self._differ(place, *pair, where) for place, pair in enumerate(zip(got, expected, strict=True))]
        except _DeviationError as error:
            error.inputs = drawn
            raise
        return max((most for most, _ in found), default=0.0), max((rel for _, rel in found), default=0.0)

    def _differ(
        self, output: int, got: NDArray[np.generic], expected: NDArray[np.generic], where: str
    ) -> tuple[float, float]:
        """Return the largest difference of one output, absolute and relative to the reference's largest value."""
        name = self.session.get_outputs()[output].name
        if got.shape != expected.shape:
            raise ParityError(f"{self.what} give '{name}' in the shapes {got.shape} and {expected.shape} {where}")
        left, right = got.astype(np.float64), expected.astype(np.float64)
        infinite = np.isinf(right) & (left == right)  # masked scores, in equal places
        for side, values in (("the reference", right), ("the model", left)):
            if not (np.isfinite(values) | infinite).all() or (values.size and infinite.all()):
                raise ParityError(
                    f"{self.what}: '{name}' of {side} is not finite {where}; look for NaN or Inf in weights and data"
                )
        if not left.size:
            return 0.0, 0.0
        left[infinite] = right[infinite] = 0.0
        difference = np.abs(left - right)
        most, scale = float(difference.max()), float(np.abs(right).max())
        allowed = self._allowed(scale)
        if most > allowed:
            place = tuple(int(i) for i in np.unravel_index(int(difference.argmax()), difference.shape))
            raise _DeviationError(
                f"{self.what} differ {where}: '{name}' by {most:.3g} at {place}, where {allowed:.3g} is allowed "
                f"on a scale of {scale:.3g}",
                output,
                most,
            )
        return most, most / scale if scale else 0.0


def _mask_fills(example: Tensor) -> tuple[bool | float, ...]:
    """Return the values that a mask may have everywhere: False and True, or minus infinity; nothing for others."""
    if example.dim() < 2 or not example.numel():
        return ()
    if example.dtype == torch.bool:
        return (False, True)
    return (-math.inf,) if example.is_floating_point() and bool(example.isneginf().any()) else ()


def _draw(
    example: Tensor, batch: int | None, generator: torch.Generator, pool: Tensor | None = None, along: int = 0
) -> Tensor:
    """Draw values like the example's: normal with its mean and deviation, or picked from its values if not floating.

    Integers are picked from ``pool`` if it is given. For a mask, which is boolean or holds infinity, whole rows are
    picked: a row that masks everything has no result.
    """
    shape = tuple(batch if batch and axis == along else size for axis, size in enumerate(example.shape))
    values = example.detach().cpu().flatten()
    if (
        example.dim() > 1
        and shape[-1] == example.shape[-1]
        and len(values)
        and (example.dtype == torch.bool or bool(values.isinf().any()))
    ):
        rows = values.reshape(-1, shape[-1])
        return rows[torch.randint(len(rows), shape[:-1], generator=generator)]
    if not example.is_floating_point():
        values = values if pool is None else pool.to(example.dtype).cpu().flatten()
        return values[torch.randint(len(values), shape, generator=generator)]
    values = values.double()
    deviation = float(values.std()) if len(values) > 1 else 0.0
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (drawn * (deviation or 1.0) + float(values.mean())).to(example.dtype)


def _example(value: ort.NodeArg) -> Tensor:
    """Return an example tensor for an input's type and shape."""
    if value.type not in _TYPES:
        raise InputError(f"input '{value.name}' is {value.type}: {', '.join(_TYPES)} can be drawn at random")
    shape = [size if isinstance(size, int) else 2 for size in value.shape]
    if not all(isinstance(size, int) for size in value.shape[1:]):
        raise InputError(f"input '{value.name}' {value.shape} is open beside its batch: give example inputs")
    kind = _TYPES[value.type]
    if kind.is_floating_point:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(kind)
    return torch.arange(int(np.prod(shape))).reshape(shape).remainder(2).to(kind)  # 0 and 1 are valid as index and mask


def _signature(session: ort.InferenceSession) -> tuple[list[tuple[str, list[int | None]]], int]:
    """Return types and shapes of the inputs, dynamic axes as None, and the number of outputs."""
    inputs = [
        (value.type, [size if isinstance(size, int) else None for size in value.shape])
        for value in session.get_inputs()
    ]
    return inputs, len(session.get_outputs())


def _describe(session: ort.InferenceSession) -> str:
    inputs = ", ".join(f"{value.name} {value.type} {value.shape}" for value in session.get_inputs())
    return f"inputs {inputs}, {len(session.get_outputs())} outputs"

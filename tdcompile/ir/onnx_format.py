"""``OnnxFormat``: the versions and the output names of an exported ONNX model; ``WEIGHTED``: its products."""

from __future__ import annotations

from dataclasses import dataclass

from tdcompile.errors import InputError
from tdcompile.ir.target import INT8_OPSET

# Operators that multiply by a weight and have an integer kernel; ConvTranspose has none.
WEIGHTED = ("Conv", "Gemm", "MatMul")


@dataclass(frozen=True)
class OnnxFormat:
    """What a consumer of the model needs; the defaults leave the choice to the exporter.

    Attributes:
        opset: version of ONNX's operator set.
        ir: version of ONNX's file format.
        output_names: names of the outputs in order; empty takes the default names.
    """

    opset: int | None = None
    ir: int | None = None
    output_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            InputError: a name is empty or given twice.
        """
        names = self.output_names
        if not all(name.strip() for name in names):
            raise InputError(f"an output name is empty: {', '.join(map(repr, names))}")
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"the output name '{twice[0]}' is given twice: each output needs its own")

    def __str__(self) -> str:
        known = (("opset", self.opset), ("IR version", self.ir))
        return " and ".join(f"{name} {version}" for name, version in known if version is not None)


def check_int8_opset(opset: int | None) -> None:
    """Require an opset whose models can be quantised; None leaves the choice to the exporter, which takes a later one.

    Raises:
        InputError: the opset is before ``INT8_OPSET``.
    """
    if opset is not None and opset < INT8_OPSET:
        raise InputError(f"int8 needs opset {INT8_OPSET} or later, not {opset}: leave --opset out or raise it")

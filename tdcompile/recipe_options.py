"""``RecipeOptions``: name, type, range, default and description of every option of a compilation, in one place.

``Recipe`` adds behaviour, ``CompileOptions`` the types for Python, and ``cli/options.py`` the flags. This file does not
import torch, so that the command prints its help at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_serializer, field_validator

from tdcompile.errors import InputError
from tdcompile.ir.target import AskedPrecision, Budget, Device, Goal
from tdcompile.support.allowed_drop import AllowedDrop
from tdcompile.support.options import Count, Workers
from tdcompile.support.spec import split

Frontend = Literal["auto", "fx", "export"]

METADATA = ("producer", "source", "plan", "model", "labels")  # keys of the models' metadata that tdcompile writes

_Bound = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # the range of torch.manual_seed


class RecipeOptions(BaseModel):
    """All options of a compilation. The names are those of the command's flags.

    A budget and a list may also be texts in the form of the flags: ``macs=0.5``, ``svd,channel``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str | None = Field(
        default=None, description="file.py:callable, package.module:callable, or a registered model"
    )
    weights: str | None = Field(
        default=None,
        description="safetensors file, checkpoint, index of shards or folder; FILE#key chooses; never run as code",
    )
    input: tuple[str, ...] = Field(
        default=(), description="Example input, e.g. 1x3x224x224, ids=1x64:int64 or batch.image=1x3x8x8"
    )
    example: str | None = Field(
        default=None, description="File of real example inputs: .pt of torch.save, or .npz; --input then must agree"
    )
    dynamic_batch: bool = Field(default=True, description="Leave the batch dimension open")
    batch_axis: tuple[str, ...] = Field(
        default=(), description="Axis of the samples in an input, e.g. state=1 or table=none"
    )
    dynamic: tuple[str, ...] = Field(default=(), description="Leave another axis open, e.g. ids:1, ids:1=time or x:2%8")
    opset: Annotated[int, Field(ge=7)] | None = Field(
        default=None, description="Opset of the ONNX models; default the exporter's"
    )
    ir: Annotated[int, Field(ge=4)] | None = Field(
        default=None, description="IR version of the ONNX models; default the exporter's"
    )
    output_names: tuple[str, ...] = Field(
        default=(),
        description="Names of the ONNX outputs in order; default the keys of a dict, or output, output_0, ...",
    )
    metadata: Mapping[str, str] = Field(default={}, description="Entry of the ONNX metadata, e.g. version=3")
    labels: str | tuple[str, ...] | None = Field(
        default=None, description="File of class names, one a line, for the ONNX metadata"
    )
    frontend: Frontend = Field(default="auto", description="How the network is traced: auto, fx or export")
    data: str | None = Field(
        default=None,
        description="digits, parquet:DIR, imagefolder:DIR, npz:FILE, text:FILE, hub:NAME, synthetic, file.py:callable",
    )
    normalize: str = Field(default="none", description="none, imagenet, or m,m,m/s,s,s")
    calibrate: Count = Field(default=1024, description="Training samples that calibrate and recalibrate read")
    eval: Count | None = Field(default=None, description="Test samples of the final accuracy; default all")
    target: Device = Field(default="cpu", description="cpu or cuda")
    threads: Workers = Field(default=1, description="Threads of onnxruntime")
    precision: AskedPrecision = Field(
        default="fp32", description="fp32, fp16, int8, or auto: int8 or fp32, whichever loses less within the budget"
    )
    grain: Count | None = Field(default=None, description="Ranks are multiples of this number")
    budget: Mapping[str, float] = Field(
        default={"latency": 0.5},
        description="Share of the dense network to keep, e.g. latency=0.5, macs=0.5, params=0.3; none beside a plan "
        "or a goal",
    )
    goal: Goal | None = Field(
        default=None,
        description="fastest or smallest: search for the least latency or size within --max-drop on training samples "
        "set aside; a budget then limits every plan",
    )
    decompose: tuple[str, ...] = Field(default=("auto",), description="Decompositions to consider; auto considers all")
    ranks: str = Field(default="knapsack", description="Rank selector")
    importance: str = Field(default="auto", description="Score of layers")
    plan: str | None = Field(default=None, description="File of a plan to apply, edited by hand or not")
    tune: str | None = Field(
        default=None,
        description="none, or options of the training passes, e.g. epochs=5,lr=0.02; default none, or the recipe's",
    )
    keep_dense: tuple[str, ...] = Field(default=(), description="Layers to leave dense, as a name or a glob")
    keep_fp32: tuple[str, ...] = Field(
        default=(), description="Layers that stay float in an int8 model, as a name or a glob"
    )
    max_drop: float | str | None = Field(
        default=None,
        description="Exit with 4 if the metric loses more than this, e.g. 1 (points, or the metric's unit) or 2%",
    )
    task: str | None = Field(
        default=None,
        description="classification, multilabel, segmentation, restoration, regression, language or agreement; default "
        "guessed from the targets",
    )
    loss: Any = Field(default=None, description="Your own loss for tuning, file.py:callable of (outputs, targets)")
    metric: Any = Field(
        default=None,
        description="Your own metric, file.py:callable{higher=true,unit=%}, or a name of torchmetrics with its options",
    )
    output: str | None = Field(
        default=None, description="Name or number of the output that is scored; default the first"
    )
    tokenizer: str | None = Field(default=None, description="Tokenizer of the data text:FILE, a tokenizer.json")
    targets: str | None = Field(default=None, description="Key of the targets in samples that are dicts")
    min_speedup: _Bound | None = Field(default=None, description="Exit with 4 if the speed-up is smaller")
    pipeline: str | None = Field(
        default=None,
        description="Passes to run instead of those that the options describe; budget, gates and keep-dense apply",
    )
    jobs: Workers = Field(default=1, description="Layers, or cells of a study, processed in parallel")
    seed: _Seed = Field(default=0, description="Seed of every random draw")

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false as a number or a text; pydantic would read them as 1 and 0."""
        name = str(info.field_name)
        if isinstance(value, bool) and cls.model_fields[name].annotation is not bool:
            raise InputError(f"the option '{name}' cannot be {value!r}: it is not true or false")
        return value

    @field_validator("max_drop")
    @classmethod
    def _check_max_drop(cls, value: float | str | None) -> float | str | None:
        allowed = None if value is None else AllowedDrop.parse(value)
        return allowed if allowed is None else str(allowed) if allowed.relative else allowed.value

    @field_serializer("loss", "metric")
    def _name_of_code(self, value: Any) -> str | None:
        """Return the text of a loss or metric; code given from Python is named, with its class or module."""
        if value is None or isinstance(value, str):
            return value
        kind = value if hasattr(value, "__qualname__") else type(value)
        return f"{kind.__module__}.{kind.__qualname__}"

    @field_validator("output", mode="before")
    @classmethod
    def _output_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("budget", mode="before")
    @classmethod
    def _read_budget(cls, value: Any) -> Any:
        if isinstance(value, str):
            return Budget.parse([value]).shares
        for name, share in value.items() if isinstance(value, Mapping) else ():
            if isinstance(share, bool):
                raise InputError(f"budget {name}={share!r} must be a share in (0, 1]")
        return value

    @field_validator("budget")
    @classmethod
    def _check_budget(cls, value: Mapping[str, float]) -> Mapping[str, float]:
        budget_of(value)
        return value

    @field_validator("metadata", mode="before")
    @classmethod
    def _read_metadata(cls, value: Any) -> Any:
        texts = (value,) if isinstance(value, str) else value
        if not isinstance(texts, list | tuple):
            return value
        pairs = [str(text).partition("=") for text in texts]
        if wrong := [text for text, (key, equals, _) in zip(texts, pairs, strict=True) if not (equals and key.strip())]:
            raise InputError(f"the metadata '{wrong[0]}' must have the form KEY=VALUE, e.g. version=3")
        keys = [key.strip() for key, _, _ in pairs]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise InputError(f"the metadata '{twice[0]}' is given twice")
        return dict(zip(keys, (text for _, _, text in pairs), strict=True))

    @field_validator("metadata")
    @classmethod
    def _check_metadata(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        if taken := [key for key in METADATA if key in value]:
            raise InputError(f"the metadata '{taken[0]}' is written by tdcompile: give another key")
        return value

    @field_validator(
        "input", "decompose", "batch_axis", "dynamic", "keep_dense", "keep_fp32", "output_names", mode="before"
    )
    @classmethod
    def _read_list(cls, value: Any) -> Any:
        return tuple(split(value)) if isinstance(value, str) else value

    @field_validator("decompose")
    @classmethod
    def _check_decompose(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise InputError("the option 'decompose' is empty: name decompositions, or 'auto' for all")
        if others := [name for name in value if name != "auto"] if "auto" in value else []:
            raise InputError(f"'auto' considers all decompositions: '{others[0]}' has no effect beside it")
        return value


def budget_of(shares: Mapping[str, float]) -> Budget:
    """Make a budget of shares by name.

    Raises:
        InputError: an unknown name, or a share outside (0, 1].
    """
    return Budget.parse([f"{name}={share}" for name, share in shares.items()])

"""``Options``: dataclasses whose fields declare the values they take, and one check of all of them.

A field declares its range in its type: ``batch: Annotated[int, Field(ge=1)]``, or ``batch: Count`` for short.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from tdcompile.errors import InputError, did_you_mean

Count = Annotated[int, Field(ge=1)]
# Threads or processes. More than any machine has cores is a typing error, which would bring the machine to a halt.
MOST_WORKERS = 1024
Workers = Annotated[int, Field(ge=1, le=MOST_WORKERS)]
Positive = Annotated[float, Field(title="a finite number", gt=0, allow_inf_nan=False)]
PositiveOrInf = Annotated[float, Field(gt=0)]  # a limit: inf sets none
NonNegative = Annotated[float, Field(title="a finite number", ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(title="a share", gt=0, le=1)]
Part = Annotated[float, Field(title="a share", ge=0, lt=1)]

# Both are built once for each class: a search makes thousands of decompositions.
_TYPES: dict[type, Mapping[str, Any]] = {}
_ADAPTERS: dict[tuple[type, str], TypeAdapter[Any]] = {}
_NOUNS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "none"}


@dataclasses.dataclass(frozen=True)
class Options:
    """A frozen dataclass whose fields are checked against their declared types when an instance is made.

    A value that pydantic can convert without loss is converted: 5 to 5.0, ``"5"`` to 5, a list to a tuple.
    """

    def __post_init__(self) -> None:
        """Check each field, then what the fields say together.

        Raises:
            InputError: a value does not fit; the message names the option, the value and the allowed range.
        """
        for name in types_of(type(self)):
            object.__setattr__(self, name, check_option(type(self), name, getattr(self, name)))
        self.check()

    def check(self) -> None:
        """Check what single ranges cannot state, such as options that exclude each other; by default nothing.

        Raises:
            InputError: the options do not fit together.
        """

    @classmethod
    def label(cls) -> str:
        """The name of these options in messages."""
        return cls.__name__.lower()


def types_of(owner: type[Options]) -> Mapping[str, Any]:
    """The declared type of each option, ranges included."""
    if owner not in _TYPES:
        hints = typing.get_type_hints(owner, include_extras=True)
        _TYPES[owner] = {field.name: hints[field.name] for field in dataclasses.fields(owner) if field.init}
    return _TYPES[owner]


def check_option(owner: type[Options], name: str, value: object) -> Any:
    """Return the value, converted to the option's type.

    Raises:
        InputError: it does not convert, or is out of range.
    """
    try:
        # Strictly, True is not a number; otherwise pydantic reads it as 1.
        return _adapter(owner, name).validate_python(value, strict=True if isinstance(value, bool) else None)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # raised by a validator that the field declares
            raise InputError(f"{owner.label()}: {name}={text_of(value)}: {first['ctx']['error']}") from error
        kind = types_of(owner)[name]
        question = did_you_mean(text_of(value), _words(kind))
        allowed = f"{describe(kind)}{f': {question}' if question else ''}"
        raise InputError(f"{owner.label()}: {name}={text_of(value)} must be {allowed}") from error


def _adapter(owner: type[Options], name: str) -> TypeAdapter[Any]:
    if (owner, name) not in _ADAPTERS:
        _ADAPTERS[owner, name] = TypeAdapter(types_of(owner)[name])
    return _ADAPTERS[owner, name]


def text_of(value: object) -> str:
    """An option's value as text; the text converts back to an equal value."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def describe(kind: Any) -> str:
    """The values that a type allows, in words: ``a whole number of at least 1``, ``a share in (0, 1]``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        return f"a list, each {describe(arguments[0])}"
    if origin is Annotated:
        noun, *marks = arguments
        fields = [mark for mark in marks if isinstance(mark, FieldInfo)]
        title = next((field.title for field in fields if field.title), describe(noun))
        return f"{title} {_range([bound for field in fields for bound in field.metadata])}".rstrip()
    return _NOUNS.get(kind, f"of type {getattr(kind, '__name__', kind)}")


def _words(kind: Any) -> list[str]:
    """The words that a type lists as its values."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return list(map(str, arguments))
    return [word for argument in arguments for word in _words(argument)]


def _range(bounds: list[Any]) -> str:
    lower = next((bound for bound in bounds if isinstance(bound, Ge | Gt)), None)
    upper = next((bound for bound in bounds if isinstance(bound, Le | Lt)), None)
    if lower is not None and upper is not None:
        opening = f"[{lower.ge}" if isinstance(lower, Ge) else f"({lower.gt}"
        closing = f"{upper.le}]" if isinstance(upper, Le) else f"{upper.lt})"
        return f"in {opening}, {closing}"
    if lower is not None:
        return f"of at least {lower.ge}" if isinstance(lower, Ge) else f"above {lower.gt}"
    if upper is not None:
        return f"of at most {upper.le}" if isinstance(upper, Le) else f"below {upper.lt}"
    return ""

"""``Plugin``: what every pass, decomposition, score, selector, cost model and network is."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from tdcompile.core.spec import Spec
from tdcompile.errors import InputError, nearest

_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclasses.dataclass(frozen=True)
class Plugin:
    """A named thing that the registry discovers.

    A subclass is a frozen dataclass: its fields are its options, and an instance holds nothing else. A class
    without a ``name`` of its own is abstract and is not registered. The first line of its docstring is what
    ``tdcompile list`` prints.
    """

    name: ClassVar[str] = ""
    defined: ClassVar[int] = 0  # classes so far: what has been listed is out of date once there are more

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Plugin.defined += 1

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """Make one from options still in text.

        Raises:
            InputError: an option is unknown or its value does not convert; the message names the known ones.
        """
        types_of = typing.get_type_hints(cls)
        known = {field.name: types_of[field.name] for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for key, text in options.items():
            option = key.replace("-", "_")
            if option not in known:
                raise InputError(f"'{cls.name}' has no option '{key}': {nearest(key, known)}")
            values[option] = _convert(cls.name, key, text, known[option])
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise InputError(f"'{cls.name}' cannot be made from {dict(options)}: {error}") from error

    def spec(self) -> Spec:
        """The text form, with only the options that differ from their defaults; reads back to an equal plug-in."""
        options = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if value != default:
                options[field.name] = text_of(value)
        return Spec(self.name, options)

    def told(self) -> str:
        """Its text form and where it comes from, for messages."""
        return f"'{self.spec()}' of {type(self).__module__}"

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return (cls.__doc__ or "").strip().partition("\n")[0]


def text_of(value: object) -> str:
    """An option's value as a spec has it; ``from_options`` reads it back."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _convert(owner: str, key: str, text: str, kind: Any) -> Any:
    """Text to a field's type: bool, int, float, str, an optional of these, a Literal, or a tuple joined by '+'."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if text.lower() == "none" and type(None) in arguments:
            return None
        return _convert(owner, key, text, next(a for a in arguments if a is not type(None)))
    if origin is typing.Literal:
        if text not in arguments:
            raise InputError(f"'{owner}{{{key}=…}}' is one of {', '.join(map(str, arguments))}, not '{text}'")
        return text
    if origin is tuple:
        return tuple(_convert(owner, key, part, arguments[0]) for part in text.split("+") if part)
    if kind is bool:
        if text.lower() not in _BOOLS:
            raise InputError(f"'{owner}{{{key}=…}}' is true or false, not '{text}'")
        return _BOOLS[text.lower()]
    try:
        return kind(text)
    except ValueError as error:
        raise InputError(f"'{owner}{{{key}=…}}' takes {kind.__name__}, not '{text}'") from error

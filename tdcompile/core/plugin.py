"""``Plugin``: the base class of passes, decompositions, scores, selectors, cost models and networks."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from tdcompile.errors import InputError, nearest
from tdcompile.support.options import Options, check_option, text_of, types_of
from tdcompile.support.spec import Spec


@dataclasses.dataclass(frozen=True)
class Plugin(Options):
    """A named class that the registry discovers.

    A subclass is a frozen dataclass. Its fields are its options and declare their ranges; an instance holds nothing
    else. A class that does not set ``name`` itself is abstract and is not registered. ``tdcompile list`` prints the
    first line of the docstring.
    """

    name: ClassVar[str] = ""
    defined: ClassVar[int] = 0  # number of classes defined so far; the registry lists anew when it grows

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Plugin.defined += 1

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Self:
        """Make an instance from options in text form.

        Raises:
            InputError: an option is unknown, does not convert, or is out of range.
        """
        known = types_of(cls)
        values: dict[str, Any] = {}
        for key, text in options.items():
            option = key.replace("-", "_")
            if option not in known:
                raise InputError(f"'{cls.name}' has no option '{key}': {nearest(key, known)}")
            values[option] = check_option(cls, option, _parsed(text, known[option]))
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise InputError(f"'{cls.name}' cannot be made from {dict(options)}: {error}") from error

    @classmethod
    def label(cls) -> str:
        """The plug-in's name."""
        return cls.name or cls.__name__

    def spec(self) -> Spec:
        """The text form, with the options that differ from their defaults; it reads back to an equal plug-in."""
        options = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if value != default:
                options[field.name] = text_of(value)
        return Spec(self.name, options)

    def told(self) -> str:
        """The text form and the module that defines the class, for messages."""
        return f"'{self.spec()}' of {type(self).__module__}"

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return (cls.__doc__ or "").strip().partition("\n")[0]


def _parsed(text: str, kind: Any) -> object:
    """Split a list at ``+`` and read ``none``; pydantic converts everything else."""
    members = typing.get_args(kind)
    if text.lower() == "none" and type(None) in members:
        return None
    if typing.get_origin(kind) is tuple:
        return tuple(part for part in text.split("+") if part)
    return text

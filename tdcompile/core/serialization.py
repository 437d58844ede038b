"""Facts as plain data (numbers, texts, lists, mappings) and back: for plan files and for checkpoints."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import TypeAdapter

from tdcompile.ir.facts import Fact

F = TypeVar("F", bound=Fact)


def fact_to_plain(fact: Fact) -> Any:
    """Return a fact as data that JSON can hold.

    Raises:
        PydanticSchemaGenerationError: the fact declares a field without a plain form.
        PydanticSerializationError: a value has no plain form.
    """
    return TypeAdapter(type(fact)).dump_python(fact, mode="json", by_alias=True)


def fact_from_plain(kind: type[F], plain: object) -> F:
    """Read the data of ``fact_to_plain``.

    Raises:
        ValidationError: the data do not describe a fact of this type.
    """
    fact: F = TypeAdapter(kind).validate_python(plain)
    return fact

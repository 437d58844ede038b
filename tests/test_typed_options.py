"""``compile`` is typed: its keyword options are those of ``Recipe``; ``make lint`` checks ``typed_calls.py``."""

from __future__ import annotations

import typing

from pydantic import TypeAdapter

from tdcompile.recipes import CompileOptions, Recipe


def test_the_options_of_compile_are_the_fields_of_a_recipe_but_for_what_it_is_given_itself() -> None:
    hints = typing.get_type_hints(CompileOptions)
    assert hints.keys() == Recipe.model_fields.keys() - {"weights", "input", "example", "data"}
    for name, kind in hints.items():
        default = Recipe.model_fields[name].default
        if isinstance(default, str | int | None):
            TypeAdapter(kind, config=None if kind is bool else {"arbitrary_types_allowed": True}).validate_python(
                default, strict=True
            )

"""The text form of plug-ins: what is written reads back, what is malformed is refused."""

from __future__ import annotations

from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdcompile.core.plugin import Plugin
from tdcompile.core.registry import _all
from tdcompile.errors import InputError
from tdcompile.support.spec import Spec, parse_options, parse_spec, parse_specs, split

NAMES = st.from_regex(r"[A-Za-z][\w.-]{0,12}", fullmatch=True)
VALUES = st.text(st.characters(codec="ascii", categories=("L", "N"), include_characters="+-._"), min_size=1, max_size=9)
SPECS = st.builds(Spec, NAMES, st.dictionaries(NAMES, VALUES, max_size=3))


@given(st.lists(SPECS, min_size=1, max_size=4))
def test_a_list_of_specs_reads_back(specs: list[Spec]) -> None:
    assert parse_specs(",".join(map(str, specs))) == specs


@given(SPECS)
def test_space_around_parts_does_not_matter(spec: Spec) -> None:
    loose = " , ".join(f" {key} = {value} " for key, value in spec.options.items())
    assert parse_spec(f"  {spec.name}{{{loose}}} ") == spec


@pytest.mark.parametrize("text", ["", "2x", "a b", "a{", "a}b", "a{k=1}{l=2}", "{k=1}"])
def test_a_malformed_spec_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_spec(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [("a,,b", "empty member"), ("a,b,", "empty member"), ("a{k=1", "do not match"), ("a}{", "do not match")],
)
def test_a_malformed_list_is_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        split(text)


@pytest.mark.parametrize(("text", "said"), [("k", "option=value"), ("=1", "option=value"), ("k=1,k=2", "given twice")])
def test_malformed_options_are_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_options(text)


def options_plugin() -> type[Plugin]:
    """A plug-in with an option of every kind; made here, so that no other test finds it registered."""
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Every(Plugin):
        """Every kind of option."""

        name: ClassVar[str] = ""
        count: int = 3
        share: float = 0.5
        flag: bool = False
        word: str = "a"
        mode: Literal["one", "two"] = "one"
        maybe: int | None = None
        many: tuple[str, ...] = ()

    return Every


EVERY = options_plugin()


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "count": st.integers(),
            "share": st.floats(allow_nan=False),
            "flag": st.booleans(),
            "word": st.text("abc-xyz", min_size=1),
            "mode": st.sampled_from(["one", "two"]),
            "maybe": st.none() | st.integers(),
            "many": st.lists(st.text("abc", min_size=1), max_size=3).map(tuple),
        },
    )
)
def test_options_survive_their_text(values: dict[str, object]) -> None:
    plugin = EVERY(**values)  # type: ignore[arg-type]
    assert EVERY.from_options(plugin.spec().options) == plugin


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cuont": "1"}, "no option 'cuont': did you mean 'count'"),
        ({"count": "1.5"}, "count=1.5 must be a whole number"),
        ({"share": "half"}, "share=half must be a number"),
        ({"flag": "maybe"}, "flag=maybe must be true or false"),
        ({"mode": "three"}, "one of one, two"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(options: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        EVERY.from_options(options)


def test_a_dash_stands_for_an_underscore() -> None:
    finetune = next(plugin for plugin in _all() if plugin.name == "recalibrate")
    assert all("-" not in field for field in finetune().spec().options)


@pytest.mark.parametrize("plugin", _all(), ids=lambda plugin: f"{plugin.__module__.split('.')[-2]}-{plugin.name}")
def test_every_plugin_has_defaults_a_summary_and_reads_back(plugin: type[Plugin]) -> None:
    made = plugin()
    assert made.spec() == Spec(plugin.name)
    assert plugin.summary().endswith(".")
    assert plugin.from_options(made.spec().options) == made
    with pytest.raises(InputError, match="has no option 'nonsense'"):
        plugin.from_options({"nonsense": "1"})

"""Discovery: what is found, what is refused by name, and that a stranger's broken plug-in harms nobody."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest

from tdcompile.core import registry
from tdcompile.core.cost_model import CostModel
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.importance import Importance
from tdcompile.core.passes import Pass
from tdcompile.core.plugin import Plugin
from tdcompile.core.rank_selector import RankSelector
from tdcompile.errors import InputError, TdcompileError


@pytest.fixture
def fresh() -> Iterator[None]:
    registry.refresh()
    yield
    registry.refresh()


def test_a_class_whose_name_is_taken_away_is_no_plug_in_any_more() -> None:
    @dataclass(frozen=True)
    class Passing(CostModel):
        name: ClassVar[str] = "passing"

        def price(self, layer, target):
            raise NotImplementedError

    assert "passing" in registry.find(CostModel)
    Passing.name = ""
    assert not {"", "passing"} & registry.find(CostModel).keys()


def test_what_is_registered_goes_by_its_name_sorted() -> None:
    forms = registry.find(Decomposition)
    assert list(forms) == sorted(forms)
    assert all(form.name == name for name, form in forms.items())
    assert {"svd", "channel", "spatial", "tucker2", "cp", "cp4", "tt", "tt-linear"} <= forms.keys()
    assert not forms.keys() & registry.find(Pass).keys()


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        (Decomposition, "tucker", "no decomposition 'tucker': did you mean 'tucker2'"),
        (RankSelector, "knapsak", "no rank selector 'knapsak': did you mean 'knapsack'"),
        (Importance, "fischer", "no score 'fischer': did you mean 'fisher'"),
        (Pass, "fine-tune", "no pass 'fine-tune': did you mean 'finetune'"),
    ],
)
def test_an_unknown_name_names_the_nearest(kind: type[Plugin], name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        registry.get(kind, name)


def test_a_plugin_is_made_from_its_text_and_reads_back() -> None:
    made = registry.make(RankSelector, "energy{keep=0.8}")
    assert str(made.spec()) == "energy{keep=0.8}"
    assert registry.make(RankSelector, made.spec()) == made


class Thing(Plugin):
    """A kind of its own, so that what is defined here is in nobody else's way."""


def test_a_new_plugin_is_found_and_two_of_one_name_are_refused(fresh: None) -> None:
    assert registry.find(Thing) == {}

    @dataclass(frozen=True)
    class First(Thing):
        """First."""

        name: ClassVar[str] = "one"

    class Unnamed(First):
        """It has no name of its own."""

    assert registry.find(Thing) == {"one": First}

    @dataclass(frozen=True)
    class Second(Thing):
        """Second."""

        name: ClassVar[str] = "one"

    with pytest.raises(TdcompileError, match="two plug-ins are called 'one'"):
        registry.find(Thing)
    del First.name, Second.name  # the classes live on in their base


def test_a_plugin_that_is_defined_again_takes_the_place_of_the_former(fresh: None) -> None:
    def define() -> type[Thing]:
        @dataclass(frozen=True)
        class Cell(Thing):
            """As a notebook's cell that is run twice."""

            name: ClassVar[str] = "cell"

        return Cell

    first, second = define(), define()
    assert first is not second
    assert registry.find(Thing) == {"cell": second}
    del first.name, second.name


class Point:
    """An entry point as importlib gives it."""

    def __init__(self, value: str) -> None:
        self.value, self.name, self.dist = value, "theirs", None


@pytest.mark.parametrize("module", ["not_there_at_all", "tests_no.such:thing"])
def test_a_broken_plugin_of_others_is_a_warning(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, module: str
) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: [Point(module)])
    with caplog.at_level(logging.WARNING, "tdcompile"):
        assert "svd" in registry.find(Decomposition)
    assert "the plug-ins of theirs are not available" in caplog.text


def test_a_role_is_found_by_what_a_class_declares_itself(monkeypatch):
    assert [plugin.name for plugin in registry.declaring(CostModel, "default_counter")] == ["analytic"]
    assert registry.only(CostModel, "default_timer").name == "measured"
    analytic = registry.get(CostModel, "analytic")
    heir = type("Heir", (analytic,), {})  # without a name of its own: the registry does not list it
    assert heir.default_counter, "it inherits the attribute"
    shown = {"analytic": analytic, "heir": heir}
    monkeypatch.setattr(registry, "find", lambda kind: shown)
    assert registry.only(CostModel, "default_counter") is analytic, "but not the role"
    rival = type("Rival", (analytic,), {"default_counter": True})
    shown["rival"] = rival
    with pytest.raises(TdcompileError, match=r"exactly one cost model must set 'default_counter'.*analytic, analytic"):
        registry.only(CostModel, "default_counter")
    shown.clear()
    with pytest.raises(TdcompileError, match="these do: none"):
        registry.only(CostModel, "default_counter")

"""Options are checked by the ranges that their fields declare, from text and in Python alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
from pydantic import AfterValidator, Field

from tdcompile.errors import InputError
from tdcompile.support.options import Count, NonNegative, Options, Part, Positive, Share, Workers, describe


def even(number: int) -> int:
    if number % 2:
        raise ValueError("an odd number has no half")
    return number


@dataclass(frozen=True)
class Every(Options):
    count: Count = 3
    rate: Positive | None = None
    weight: NonNegative = 0.0
    share: Share = 1.0
    part: Part = 0.0
    inner: Annotated[float, Field(gt=0, lt=1)] = 0.5
    few: Annotated[int, Field(le=4)] = 2
    half: Annotated[int, AfterValidator(even)] = 2
    workers: Workers = 1
    flag: bool = False
    mode: Literal["slow", "fast"] = "slow"
    many: tuple[Count, ...] = ()

    def check(self) -> None:
        if self.flag and self.mode == "slow":
            raise InputError("flag needs mode=fast")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("count", 0, "a whole number of at least 1"),
        ("count", 1.5, "a whole number of at least 1"),
        ("rate", 0.0, "a finite number above 0 or none"),
        ("rate", math.nan, "a finite number above 0 or none"),
        ("weight", -0.1, "a finite number of at least 0"),
        ("share", 0.0, "a share in (0, 1]"),
        ("share", 1.1, "a share in (0, 1]"),
        ("part", 1.0, "a share in [0, 1)"),
        ("inner", 1.0, "a number in (0, 1)"),
        ("few", 5, "a whole number of at most 4"),
        ("workers", 5000, "a whole number in [1, 1024]"),
        ("count", True, "a whole number of at least 1"),
        ("rate", True, "a finite number above 0 or none"),
        ("flag", "perhaps", "true or false"),
        ("mode", "medium", "one of slow, fast"),
        ("mode", "fsat", "one of slow, fast: did you mean 'fast'?"),
        ("many", (2, 0), "a list, each a whole number of at least 1"),
    ],
)
def test_an_error_names_the_option_the_value_and_the_range(name: str, value: object, allowed: str) -> None:
    shown = {"(2, 0)": "2+0", "True": "true"}.get(str(value), value)
    with pytest.raises(InputError) as failure:
        Every(**{name: value})  # type: ignore[arg-type]
    assert str(failure.value) == f"every: {name}={shown} must be {allowed}"


def test_values_at_the_ends_of_a_range_are_taken() -> None:
    ends = {"count": 1, "weight": 0.0, "share": 1.0, "part": 0.0, "few": 4, "many": (1,)}
    made = Every(**ends)  # type: ignore[arg-type]
    assert {name: getattr(made, name) for name in ends} == ends


def test_a_value_that_converts_without_loss_is_converted() -> None:
    made = Every(count="5", rate=2, many=[1, 2])  # type: ignore[arg-type]
    assert (made.count, made.rate, made.many) == (5, 2.0, (1, 2))
    assert isinstance(made.rate, float)


def test_a_validator_says_itself_what_is_wrong() -> None:
    with pytest.raises(InputError, match=r"^every: half=3: an odd number has no half$"):
        Every(half=3)


def test_options_that_exclude_each_other_are_refused_after_the_ranges() -> None:
    assert Every(flag=True, mode="fast").flag
    with pytest.raises(InputError, match="needs mode=fast"):
        Every(flag=True)


def test_a_bound_alone_is_described() -> None:
    assert describe(Annotated[int, Field(lt=4)]) == "a whole number below 4"
    assert describe(dict) == "of type dict"

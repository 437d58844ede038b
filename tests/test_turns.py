"""``turns``: where a network's comparisons of sizes turn out otherwise, and nowhere else."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from tdcompile.turns import limits, turns

EXAMPLE = {"batch": 4, "length": 6}


class Comparing(nn.Module):
    def __init__(self, compares: Callable[[int, int], bool]) -> None:
        super().__init__()
        self.compares = compares

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.compares(x.shape[0], x.shape[1]) else x * 3


def found(compares: Callable[[int, int], bool]) -> tuple[list[dict[str, int]], dict[str, tuple[int, int | None]]]:
    x = torch.randn(EXAMPLE["batch"], EXAMPLE["length"], 3)
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    program = torch.export.export(Comparing(compares), (x,), dynamic_shapes=shapes, strict=False)
    opened = [{0: "batch", 1: "length"}]
    return turns(program, opened, EXAMPLE), limits(program, opened)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(kind=st.sampled_from(["==", "<", ">", "%", "sum", "product"]), number=st.integers(2, 60))
def test_every_comparison_is_broken_by_what_is_found_for_it(kind: str, number: int) -> None:
    compares: Callable[[int, int], bool] = {
        "==": lambda n, length: length == number,
        "<": lambda n, length: n < number,
        ">": lambda n, length: length > number,
        "%": lambda n, length: length % number == 0,
        "sum": lambda n, length: n + length > number,
        "product": lambda n, length: n * length == number,
    }[kind]
    usual = compares(*EXAMPLE.values())
    sizes, _ = found(compares)
    near = [(n, 6) for n in range(2, 60)] + [(4, n) for n in range(2, 60)]
    near += [(n, length) for n in range(2, 20) for length in range(2, 20)]  # both at once are looked at less far
    if usual and kind == "==":
        return  # torch takes the axis for that number, which is told elsewhere
    if any(compares(*pair) != usual for pair in near):
        assert any(compares(*(EXAMPLE | other).values()) != usual for other in sizes)
    assert all(EXAMPLE.keys() >= other.keys() for other in sizes)


def test_a_bound_is_met_from_either_side() -> None:
    assert found(lambda n, length: length > 10) == ([{"length": 11}], {"batch": (2, None), "length": (2, 10)})
    assert found(lambda n, length: length < 5) == ([{"length": 4}], {"batch": (2, None), "length": (5, None)})


@pytest.mark.parametrize(
    "compares", [lambda n, length: n < 0, lambda n, length: True, lambda n, length: n * 2 % 2 == 1]
)
def test_what_no_size_changes_is_left_out(compares: Callable[[int, int], bool]) -> None:
    assert found(compares)[0] == []


def test_two_axes_are_tried_together_where_one_alone_is_not_enough() -> None:
    sizes, _ = found(lambda n, length: n % 5 + length % 5 == 0)
    assert sizes == [{"batch": 5, "length": 5}]

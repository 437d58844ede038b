"""``guard_violations``: where a network's comparisons of sizes turn out otherwise, and nowhere else."""

from collections.abc import Callable
from itertools import chain

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from tdcompile.frontend.guards import guard_violations
from tdcompile.ir.dynamic_shapes import limits

EXAMPLE = {"batch": 4, "length": 6}


class Comparing(nn.Module):
    def __init__(self, compares: Callable[[int, int], bool]) -> None:
        super().__init__()
        self.compares = compares

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.compares(x.shape[0], x.shape[1]) else x * 3


def found(
    compares: Callable[[int, int], bool],
) -> tuple[list[list[dict[str, int]]], dict[str, tuple[int, int | None]]]:
    x = torch.randn(EXAMPLE["batch"], EXAMPLE["length"], 3)
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    program = torch.export.export(Comparing(compares), (x,), dynamic_shapes=shapes, strict=False)
    opened = [{0: "batch", 1: "length"}]
    return guard_violations(program, opened, EXAMPLE), limits(program, opened)


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
        assert all(compares(*(EXAMPLE | other).values()) != usual for other in chain.from_iterable(sizes))
        assert sizes


def test_a_bound_is_met_from_either_side_at_more_sizes_than_one() -> None:
    (above,), known = found(lambda n, length: length > 10)
    assert above[:2] == [{"length": 11}, {"length": 12}]
    assert known == {"batch": (2, None), "length": (2, 10)}
    below, known = found(lambda n, length: length < 5)
    assert {"length": 4} in chain.from_iterable(below)
    assert known == {"batch": (2, None), "length": (5, None)}


@pytest.mark.parametrize(
    "compares", [lambda n, length: n < 0, lambda n, length: True, lambda n, length: n * 2 % 2 == 1]
)
def test_what_no_size_changes_is_left_out(compares: Callable[[int, int], bool]) -> None:
    assert found(compares)[0] == []


def test_two_axes_are_tried_together_where_one_alone_is_not_enough() -> None:
    (ways,), _ = found(lambda n, length: n % 5 + length % 5 == 0)
    assert {"batch": 5, "length": 5} in ways
    (ways,), _ = found(lambda n, length: n * length > 10**6)  # grown together, and not one of them beyond all measure
    assert ways[0]["batch"] * ways[0]["length"] < 4 * 10**6
    assert len(ways[0]) == 2


def test_axes_that_torch_takes_for_one_are_told() -> None:
    x = torch.randn(4, 6, 6)
    module = Comparing(lambda n, length: True)
    module.forward = lambda x: x * 2 if x.shape[1] == x.shape[2] else x * 3  # type: ignore[method-assign]
    program = torch.export.export(module, (x,), dynamic_shapes=({1: Dim.AUTO, 2: Dim.AUTO},), strict=False)
    assert [{"w": 7}] in guard_violations(program, [{1: "h", 2: "w"}], {"h": 6, "w": 6})
    assert guard_violations(program, [{1: "h", 2: "h"}], {"h": 6}) == []

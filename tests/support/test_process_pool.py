"""Work over processes: the results as here and in order, items made when they are needed, a dead process told."""

import os
import time
from collections.abc import Iterator

import pytest
import torch

from tdcompile.errors import TdcompileError
from tdcompile.support.process_pool import LazyValues, parallel_map


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


SLEEP = 600  # seconds, longer than any start of a process


def double_or_sleep(x: int) -> int:
    time.sleep(SLEEP * x)
    return 2 * x


def die(x: int) -> int:
    os._exit(1)


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_come_in_order_and_items_are_made_as_they_are_needed(jobs: int) -> None:
    made: list[torch.Tensor] = []

    def items() -> Iterator[torch.Tensor]:
        for i in range(20):
            made.append(torch.full((3,), float(i), dtype=torch.bfloat16))
            yield made[-1]

    results = parallel_map(double, items(), jobs)
    found = [next(results)]
    assert len(made) <= 5
    found += results
    assert len(found) == len(made) == 20
    assert all(torch.equal(a, 2 * b) and a.dtype == torch.bfloat16 for a, b in zip(found, made, strict=True))


def test_a_lazy_value_is_made_once_and_a_failure_is_raised_at_each_use() -> None:
    values, made = LazyValues[int](), []

    def make() -> int:
        made.append(1)
        if len(made) == 1:
            raise ValueError("not yet")
        return 7

    assert "a" not in values
    values.register("a", make)
    assert "a" in values
    with pytest.raises(ValueError, match="not yet"):
        values["a"]
    assert [values["a"], values["a"], len(made)] == [7, 7, 2]
    assert "a" in values
    values.clear()
    assert "a" not in values


def test_processes_at_work_stop_at_an_early_end() -> None:
    results = parallel_map(double_or_sleep, range(2), 2)
    begun = time.monotonic()
    assert next(results) == 0
    results.close()
    assert time.monotonic() - begun < SLEEP / 2


def test_a_dead_process_is_told() -> None:
    with pytest.raises(TdcompileError, match="fewer jobs"):
        list(parallel_map(die, [1, 2], 2))

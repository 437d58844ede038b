"""Work over processes: the results as here and in order, items made when they are needed, a dead process told."""

import os

import pytest
import torch

from tdcompile.errors import TdcompileError
from tdcompile.support.process_pool import parallel_map


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def die(x: int) -> int:
    os._exit(1)


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_come_in_order(jobs: int) -> None:
    items = [torch.full((3,), float(i), dtype=torch.bfloat16) for i in range(7)]
    found = list(parallel_map(double, items, jobs))
    assert len(found) == 7
    assert all(torch.equal(a, 2 * b) and a.dtype == torch.bfloat16 for a, b in zip(found, items, strict=True))


def test_items_are_made_as_they_are_needed() -> None:
    made = []

    def items():
        for i in range(20):
            made.append(i)
            yield torch.tensor(i)

    results = parallel_map(double, items(), 2)
    next(results)
    assert len(made) <= 5
    results.close()


def test_a_dead_process_is_told() -> None:
    with pytest.raises(TdcompileError, match="fewer jobs"):
        list(parallel_map(die, [1, 2], 2))

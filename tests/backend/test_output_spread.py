"""The spread of outputs over samples does not depend on batches, and constant outputs have their magnitude for it."""

import numpy as np
import pytest

from tdcompile.backend.output_spread import OutputSpread


def spread_of(*batches: np.ndarray, place: int = 0) -> OutputSpread:
    spread = OutputSpread()
    for batch in batches:
        spread.add(place, batch)
    return spread


@pytest.mark.parametrize("sizes", [(12,), (1,) * 12, (5, 7), (1, 10, 1)])
def test_batches_of_any_size_give_one_spread(sizes: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(3, 2, (12, 4, 5)).astype(np.float32)
    found = spread_of(*np.split(values, np.cumsum(sizes)[:-1]))
    assert found.value == pytest.approx(float(np.linalg.norm(values - values.mean(0, dtype=float))), rel=1e-6)
    assert found.magnitude == pytest.approx(float(np.linalg.norm(values)), rel=1e-6)


def test_outputs_that_do_not_vary_have_their_magnitude_as_spread() -> None:
    one = np.array([[3.0, 4.0]])
    assert spread_of(one).value == pytest.approx(5)
    assert spread_of(one, one * (1 + 1e-7)).value == pytest.approx(50**0.5)
    assert spread_of(one, one * 1.01).value == pytest.approx(0.05 / 2**0.5)
    assert spread_of(np.zeros((3, 2))).value > 0


def test_single_numbers_are_samples_and_outputs_are_kept_apart() -> None:
    both = spread_of(np.float32(1.0), np.float32(3.0))
    assert both.value == pytest.approx(2**0.5)
    both.add(1, np.array([[10.0], [10.0]]))
    assert both.value == pytest.approx(2**0.5)
    assert both.magnitude == pytest.approx(210**0.5)

"""``OutputComparison``: the figures of whole outputs, whatever the batches; equal, constant and broken outputs."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tdcompile.data.quality import OutputComparison, OutputQuality, compare_outputs


def compared(dense: torch.Tensor, compiled: torch.Tensor, size: int = 1000) -> OutputQuality:
    comparison = OutputComparison()
    for a, b in zip(dense.split(size), compiled.split(size), strict=True):
        compare_outputs([comparison], [a], [b])
    return comparison.result()


def outputs(count: int = 40, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    dense = torch.randn(count, classes, generator=draw) + 3
    return dense, dense + 0.5 * torch.randn(count, classes, generator=draw)


@given(size=st.integers(1, 45))
def test_the_figures_do_not_depend_on_the_batches(size: int) -> None:
    dense, compiled = (x.double() for x in outputs())
    found = compared(dense, compiled, size)
    spread = (dense - dense.mean(0)).square().sum()
    assert found.relative_error == pytest.approx(float(((dense - compiled).square().sum() / spread).sqrt()))
    assert found.agreement == pytest.approx(float((dense.argmax(1) == compiled.argmax(1)).double().mean()))
    assert found.cosine == pytest.approx(float(F.cosine_similarity(dense, compiled).mean()))
    divergence = F.kl_div(compiled.log_softmax(1), dense.log_softmax(1), log_target=True, reduction="batchmean")
    assert found.divergence == pytest.approx(float(divergence))


def test_equal_outputs_have_no_error_and_a_constant_answer_has_error_one() -> None:
    dense, _ = outputs()
    assert compared(dense, dense) == OutputQuality(0.0, pytest.approx(1.0), 1.0, pytest.approx(0.0, abs=1e-12))
    assert compared(dense, dense.mean(0).expand_as(dense)).relative_error == pytest.approx(1.0)


def test_an_output_that_never_varies_is_compared_by_its_size() -> None:
    dense = torch.full((10, 3, 2), 4.0)
    assert compared(dense, dense * 1.25).relative_error == pytest.approx(0.25)
    assert compared(torch.zeros(4, 3, 2), torch.zeros(4, 3, 2)).relative_error == 0.0
    assert compared(torch.zeros(4, 3, 2), torch.ones(4, 3, 2)).relative_error == math.inf


def test_probabilities_are_not_put_through_a_softmax_again() -> None:
    dense, compiled = (x.double() for x in outputs())
    assert compared(dense.softmax(1), compiled.softmax(1)).divergence == pytest.approx(
        compared(dense, compiled).divergence, rel=1e-6
    )


def test_feature_maps_and_tokens_have_no_classes_and_complex_outputs_are_left_out() -> None:
    found = compared(torch.randn(6, 4, 8), torch.randn(6, 4, 8))
    assert (found.agreement, found.divergence) == (None, None)
    comparison = OutputComparison()
    compare_outputs([comparison], [torch.ones(2, 3, dtype=torch.complex64)], [torch.zeros(2, 3)])
    assert comparison.samples == 0


def test_nan_is_not_a_small_error() -> None:
    dense, compiled = outputs()
    compiled[3, 1] = math.nan
    assert math.isnan(compared(dense, compiled).relative_error)

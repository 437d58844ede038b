"""The benchmark of changed answers judges as the gate does."""

import pytest

from tdcompile.backend.evaluation import Evaluation, OutputQuality
from tdcompile.backend.quality_drop import quality_drop
from tests.benchmark_modules import load

for needed in ("results", "common", "real_networks"):
    load(needed)
changed_answers = load("changed_answers")


@pytest.mark.parametrize(
    ("error", "agreement", "changed"),
    [(0.9, 0.71, False), (0.1, 0.69, True), (0.49, None, False), (0.51, None, True), (float("inf"), 0.9, True)],
)
def test_answers_changed_where_the_gate_of_a_compilation_fails(error, agreement, changed):
    output = OutputQuality(relative_error=error, cosine=0.5, agreement=agreement, divergence=None)
    drop = quality_drop(None, Evaluation(200, None, None, (output,)))
    assert drop.passed is not changed
    reported = None if error == float("inf") else error
    assert changed_answers.is_changed(reported, agreement) is changed

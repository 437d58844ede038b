"""The log has the seconds of each layer by form, and one table of all forms."""

from __future__ import annotations

import logging
import time

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.support.form_seconds import FormSeconds, timed


def test_layers_and_forms_are_logged_slowest_first(caplog: pytest.LogCaptureFixture) -> None:
    spent = FormSeconds("propose")
    with caplog.at_level(logging.DEBUG, logger="tdcompile"):
        spent.add("svd", 0.5, ranks=8)
        spent.add("tt-linear", 1.0, ranks=12)
        spent.layer_done("fc")
        spent.add("svd", 0.5, ranks=4)
        spent.layer_done("head")
        spent.layer_done("kept")  # no form was tried
        spent.all_done()
    assert [record.levelname for record in caplog.records] == ["DEBUG"] * 3
    fc, head, table = caplog.messages
    assert fc == "propose: fc: tt-linear 1.00 s, svd 0.50 s"
    assert head == "propose: head: svd 0.50 s"
    assert table.splitlines() == [
        "propose: processor seconds by form",
        "form       layers  ranks  seconds  share",
        "svd             2     12     1.00    50%",
        "tt-linear       1     12     1.00    50%",
        "all                   24     2.00",
    ]


def test_nothing_is_logged_without_forms(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="tdcompile"):
        FormSeconds("propose").all_done()
    assert not caplog.records


def test_sleep_does_not_count() -> None:
    result, seconds = timed(lambda pause: time.sleep(pause) or "done", 0.2)
    assert result == "done"
    assert seconds < 0.1


@pytest.mark.parametrize("jobs", [1, 2])
def test_propose_and_factorize_log_their_seconds(caplog: pytest.LogCaptureFixture, jobs: int) -> None:
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    with caplog.at_level(logging.DEBUG, logger="tdcompile"):
        tdcompile.compile(network, torch.randn(2, 64), budget={"macs": 0.6}, decompose="svd", jobs=jobs)
    for step in ("propose", "factorize"):
        assert any(message.startswith(f"{step}: 0: svd ") for message in caplog.messages)
        assert any(message.startswith(f"{step}: processor seconds by form\n") for message in caplog.messages)

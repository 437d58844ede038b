"""Passes over many samples hold fewer of them where the values between layers are large."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tdcompile
from tdcompile.backend.deployment import held_out_batches
from tdcompile.data.task import Task, Tensors
from tdcompile.ir import memory
from tdcompile.ir.memory import footprint, samples_within
from tdcompile.ir.scoring import samples_at_once

VALUE, GIVEN, POOLED = 4 * 8 * 100, 4 * 100, 4 * 8  # bytes of one sample: after the convolution, before it, at the end


@pytest.fixture
def program() -> tdcompile.Program:
    network = nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.AvgPool2d(10))
    return tdcompile.trace(network.eval(), (torch.randn(2, 1, 10, 10),))


def test_the_footprint_is_that_of_one_sample(program):
    found = footprint(program.dense, (torch.randn(3, 1, 10, 10),))
    assert found == (VALUE, GIVEN + 2 * VALUE + POOLED)


def test_small_values_leave_the_number(program):
    assert samples_within(program, 256) == samples_within(program, 256, kept=True) == samples_at_once(program) == 256


@pytest.mark.parametrize(("limit", "samples"), [(10 * VALUE, 10), (VALUE // 2, 1)])
def test_large_values_lower_it_to_one_at_least(program, monkeypatch, limit, samples):
    monkeypatch.setattr(memory, "_PASS_BYTES", limit)
    assert samples_within(program, 256) == samples_at_once(program) == samples


def test_where_all_values_are_kept_their_sum_counts(program, monkeypatch):
    monkeypatch.setattr(memory, "_ALL_BYTES", 3 * (GIVEN + 2 * VALUE + POOLED))
    trained = program.with_(task=Task(Tensors(torch.randn(16, 1, 10, 10)), calibrate=4))
    assert samples_within(trained, 256, kept=True) == 3
    assert [len(batch[0]) for batch in held_out_batches(trained, 8)] == [3, 3, 2]

"""A small network with all that gets in a score's way: in-place ops, batch norm, a shared module, frozen weights."""

import pytest
import torch
from torch import nn

from tdcompile.data.task import Task, Tensors
from tdcompile.frontend.tracing import trace
from tdcompile.ir.program import Program


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.shared = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.dead = nn.Linear(8, 4)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        x = self.act(self.shared(self.act(self.shared(x)))).mean((2, 3))
        return self.head(x) + 0.0 * self.dead(x).sum()


@pytest.fixture
def program() -> Program:
    """The network over 40 random samples with labels."""
    torch.manual_seed(0)
    program = trace(Net(), (torch.randn(2, 3, 8, 8),))
    samples = Tensors(torch.randn(40, 3, 8, 8), torch.randint(5, (40,)))
    return program.with_(task=Task(train=samples, calibrate=32))

"""The text of the graph after each step of a recipe; ``TDCOMPILE_GOLDEN=write`` rewrites the files."""

import os
from pathlib import Path

import torch
from torch import nn

import tdcompile
from tdcompile.core.hooks import Hook

FILE = Path(__file__).with_name("resnet_block.txt")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.drop, self.head = nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 4)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)) + x)
        return self.head(self.drop(y).mean((2, 3)))


class Text(Hook):
    def __init__(self):
        self.parts = []

    def finished(self, step, program, seconds):
        nodes = "\n".join(f"  {node.format_node()}" for node in program.graph.graph.nodes)
        self.parts.append(f"after {step.name}\n{nodes}\n")


def test_the_graph_after_each_step():
    torch.manual_seed(0)
    program = tdcompile.trace(Block().eval(), (torch.randn(2, 8, 6, 6),)).with_(budget=tdcompile.Budget(macs=0.6))
    text = Text()
    steps = "score,propose{decompose=tucker2},choose,factorize,recalibrate,fold-batchnorm,drop-dead"
    tdcompile.Pipeline.parse(steps).run(program, [text])
    got = "\n".join(text.parts[3:])  # the steps before touch nothing
    if os.environ.get("TDCOMPILE_GOLDEN") == "write":
        FILE.write_text(got)
    assert got == FILE.read_text()

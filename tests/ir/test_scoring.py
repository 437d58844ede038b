"""The objective of a program's task, as targets and outputs tell it."""

import pytest
import torch
from torch import Tensor, nn

import tdcompile
from tdcompile.data.task import Task, Tensors
from tdcompile.ir.scoring import objective_of


class TwoHeads(nn.Module):
    """A summary of the whole sequence first, then scores of the next token, of which each sees what its mask lets."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(20, 8), nn.Linear(8, 20)
        ones = torch.ones(6, 6)
        self.register_buffer("seen", ones.tril() if causal else ones)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(ids)
        return x.mean(1), self.out(self.seen @ x)


@pytest.mark.parametrize("causal", [True, False])
def test_whether_scores_of_the_chosen_output_see_later_tokens_decides_on_a_language_task(causal: bool) -> None:
    ids = torch.randint(0, 20, (16, 6), generator=torch.Generator().manual_seed(0))
    program = tdcompile.trace(TwoHeads(causal), (ids[:2],)).with_(task=Task(Tensors(ids), output="1"))
    objective = objective_of(program)
    if causal:
        assert objective is not None
        assert (objective.kind.name, objective.output) == ("language", 1)
    else:
        assert objective is None

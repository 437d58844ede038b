"""``Trainer``: its rates and clipping, and what a gradient that is not finite means."""

import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import tdcompile
from tdcompile.data.task import Batch, Tensors
from tdcompile.errors import InputError, TdcompileError
from tdcompile.ir.target import Target
from tdcompile.training import trainer as training
from tdcompile.training.run_state import Saved
from tdcompile.training.schedule import warmup_cosine
from tdcompile.training.trainer import Settings, Trainer


@pytest.fixture(autouse=True)
def nothing_is_left_of_the_precision():
    yield
    AcceleratorState._reset_state()


class Overflowing(nn.Module):
    """A loss whose gradient overflows at some of its calls, and is not finite from one on."""

    def __init__(self, at: set[int], nan_from: int = 10**6) -> None:
        super().__init__()
        self.at, self.nan_from, self.calls = at, nan_from, 0

    def forward(self, outputs: list[Tensor], batch: Batch) -> Tensor:
        self.calls += 1
        loss = outputs[0].float().square().mean()
        if self.calls >= self.nan_from:
            return loss * math.nan
        return loss * torch.tensor(1e30) * 1e5 if self.calls in self.at else loss


def scaled(monkeypatch: pytest.MonkeyPatch, loss: nn.Module, saved: Saved, steps: int = 10) -> Trainer:
    """A trainer in fp16 with a gradient scaler, which accelerate has on GPUs alone, on a CPU."""

    def accelerator(target: Target, precision: str) -> Accelerator:
        AcceleratorState._reset_state()
        made = Accelerator(cpu=True)
        made.scaler, made.native_amp = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3), True
        made.state._mixed_precision = "fp16"
        return made

    monkeypatch.setattr(training, "make_accelerator", accelerator)
    torch.manual_seed(0)
    given = tdcompile.trace(nn.Sequential(nn.Linear(6, 4)).eval(), (torch.randn(2, 6),))
    settings = Settings(1.0, 0.05, 32, 0.9, 0.0, 5.0, "none", False)
    return Trainer(given.graph, loss, Tensors(torch.randn(32 * steps, 6)), None, settings, given, "finetune", saved)


def test_a_step_that_overflows_in_fp16_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = scaled(monkeypatch, Overflowing({1, 2, 6}), Saved(None, ""))
    before = trainer._graph.get_submodule("0").weight.clone()
    assert math.isfinite(trainer.run().curve[-1].train_loss)
    assert trainer._accelerator.scaler.get_scale() < 2**16
    after = trainer._graph.get_submodule("0").weight
    assert torch.isfinite(after).all()
    assert not torch.equal(after, before)


def test_fp16_that_never_comes_back_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = scaled(monkeypatch, Overflowing(set(), nan_from=4), Saved(None, ""), steps=30)
    with pytest.raises(TdcompileError, match="diverged: loss nan at step 24 of 30"):
        trainer.run()
    trainer = scaled(monkeypatch, Overflowing(set(), nan_from=1), Saved(None, ""), steps=30)
    with pytest.raises(InputError, match="the first loss is nan"):
        trainer.run()


def plain(steps: int, clip: float, warmup: float, seen: list[float] | None = None) -> Trainer:
    """A trainer of one layer in fp32, which notes the rate of each step."""
    torch.manual_seed(0)
    traced = tdcompile.trace(nn.Sequential(nn.Linear(6, 4)).eval(), (torch.randn(2, 6),))
    chosen = Settings(1.0, 0.05, 8, 0.9, warmup, clip, "none", False)
    x = Tensors(10 * torch.randn(8 * steps, 6))

    def note(step: int, of: int, optimizer: torch.optim.Optimizer) -> None:
        if seen is not None:
            seen.append(optimizer.param_groups[0]["lr"])

    loss = Overflowing(set())
    return Trainer(traced.graph, loss, x, None, chosen, traced, "finetune", Saved(None, ""), note)


def test_training_takes_the_rates_of_the_schedule() -> None:
    seen: list[float] = []
    plain(steps=20, clip=5.0, warmup=0.2, seen=seen).run()
    assert seen == pytest.approx([0.05 * warmup_cosine(step, 4, 20) for step in range(20)])


@pytest.mark.parametrize("clip", [1e-3, 1e-2])
def test_the_first_step_is_no_longer_than_the_clipped_gradient_lets_it(clip: float) -> None:
    trainer = plain(steps=1, clip=clip, warmup=0.0)
    before = [p.detach().clone() for p in trainer._graph.parameters()]
    trainer.run()
    after = [p.detach() for p in trainer._graph.parameters()]
    moved = math.sqrt(sum(float((p - q).square().sum()) for p, q in zip(after, before, strict=True)))
    longest = 0.05 * (1 + 0.9) * clip  # Nesterov: the gradient, and its momentum ahead of it
    assert moved <= longest * (1 + 1e-3)
    assert moved == pytest.approx(longest, rel=1e-2)  # without clipping it would be a thousand times as long

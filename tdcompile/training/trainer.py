"""``Trainer``: the training loop of tune passes, on Hugging Face accelerate, for a CPU, a GPU or several."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, RandomSampler

from tdcompile.core.plugin import Plugin
from tdcompile.data.nesting import tensors_in
from tdcompile.data.objective import has_targets
from tdcompile.data.task import Batch, Samples
from tdcompile.errors import InputError, TdcompileError
from tdcompile.ir.modules import evaluating
from tdcompile.ir.program import Program
from tdcompile.ir.scoring import objective_of, samples_at_once
from tdcompile.ir.target import Target
from tdcompile.support.progress import report_progress
from tdcompile.training.augment import Augment, Augmented
from tdcompile.training.distributed import count, devices, from_first, no_gpu, same_in_all
from tdcompile.training.mixed_precision import Precision, strided_depthwise_in_fp32
from tdcompile.training.run_state import Epoch, Optimizer, Saved, Tuning, key_of, state_folder
from tdcompile.training.schedule import warmup_cosine
from tdcompile.training.sync_batchnorm import synchronized_batchnorm

# Discount on the start's held-out score when the best weights are selected. Held-out samples are often part of the
# dense network's training data, which the start has memorised and no epoch learns again (measured by this project). The
# addend keeps an epoch that is worse by exactly 0.01.
_START_DISCOUNT = 0.01 + 1e-9

_SQUARES = 0.999  # β₂ of Adam: the decay of its mean of squared gradients

# Consecutive steps that fp16 may skip: its loss scale starts at 2^16 and is halved by each.
_MAX_SKIPPED_STEPS = 20


@dataclass(frozen=True)
class Settings:
    """Hyperparameters: linear warm-up, cosine decay, clipped gradients, no weight decay.

    Attributes:
        epochs: number of epochs; may be a fraction.
        lr: highest learning rate.
        batch: samples per step, over all processes together.
        momentum: momentum of SGD, 0 turns Nesterov off; β₁ of Adam.
        warmup: share of the steps in which the rate rises.
        clip: upper bound on the gradient norm of all parameters together.
        augment: augmentation of images.
        frozen: keep batch-norm statistics fixed.
        average: decay of the exponential moving average of the weights, which is then evaluated and kept; 0 is off.
        patience: stop after so many epochs without improvement; 0 never stops early.
        precision: precision of autocast; the weights stay in fp32.
        optimizer: ``sgd`` with Nesterov momentum, or ``adam`` (Kingma and Ba 2015, arXiv 1412.6980).
    """

    epochs: float
    lr: float
    batch: int
    momentum: float
    warmup: float
    clip: float
    augment: Augment
    frozen: bool
    average: float = 0.0
    patience: int = 0
    precision: Precision = "fp32"
    optimizer: Optimizer = "sgd"

    def optimizer_of(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer of some parameters."""
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, self.lr, (self.momentum, _SQUARES))
        return torch.optim.SGD(parameters, self.lr, self.momentum, nesterov=self.momentum > 0)


class Trainer:
    """Trains a graph in place and leaves it with the weights that score best on the held-out split.

    The initial weights are kept only if every epoch's metric on that split is worse by more than a hundredth (one point
    of accuracy, 1 % of other metrics). Without targets they are kept if no epoch has a lower loss.

    All randomness of an epoch comes from the program's seed, the purpose and the epoch's number. A run that resumes
    from a saved epoch therefore equals a run that was not interrupted.

    Several processes give the result of one, up to rounding. They split each batch in one order, with equal shifts and
    flips, and compute batch norm and gradients over the whole batch. A batch that their number does not divide is
    rounded down to a multiple. Dropout draws equal masks in each share, and batch norm of a class that overrides
    ``forward`` is not synchronised.

    Args:
        graph: the network, with its own tensors.
        loss: maps the network's outputs, a list, and their batch to a scalar; its train or eval mode is not changed.
        fit: samples to train on, at least two.
        heldout: held-out split, which selects the best epoch; None keeps the last weights.
        settings: hyperparameters.
        program: gives the target and the random generators.
        purpose: name of the generators, and of the run in messages.
        saved: state on disk, written after each epoch; the caller clears it once the result is kept.
        schedule: called before each step with its index from 0, the number of steps and the optimizer.
        only: the parameters to train; default all floating-point parameters.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        loss: nn.Module,
        fit: Samples,
        heldout: Samples | None,
        settings: Settings,
        program: Program,
        purpose: str,
        saved: Saved,
        schedule: Callable[[int, int, torch.optim.Optimizer], None] | None = None,
        only: Iterable[nn.Parameter] | None = None,
    ) -> None:
        self._schedule = schedule
        self._graph, self._heldout, self._settings, self._saved = graph, heldout, settings, saved
        self._program, self._purpose = program, purpose
        self._task = objective_of(program)
        self._about = self._task.metric.about if self._task else None
        self._at_once = 1 if heldout is None else samples_at_once(program)
        self._home = program.inputs[0].device
        trained = [p for p in (graph.parameters() if only is None else only) if p.is_floating_point()]
        moving = set(map(id, trained))
        self._still = [p for p in graph.parameters() if p.requires_grad and id(p) not in moving]
        for parameters, move in ((trained, True), (self._still, False)):
            for parameter in parameters:
                parameter.requires_grad_(move)
        self._accelerator = accelerator = make_accelerator(program.target, settings.precision)
        loss = loss.to(accelerator.device)
        graph.to(accelerator.device)
        # Depthwise convolutions, which CP makes, train two to three times as fast in channels-last memory format.
        for network in (graph, loss):
            set_memory_format(network, torch.channels_last)
        self._objective = _Objective(graph, loss)
        if count() > 1 and not self._objective.reaches(trained, fit.batch([0, 1]).on(accelerator.device)):
            # not by default: the search costs time in every step
            accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        self._order, self._images = torch.Generator(), Augmented(fit, settings.augment, 0, self._task)
        processes = accelerator.num_processes
        loader = DataLoader(
            self._images,
            batch_size=max(1, min(settings.batch, len(fit)) // processes) * processes,
            sampler=RandomSampler(fit, generator=self._order),
            drop_last=True,  # a last batch of one sample has no batch statistics
            collate_fn=_identity,
        )
        self._steps = max(1, round(settings.epochs * len(loader)))
        self._epochs = math.ceil(self._steps / len(loader))
        optimizer = settings.optimizer_of(trained)
        rate = partial(warmup_cosine, warmup=round(settings.warmup * self._steps), total=self._steps)
        self._model, self._optimizer, self._loader, self._scheduler = accelerator.prepare(
            self._objective, optimizer, loader, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        )
        self._average = WeightAverage(graph, settings.average) if settings.average else None
        self._skipped = 0  # steps in a row whose gradient was not finite

    def run(self) -> Tuning:
        """Train to the end, resuming from the saved epoch if there is one.

        Raises:
            TdcompileError: the loss or its gradient became NaN or Inf.
        """
        slow = strided_depthwise_in_fp32(self._graph, self._settings.precision, self._accelerator.device)
        with slow, synchronized_batchnorm(self._graph):
            return self._run()

    def _run(self) -> Tuning:
        state = self._begin()
        curve = [Epoch(*entry) for entry in state["curve"]]
        for number in range(len(curve) + 1, self._epochs + 1):
            if self._settings.patience and len(curve) - state["best"][0] >= self._settings.patience:
                break
            begun = time.perf_counter()
            loss = self._epoch(number, curve)
            with self._average.applied() if self._average else nullcontext():
                curve.append(Epoch(number, loss, *self._judge()))
                if self._heldout is None or self._merit(curve[-1]) > self._merit(Epoch(*state["best"])):
                    state |= {"best": tuple(curve[-1]), "weights": _copy_state(self._graph)}
            state |= {
                "average": self._average.state if self._average else {},
                "curve": [tuple(entry) for entry in curve],
                "seconds": state["seconds"] + time.perf_counter() - begun,
                "model": self._graph.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "scheduler": self._scheduler.state_dict(),
                "scaler": self._accelerator.scaler.state_dict() if self._accelerator.scaler is not None else {},
            }
            if self._accelerator.is_main_process:
                self._saved.write(state)
        self._end(state["weights"])
        kept, rate = state["best"][0], self._settings.lr
        start = state["start"][2]
        return Tuning(len(curve), tuple(curve), kept, state["seconds"], start, rate, self._settings.optimizer)

    def _begin(self) -> dict[str, Any]:
        """Return the saved state after loading it into graph and optimizer, or the state of a new run."""
        state = self._saved.read(self._accelerator.device)
        if state is None:
            start = (0, math.nan, *self._judge())
            return {"curve": [], "start": start, "best": start, "weights": _copy_state(self._graph), "seconds": 0.0}
        self._graph.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])
        if self._average:
            self._average.state = state["average"]
        return state

    def _end(self, weights: dict[str, Tensor]) -> None:
        same_in_all(weights.values())
        self._graph.load_state_dict(weights)
        self._graph.zero_grad(set_to_none=True)
        for parameter in self._still:
            parameter.requires_grad_()
        self._graph.eval().to(self._home)
        set_memory_format(self._graph, torch.contiguous_format)
        self._accelerator.free_memory()

    def _epoch(self, number: int, curve: list[Epoch]) -> float:
        """Train for one epoch and return its mean loss; the last epoch may be partial."""
        done = (number - 1) * len(self._loader)
        steps = min(len(self._loader), self._steps - done)
        self._order.manual_seed(self._seed("order", number))
        self._images.redraw(self._seed("draws", number))
        about, last = self._about, [entry.heldout_score for entry in curve[-1:]]
        before = f", held-out {about.name} {about.text(last[0])}" if about and last and last[0] is not None else ""
        device, total = self._accelerator.device, 0.0
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self._seed("dropout", number))
            self._train_mode()
            for step, batch in enumerate(self._loader, start=1):
                if step > steps:
                    break
                if self._schedule is not None:
                    self._schedule(done + step - 1, self._steps, self._optimizer.optimizer)
                total += self._step(batch, done + step)
                report_progress(
                    done + step, self._steps, f"epoch {number}/{self._epochs}, loss {total / step:.3f}{before}"
                )
        return total / steps

    def _step(self, batch: Batch, step: int) -> float:
        batch = batch._replace(inputs=tuple(map(_channels_last, batch.inputs)))
        loss, _ = self._model(batch)
        self._accelerator.backward(loss)
        norm = self._accelerator.clip_grad_norm_(self._graph.parameters(), self._settings.clip)
        # A NaN loss in one process gives a NaN norm in all. In fp16 the scaler skips such a step and lowers its scale,
        # which it raises otherwise.
        self._skipped = 0 if math.isfinite(norm) else self._skipped + 1
        if self._skipped > (_MAX_SKIPPED_STEPS if self._accelerator.scaler is not None else 0):
            if step == self._skipped:
                raise InputError(
                    f"{self._purpose}: the first loss is {loss.item()}: the data or the weights are not finite"
                )
            raise TdcompileError(
                f"{self._purpose} diverged: loss {loss.item()} at step {step} of {self._steps}; "
                f"give it a lower lr than {self._settings.lr:g}"
            )
        self._optimizer.step()
        self._scheduler.step()
        self._optimizer.zero_grad()
        if self._average:
            self._average.follow(step)
        return float(loss.item())

    def _train_mode(self) -> None:
        self._model.train()
        if self._settings.frozen:
            for module in self._graph.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def _judge(self) -> tuple[float | None, float | None]:
        """Return metric and loss on the held-out split; the metric is None without targets, both without a split.

        The first of several processes evaluates, with batch-norm statistics that are equal in all. All processes then
        agree on the epoch to keep and on when to stop.
        """
        if self._heldout is None:
            return None, None
        same_in_all(self._graph.buffers())
        return from_first(self._judged, self._accelerator.device.type == "cpu")

    @torch.no_grad()
    def _judged(self) -> tuple[float | None, float | None]:
        assert self._heldout is not None  # ``_judge`` ensures this
        self._graph.eval()
        loss, device, meter = 0.0, self._accelerator.device, None
        for number, batch in enumerate(self._heldout.batches(self._at_once)):
            batch = batch.on(device)
            lost, outputs = self._objective(batch)
            loss += float(lost) * len(batch.inputs[0])
            if not number and self._task is not None and has_targets(self._task, batch):
                meter = self._task.meter()
            if not math.isfinite(loss):
                return None, loss  # the next step tells whether the training diverged or the data are not finite
            if meter is not None:
                meter.update(outputs, batch)
        return (None if meter is None else meter.compute()), loss / len(self._heldout)

    def _merit(self, epoch: Epoch) -> tuple[float, float]:
        """Return the selection key of an epoch: held-out metric in its direction, discounted for the start, then loss.

        Without targets the loss alone decides.
        """
        score, loss = epoch.heldout_score, epoch.heldout_loss or 0.0
        if not math.isfinite(loss):
            return -math.inf, -math.inf
        if score is None or self._about is None:
            return 0.0, -loss
        merit = score if self._about.higher_is_better else -score
        if epoch.epoch == 0:
            merit -= _START_DISCOUNT * (1.0 if self._about.unit == "%" else abs(score))
        return (max(0.0, merit) if self._about.unit == "%" else merit), -loss

    def _seed(self, what: str, epoch: int) -> int:
        return self._program.generator(f"{self._purpose}/{what}/{epoch}").initial_seed()


class _Objective(nn.Module):
    """A network and its loss as one module, the loss without autocast.

    With several processes, accelerate's wrapper of this module must see which parameters the loss reaches: the others
    have no gradients to share.
    """

    def __init__(self, graph: fx.GraphModule, loss: nn.Module) -> None:
        super().__init__()
        self.graph = graph
        self._loss = (loss,)  # a tuple hides the loss from the submodules, because nothing in it is trained

    def forward(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Return the loss and the outputs, detached."""
        given = [*tensors_in(self.graph(*batch.copies()))]
        device = given[0].device.type
        if torch.is_autocast_enabled(device):
            given = [x.float() if x.is_floating_point() else x for x in given]
        with torch.autocast(device, enabled=False):
            return self._loss[0](given, batch), [x.detach() for x in given]

    def reaches(self, trained: Sequence[nn.Parameter], batch: Batch) -> bool:
        """Return whether every parameter gets a gradient; one that only leads to integers does not."""
        with evaluating(self.graph), torch.enable_grad():
            found = torch.autograd.grad(self(batch)[0], trained, allow_unused=True)
        return all(gradient is not None for gradient in found)


def training_state_of(step: Plugin, graph: fx.GraphModule, train: Samples, program: Program) -> Saved:
    """Return the training state of a pass for these weights, options, data and seed; unset without a workspace."""
    folder = state_folder(program.workspace, step)
    if folder is None:
        return Saved(None, "")
    return Saved(folder, key_of([graph, program.dense], step, program.seed, train.fingerprint(), program.task.source))


class WeightAverage:
    """Exponential moving average of a network's weights and statistics, with a lower decay in the first steps.

    Attributes:
        state: averages by name; what is not floating point is copied.
    """

    def __init__(self, graph: fx.GraphModule, decay: float) -> None:
        self._graph, self._decay = graph, decay
        self.state = _copy_state(graph)

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Update the average after a step, counted from 1; the decay is at most (1 + step) / (10 + step)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, value in self._graph.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, 1 - decay)
            else:
                self.state[name].copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Load the average into the network for a while."""
        own = _copy_state(self._graph)
        self._graph.load_state_dict(self.state)
        try:
            yield
        finally:
            self._graph.load_state_dict(own)


def make_accelerator(target: Target, precision: str) -> Accelerator:
    """Return an accelerator for the target's device and a precision.

    accelerate keeps the first device and precision of a process, so that its state is reset for another one.

    Raises:
        InputError: fp16 is asked for on a CPU.
    """
    cpu = no_gpu(target.device)
    if cpu and precision == "fp16":
        raise InputError("training in fp16 needs a CUDA device; on CPU precision is fp32 or bf16")
    other = (devices(cpu).device.type == "cpu") != cpu
    AcceleratorState._reset_state(reset_partial_state=other)
    mixed = "no" if precision == "fp32" else precision
    # Split batches: the number of processes changes neither the number of steps nor the rates.
    return Accelerator(cpu=cpu, mixed_precision=mixed, dataloader_config=DataLoaderConfiguration(split_batches=True))


def _copy_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def set_memory_format(network: nn.Module, form: torch.memory_format) -> None:
    """Set the memory format of all 4-D parameters in place.

    ``Module.to(memory_format=…)`` fails on 5-D weights.
    """
    for weight in network.parameters():
        if weight.dim() == 4:
            # not ``contiguous``, which keeps the strides of a 1×1 kernel because it fits both formats
            weight.data = torch.empty_like(weight.data, memory_format=form).copy_(weight.data)


def _identity(batch: Any) -> Any:
    return batch  # ``Samples`` already returns whole batches

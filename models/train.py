"""Train a reference network from scratch: ``python -m tdcompile.models.train digits_net --data digits -o FILE``."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from tdcompile.core import registry
from tdcompile.core.network import Network
from tdcompile.data.loading import load_data
from tdcompile.data.nesting import tensors_in
from tdcompile.data.objective import Example, Objective, resolve_objective
from tdcompile.data.task import Batch, Samples, Task
from tdcompile.data.task_kinds import Classification
from tdcompile.errors import InputError, TdcompileError
from tdcompile.ir.program import sites_of
from tdcompile.ir.scoring import score_of
from tdcompile.ir.target import Target
from tdcompile.support.heap import keep_freed_memory
from tdcompile.training.augment import Augment, Augmented
from tdcompile.training.mixed_precision import Precision, strided_depthwise_in_fp32
from tdcompile.training.schedule import warmup_cosine

MOMENTUM = 0.9
# Samples that tell what the targets mean, and those that tell one-hot rows from others.
_FIRST, _MANY = 8, 256


@dataclass(frozen=True)
class Schedule:
    """Hyperparameters of SGD with Nesterov momentum, linear warm-up and cosine decay.

    Attributes:
        epochs: number of epochs.
        lr: highest learning rate.
        batch: samples per step.
        weight_decay: decay of weights; biases and norm parameters have none.
        smoothing: label smoothing of a classification, the share of the label that is spread over all classes.
        warmup: share of the steps in which the rate rises.
        augment: augmentation of images.
        precision: precision of autocast; the weights stay in fp32.
    """

    epochs: int = 12
    lr: float = 0.1
    batch: int = 64
    weight_decay: float = 5e-4
    smoothing: float = 0.1
    warmup: float = 0.1
    augment: Augment = "none"
    precision: Precision = "fp32"


def fit(module: nn.Module, samples: Samples, schedule: Schedule, generator: torch.Generator) -> Iterator[float]:
    """Train a network in place and yield the mean loss after each epoch; the network is in eval mode then.

    Args:
        module: the network; it stays on the device that accelerate selects.
        samples: samples with targets.
        schedule: hyperparameters.
        generator: draws the order and the augmentation; dropout draws from torch's global generator.

    Raises:
        InputError: targets are missing or do not fit the outputs, it does not run on the inputs, or fp16 on a CPU.
        TdcompileError: the loss became NaN or Inf.
    """
    from tdcompile.training.trainer import (  # the registry imports this file too, and must stay quick
        make_accelerator,
        set_memory_format,
    )

    objective = _objective(module, samples)
    target = Target("cuda" if torch.cuda.is_available() else "cpu")
    accelerator = make_accelerator(target, schedule.precision)
    set_memory_format(module, torch.channels_last)
    images = Augmented(samples, schedule.augment, objective=objective)
    loader = DataLoader(
        images,
        schedule.batch,
        shuffle=True,
        generator=generator,
        drop_last=len(samples) > schedule.batch,  # a last batch of one sample has no batch statistics
        collate_fn=_whole,
    )
    optimizer = torch.optim.SGD(_groups(module, schedule), schedule.lr, MOMENTUM, nesterov=True)
    steps = schedule.epochs * len(loader)
    scheduler = LambdaLR(optimizer, partial(warmup_cosine, warmup=round(schedule.warmup * steps), total=steps))
    model, optimizer, loader, scheduler = accelerator.prepare(module, optimizer, loader, scheduler)
    for epoch in range(schedule.epochs):
        images.redraw(int(torch.randint(2**62, (), generator=generator)))
        model.train()
        losses = []
        with strided_depthwise_in_fp32(module, schedule.precision, accelerator.device):
            for batch in loader:
                loss = _loss(objective, [*tensors_in(model(*batch.inputs))], batch, schedule.smoothing)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
        mean = float(torch.stack(losses).mean())
        if not math.isfinite(mean):
            raise TdcompileError(f"the loss is {mean} after epoch {epoch + 1}: try a rate below {schedule.lr}")
        model.eval()
        yield mean
    set_memory_format(module, torch.contiguous_format)


def _whole(batch: Any) -> Batch:
    """Return the batch unchanged: ``Samples`` already returns whole batches."""
    assert isinstance(batch, Batch)
    return batch


def _groups(module: nn.Module, schedule: Schedule) -> list[dict[str, object]]:
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


@torch.no_grad()
def _objective(module: nn.Module, samples: Samples) -> Objective:
    """Return the loss and the metric of the samples' targets.

    Raises:
        InputError: the samples have no targets, or they do not fit the network.
    """
    batch = samples.batch(range(min(len(samples), _FIRST)))
    if batch.targets is None:
        raise InputError("the data have no targets; training needs them")
    sites_of(module, batch.inputs)  # raises InputError if the network does not run on them
    outputs = [*tensors_in(module.eval()(*batch.copies()))]
    many = samples.batch(range(min(len(samples), _MANY))).targets
    objective, _ = resolve_objective(
        Task(samples), Example(batch, outputs, many), ["output"], lambda tokens, scored: True
    )
    assert objective is not None  # there are targets
    known = objective.classes
    if known is not None and samples.classes is not None and samples.classes > known:
        raise InputError(
            f"the data have {samples.classes} classes, the network {known}: write NAME{{num_classes={samples.classes}}}"
        )
    return objective


def _loss(objective: Objective, outputs: Sequence[Tensor], batch: Batch, smoothing: float) -> Tensor:
    if isinstance(objective.kind, Classification) and objective.kind.scores > 1:
        return F.cross_entropy(*objective.kind.pair(outputs[0], batch), label_smoothing=smoothing)
    return objective.loss(outputs, batch)


def save(module: nn.Module, path: Path) -> None:
    """Write the weights to a safetensors file atomically."""
    partial = path.with_name(path.name + ".partial")
    weights = {name: tensor.cpu().contiguous() for name, tensor in module.state_dict().items()}
    partial.write_bytes(serialize(weights))  # safetensors' own writer creates a file that only its owner can read
    os.replace(partial, path)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    name: Annotated[str, typer.Argument(help="a registered network, e.g. resnet20 or resnet20{num_classes=100}")],
    output: Annotated[Path, typer.Option("-o", "--output", help="the safetensors file to write")],
    data: Annotated[
        str, typer.Option(help="digits, scenes, parquet:DIR, imagefolder:DIR, npz:FILE or file.py:callable")
    ],
    epochs: Annotated[int, typer.Option(min=1)] = Schedule.epochs,
    lr: Annotated[float, typer.Option(min=0.0)] = Schedule.lr,
    batch: Annotated[int, typer.Option(min=2)] = Schedule.batch,
    weight_decay: Annotated[float, typer.Option(min=0.0)] = Schedule.weight_decay,
    smoothing: Annotated[float, typer.Option(min=0.0, max=1.0)] = Schedule.smoothing,
    warmup: Annotated[float, typer.Option(min=0.0, max=1.0, help="share of the steps")] = Schedule.warmup,
    augment: Annotated[Augment, typer.Option()] = Schedule.augment,
    normalize: Annotated[str, typer.Option(help="imagenet, none or m,m,m/s,s,s")] = "none",
    input_shape: Annotated[str | None, typer.Option("--input", help="e.g. 3x32x32; default the network's own")] = None,
    precision: Annotated[
        Precision, typer.Option(help="bf16 and fp16 (on a GPU) are automatic mixed precision")
    ] = "fp32",
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train NAME on the train samples, write its weights, print the metric on the test samples."""
    try:
        if not output.parent.is_dir():
            raise InputError(f"there is no folder '{output.parent}' to write {output.name} in")
        network = registry.make(Network, name)
        train, test = load_data(data, _shape(input_shape) or network.input_shapes[0], normalize, seed)
        torch.manual_seed(seed)
        module = network.build()
        schedule = Schedule(epochs, lr, batch, weight_decay, smoothing, warmup, augment, precision)
        with keep_freed_memory():
            for epoch, loss in enumerate(fit(module, train, schedule, torch.Generator().manual_seed(seed)), start=1):
                typer.echo(f"epoch {epoch}/{epochs}: loss {loss:.4f}", err=True)
        save(module, output)
        told = "no test samples"
        if test is not None:
            objective = _objective(module, train)
            about = objective.metric.about
            told = f"test {about.name} {about.text(score_of(objective, module, test.batches()))}"
        typer.echo(f"{output}: {told}")
    except TdcompileError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from error


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    sizes = text.split("x")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise InputError(f"--input '{text}' is not of the form 1x16x16")
    return tuple(map(int, sizes))


if __name__ == "__main__":
    app()

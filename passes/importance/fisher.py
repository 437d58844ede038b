"""``fisher``: how much the loss moves when a layer's output does, by the empirical Fisher information."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdcompile.core.importance import Importance, normalised
from tdcompile.data.metrics import logits
from tdcompile.errors import InputError
from tdcompile.ir.program import Program, Site, sites
from tdcompile.support.options import Count
from tdcompile.support.progress import report_progress


@dataclass(frozen=True)
class Fisher(Importance):
    """Fisher information of each layer's output times the output's energy, so that score · error² estimates the loss.

    To second order an error δy of an output costs ½ E[(g·δy)²] with g the gradient of the loss there. For δy of no
    preferred direction in D dimensions this is ½ E‖g‖² E‖δy‖² / D, and E‖δy‖² is error² · E‖y‖², y without its bias:
    the score is E‖g‖² E‖y‖² / D, mean 1 over the layers. The loss is cross-entropy on the labels, and without labels
    on classes drawn from the network's own predictions. The outputs of a module called twice count as one output.

    Attributes:
        samples: how many training samples to read; by default as many as calibration does.
        batch: samples in one pass; memory grows with it, the score does not change.
    """

    name: ClassVar[str] = "fisher"
    samples: Count | None = None
    batch: Count = 16

    def score(self, program: Program) -> Mapping[str, float]:
        """See ``Importance.score``.

        Raises:
            InputError: there are no training samples, the network returns no class scores, or a NaN appears.
        """
        train = program.task.train
        if train is None or len(train) == 0:
            raise InputError(
                "the importance 'fisher' needs training samples: give data, or take 'relative-error' or 'none'"
            )
        count = min(len(train), self.samples or program.task.calibrate)
        generator = program.generator(self.name)
        meters = {name: _Meter(site) for name, site in sites(program).items()}
        graph, device = program.graph, next((p.device for p in program.graph.parameters()), torch.device("cpu"))
        hooks = [meter.site.module.register_forward_hook(meter.watch) for meter in meters.values()]
        training, done = graph.training, 0
        try:
            graph.eval()
            # Shuffled, for data that lies in the order of its classes.
            for batch in train.shuffled(generator).batches(self.batch, limit=count):
                with torch.enable_grad():
                    scores = logits(graph(*(x.to(device) for x in batch.inputs)))
                    loss = _loss(scores, batch.labels, generator)
                probes = [probe for meter in meters.values() for probe in meter.take()]
                if loss.requires_grad:  # a network may detach what it returns
                    # Gradients of probes alone: no tensor of the program gets a ``grad``.
                    torch.autograd.grad(loss, probes, allow_unused=True)
                done += len(scores)
                report_progress(done, count)
        finally:
            graph.train(training)
            for hook in hooks:
                hook.remove()
        return normalised({name: meter.score(done) for name, meter in meters.items()})


def _loss(scores: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
    """Cross-entropy summed over the samples, so that each one's gradient is its own."""
    if scores.dim() != 2:
        shape = "x".join(map(str, scores.shape))
        raise InputError(
            f"the importance 'fisher' needs class scores (samples, classes), and the network returns {shape}"
        )
    if not torch.isfinite(scores).all():
        raise InputError("a NaN or an infinity appears in the network's output on the training samples")
    if labels is None:
        labels = torch.multinomial(scores.detach().softmax(1).cpu(), 1, generator=generator).squeeze(1)
    return F.cross_entropy(scores, labels.to(scores.device), reduction="sum")


class _Meter:
    """Adds up ‖g‖² and ‖y‖² of one layer without holding any of them."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.gradient, self.energy, self.elements = 0.0, 0.0, 0
        self._probes: list[Tensor] = []

    def watch(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Forward hook: a zero added to the output makes a gradient flow there, whatever else is frozen or in-place."""
        y = output.detach() - _bias(module, output)
        self.energy += float(y.double().square().sum())
        self.elements += y.numel()
        probe = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        watched = output + probe
        if not watched.requires_grad:  # the network's own code computes without gradients here
            return output
        self._probes.append(probe)
        watched.register_hook(self._add)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return watched

    def _add(self, gradient: Tensor) -> None:
        self.gradient += float(gradient.double().square().sum())

    def take(self) -> list[Tensor]:
        """The probes of the last forward pass."""
        probes, self._probes = self._probes, []
        return probes

    def score(self, samples: int) -> float:
        """E‖g‖² E‖y‖² / D."""
        if not self.elements:
            return 0.0
        return (self.gradient / samples) * (self.energy / samples) / (self.elements / samples)


def _bias(module: nn.Module, output: Tensor) -> Tensor:
    """The bias in the shape of a convolution's or linear layer's output; zero where there is none."""
    bias = module.bias
    if not isinstance(bias, Tensor):
        return output.new_zeros(())
    axes = (1,) * (0 if isinstance(module, nn.Linear) else output.dim() - 2)
    return bias.detach().reshape(-1, *axes)

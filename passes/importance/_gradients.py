"""Gradients of the loss at the outputs of layers; no tensor of the program gets a ``grad``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdcompile.data.class_scores import of_tokens
from tdcompile.data.nesting import tensors_in
from tdcompile.data.objective import Objective
from tdcompile.data.task import Batch
from tdcompile.errors import InputError
from tdcompile.ir.modules import evaluating, input_of
from tdcompile.ir.program import Program
from tdcompile.ir.scoring import objective_of


class GradientMeter(ABC):
    """Measure one layer from its outputs and from the gradients of the loss at them.

    Args:
        module: the layer.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._probes: list[Tensor] = []

    @abstractmethod
    def observe(self, input: Tensor, output: Tensor) -> Callable[[Tensor], None]:
        """Look at one call of the layer; return the function that receives the gradient at its output."""

    def watch(
        self, module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
    ) -> Tensor:
        """Forward hook: add a zero to the output, so that a gradient flows there even if all weights are frozen."""
        receive = self.observe(input_of(arguments, named).detach(), output)
        probe = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        watched = output + probe
        if not watched.requires_grad:  # the network's own code computes without gradients here
            return output
        self._probes.append(probe)
        watched.register_hook(receive)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return watched

    def take(self) -> list[Tensor]:
        """Return the probes of the last forward pass, and forget them."""
        probes, self._probes = self._probes, []
        return probes


def backward_passes(
    program: Program,
    meters: Sequence[GradientMeter],
    batches: Iterable[Batch],
    generator: torch.Generator,
    score: str,
) -> Iterator[int]:
    """Run each batch forward and backward past the meters; yield its number of samples.

    The loss is that of the task, such as cross-entropy on the labels, or without targets cross-entropy on classes drawn
    from the network's own predictions. In a language model every token is a sample, and its class is drawn.

    Args:
        generator: draws the classes.
        score: name of the importance score, for messages.

    Raises:
        InputError: there are neither targets nor class scores, or the network returns NaN or Inf.
    """
    graph, objective = program.graph, objective_of(program)  # found before the hooks see a forward pass
    device = next((p.device for p in graph.parameters()), torch.device("cpu"))
    with ExitStack() as stack:
        stack.enter_context(evaluating(graph))
        for meter in meters:
            hook = meter.module.register_forward_hook(meter.watch, with_kwargs=True)
            stack.callback(hook.remove)
        for batch in batches:
            with torch.enable_grad():
                outputs = [*tensors_in(graph(*(x.to(device) for x in batch.inputs)))]
                count = len(outputs[0])
                loss = _loss(objective, outputs, batch, generator, score)
            probes = [probe for meter in meters for probe in meter.take()]
            if loss.requires_grad:  # a network may detach its output
                torch.autograd.grad(loss, probes, allow_unused=True)
            yield count


def _loss(
    objective: Objective | None, outputs: Sequence[Tensor], batch: Batch, generator: torch.Generator, score: str
) -> Tensor:
    """Return the loss summed over the samples, so that each sample has its own gradient."""
    scores = outputs[objective.output if objective else 0]
    if not bool(torch.isfinite(scores).all()):
        raise InputError("NaN or Inf appears in the network's output on the training samples")
    if of_tokens(batch.inputs, scores):
        scores = scores.flatten(0, 1)  # every token is a sample of the loss
    elif objective is not None and objective.trains and batch.targets is not None:
        return objective.loss(outputs, batch) * len(scores)
    if scores.dim() != 2:
        shape = "x".join(map(str, scores.shape))
        raise InputError(
            f"the importance '{score}' needs targets, or class scores (samples, classes); the network returns {shape}"
        )
    labels = torch.multinomial(scores.detach().softmax(1).cpu(), 1, generator=generator).squeeze(1)
    return F.cross_entropy(scores, labels.to(scores.device), reduction="sum")

"""``Distillation``: the loss of tuning, which learns from the dense network and from labels where there are any."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdcompile.core.decomposition import Decomposition
from tdcompile.core.registry import make
from tdcompile.data.task import Batch, Samples, classified
from tdcompile.errors import InputError
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode
from tdcompile.ir.layer import Layer
from tdcompile.ir.modules import outputs_of, tensors_in
from tdcompile.ir.plan import DENSE, RankPlan, Ranks
from tdcompile.training.distributed import mean_of_all
from tdcompile.training.mixed_precision import AUTOCAST, Precision

# Mean squares, as a part of those of the largest output, below which an output says nothing.
_MIN_ENERGY_SHARE = 1e-6
_ENERGY_SAMPLES = 32  # samples that they are taken over


class Distillation(nn.Module):
    """The loss: maps the compressed network's outputs and their batch to a scalar.

    The first output is the class scores, ``(N, classes)``, or another answer. The dense network computes in the
    precision that the compressed one trains in; the loss itself is fp32.

    Args:
        teacher: the dense network.
        temperature: T, of the class scores.
        labels: share of the label loss.
        layers: adds its loss.
        precision: what the compressed network trains in.
        others: of the outputs but the first, by place, the energy that their squared differences are divided by.
    """

    def __init__(
        self,
        teacher: nn.Module,
        temperature: float,
        labels: float,
        layers: LayerwiseLoss | None = None,
        precision: Precision = "fp32",
        others: Mapping[int, float] | None = None,
    ) -> None:
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)
        self.temperature, self.labels, self.layers = temperature, labels, layers
        self._computed_in, self._others = AUTOCAST[precision], dict(others or {})

    def forward(self, outputs: object, batch: Batch) -> Tensor:
        """(1 - labels) · T² · KL + labels · cross-entropy of scores, else squares over the energy; others', layers'.

        Args:
            outputs: a tensor, or a nesting of them.
        """
        given = [*tensors_in(outputs)]
        device = given[0].device.type
        with torch.no_grad(), torch.autocast(device, self._computed_in, self._computed_in is not None):
            wanted = [*tensors_in(self.teacher(*batch.inputs))]
        loss = self._of_answers(given[0], wanted[0].to(given[0].dtype), batch.labels)
        for place, energy in self._others.items():
            loss = loss + F.mse_loss(given[place], wanted[place].to(given[place].dtype)) / energy
        return loss if self.layers is None else loss + self.layers.take()

    def _of_answers(self, scores: Tensor, wanted: Tensor, labels: Tensor | None) -> Tensor:
        if not classified(scores):
            energy = wanted.square().mean()
            if torch.is_grad_enabled():  # all processes are at this step, with a share of a batch; one alone judges
                energy = mean_of_all(energy)
            return F.mse_loss(scores, wanted) / energy.clamp_min(torch.finfo(wanted.dtype).tiny)
        soft, target = ((x / self.temperature).log_softmax(1) for x in (scores, wanted))
        loss = F.kl_div(soft, target, reduction="batchmean", log_target=True) * self.temperature**2
        if self.labels and labels is not None:
            loss = (1 - self.labels) * loss + self.labels * F.cross_entropy(scores, labels)
        return loss


def output_energies(teacher: nn.Module, train: Samples, weight: float) -> tuple[dict[int, float], dict[int, str]]:
    """What ``others`` is for a network, by place in its outputs, and why some are left out.

    Whole and complex numbers are in neither. Left out is what is not finite or nearly zero, as masks are: what is left
    by rounding would outweigh all else.

    Args:
        teacher: the dense network.
        train: the energies are those of its first samples.
        weight: of these outputs in the loss; 0 leaves them all out.
    """
    if not weight:
        return {}, {}
    found, left = {}, {}
    device = next((p.device for p in teacher.parameters()), torch.device("cpu"))
    outputs = outputs_of(teacher, train.batch(range(min(len(train), _ENERGY_SAMPLES))).on(device).inputs)
    learnt = {place: y.double() for place, y in enumerate(outputs) if y.is_floating_point() and y.numel()}
    squares = {place: float(y.square().mean()) for place, y in learnt.items()}
    largest = max((square for square in squares.values() if math.isfinite(square)), default=0.0)
    for place, square in squares.items():
        if place == 0:
            continue
        if not math.isfinite(square):
            left[place] = "it is not finite everywhere"
        elif square <= _MIN_ENERGY_SHARE * largest:
            left[place] = "it is zero, or next to it"
        else:
            found[place] = square / weight
    return found, left


def excluded_output(who: str, place: int, why: str) -> Diagnostic:
    """What a pass says of an output that it does not learn from."""
    return Diagnostic(
        "warning", DiagnosticCode.OUTPUT_LEFT_OUT, f"{who}: output {place} has no part in the loss: {why}"
    )


@dataclass(frozen=True)
class _Pair:
    """A dense layer and what has taken its place: the module that gives its output, and its factors' parameters."""

    layer: Layer
    form: Decomposition
    ranks: Ranks
    factors: tuple[nn.Parameter, ...]
    dense: nn.Module
    last: nn.Module

    def weight(self) -> Tensor:
        """W, wherever the dense network is by now."""
        weight = self.dense.weight
        assert isinstance(weight, Tensor)  # it is a convolution or a linear layer
        return weight.detach()

    def approximation(self) -> Tensor:
        """W̃, of the shape of the dense weight."""
        shapes = [part.weight_shape for part in self.form.blueprint(self.layer, self.ranks)]
        return self.form.reconstruct(self.layer, [f.reshape(s) for f, s in zip(self.factors, shapes, strict=True)])


class LayerwiseLoss:
    """Layer by layer, outputs and weights drawn to those of the dense network (RENE, arXiv 2409.03555, equation 10).

    Σ_i over the replaced layers of ``weights`` · mean (W_i − W̃_i)² and ``outputs`` · mean (O_i − D_i)², means over
    elements as in the method's code, where the paper writes sums. The input of each layer is that of its own network.

    Args:
        teacher: the dense network.
        graph: the compressed one.
        plan: what was replaced by what.
        layers: of the dense network, by name.
        outputs: share of the layers' outputs in the loss.
        weights: share of their weights.

    Raises:
        InputError: a layer is not replaced in the way the plan says.
    """

    def __init__(
        self,
        teacher: nn.Module,
        graph: nn.Module,
        plan: RankPlan,
        layers: Mapping[str, Layer],
        outputs: float,
        weights: float,
    ) -> None:
        self._outputs, self._weights = outputs, weights
        self._pairs = []
        for name, choice in plan.choices.items():
            if choice.decomposition == DENSE:
                continue
            dense, new = teacher.get_submodule(name), graph.get_submodule(name)
            factors = tuple(p for key, p in new.named_parameters() if key.rpartition(".")[2] != "bias")
            form, layer = make(Decomposition, choice.decomposition), layers[name]
            if len(factors) != len(form.blueprint(layer, choice.ranks)):
                raise InputError(
                    f"the layer '{name}' is not as {choice.decomposition} left it: tune it without its layers"
                )
            chain = type(form).build is Decomposition.build  # of whatever class: a container restored has lost its own
            last = [*new.children()][-1] if chain else new
            self._pairs.append(_Pair(layer, form, choice.ranks, factors, dense, last))
        self._seen: dict[nn.Module, list[Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While it lasts, both networks' passes are seen."""

        def see(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            self._seen.setdefault(module, []).append(output.clone())  # what follows may work in place

        watched = [module for pair in self._pairs for module in (pair.dense, pair.last)] if self._outputs else []
        hooks = [module.register_forward_hook(see) for module in watched]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._seen.clear()

    def take(self) -> Tensor:
        """The loss of the last pass of both networks."""
        seen: Mapping[nn.Module, list[Tensor]] = self._seen
        self._seen = {}
        losses = []
        for pair in self._pairs:
            if self._weights:
                losses.append(self._weights * F.mse_loss(pair.approximation(), pair.weight()))
            for wanted, given in zip(seen.get(pair.dense, ()), seen.get(pair.last, ()), strict=True):
                losses.append(self._outputs * F.mse_loss(given.float(), wanted.float()))
        return torch.stack(losses).sum() if losses else torch.zeros(())

"""Losses of tuning: distillation from the dense network, the task's loss if there are targets, and layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdcompile.core.decomposition import Decomposition
from tdcompile.core.plan import RankPlan
from tdcompile.data.class_scores import classified, of_tokens
from tdcompile.data.nesting import tensors_in
from tdcompile.data.objective import Objective, has_targets
from tdcompile.data.task import Batch, Samples
from tdcompile.errors import InputError
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode
from tdcompile.ir.layer import Layer, Ranks
from tdcompile.ir.modules import outputs_of
from tdcompile.ir.program import Program
from tdcompile.ir.scoring import objective_of
from tdcompile.training.distributed import mean_of_all
from tdcompile.training.mixed_precision import AUTOCAST, Precision

# An output whose mean square is a smaller share of the largest output's carries rounding noise only.
_MIN_ENERGY_SHARE = 1e-6
_ENERGY_SAMPLES = 32  # number of samples for the mean squares of the outputs
_REMEMBERED_BYTES = 2**28  # upper bound on the answers that ``RememberedAnswers`` keeps


@dataclass(frozen=True)
class ScoredOutputs:
    """The outputs that tuning trains.

    Attributes:
        objective: the task's loss, and the index of the scored output; None scores the first output without targets.
        others: energy by index of every other output that is trained; divides that output's squared error.
    """

    objective: Objective | None = None
    others: Mapping[int, float] = field(default_factory=dict)

    @property
    def place(self) -> int:
        """Index of the scored output."""
        return self.objective.output if self.objective else 0


class Distillation(nn.Module):
    """Loss that maps the compressed network's outputs and their batch to a scalar.

    The scored output holds class scores along one axis, or other values. The dense network computes in the precision
    of the training; the loss itself is fp32.

    Args:
        teacher: the dense network.
        temperature: T, the divisor of the class scores.
        labels: share of the task's loss, where there are targets.
        layers: a layerwise loss to add.
        precision: precision in which the compressed network trains.
        scored: the outputs that are trained.
    """

    def __init__(
        self,
        teacher: nn.Module,
        temperature: float,
        labels: float,
        layers: LayerwiseLoss | None = None,
        precision: Precision = "fp32",
        scored: ScoredOutputs | None = None,
    ) -> None:
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)
        self.temperature, self.labels, self.layers = temperature, labels, layers
        self._computed_in, self._scored = AUTOCAST[precision], scored or ScoredOutputs()

    def forward(self, outputs: object, batch: Batch) -> Tensor:
        """Return (1 - labels) · T² · KL + labels · the task's loss, plus the losses of other outputs and of layers.

        KL is along the axis of the class scores. An output without class scores has its squared error over the
        teacher's energy instead.

        Args:
            outputs: a tensor, or a nesting of them.
        """
        given = [*tensors_in(outputs)]
        device = given[0].device.type
        with torch.no_grad(), torch.autocast(device, self._computed_in, self._computed_in is not None):
            wanted = [*tensors_in(self.teacher(*batch.inputs))]
        place, objective = self._scored.place, self._scored.objective
        loss = self._of_answers(given[place], wanted[place].to(given[place].dtype), batch)
        if self.labels and objective is not None and objective.trains and has_targets(objective, batch):
            loss = (1 - self.labels) * loss + self.labels * objective.loss(given, batch)
        for place, energy in self._scored.others.items():
            loss = loss + F.mse_loss(given[place], wanted[place].to(given[place].dtype)) / energy
        return loss if self.layers is None else loss + self.layers.take()

    def _of_answers(self, scores: Tensor, wanted: Tensor, batch: Batch) -> Tensor:
        axis = class_axis(self._scored.objective, batch, scores)
        if axis is None:
            energy = wanted.square().mean()
            if torch.is_grad_enabled():  # in training all processes are at this step; the first alone evaluates
                energy = mean_of_all(energy)
            return F.mse_loss(scores, wanted) / energy.clamp_min(torch.finfo(wanted.dtype).tiny)
        if scores.shape[axis] == 1:  # one score for two classes: that of the other is 0
            scores, wanted = (torch.cat((torch.zeros_like(x), x), axis) for x in (scores, wanted))
        soft, target = ((x / self.temperature).log_softmax(axis) for x in (scores, wanted))
        divergence = F.kl_div(soft, target, reduction="sum", log_target=True) * scores.shape[axis] / scores.numel()
        return divergence * self.temperature**2


def class_axis(objective: Objective | None, batch: Batch, scores: Tensor) -> int | None:
    """Return the axis of the class scores in the scored output; None if it holds other values, or probabilities."""
    if objective is not None and objective.class_axis is not None:
        return objective.kind.logits_axis(scores)
    if objective is None and classified(scores):
        return 1
    return 2 if of_tokens(batch.inputs, scores) else None


def scored_outputs(program: Program, train: Samples, weight: float) -> tuple[ScoredOutputs, dict[int, str]]:
    """Return the outputs that tuning trains, and why some are excluded, by index; see ``output_energies``."""
    scored = ScoredOutputs(objective_of(program))
    energies, left = output_energies(program.dense, train, weight, scored.place)
    return replace(scored, others=energies), left


def output_energies(
    teacher: nn.Module, train: Samples, weight: float, scored: int = 0
) -> tuple[dict[int, float], dict[int, str]]:
    """Return the energies of all outputs but the scored one, and why some are excluded, both by output index.

    An output that is not finite or nearly zero, as masks are, is excluded: its rounding noise would outweigh all else.
    Integer and complex outputs are in neither result.

    Args:
        teacher: the dense network.
        train: samples, the first of which give the energies.
        weight: weight of these outputs in the loss; 0 excludes all of them.
        scored: index of the scored output.
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
        if place == scored:
            continue
        if not math.isfinite(square):
            left[place] = "it is not finite everywhere"
        elif square <= _MIN_ENERGY_SHARE * largest:
            left[place] = "it is zero, or next to it"
        else:
            found[place] = square / weight
    return found, left


def excluded_output(who: str, place: int, why: str) -> Diagnostic:
    """Return a pass's note on an output that it does not train on."""
    return Diagnostic(
        "warning", DiagnosticCode.OUTPUT_LEFT_OUT, f"{who}: output {place} has no part in the loss: {why}"
    )


@dataclass(frozen=True)
class _Pair:
    """A dense layer and its replacement.

    Attributes:
        factors: parameters of the replacement, in the order of the blueprint.
        dense: the layer in the dense network.
        last: the module of the compressed network that returns the layer's output.
    """

    layer: Layer
    form: Decomposition
    ranks: Ranks
    factors: tuple[nn.Parameter, ...]
    dense: nn.Module
    last: nn.Module

    def weight(self) -> Tensor:
        """Return W, on the current device of the dense network."""
        weight = self.dense.weight
        assert isinstance(weight, Tensor)  # every dense layer is a convolution or a linear layer
        return weight.detach()

    def approximation(self) -> Tensor:
        """Return W̃, in the shape of the dense weight."""
        shapes = [part.weight_shape for part in self.form.blueprint(self.layer, self.ranks)]
        return self.form.reconstruct(self.layer, [f.reshape(s) for f, s in zip(self.factors, shapes, strict=True)])


class RememberedAnswers(nn.Module):
    """A network in eval mode that several runs ask the same batches in the same order.

    The first run computes its answers, at most 256 MB of which are kept; later runs read them.

    Args:
        network: the network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._answers: list[Any] = []
        self._asked = self._bytes = 0

    def restart(self) -> None:
        """Begin with the first batch again."""
        self._asked = 0

    def forward(self, *inputs: Tensor) -> Any:
        """Return the network's answers to the next batch."""
        place, self._asked = self._asked, self._asked + 1
        if place < len(self._answers):
            return self._answers[place]
        answer = self.network(*inputs)
        self._bytes += sum(y.nbytes for y in tensors_in(answer))
        if place == len(self._answers) and self._bytes <= _REMEMBERED_BYTES:
            self._answers.append(answer)
        return answer


class LayerwiseLoss:
    """Loss that pulls each layer's output and weight to the dense network's (RENE, arXiv 2409.03555, equation 10).

    Σ_i over the replaced layers of ``weights`` · mean (W_i − W̃_i)² and ``outputs`` · mean (O_i − D_i)². Means are over
    elements, as in the method's code; the paper writes sums. Each layer has the input that its own network gives it.

    Args:
        teacher: the dense network.
        graph: the compressed network.
        plan: the replaced layers with their decompositions and ranks.
        layers: layers of the dense network, by name.
        outputs: share of the layers' outputs in the loss.
        weights: share of the layers' weights in the loss.

    Raises:
        InputError: a layer does not have the factors that the plan says.
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
            if choice.is_dense:
                continue
            dense, new = teacher.get_submodule(name), graph.get_submodule(name)
            factors = tuple(p for key, p in new.named_parameters() if key.rpartition(".")[2] != "bias")
            form, layer = choice.decomposition, layers[name]
            if len(factors) != len(form.blueprint(layer, choice.ranks)):
                raise InputError(f"the layer '{name}' is not as {choice.form} left it: tune it without its layers")
            chain = type(form).build is Decomposition.build  # ``new`` may be restored, without its class
            last = [*new.children()][-1] if chain else new
            self._pairs.append(_Pair(layer, form, choice.ranks, factors, dense, last))
        self._seen: dict[nn.Module, list[Tensor]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record the layer outputs of both networks for a while, through hooks."""

        def see(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            self._seen.setdefault(module, []).append(output.clone())  # later operators may work in place

        watched = [module for pair in self._pairs for module in (pair.dense, pair.last)] if self._outputs else []
        hooks = [module.register_forward_hook(see) for module in watched]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._seen.clear()

    def take(self) -> Tensor:
        """Return the loss of the last forward pass of both networks, and drop its record."""
        seen: Mapping[nn.Module, list[Tensor]] = self._seen
        self._seen = {}
        losses = []
        for pair in self._pairs:
            if self._weights:
                losses.append(self._weights * F.mse_loss(pair.approximation(), pair.weight()))
            for wanted, given in zip(seen.get(pair.dense, ()), seen.get(pair.last, ()), strict=True):
                losses.append(self._outputs * F.mse_loss(given.float(), wanted.float()))
        return torch.stack(losses).sum() if losses else torch.zeros(())

"""``Distillation``: the loss of tuning, which learns from the dense network and from labels where there are any."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdcompile.amp import AUTOCAST, Precision
from tdcompile.decomposition import Decomposition
from tdcompile.errors import InputError
from tdcompile.layer import Layer
from tdcompile.processes import mean_of_all
from tdcompile.ranks import DENSE, RankPlan, Ranks
from tdcompile.registry import make
from tdcompile.surgery import tensors_in
from tdcompile.task import Batch, classified


class Distillation(nn.Module):
    """The loss: maps the compressed network's outputs and their batch to a scalar.

    The first output is the class scores, ``(N, classes)``, or another answer; of the others all that are floating point
    are drawn to the dense network's, by their squared difference over the energy. The dense network computes in the
    precision that the compressed one trains in; the loss itself is fp32.
    """

    def __init__(
        self,
        teacher: nn.Module,
        temperature: float,
        labels: float,
        layers: Layerwise | None = None,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)
        self.temperature, self.labels, self.layers = temperature, labels, layers
        self._computed_in = AUTOCAST[precision]

    def forward(self, outputs: object, batch: Batch) -> Tensor:
        """(1 - labels) · T² · KL + labels · cross-entropy of scores, squares over the energy of the rest; the layers'.

        Args:
            outputs: a tensor, or a nesting of them.
        """
        given = [*tensors_in(outputs)]
        device = given[0].device.type
        with torch.no_grad(), torch.autocast(device, self._computed_in, self._computed_in is not None):
            wanted = [y.to(x.dtype) for x, y in zip(given, tensors_in(self.teacher(*batch.inputs)), strict=True)]
        losses = [self._of_answers(given[0], wanted[0], batch.labels)]
        losses += [_apart(x, y) for x, y in zip(given[1:], wanted[1:], strict=True) if _is_learnt(x)]
        loss = torch.stack(losses).sum()
        return loss if self.layers is None else loss + self.layers.take()

    def _of_answers(self, scores: Tensor, wanted: Tensor, labels: Tensor | None) -> Tensor:
        if not classified(scores):
            return _apart(scores, wanted)
        soft, target = ((x / self.temperature).log_softmax(1) for x in (scores, wanted))
        loss = F.kl_div(soft, target, reduction="batchmean", log_target=True) * self.temperature**2
        if self.labels and labels is not None:
            loss = (1 - self.labels) * loss + self.labels * F.cross_entropy(scores, labels)
        return loss


def _is_learnt(output: Tensor) -> bool:
    return output.is_floating_point() and output.numel() > 0


def _apart(given: Tensor, wanted: Tensor) -> Tensor:
    """The squared difference over the energy of what is wanted, where that is finite; masks hold infinities."""
    finite = wanted.isfinite()
    wanted, given = (torch.where(finite, x, 0) for x in (wanted, given))
    energy = wanted.square().mean()
    if torch.is_grad_enabled():  # all processes are at this step, and the batch is that of all; one alone judges
        energy = mean_of_all(energy)
    return F.mse_loss(given, wanted) / torch.where(energy > 0, energy, 1)


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


class Layerwise:
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

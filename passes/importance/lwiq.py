"""``lwiq``: the accuracy that each layer adds to a classifier imprinted on its activations (arXiv 2408.01534)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tdcompile.core.importance import Importance, normalised
from tdcompile.data.task import Batch, Samples
from tdcompile.errors import InputError
from tdcompile.ir.graph_edits import calls_of, module_at, only_user
from tdcompile.ir.program import Program, Site, sites
from tdcompile.support.options import Count, NonNegative, Positive
from tdcompile.support.progress import report_progress

# Modules and functions that belong to the layer before them: norm, activation, dropout.
_BEHIND = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm),
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.ELU, nn.Tanh, nn.Sigmoid),
    *(nn.Dropout, nn.Dropout2d, nn.Identity),
)
_ATEN = (
    *("relu", "relu_", "gelu", "silu", "silu_", "leaky_relu", "leaky_relu_", "hardswish", "hardswish_", "hardtanh"),
    *("hardtanh_", "elu", "elu_", "tanh", "tanh_", "sigmoid", "sigmoid_", "layer_norm", "group_norm"),
)
_BEHIND_CALLS = (
    *(F.relu, torch.relu, F.gelu, F.silu, F.leaky_relu, torch.tanh, torch.sigmoid, "relu", "relu_", "tanh"),
    *(F.relu6, F.hardswish, F.elu, F.layer_norm, F.group_norm),
    *(getattr(torch.ops.aten, name).default for name in _ATEN),
)


@dataclass(frozen=True)
class Lwiq(Importance):
    """Layer-wise imprinting: the gain in proxy accuracy over each layer, from one pass without gradients.

    A classifier is imprinted behind every layer's activation. Activations are averaged over a d x d grid,
    d = round(√(embedding / channels)); one or three axes take the root of that order, and tokens are averaged. The
    weight of a class is the normalised mean of its samples (Elkerdawy et al. 2020). The gain of a layer is the accuracy
    of its classifier on other samples, minus the accuracy at the layer's input. In a residual network the input of a
    block's first layer is the sum of the block before (this project's completion). The score is eps + gain / largest
    gain, with negative gains as zero, scaled to mean 1.

    Attributes:
        embedding: length of an activation's vector.
        samples: number of training samples to imprint; by default as many as calibration reads.
        judged: number of other samples that measure the accuracy, as a share of the imprinted ones.
        cosine: normalise activations too.
        reading: ``gain``, or the ``accuracy`` behind the layer.
        eps: the score of a layer without gain, before scaling.
    """

    name: ClassVar[str] = "lwiq"
    embedding: Count = 512
    samples: Count | None = None
    judged: Positive = 0.5
    cosine: bool = False
    reading: Literal["gain", "accuracy"] = "gain"
    eps: NonNegative = 0.1
    batch: Count = 128

    @torch.no_grad()
    def score(self, program: Program) -> Mapping[str, float]:
        """See ``Importance.score``.

        Raises:
            InputError: there are no labels, or a class has no imprinted sample.
        """
        imprinted, others = self._split(program)
        found = sites(program)
        points = {name: _points(program.graph, site) for name, site in found.items()}
        axes = {node: len(found[name].layer.kernel) for name, pair in points.items() for node in pair if node}
        proxies = {node: _Proxy(count, self.embedding, self.cosine) for node, count in axes.items()}
        total, done = len(imprinted) + len(others), 0
        for samples, imprint in ((imprinted, True), (others, False)):
            for batch in samples.batches(self.batch):
                _Tapped(program.graph, proxies, batch).run(*batch.inputs)
                done += len(batch.inputs[0])
                report_progress(done, total, "samples")
            for proxy in proxies.values() if imprint else ():
                proxy.settle(samples.classes or 0)
        chance = 1 / (imprinted.classes or 1)
        gains = {}
        for name, (before, behind) in points.items():
            if behind is None or not proxies[behind].seen or (before is not None and not proxies[before].seen):
                continue  # no tensor with one row for each sample: the layer has no gain
            level = proxies[before].accuracy if before else chance
            after = proxies[behind].accuracy
            gains[name] = after if self.reading == "accuracy" else max(after - level, 0.0)
        most = max(gains.values(), default=0.0) or 1.0
        known = normalised({name: self.eps + gain / most for name, gain in gains.items()})
        return {name: known.get(name, 1.0) for name in found}

    def _split(self, program: Program) -> tuple[Samples, Samples]:
        """Return training samples to imprint, and others that measure the accuracy."""
        train = program.task.train
        if train is None or train.classes is None:
            raise InputError(
                "the importance 'lwiq' imprints classes, and the data have no class numbers (N,) as targets: give such "
                "data, or take 'noise' or 'none'"
            )
        first = min(self.samples or program.task.calibrate, math.floor(len(train) / (1 + self.judged)))
        second = min(math.ceil(first * self.judged), len(train) - first)
        if first < 1 or second < 1:
            raise InputError(f"the importance 'lwiq' needs samples to imprint and others to judge by, not {len(train)}")
        order = torch.randperm(len(train), generator=program.generator(self.name)).tolist()
        return train.subset(order[:first]), train.subset(order[first : first + second])


@dataclass
class _Proxy:
    """An imprinted classifier.

    Attributes:
        axes: number of spatial axes of the activation, for a convolution; 0 for a linear layer, whose features are the
            last axis.
    """

    axes: int
    embedding: int
    cosine: bool
    sums: dict[int, Tensor] = field(default_factory=dict)
    weights: Tensor | None = None
    right: int = 0
    seen: int = 0

    @property
    def accuracy(self) -> float:
        """The accuracy on the samples seen so far."""
        return self.right / max(self.seen, 1)

    def take(self, x: Tensor, labels: Tensor) -> None:
        """Add activations to their classes; after ``settle``, classify them."""
        z = self._embedded(x, len(labels))
        if z is None:
            return
        if self.weights is None:
            for label in set(labels.tolist()):
                here = z[labels == label].double().sum(0)
                self.sums[label] = self.sums[label] + here if label in self.sums else here
        elif self.weights.numel():
            self.right += int(((z @ self.weights.T).argmax(1) == labels).sum())
            self.seen += len(labels)

    def settle(self, classes: int) -> None:
        """Set the weights to the normalised class means; normalised sums are the same."""
        if not self.sums:
            self.weights = torch.empty(0)  # no activation has arrived
            return
        missing = [label for label in range(classes) if label not in self.sums]
        if missing:
            raise InputError(
                f"the importance 'lwiq' found no sample of class {missing[0]} among those it imprints: "
                "raise --calibrate or give lwiq{samples=…}"
            )
        self.weights = F.normalize(torch.stack([self.sums[label] for label in range(classes)]), dim=1).float()
        self.sums = {}

    def _embedded(self, x: Tensor, count: int) -> Tensor | None:
        """Return ``(N, about embedding at most)``; average tokens, and axes that the network folded into the batch."""
        if x.ndim < 2 or len(x) % count or (self.axes and x.ndim != self.axes + 2):
            return None
        if self.axes:
            side = max(1, round((self.embedding / x.shape[1]) ** (1 / self.axes)))
            pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[self.axes - 1]
            x = pool(x, [min(side, size) for size in x.shape[2:]])  # type: ignore[arg-type]  # a size for each axis
        elif x.ndim > 2:
            x = x.flatten(1, -2).mean(1)
        z = x.flatten(1).float()
        z = z.view(count, -1, z.shape[1]).mean(1)
        return F.normalize(z, dim=1) if self.cosine else z


class _Tapped(fx.Interpreter):
    """Run the network once and pass the values of some nodes to their proxies."""

    def __init__(self, graph: fx.GraphModule, proxies: Mapping[fx.Node, _Proxy], batch: Batch) -> None:
        super().__init__(graph)
        assert batch.targets is not None  # ``_split`` checks it
        self._proxies, self._labels = proxies, batch.targets

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n in self._proxies and isinstance(value, Tensor):
            self._proxies[n].take(value, self._labels)
        return value


def _points(graph: fx.GraphModule, site: Site) -> tuple[fx.Node | None, fx.Node | None]:
    """Return the node that a layer reads and the node behind its activation; None for an input of the network.

    A layer inside an untraced module takes the nodes of that module.
    """
    calls: Sequence[fx.Node] = calls_of(graph, site.name if site.inner is None else site.inner)
    if not calls:
        return None, None
    before, behind = next(iter(calls[0].all_input_nodes), None), calls[-1]  # also if it is passed by keyword
    while (follower := only_user(behind)) is not None and _is_behind(graph, follower):
        behind = follower
    if before is None or before.op == "placeholder":
        return None, behind
    return before, behind


def _is_behind(graph: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(module_at(graph, node), _BEHIND) or node.target in _BEHIND_CALLS

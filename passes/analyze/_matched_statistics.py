"""Samples whose values at the batch-norm layers have the mean and deviation that the layers keep from training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tdcompile.errors import InputError
from tdcompile.ir.modules import input_of

# Scales of the first noise that are tried: networks take pixels from 0 to 1, from 0 to 255, or normalised ones.
_SCALES = tuple(4.0**power for power in range(-4, 5))
# Added to the squared scale of a channel: a channel that batch norm scales to nothing has no say.
_FAINT = 1e-3


@dataclass(frozen=True)
class Drawing:
    """How samples are drawn.

    Attributes:
        shape: shape of one sample.
        axes: axes of a batch along which samples are smooth, such as height and width; empty for features.
        shift: a sample is optimised with so many more values along these axes, and cut out at random in every step.
        mirrored: whether half of the steps see the samples mirrored along the last axis.
        steps: steps of Adam.
        rate: its first learning rate, in units of the first noise; it falls to 0 by a cosine.
        dtype: dtype of the network's input.
        scale: deviation of the first noise.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    shift: int
    mirrored: bool
    steps: int
    rate: float
    dtype: torch.dtype
    scale: float = 1.0

    def noise(self, count: int, generator: torch.Generator) -> Tensor:
        """Return noise of deviation 1 for so many samples, with the values that shifts need."""
        larger = [size + self.shift * (axis in self.axes) for axis, size in enumerate(self.shape, start=1)]
        return torch.randn(count, *larger, generator=generator).to(self.dtype)


@dataclass
class Statistics:
    """Hooks on batch-norm layers that read the mean and variance of each channel of their inputs."""

    norms: Sequence[_BatchNorm]
    seen: dict[_BatchNorm, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Read the inputs of the layers inside the context."""
        hooks = [norm.register_forward_pre_hook(self._read, with_kwargs=True) for norm in self.norms]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _read(self, norm: nn.Module, arguments: Sequence[Tensor], named: Mapping[str, Tensor]) -> None:
        assert isinstance(norm, _BatchNorm)  # only these have the hook
        values = input_of(arguments, named).transpose(0, 1).flatten(1)
        variance, mean = torch.var_mean(values, 1, correction=0)
        self.seen.setdefault(norm, []).append((mean, variance))

    def take(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return, for each layer that was called, how far its channels are off, and forget what was read.

        Several calls of a layer are pooled.

        Returns:
            The shift of the mean in standard deviations of training, the ratio of the deviations less 1, and the
            layer's squared scale, each ``(C,)``.
        """
        found = []
        for norm, calls in self.seen.items():
            assert norm.running_mean is not None  # ``trained_norms`` has looked
            assert norm.running_var is not None
            mean = torch.stack([mean for mean, _ in calls]).mean(0)
            square = torch.stack([variance + m.square() for m, variance in calls]).mean(0)
            trained = norm.running_var + norm.eps
            tiny = torch.finfo(mean.dtype).tiny
            ratio = ((square - mean.square()).clamp_min(0) / trained + tiny).sqrt()  # no infinite slope at 0
            scale = torch.ones_like(mean) if norm.weight is None else norm.weight.detach().square()
            found.append(((mean - norm.running_mean) / trained.sqrt(), ratio - 1, scale))
        self.seen.clear()
        return found

    def loss(self) -> Tensor:
        """Return the squared differences behind batch norm, over the squared scales: mean over channels, then layers.

        Raises:
            InputError: no batch-norm layer was called.
        """
        terms = [
            (scale / (scale + _FAINT) * (shift.square() + spread.square())).mean()
            for shift, spread, scale in self.take()
        ]
        if not terms:
            raise InputError("data=synthetic: the network calls none of its batch-norm layers; give real samples")
        return torch.stack(terms).mean()


def draw_matched(
    graph: nn.Module,
    norms: Sequence[_BatchNorm],
    drawing: Drawing,
    count: int,
    generator: torch.Generator,
    told: Callable[[], None],
) -> Tensor:
    """Optimise ``count`` samples from noise so that their statistics over the batch are those from training.

    Cai et al., 2020 (ZeroQ, arXiv 2001.00281), match the statistics of each image. Statistics over the batch leave
    images different from each other, which real ones are too; they gave better factors.

    Args:
        graph: the network in eval mode; its weights get no gradient.
        norms: the layers whose statistics are matched.
        generator: for the noise and the shifts.
        told: called after each step.

    Returns:
        The samples, ``(count, *shape)``.

    Raises:
        InputError: no gradient reaches the input, or the values are not finite.
    """
    canvas = (drawing.scale * drawing.noise(count, generator)).requires_grad_()
    rate, statistics = drawing.rate * drawing.scale, Statistics(norms)
    adam = torch.optim.Adam([canvas], lr=rate)
    with statistics.watching():
        for step in range(drawing.steps):
            adam.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / drawing.steps)) / 2
            with torch.enable_grad():
                graph(_view(canvas, drawing, generator))
                loss = statistics.loss()
            slope = torch.autograd.grad(loss, [canvas], allow_unused=True)[0] if loss.requires_grad else None
            if slope is None:
                raise InputError(
                    "data=synthetic: no gradient of the batch-norm statistics reaches the network's input; give real "
                    "samples"
                )
            if not bool(torch.isfinite(slope).all()):
                raise InputError(
                    "data=synthetic: the gradient of the batch-norm statistics is not finite; give real samples"
                )
            canvas.grad = slope
            adam.step()
            told()
    return _view(canvas.detach(), drawing, None).contiguous()


@torch.no_grad()
def best_scale(
    graph: nn.Module, norms: Sequence[_BatchNorm], drawing: Drawing, count: int, generator: torch.Generator
) -> float:
    """Return the scale at which the noise of ``count`` samples comes nearest to the statistics."""
    noise, statistics = _view(drawing.noise(count, generator), drawing, None), Statistics(norms)

    def loss(scale: float) -> float:
        graph(scale * noise)
        found = float(statistics.loss())
        return found if math.isfinite(found) else math.inf

    with statistics.watching():
        return min(_SCALES, key=loss)


def _view(canvas: Tensor, drawing: Drawing, generator: torch.Generator | None) -> Tensor:
    """Return the samples of a canvas: smooth, and cut out at random places, or in the middle without a generator."""
    samples = canvas
    for axis in drawing.axes:
        samples = _smooth(samples, axis)
        start = drawing.shift // 2
        if generator is not None:
            start = int(torch.randint(0, drawing.shift + 1, (), generator=generator))
        samples = samples.narrow(axis, start, drawing.shape[axis - 1])
    mirrored = generator is not None and drawing.mirrored and bool(torch.rand((), generator=generator) < 0.5)
    return samples.flip(-1) if mirrored else samples.clone()  # the network may write into its input


def _smooth(x: Tensor, axis: int) -> Tensor:
    """Average each value with its neighbours by 1:2:1; the border is repeated."""
    size = x.shape[axis]
    padded = torch.cat([x.narrow(axis, 0, 1), x, x.narrow(axis, size - 1, 1)], axis)
    return (padded.narrow(axis, 0, size) + 2 * x + padded.narrow(axis, 2, size)) / 4

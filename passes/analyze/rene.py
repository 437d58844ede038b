"""``rene``: search ranks in a continuous space by alternating steps (RENE, arXiv 2409.03555)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.func import functional_call

from tdcompile.core.decomposition import Decomposition
from tdcompile.core.passes import AnalysisPass
from tdcompile.core.plan import RankPlan
from tdcompile.core.registry import make
from tdcompile.data.nesting import tensors_in
from tdcompile.data.task import Batch
from tdcompile.errors import InputError, TdcompileError
from tdcompile.ir.facts import Fact
from tdcompile.ir.program import Program, Site, kept_dense, sites
from tdcompile.ir.scoring import objective_of
from tdcompile.passes.analyze._rene_ranks import WHOLE, SingleRanks
from tdcompile.passes.analyze._rene_relaxation import Interval, Relaxed, intervals, rank_loss
from tdcompile.support.options import Count, NonNegative, Positive
from tdcompile.support.progress import report_progress

_CLIP = 5.0  # without it a search over CP diverges
_STEEPEST, _HALVINGS = 1e6, 30  # of the projection: largest multiplier, number of bisections
_TIE = 4e-3  # weight of the rank loss under a budget: of two equally good ranks the smaller one wins
_CONVOLUTIONS = {"tt": "tucker2", "cp": "cp", "cp4": "cp4"}


@dataclass(frozen=True)
class Rene(AnalysisPass):
    """Search ranks by relaxation: RENE, with its rank loss or under the program's budget.

    The weight of every layer is a mixture of candidates of different ranks. Weight steps lower the logarithm of
    Σ ‖W − Σ p_r W^(r)‖² / ‖W‖² times the rank loss. Coefficient steps lower the same (``recon``), or replace the error
    by the loss on training samples (``data``). The winner of each layer is the centre of a finer interval, down to
    steps of 1.

    The paper's ``tt`` of a convolution (1x1, k x k, 1x1 at one rank) has the graph of Tucker-2 at tied ranks.
    ``tucker2`` fits better at equal ranks and is used instead. Linear layers and 1x1 convolutions become ``svd``.
    Our completions: errors are relative to each layer's weight; ``single`` makes each branch accurate alone; with
    ``budget`` a share is the layer's cost, dense is one more candidate, mixtures are projected to the budget after
    each step, and the plan is made to fit.

    Attributes:
        form: the decomposition of convolutions: ``tt``, ``cp`` or ``cp4``.
        mode: the loss of coefficient steps, see above.
        step: first distance between candidate ranks; each refinement divides it by ``factor``.
        reach: extent of a finer interval to either side, in steps; 0.5 in the paper.
        steps: pairs of steps in each refinement, after ``warmup`` weight steps.
        alternate: false takes both steps together from one loss, for comparison.
        lr_weights, lr_coefficients: learning rates of the two steps; 1e-3 for both in the paper.
            ``lr_coefficients=none`` means 1 under the budget and 0.1 without it.
        gamma, beta: parameters of the rank loss; in the paper's product γ moves no minimum.
        single: weight of Σ p_r ‖W − W^(r)‖² in the error.
        tolerance: squared relative error of a layer below which more rank gains little. Without it, the search
            without a budget fits the noise of the weights, because its product falls as long as the error does.
        budget: false searches without a budget, as the paper does. The program's budget still names the costs to count,
            and ``compile`` checks the result against it.
        samples: number of training samples for coefficient steps with ``mode=data``; weight steps need none.
    """

    name: ClassVar[str] = "rene"
    gives: ClassVar[tuple[type[Fact], ...]] = (RankPlan,)
    form: Literal["tt", "cp", "cp4"] = "tt"
    mode: Literal["recon", "data"] = "recon"
    step: Count = 10
    factor: Annotated[int, Field(ge=2)] = 10
    reach: Positive = 1.0
    steps: Count = 100
    warmup: Annotated[int, Field(ge=0)] = 20
    alternate: bool = True
    lr_weights: NonNegative = 1e-3
    lr_coefficients: NonNegative | None = None
    gamma: NonNegative = 0.4
    beta: NonNegative = 0.8
    single: NonNegative = 1.0
    tolerance: NonNegative = 1e-3
    budget: bool = True
    samples: Count = 1024
    batch: Count = 64

    def analyze(self, program: Program) -> RankPlan:
        """Return the plan. A layer stays dense if no form accepts it or the search finds no cheaper rank.

        Raises:
            InputError: ``mode=data`` without labelled training samples.
            BudgetError: not even the smallest ranks meet the budget.
            TdcompileError: the search diverged.
        """
        found = sites(program)
        kept = kept_dense(program, found)
        forms = {n: form for n, site in found.items() if n not in kept and (form := self._form(site)) is not None}
        prices = SingleRanks(program, forms)
        if self.budget:
            prices.reachable(forms)
        ends = {name: prices.end(name) if self.budget else prices.most(name) for name in forms}
        chosen = {name: WHOLE for name, end in ends.items() if end == WHOLE}
        searched = [name for name, end in ends.items() if end > (WHOLE if self.budget else 1)]
        grids = {name: intervals(ends[name], self.step) for name in searched}
        settled, generator, rounds = _Settled({}, {}), program.generator(self.name), 0
        while grids:
            relaxed = [self._relaxed(found[name], prices, grid) for name, grid in grids.items()]
            self._search(program, relaxed, prices, settled, generator, rounds)
            chosen |= {layer.site.name: layer.chosen() for layer in relaxed}
            finer = {
                (name := layer.site.name): grids[name].around(layer.middle(), self.factor, ends[name], self.reach)
                for layer in relaxed
            }
            grids = {name: grid for name, grid in finer.items() if grid is not None}
            for layer in relaxed:
                if (name := layer.site.name) not in grids:
                    settled.take(layer, prices.share(name, chosen[name]))
            rounds += 1
        return prices.plan(prices.fitted(chosen) if self.budget else chosen, kept, str(self.spec()))

    def _form(self, site: Site) -> Decomposition | None:
        for text in (_CONVOLUTIONS[self.form], "svd"):
            form = make(Decomposition, text)
            if form.refuse(site.layer) is None:
                return form
        return None

    def _relaxed(self, site: Site, prices: SingleRanks, grid: Interval) -> Relaxed:
        candidates, name = grid.ranks(), site.name
        if self.budget:
            candidates = [*(rank for rank in candidates if prices.share(name, rank) < 1), WHOLE]
            shares = [prices.share(name, rank) for rank in candidates]
        else:
            shares = [rank / max(candidates) for rank in candidates]
        return Relaxed(site, prices.forms[name], partial(prices.ranks, name), candidates, shares)

    def _search(
        self,
        program: Program,
        layers: Sequence[Relaxed],
        prices: SingleRanks,
        settled: _Settled,
        generator: torch.Generator,
        rounds: int,
    ) -> None:
        weights = [p for layer in layers for p in layer.factors.parameters()]
        if not weights:
            return  # dense is the only candidate of each layer
        coefficients = [layer.coefficients for layer in layers]
        one, other = (
            torch.optim.SGD(group, rate, momentum=0.9, nesterov=True)
            for group, rate in ((weights, self.lr_weights), (coefficients, self._rate))
        )
        data = self._data(program, generator) if self.mode == "data" else None
        for done in range(self.warmup + self.steps):
            turns = [one] if done < self.warmup else [one, other] if self.alternate else [None]
            for turn in turns:
                for optimizer in (one, other):
                    optimizer.zero_grad()
                loss = self._loss(layers, settled, None if turn is one else data)
                if not bool(torch.isfinite(loss)):
                    raise TdcompileError(f"the rank search diverged: its loss is {loss.item()}; lower the rates")
                torch.autograd.backward(loss)
                for optimizer, group in ((one, weights), (other, coefficients)):
                    if turn in (None, optimizer):
                        torch.nn.utils.clip_grad_norm_(group, _CLIP)
                        optimizer.step()
                if self.budget and turn is not one:
                    self._project(layers, prices, settled)
            report_progress(done + 1, self.warmup + self.steps, f"refinement {rounds + 1}")
        for layer in layers:
            _ = layer.gates  # raises if a coefficient is not finite, which ``argmax`` would take for the smallest rank

    @property
    def _rate(self) -> float:
        if self.lr_coefficients is not None:
            return self.lr_coefficients
        return 1.0 if self.budget else 0.1

    def _loss(self, layers: Sequence[Relaxed], settled: _Settled, data: _Batches | None) -> Tensor:
        mixed, errors, singles = zip(*(layer() for layer in layers), strict=True)
        error = torch.stack(errors).sum() + self.single * torch.stack(singles).sum()
        if data is not None:
            moving = {f"{layer.site.name}.weight": w for layer, w in zip(layers, mixed, strict=True)}
            error = data.loss({**settled.weights, **moving})
        shares = [layer.share() for layer in layers]
        price = rank_loss(shares, self.gamma, self.beta)
        if not self.budget:
            return (
                error + len(layers) * self.tolerance
            ).log() + price.log()  # the logarithm has the minima of the product
        return error + _TIE * price

    @torch.no_grad()
    def _project(self, layers: Sequence[Relaxed], prices: SingleRanks, settled: _Settled) -> None:
        """Project the mixtures to the budget: take the nearest ones by Kullback-Leibler divergence.

        These are p_r · exp(−λ · cost_r) with one λ for all layers, found by bisection.
        """
        weights = [prices.part(layer.site.name) for layer in layers]
        start = [layer.coefficients.clone() for layer in layers]

        def keeps(price: float) -> bool:
            for layer, weight, before in zip(layers, weights, start, strict=True):
                layer.coefficients.copy_(before - price * weight * layer.shares)
            return float(prices.load({layer.site.name: layer.share() for layer in layers}, settled.shares)) <= 1

        low, high = 0.0, 1.0
        if keeps(low):
            return
        while not keeps(high) and high < _STEEPEST:
            low, high = high, 2 * high
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if keeps(middle) else (middle, high)
        keeps(high)

    def _data(self, program: Program, generator: torch.Generator) -> _Batches:
        train = program.task.train
        objective = objective_of(program)
        if train is None or objective is None or not objective.trains or train.batch([0]).targets is None:
            raise InputError("rene{mode=data} needs targets and a loss: give data with targets, or use mode=recon")
        return _Batches(program, list(train.shuffled(generator).batches(self.batch, limit=self.samples)))


@dataclass(frozen=True)
class _Settled:
    """Layers whose search has ended: their cost as a share of dense, and the weights of those that are replaced."""

    shares: dict[str, float]
    weights: dict[str, Tensor]

    def take(self, layer: Relaxed, share: float) -> None:
        """Add a layer at its chosen rank."""
        self.shares[layer.site.name] = share
        if share < 1:
            weight = layer.branches()[layer.candidates.index(layer.chosen())]
            self.weights[f"{layer.site.name}.weight"] = weight.detach()


class _Batches:
    """The task's loss of the network with given weights, batch by batch."""

    def __init__(self, program: Program, batches: list[Batch]) -> None:
        self._graph, self._batches, self._next = program.graph, batches, 0
        self._objective = objective_of(program)

    def loss(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the loss on the next batch."""
        batch = self._batches[self._next % len(self._batches)]
        self._next += 1
        outputs = [*tensors_in(functional_call(self._graph, dict(weights), batch.copies()))]
        assert self._objective is not None  # ``_data`` has looked
        return self._objective.loss(outputs, batch)

"""``propose``: for each layer every decomposition and rank worth choosing, with its error and its price."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from tdcompile.calibration import Baseline, Calibration
from tdcompile.decomposition import Decomposition
from tdcompile.facts import Fact
from tdcompile.kinds import AnalysisPass, tick
from tdcompile.layer import Layer, Refusal
from tdcompile.program import Program, Site, parameters_of, sites
from tdcompile.ranks import DENSE, Candidate, Candidates, Spectrum
from tdcompile.registry import find, make
from tdcompile.target import Cost, CostModel, total


@dataclass(frozen=True)
class Propose(AnalysisPass):
    """Candidates of all layers, the dense one first.

    Attributes:
        decompose: names of decompositions to consider; empty is all of them.
        grain: ranks are multiples of it; none takes the target's grain under a latency budget and 1 otherwise.
        cost: the cost model that counts.
        timer: the cost model that measures, asked under a latency budget alone.
        spectra: also give the singular values of every weight, for the selectors that ask for them.
    """

    name: ClassVar[str] = "propose"
    gives: ClassVar[tuple[type[Fact], ...]] = (Candidates,)
    decompose: tuple[str, ...] = ()
    grain: int | None = None
    cost: str = "analytic"
    timer: str = "measured"
    spectra: bool = False

    def analyze(self, program: Program) -> Candidates:
        """Errors come from one spectrum a layer where the form has one; prices from the cost models."""
        forms = [make(Decomposition, text) for text in self.decompose or find(Decomposition)]
        found = sites(program)
        refusals = dict(_kept_dense(program, found))
        options: dict[str, list[Candidate]] = {}
        for done, (name, site) in enumerate(found.items(), start=1):
            tick(done, len(found), name)
            chains = [] if name in refusals else self._candidates(program, site, forms)
            options[name] = [Candidate(DENSE, (), 0.0, Cost()), *chains]
            if not chains and name not in refusals:
                refusals[name] = _refused(name, site, forms)
        priced = self._price(program, found, options)
        dense = total([candidates[0].cost for candidates in priced.values()])
        return Candidates(
            {name: tuple(candidates) for name, candidates in priced.items()},
            rest=self._whole(program, dense) - dense,
            spectra={name: _spectra(found[name]) for name in found if self.spectra and name not in refusals},
            refusals=tuple(refusals.values()),
        )

    def _candidates(self, program: Program, site: Site, forms: Sequence[Decomposition]) -> list[Candidate]:
        """Every form that applies at every rank of its space, not yet priced."""
        calibration = program.facts.get(Calibration)
        moments = calibration.moments.get(site.name) if calibration else None
        grain = self.grain or (program.target.rank_grain if program.budget.latency is not None else 1)
        made = []
        for form in forms:
            if form.refuse(site.layer) is not None:
                continue
            space = list(form.rank_space(site.layer, grain))
            errors = form.errors(site.layer, site.weight, space, moments)
            text = str(form.spec())
            made += [
                Candidate(text, ranks, float(error), Cost(), form.modes)
                for ranks, error in zip(space, errors, strict=True)
            ]
        return made

    def _price(
        self, program: Program, found: Mapping[str, Site], options: Mapping[str, list[Candidate]]
    ) -> dict[str, list[Candidate]]:
        """Every candidate with its cost; what is measured is measured together."""
        models = [make(CostModel, self.cost)]
        if program.budget.latency is not None:
            models.append(make(CostModel, self.timer))
        chains = {
            (name, candidate.decomposition, candidate.ranks): chain_of(found[name], candidate)
            for name, candidates in options.items()
            for candidate in candidates
        }
        parts = list(dict.fromkeys(part for chain in chains.values() for part in chain))
        prices: dict[Layer, Cost] = {part: Cost() for part in parts}
        for model in models:
            model.prepare(parts, program.target)
            for part in parts:
                prices[part] += model.price(part, program.target)
        return {
            name: [
                replace(c, cost=_cost(chains[name, c.decomposition, c.ranks], prices, found[name])) for c in candidates
            ]
            for name, candidates in options.items()
        }

    def _whole(self, program: Program, dense: Cost) -> Cost:
        """What the dense network costs: all its parameters, its measured latency where there is one."""
        baseline = program.facts.get(Baseline)
        return Cost(
            params=parameters_of(program.graph),
            macs=dense.macs,
            bytes=dense.bytes,
            seconds=baseline.seconds if baseline else dense.seconds,
        )


def chain_of(site: Site, candidate: Candidate) -> tuple[Layer, ...]:
    """The layers that a candidate computes, for all calls of the site."""
    if candidate.decomposition == DENSE:
        return site.calls
    form = make(Decomposition, candidate.decomposition)
    return tuple(part for call in site.calls for part in form.blueprint(call, candidate.ranks))


def _cost(chain: Sequence[Layer], prices: Mapping[Layer, Cost], site: Site) -> Cost:
    """The price of a chain over all calls; its parameters are there once."""
    cost = total([prices[part] for part in chain])
    return replace(cost, params=cost.params / len(site.calls))


def _kept_dense(program: Program, found: Mapping[str, Site]) -> Iterable[tuple[str, Refusal]]:
    """Layers that no decomposition is asked about."""
    owners: dict[int, list[str]] = {}
    for name, module in program.graph.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for name, site in found.items():
        sharing = [other for other in owners.get(id(site.module.weight), ()) if other != name]
        if name in program.keep_dense:
            yield name, Refusal(name, "excluded_by_user", program.keep_dense[name])
        elif sharing:
            yield name, Refusal(name, "tied_parameter", f"its weight also belongs to {', '.join(sharing)}")
        elif site.weight.is_meta or not site.weight.is_floating_point():
            yield name, Refusal(name, "no_float_weight", f"its weight is {site.weight.dtype} on {site.weight.device}")


def _refused(name: str, site: Site, forms: Sequence[Decomposition]) -> Refusal:
    """One reason for a layer that no form applies to: the commonest code, with its first sentence."""
    reasons = [refusal for form in forms if (refusal := form.refuse(site.layer)) is not None]
    if not reasons:
        return Refusal(name, "no_ranks", "its ranks are below the grain: it is too small to be split")
    codes = [refusal.code for refusal in reasons]
    chosen = max(reasons, key=lambda refusal: codes.count(refusal.code))
    return Refusal(name, chosen.code, chosen.reason)


def _spectra(site: Site) -> dict[str, Spectrum]:
    """Singular values of the unfoldings ``out`` (T x CK) and ``in`` (C x TK) of a weight."""
    weight = site.weight.double()
    out = _spectrum(weight.flatten(1))
    if site.layer.pointwise:  # the two unfoldings are one matrix and its transpose
        return {"out": out, "in": Spectrum(out.values, out.columns, out.rows)}
    return {"out": out, "in": _spectrum(weight.transpose(0, 1).flatten(1))}


def _spectrum(matrix: torch.Tensor) -> Spectrum:
    rows, columns = matrix.shape
    gram = matrix @ matrix.T if rows <= columns else matrix.T @ matrix
    values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()
    return Spectrum(tuple(values.tolist()), rows, columns)

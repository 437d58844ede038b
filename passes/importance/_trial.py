"""``Trial``: a layer approximated by a form that keeps a share of its weights, as a probe for scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdcompile.core.decomposition import Decomposition, reading, relative_error
from tdcompile.core.registry import make
from tdcompile.errors import InputError
from tdcompile.ir.measurements import input_covariance
from tdcompile.ir.program import Program, Site, kept_dense, sites
from tdcompile.numerics.covariance import Covariance
from tdcompile.planning.rank_grid import ranks_for

FORMS = ("tucker2", "svd", "grouped")  # for convolutions, layers of one tap, and layers in groups
_TOLD = 1e-4  # a smaller error is rounding and carries no information


@dataclass(frozen=True)
class Trial:
    """One layer, approximated.

    Attributes:
        weight: W̃, in the shape of the layer's weight.
        error: relative error of the layer's output if there is calibration data, otherwise of its weight.
    """

    site: Site
    weight: Tensor
    error: float

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the layer this weight inside the context."""
        own = self.site.module.weight
        self.site.module.weight = nn.Parameter(self.weight.to(self.site.weight), requires_grad=False)
        try:
            yield
        finally:
            self.site.module.weight = own


@torch.no_grad()
def trials(
    program: Program, share: float, forms: tuple[str, ...] = FORMS, largest: int | None = None
) -> Mapping[str, Trial]:
    """Return a trial for each layer that need not stay dense, by the first of the forms that applies to it.

    Args:
        share: share of the layer's weights that the trial keeps; halved until the trial has an error.
        forms: decompositions in their text form.
        largest: leave out layers whose weight (T x CK) has more rows and more columns than this.

    Raises:
        InputError: the share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise InputError(f"share={share:g} is not in (0, 1]: 0.5 keeps half of a layer's weights")
    known = [make(Decomposition, form) for form in forms]
    made, found = {}, sites(program)
    kept = kept_dense(program, found)
    for name, site in found.items():
        if name in kept:
            continue
        form = next((form for form in known if form.refuse(site.layer) is None), None)
        if form is None or (largest is not None and min(site.weight.flatten(1).shape) > largest):
            continue
        made[name] = _trial(site, form, share, input_covariance(program.facts, name, site.weight))
    return made


def _trial(site: Site, form: Decomposition, share: float, covariance: Covariance) -> Trial:
    ranks = ranks_for(form, site.layer, share)
    read = site.weight
    with reading(form, read):
        factors = form.factorize(site.layer, read, ranks, covariance)
    weight = form.reconstruct(site.layer, factors)
    error = relative_error(site.weight, weight, covariance)
    if error < _TOLD and max(ranks) > 1:
        return _trial(site, form, share / 2, covariance)
    return Trial(site, weight, error)

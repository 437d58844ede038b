"""Tables of candidates with a closed form: a layer of ``full`` rank whose error falls along a spectrum."""

import math
from collections.abc import Callable, Sequence

import pytest

from tdcompile.core.decomposition import Decomposition
from tdcompile.core.plan import Candidate, Candidates, Spectrum
from tdcompile.core.registry import make
from tdcompile.ir.target import Cost

Table = Callable[..., Candidates]


def cost(macs: float) -> Cost:
    return Cost(params=macs / 10, macs=macs, bytes=macs, seconds=macs * 1e-9)


def low_rank(form: str, full: int, dense: float, price: float, decay: float, mode: str) -> list[Candidate]:
    """Ranks 1 to full: rank r costs ``price * r / full`` of dense, and keeps the first r of decaying energies."""
    energies, decomposition = [math.exp(-decay * i) for i in range(full)], make(Decomposition, form)
    return [
        Candidate(
            decomposition,
            (r,),
            math.sqrt(sum(energies[r:]) / sum(energies)),
            cost(dense * price * r / full),
            (mode,),
        )
        for r in range(1, full + 1)
    ]


@pytest.fixture
def table() -> Table:
    """``table(decays, rest=0)``: one layer for each decay, 16 ranks of 'channel' and of 'cp', dense costs 1000 MACs."""

    def make(decays: Sequence[float], rest: float = 0.0) -> Candidates:
        layers, spectra = {}, {}
        for number, decay in enumerate(decays):
            dense = Candidate.dense(cost(1000.0))
            layers[f"layer{number}"] = (
                dense,
                *low_rank("channel", 16, 1000.0, 1.5, decay, "out"),
                *low_rank("cp", 16, 1000.0, 1.2, decay * 0.7, ""),
            )
            values = tuple(math.exp(-decay * i / 2) for i in range(16))
            spectra[f"layer{number}"] = {"out": Spectrum(values, 16, 144), "in": Spectrum(values, 16, 144)}
        return Candidates(layers, cost(rest), spectra)

    return make

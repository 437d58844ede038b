"""SVG drawings of the pipeline and of the decompositions, made from the passes and blueprints themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from tdcompile.compiler import EXPORT_FIRST
from tdcompile.core.decomposition import Decomposition
from tdcompile.core.passes import AnalysisPass, Pass, RewritePass, TunePass
from tdcompile.core.registry import find, make
from tdcompile.ir.layer import Layer, Ranks
from tdcompile.recipes import Recipe

WIDTH, HEIGHT, GAP = 132, 56, 34  # size of a box, and gap between two boxes of a row
IN_A_ROW = 5
SHARE = 0.4  # largest share of the dense layer's MACs at the ranks that are drawn
GRAIN = 4  # of these ranks: fine enough that every form has some below that share

KINDS: dict[type[Pass], str] = {AnalysisPass: "analysis", RewritePass: "rewrite", TunePass: "tune"}

# Layers to draw decompositions for: a decomposition is drawn for the first one that it accepts.
EXAMPLES = (
    Layer("conv", 64, 128, (14, 14), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
    Layer("linear", 768, 768),
    Layer("conv", 256, 256, (14, 14), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), groups=4),
)


@dataclass(frozen=True)
class Box:
    """A step in a drawing: a title, lines of small text, and the CSS classes that colour it."""

    title: str
    lines: tuple[str, ...] = ()
    style: str = "driver"


def draw_pipeline() -> str:
    """Draw the steps of the default pipeline under a latency budget with tuning; optional steps are dashed."""
    usual = {step.name for step in Recipe(budget={"macs": 0.5}).steps().steps}
    exact, others = (
        [_step(step, step.name in usual) for step in part.steps]
        for part in Recipe(tune="epochs=1").steps().split_exact()
    )
    ends = Box("export", ("verify, measure",)), Box("report", ("and folder",))
    legend = [Box("analysis", style="analysis"), Box("rewrite", style="rewrite"), Box("tune", style="tune")]
    first = _step(make(Pass, EXPORT_FIRST), usual=True)
    rows = _rows([Box("trace", ("Program",)), *exact, first, *others, *ends])
    key = "".join(_legend(box, 110 * place) for place, box in enumerate([*legend, Box("if asked", style="optional")]))
    return _figure(key + _grid(rows, top=34), IN_A_ROW, 34 + _high(len(rows)), "The default pipeline")


def draw_decompositions() -> str:
    """Return a section for each decomposition: its summary, the example layer and the chain that replaces it."""
    sections = []
    for name, kind in find(Decomposition).items():
        form = kind()
        layer = next(layer for layer in EXAMPLES if form.refuse(layer) is None)
        chain = form.blueprint(layer, ranks := _ranks(form, layer))
        caption = f"{_weights([layer])} and {_macs([layer])} become {_weights(chain)} and {_macs(chain)}."
        drawing = _figure(_grid([list(map(_layer, chain))], top=0), len(chain), HEIGHT + 2, f"The chain of {name}")
        sections += [
            f"### `{name}`",
            kind.summary(),
            drawing,
            f"Example: a {_told(layer)} at rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}. {caption}",
        ]
    return "\n\n".join(sections)


def _step(step: Pass, usual: bool) -> Box:
    style = next(name for kind, name in KINDS.items() if isinstance(step, kind))
    facts = tuple(fact.__name__ for fact in step.gives)
    return Box(step.name, facts[:1], style if usual else f"{style} optional")


def _ranks(form: Decomposition, layer: Layer) -> Ranks:
    def share(ranks: Ranks) -> float:
        return sum(part.macs for part in form.blueprint(layer, ranks)) / layer.macs

    space = form.rank_space(layer, GRAIN)
    return max((ranks for ranks in space if share(ranks) <= SHARE), key=share)


def _layer(layer: Layer) -> Box:
    size = "×".join(map(str, layer.kernel)) or "linear"
    what = "depthwise " if layer.depthwise else f"{layer.groups} groups " if layer.groups > 1 else ""
    return Box(what + size, (f"{layer.in_channels} → {layer.out_channels}", _weights([layer])), "rewrite")


def _told(layer: Layer) -> str:
    if layer.kind == "linear":
        return f"linear layer, {layer.in_channels} → {layer.out_channels}"
    kernel, extent = ("×".join(map(str, sizes)) for sizes in (layer.kernel, layer.extent))
    groups = f" in {layer.groups} groups" if layer.groups > 1 else ""
    return f"{kernel} convolution{groups}, {layer.in_channels} → {layer.out_channels} channels, on {extent}"


def _weights(layers: Iterable[Layer]) -> str:
    return f"{sum(layer.params - layer.bias * layer.out_channels for layer in layers):,} weights"


def _macs(layers: Iterable[Layer]) -> str:
    return f"{sum(layer.macs for layer in layers) / 1e6:.3g} M MACs"


def _rows(boxes: Sequence[Box]) -> list[Sequence[Box]]:
    return [boxes[start : start + IN_A_ROW] for start in range(0, len(boxes), IN_A_ROW)]


def _high(rows: int) -> int:
    return rows * (HEIGHT + GAP) - GAP + 2


def _grid(rows: Sequence[Sequence[Box]], top: int) -> str:
    """Draw rows of boxes, read from left to right, with arrows between them."""
    parts = []
    for row, boxes in enumerate(rows):
        y = top + row * (HEIGHT + GAP) + 1
        for column, box in enumerate(boxes):
            x = column * (WIDTH + GAP) + 1
            parts.append(_box(box, x, y))
            if column:
                parts.append(_arrow(f"M{x - GAP} {y + HEIGHT / 2}H{x - 2}"))
        if row:
            end = (len(rows[row - 1]) - 1) * (WIDTH + GAP) + 1 + WIDTH / 2
            parts.append(_arrow(f"M{end} {y - GAP}V{y - GAP / 2}H{1 + WIDTH / 2}V{y - 2}"))
    return "".join(parts)


def _box(box: Box, x: float, y: float) -> str:
    middle, count = x + WIDTH / 2, len(box.lines)
    first = y + HEIGHT / 2 + 5 - 8 * count
    text = f'<text class="title" x="{middle}" y="{first}">{escape(box.title)}</text>'
    for place, line in enumerate(box.lines, start=1):
        text += f'<text x="{middle}" y="{first + 16 * place}">{escape(line)}</text>'
    return f'<rect class="{box.style}" x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>{text}'


def _legend(box: Box, x: float) -> str:
    return (
        f'<rect class="{box.style}" x="{x + 1}" y="1" width="18" height="18" rx="3"/>'
        f'<text class="legend" x="{x + 26}" y="14">{box.title}</text>'
    )


def _arrow(path: str) -> str:
    return f'<path class="arrow" d="{path}" marker-end="url(#arrow)"/>'


def _figure(content: str, columns: int, height: float, label: str) -> str:
    width = columns * (WIDTH + GAP) - GAP + 2
    marker = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="head" d="M0 0L8 4L0 8z"/></marker></defs>'
    )
    return (
        f'<figure class="drawing"><svg viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{escape(label)}">{marker}{content}</svg></figure>'
    )

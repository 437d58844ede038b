"""Small layers that several chains are made of: a 1x1 layer at either end, and a kernel split by axis."""

from __future__ import annotations

from dataclasses import replace

from tdcompile.ir.layer import Layer


def point_in(layer: Layer, rank: int) -> Layer:
    """Return the 1x1 layer from the layer's input to ``rank`` channels, without a bias."""
    return replace(layer.point(), out_channels=rank, bias=False)


def point_out(layer: Layer, rank: int) -> Layer:
    """Return the 1x1 layer from ``rank`` channels to the layer's output, with its bias."""
    return replace(layer.point(), in_channels=rank, extent=layer.out_extent)


def by_axis(layer: Layer) -> tuple[Layer, Layer]:
    """Return a kh x 1 layer and a 1 x kw layer on its output, each with the layer's settings for its axis."""
    rows = replace(
        layer,
        kernel=(layer.kernel[0], 1),
        stride=(layer.stride[0], 1),
        padding=(layer.padding[0], (0, 0)),
        dilation=(layer.dilation[0], 1),
    )
    columns = replace(
        layer,
        extent=rows.out_extent,
        kernel=(1, layer.kernel[1]),
        stride=(1, layer.stride[1]),
        padding=((0, 0), layer.padding[1]),
        dilation=(1, layer.dilation[1]),
    )
    return rows, columns

"""Calls for mypy, never run: a right one passes, and each wrong one needs the comment that it stands beside.

``make lint`` reports an error that is missing as an unused comment.
"""

from torch import Tensor, nn

from tdcompile.compiler import compile


def calls(net: nn.Module, x: Tensor) -> None:
    compile(net, x, budget={"macs": 0.5}, target="cpu", keep_dense=["fc*"], tune="epochs=5")
    compile(net, x, bugdet={"macs": 0.5})  # type: ignore[call-arg]
    compile(net, x, threads="four")  # type: ignore[arg-type]
    compile(net, x, target="tpu")  # type: ignore[arg-type]

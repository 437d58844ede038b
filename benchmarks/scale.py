"""Plan, factorise and export a transformer of a billion parameters; report time and memory of each step."""

from __future__ import annotations

import resource
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
import typer
from common import publish
from torch import Tensor, nn

import tdcompile
from tdcompile.backend.export import export_onnx
from tdcompile.core.pipeline import Pipeline
from tdcompile.frontend.load_network import load_weights
from tdcompile.ir.program import parameters_of
from tdcompile.ir.target import Budget, Target


class Block(nn.Module):
    """A layer of a pre-norm transformer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, ``(N, L, width)``."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """An embedding, blocks and a head."""

    def __init__(self, width: int, depth: int, words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.blocks = nn.Sequential(*(Block(width, width // 64) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Map ``(N, L)`` to ``(N, L, words)``."""
        return self.head(self.norm(self.blocks(self.embedding(ids))))


class Memory:
    """The peak of this process's anonymous memory above its value at the start, by step.

    Mapped pages of files are not counted, because the system reclaims them on demand.
    """

    def __init__(self) -> None:
        self.start = anonymous()
        self.most: dict[str, int] = {}
        self.step = "start"
        self._over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            self.most[self.step] = max(self.most.get(self.step, 0), anonymous() - self.start)

    def close(self) -> None:
        """Stop watching."""
        self._over.set()


def anonymous() -> int:
    """Return the bytes of the process's anonymous memory, from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main(
    width: int = 2048,
    depth: int = 20,
    words: int = 8192,
    macs: Annotated[float, typer.Option(help="share of the MACs that is kept")] = 0.6,
    jobs: Annotated[int, typer.Option(help="layers side by side, each in a process")] = 1,
    export: Annotated[bool, typer.Option(help="also export it")] = True,
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="also write the table here")] = None,
) -> None:
    """Write random weights to a file layer by layer; build the network on the meta device and fill it from the file."""
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        network = Transformer(width, depth, words).eval()
        file, memory, rows = Path(folder) / "weights.safetensors", Memory(), list[dict[str, Any]]()
        with torch.device("cpu"):
            _write(network, file, seed)
            size = sum(p.numel() * p.element_size() for p in network.parameters())
            largest = max(p.numel() * p.element_size() for p in network.parameters())

            def done(step: str, begun: tuple[float, float]) -> None:
                most = memory.most.get(step, 0)
                wall, busy = (now - before for now, before in zip(_clocks(), begun, strict=True))
                row = {"step": step, "seconds": wall, "CPU seconds": busy, "peak GB": most / 1e9}
                rows.append(row | {"of the model": most / size})
                print(rows[-1], flush=True)

            memory.step, begun = "load", _clocks()
            load_weights(network, file)
            done("load", begun)
            memory.step, begun = "trace", _clocks()
            program = tdcompile.trace(network, torch.randint(0, words, (2, 32)))
            program = program.with_(budget=Budget(macs=macs), seed=seed)
            done("trace", begun)
            for step in (f"propose{{decompose=svd,jobs={jobs}}}", "choose{by=lagrangian}", f"factorize{{jobs={jobs}}}"):
                memory.step, begun = step, _clocks()
                program = Pipeline.parse(f"score,{step}" if step.startswith("propose") else step).run(program)
                done(step, begun)
            if export:
                memory.step, begun = "export", _clocks()
                exported = export_onnx(program.graph, program.inputs, Path(folder) / "model.onnx")
                done("export", begun)
                rows[-1]["written GB"] = exported.bytes / 1e9
        memory.close()
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before, after = (parameters_of(graph) / 1e9 for graph in (program.dense, program.graph))
    title = (
        f"{before:.2f} billion parameters ({size / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f}) to {after:.2f}; "
        f"at most {whole / 1e9:.1f} GB, mapped files included"
    )
    publish(title, rows, seed, Target(), json)


def _clocks() -> tuple[float, float]:
    """Return elapsed seconds, and the processor seconds of this process, which other processes hardly change."""
    return time.perf_counter(), time.process_time()


def _write(network: nn.Module, file: Path, seed: int) -> None:
    """Write the weights to a file, drawing one tensor at a time."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: torch.Size) -> Tensor:
        if len(shape) < 2:
            return torch.ones(shape) if "norm" in name and name.endswith("weight") else torch.zeros(shape)
            # A falling spectrum, as in trained weights; pure noise has no spectrum worth truncating.
        drawn = torch.randn(shape, generator=generator) / shape[1] ** 0.5
        return drawn * torch.linspace(2.0, 0.05, shape[1])

    safetensors.torch.save_file({name: draw(name, p.shape) for name, p in network.named_parameters()}, file)


if __name__ == "__main__":
    typer.run(main)

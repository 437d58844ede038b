"""The output folder: written whole or not at all, with a manifest of hashes; and the weights file that loads back."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from tdcompile.artifact.graph_json import describe, rebuild, tensors_of
from tdcompile.errors import InputError

FORMAT = 1
TOOL = "tdcompile"
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"


def check_out(out: Path) -> None:
    """Refuse, before any work, a place where ``write_folder`` could or should not write.

    Raises:
        InputError: it is a file, a folder that is not tdcompile's or holds something else too, or is not writable.
    """
    out = out.absolute()
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give another -o, a folder that does not exist yet")
    present = {path.name for path in out.iterdir()} if out.exists() else set()
    if present:
        try:
            listed = {MANIFEST, *read_manifest(out)["files"]}
        except InputError as error:
            raise InputError(f"{out} is not a tdcompile output folder; give another -o or empty it") from error
        if foreign := sorted(present - listed):
            raise InputError(f"{out} holds {foreign[0]}, which tdcompile did not write; move it or give another -o")
    parent = next(folder for folder in out.resolve().parents if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise InputError(f"cannot write into {parent}; give an -o in a folder that you may write to")


def write_folder(out: Path, files: Mapping[str, bytes | str | Path], *, info: Mapping[str, object]) -> Path:
    """Write an output folder beside its place, then rename it there; an earlier one of tdcompile's is replaced.

    Args:
        out: the folder.
        files: by name, their content or a file to copy; with ``model.onnx`` come ``model.onnx.data`` and the like
            that lie beside it, under their own names, by which the model refers to them.
        info: what else the manifest says: versions, the command line, the seed.

    Raises:
        InputError: see ``check_out``; or the disk is full, or may not be written. Nothing is left behind then.
    """
    check_out(out)
    place = out.resolve()
    draft, former = (place.with_name(f".{place.name}.{os.getpid()}.{end}") for end in ("new", "old"))
    try:
        draft.mkdir(parents=True)
        for name, content in files.items():
            _write(draft, name, content)
        hashes = {path.name: _fingerprint(path) for path in sorted(draft.iterdir())}
        manifest = {"format": FORMAT, "tool": TOOL, "version": version(TOOL), "files": hashes, **info}
        _write(draft, MANIFEST, json.dumps(manifest, indent=1, default=str) + "\n")
        _sync(draft)
        _swap(draft, place, former)
        _sync(place.parent)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}; nothing was written") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    shutil.rmtree(former, ignore_errors=True)
    return out


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an output folder.

    Raises:
        InputError: there is none, or it is another tool's or of another format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["tool"] == TOOL and manifest["format"] == FORMAT and isinstance(manifest["files"], dict):
            return dict(manifest)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # whatever is wrong with it, the sentence below is what helps
    raise InputError(f"{folder} is not a tdcompile output folder: it has no {MANIFEST} of format {FORMAT}")


def verify(folder: Path) -> None:
    """Check every file of an output folder against its manifest.

    Raises:
        InputError: a file is missing or has changed; the message names it.
    """
    for name, expected in read_manifest(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{folder} lacks {name}, which its manifest lists")
        if _fingerprint(path) != expected:
            raise InputError(f"{path} has changed since it was written: its hash is not the manifest's")


def load(folder: Path | str, trusted: Sequence[str] = ()) -> nn.Module:
    """The compiled network of an output folder as a PyTorch module in eval mode, on the CPU.

    Args:
        folder: what ``tdcompile compile -o`` wrote.
        trusted: packages, or ``.py`` files, of your own whose modules the network still contains; nothing else is
            imported.

    Raises:
        InputError: there is no such folder, it has changed, or the network needs what is not trusted.
    """
    verify(Path(folder))
    return load_graph(Path(folder) / WEIGHTS, trusted)


def load_graph(path: Path, trusted: Sequence[str] = ()) -> fx.GraphModule:
    """The graph of a file that ``save_weights`` wrote, in eval mode.

    Raises:
        InputError: the file cannot be read, or the network needs what is not trusted or has no text form.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if "architecture" not in metadata:
        why = metadata.get("no_architecture", "tdcompile did not write it")
        raise InputError(f"{path} holds weights without the network they belong to: {why}")
    graph = rebuild(metadata["architecture"], trusted, tensors)
    graph.eval()
    return graph


def save_weights(graph: fx.GraphModule, path: Path, metadata: Mapping[str, str]) -> None:
    """Write the tensors, each once, and the architecture as metadata; equal graphs give equal files.

    A network without a text form (a class of the user's defined inside a function, say) is written all the same,
    and the file says why it cannot be loaded back.

    Args:
        graph: the network.
        path: a ``.safetensors`` file.
        metadata: further entries, besides ``architecture``.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        tensors, about = tensors_of(graph), {"architecture": describe(graph)}
    except InputError as error:
        tensors, about = (
            {**dict(graph.named_parameters()), **dict(graph.named_buffers())},
            {"no_architecture": str(error)},
        )
    try:
        save_file(_apart(tensors), path, {**metadata, **about})
        _sort_metadata(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {path}: {error}") from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors wants them: contiguous, on the CPU, no two over the same memory."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous(memory_format=torch.contiguous_format)
        memory = plain.untyped_storage().data_ptr()
        apart[name] = plain.clone() if memory in seen else plain
        seen.add(memory)
    return apart


def _sort_metadata(path: Path) -> None:
    """Put the metadata in order, in place: safetensors writes it in a random one."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:  # the same text in another order, and spaces to the same length
            file.seek(8)
            file.write(text.ljust(size))


def _write(folder: Path, name: str, content: bytes | str | Path) -> None:
    target = folder / name
    if isinstance(content, Path):
        shutil.copyfile(content, target)
        for sibling in sorted(content.parent.glob(f"{content.name}.data*")):
            shutil.copyfile(sibling, folder / sibling.name)
            _sync(folder / sibling.name)
    else:
        target.write_bytes(content.encode() if isinstance(content, str) else content)
    _sync(target)


def _fingerprint(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _swap(draft: Path, place: Path, former: Path) -> None:
    """Rename the draft to its place; what was there is put back if that fails."""
    existed = place.exists()
    if existed:
        place.rename(former)
    try:
        draft.rename(place)
    except BaseException:
        if existed:
            former.rename(place)
        raise


def _sync(path: Path) -> None:
    """Have the disk hold it before it is renamed: after a power cut a renamed file may otherwise be empty."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no such call for folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

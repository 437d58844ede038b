"""The output folder, written atomically with a manifest of hashes, and the weights file that loads back."""

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
    """Check, before any work, that ``write_folder`` may write to a place.

    Raises:
        InputError: the place is a file, is not writable, or is a folder with files that tdcompile did not write.
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
    """Write an output folder atomically, by a rename; an earlier output folder at the place is replaced.

    Args:
        out: the folder.
        files: content, or a file to copy, by name. Files such as ``model.onnx.data`` beside ``model.onnx`` are copied
            under their own names, by which the model refers to them.
        info: further entries of the manifest: versions, the command line, the seed.

    Raises:
        InputError: see ``check_out``; or the disk is full or not writable. No partial folder is left.
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
    """Return the manifest of an output folder.

    Raises:
        InputError: there is no manifest, or another tool wrote it, or its format is unknown.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["tool"] == TOOL and manifest["format"] == FORMAT and isinstance(manifest["files"], dict):
            return dict(manifest)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the error below applies to every unreadable manifest
    raise InputError(f"{folder} is not a tdcompile output folder: it has no {MANIFEST} of format {FORMAT}")


def verify(folder: Path) -> None:
    """Check the hash of every file in an output folder against the manifest.

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
    """Return the compiled network of an output folder as a PyTorch module in eval mode, on the CPU.

    Args:
        folder: the output folder of ``tdcompile compile -o``.
        trusted: packages, or ``.py`` files, of your own whose modules the network still contains; nothing else is
            imported.

    Raises:
        InputError: the folder is missing or has changed, or the network needs a package that is not trusted.
    """
    verify(Path(folder))
    return load_graph(Path(folder) / WEIGHTS, trusted)


def load_graph(path: Path, trusted: Sequence[str] = ()) -> fx.GraphModule:
    """Return the graph of a file that ``save_weights`` wrote, in eval mode.

    Raises:
        InputError: the file cannot be read, the network has no text form, or it needs a package that is not trusted.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if "architecture" not in metadata:
        why = metadata.get("no_architecture", "tdcompile did not write it")
        raise InputError(f"{path} holds weights without the network they belong to: {why}")
    graph = rebuild(metadata["architecture"], trusted, tensors)
    graph.eval()
    return graph


def save_weights(graph: fx.GraphModule, path: Path, metadata: Mapping[str, str]) -> None:
    """Write each tensor once, and the architecture as metadata; equal graphs give equal files.

    A network has no text form if, for example, a class is defined inside a function. Its tensors are written,
    and the file states why it cannot be loaded back.

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
    """Return the tensors as safetensors needs them: contiguous, on the CPU, without shared memory."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous(memory_format=torch.contiguous_format)
        memory = plain.untyped_storage().data_ptr()
        apart[name] = plain.clone() if memory in seen else plain
        seen.add(memory)
    return apart


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in the file, because safetensors writes it in random order."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:  # sorting keeps the entries; spaces pad the text to the old length
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
    """Rename the draft to its place; if that fails, restore the earlier folder."""
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
    """Flush to disk before the rename; otherwise a renamed file may be empty after a power cut."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot flush a folder
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Read a file of weights, a folder that holds one, or a sharded checkpoint; no code in them is executed."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import safetensors
import safetensors.torch
import torch

from tdcompile.errors import InputError
from tdcompile.support.formatting import join_first

# First bytes of a safetensors header, a pickle, and a zip archive, which torch.save writes.
_SAFETENSORS_START, _PICKLE_START, _ZIP_START = b"{", b"\x80", b"PK"
_UNREADABLE = "it is no PyTorch or safetensors file, or cut off"
# Plain values that trainers save beside the weights: arguments, paths, numpy's numbers. They are not needed, and a
# placeholder takes their place, so that their classes are not called either.
_VALUES = (
    "argparse.Namespace",
    *(
        f"pathlib{part}.{kind}Path"
        for part in ("", "._local")
        for kind in ("Posix", "PurePosix", "Windows", "PureWindows")
    ),
    *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
    "numpy.dtype",
)
_INDEX = ".index.json"
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# Names that transformers and diffusers give to the weights, best first: their folders hold optimizer states too.
_KNOWN = tuple(
    f"{stem}{suffix}"
    for stem, kind in (
        ("model", ".safetensors"),
        ("diffusion_pytorch_model", ".safetensors"),
        ("pytorch_model", ".bin"),
        ("diffusion_pytorch_model", ".bin"),
    )
    for suffix in (kind, kind + _INDEX)
)


class _Placeholder:
    """Stands for a value that is not read; it takes any arguments and any state."""

    def __new__(cls, *_: object) -> Self:
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None: ...


def split_reference(reference: str | Path) -> tuple[Path, str | None]:
    """Split ``FILE#key`` into the file and the key; the key is None without a ``#``, or if a file has that name."""
    text = str(reference)
    if "#" not in text or Path(text).exists():
        return Path(text), None
    file, _, key = text.rpartition("#")
    return Path(file), key


def read_weights(path: Path) -> object:
    """Return the content of a file, or one mapping of all tensors of a sharded checkpoint.

    Args:
        path: a safetensors or PyTorch file, the index of a sharded checkpoint, or the folder of either.

    Raises:
        InputError: nothing is there, it cannot be read, needs code, or a shard is missing or incomplete.
    """
    if path.is_dir():
        path = _file_in(path)
    if not path.is_file():
        raise InputError(f"there is no weights file '{path}'")
    return _read_shards(path) if path.suffix == ".json" else _read_file(path)


def _file_in(folder: Path) -> Path:
    """Return the file or index of the weights in a folder.

    Raises:
        InputError: the folder holds none, or several.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    indices = [name for name in names if name.endswith(_INDEX)]
    files = [name for name in names if name.endswith(_SUFFIXES)]
    named = [name for name in _KNOWN if name in names][:1]
    found = next((group for group in (named, indices, files) if len(group) == 1), None)
    if found is None:
        kinds = ", ".join((*_SUFFIXES, _INDEX))
        several = join_first(indices or files, ", ")
        why = f"holds several weights files, {several}: name one" if several else f"holds no weights file ({kinds})"
        raise InputError(f"'{folder}' is a folder and {why}")
    return folder / found[0]


def _read_shards(index: Path) -> dict[str, object]:
    """Return all tensors of the files that an index names.

    Raises:
        InputError: the index is damaged, or a shard is missing, outside its folder, or lacks a tensor.
    """
    try:
        shard_of = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(shard_of.values()), key=str)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"'{index}' is no index of a sharded checkpoint: its 'weight_map' is missing") from error
    weights: dict[str, object] = {}
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(f"'{index}' names the shard '{shard}', which is not a file beside it")
        if not (index.parent / shard).is_file():
            raise InputError(f"'{index}' names the shard '{shard}', which is missing")
        held = _read_file(index.parent / shard)
        wanted = {name for name, file in shard_of.items() if file == shard}
        lost = sorted(wanted - set(held)) if isinstance(held, Mapping) else sorted(wanted)
        if lost or not isinstance(held, Mapping):
            raise InputError(f"'{index}' says that '{shard}' holds {join_first(lost, ', ')}; it does not")
        weights |= {str(name): value for name, value in held.items() if shard_of.get(name, shard) == shard}
    return weights


def _read_file(path: Path) -> object:
    head = b""
    try:
        with path.open("rb") as file:
            head = file.read(9)  # a safetensors file has a length in eight bytes, followed by JSON
        if path.suffix == ".safetensors" or head[8:] == _SAFETENSORS_START:
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([(_Placeholder, v) for v in _VALUES]):
            warnings.simplefilter("ignore")  # on unusual files; the errors below say it in one sentence
            return torch.load(path, map_location="cpu", weights_only=True)
    except safetensors.SafetensorError as error:
        raise InputError(f"'{path}' cannot be read as weights: it is no safetensors file, or cut off") from error
    except pickle.UnpicklingError as error:
        needs = re.search(r"GLOBAL ([\w.]+)", str(error))
        if needs is None and head.startswith(_PICKLE_START):
            raise InputError(
                f"'{path}' is a pickle that torch.save has not written: save the state_dict() with it or as safetensors"
            ) from error
        if needs is None and head.startswith(_ZIP_START):
            raise InputError(f"'{path}' is not a state dict that can be read without running code") from error
        if needs is None:
            raise InputError(f"'{path}' cannot be read as weights: {_UNREADABLE}") from error
        raise InputError(
            f"'{path}' is a pickle that needs code to load ({needs[1]}), which is refused: "
            "save the state_dict() alone, best as safetensors"
        ) from error
    except Exception as error:  # torch's reader raises anything on files of another kind
        if "TorchScript" in str(error):
            raise InputError(f"'{path}' is a TorchScript archive, which holds code; a state dict is needed") from error
        if isinstance(error, PermissionError):
            raise InputError(f"'{path}' cannot be read: {error.strerror}") from error
        raise InputError(f"'{path}' cannot be read as weights: {_UNREADABLE}") from error

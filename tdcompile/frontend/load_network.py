"""Load the network to compile, from a callable or by its registered name, and its weights from a file."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from tdcompile.core.network import Network
from tdcompile.core.registry import make
from tdcompile.errors import InputError
from tdcompile.ir.modules import not_finite
from tdcompile.support.user_code import call_user_function, load_callable, names_file

__all__ = ["check_weights", "load_callable", "load_source", "load_weights"]

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # that DataParallel and torch.compile add to every name
# First bytes of a safetensors header, a pickle, and a zip archive, which torch.save writes.
_SAFETENSORS_START, _PICKLE_START, _ZIP_START = b"{", b"\x80", b"PK"
_UNREADABLE = "it is no PyTorch or safetensors file, or cut off"
_MAX_NAMES = 4  # names that a message lists of each kind


def load_source(source: str) -> tuple[nn.Module, Network | None]:
    """Return the network in eval mode, and its plug-in if the source is a registered name.

    Raises:
        InputError: the file, module, callable or registered name does not exist, or gives no ``nn.Module``.
    """
    if ":" not in source:
        if names_file(source):
            raise InputError(f"'{source}' names no callable: write {source}:NAME, a function that returns the network")
        network = make(Network, source)
        return network.build().eval(), network
    place, _, name = source.rpartition(":")
    found = load_callable(source)
    module = found if isinstance(found, nn.Module) else call_user_function(source)
    if not isinstance(module, nn.Module):
        raise InputError(f"'{name}' in '{place}' returned a {type(module).__name__}; it must return an nn.Module")
    return module.eval(), None


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a complete checkpoint into the module; no code in the file is executed.

    Raises:
        InputError: the file cannot be read, needs code, does not fit the network, or holds NaN or Inf.
    """
    weights = _unwrap_state_dict(_read_file(path), set(module.state_dict()), path)
    own = module.state_dict()
    shapes = [
        f"{name} is {tuple(value.shape)} in the file, {tuple(own[name].shape)} in the network"
        for name, value in weights.items()
        if name in own and value.shape != own[name].shape
    ]
    if shapes:
        raise InputError(f"'{path}' does not fit the network: {_join_first(shapes, '; ')}")
    tied = _tied_names(module)
    _check_tied_weights(weights, tied, path)
    loaded = _assign_weights(module, weights)
    shared = {name for names in tied if not names.isdisjoint(weights) for name in names}
    missing = [name for name in loaded.missing_keys if name not in shared]
    if missing or loaded.unexpected_keys:
        parts = [("lacks", missing), ("has in excess", loaded.unexpected_keys)]
        said = "; it ".join(f"{verb} {_join_first(names, ', ')}" for verb, names in parts if names)
        raise InputError(f"'{path}' does not fit the network: it {said}")
    check_weights(module, str(path))


def _tied_names(module: nn.Module) -> list[set[str]]:
    """Return the names of all parameters and buffers, grouped by tensor."""
    names: dict[int, set[str]] = {}
    parameters, buffers = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    for name, tensor in (*parameters, *buffers):
        names.setdefault(id(tensor), set()).add(name)
    return list(names.values())


def _check_tied_weights(weights: Mapping[str, Tensor], tied: Iterable[set[str]], path: Path) -> None:
    for names in tied:
        first, *others = sorted(names & set(weights)) or [""]
        for other in others:
            if not torch.equal(weights[first], weights[other]):
                raise InputError(f"'{path}' has other values for '{first}' than for '{other}', which are one weight")


def _assign_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> Any:
    """Assign the weights to the network's tensors without a copy, so that a safetensors file is read on demand.

    Parameters keep their identity, wherever the network holds them. Only tensors on the meta device, which have no
    values, are replaced, and tied ones stay tied.
    """
    own = dict((*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)))
    empty = {id(tensor) for tensor in own.values() if tensor.is_meta}
    mapped = {
        name: value
        for name, value in weights.items()
        if name in own
        and id(own[name]) not in empty
        and own[name].dtype == value.dtype
        and own[name].device == value.device
    }
    replaced: dict[int, Tensor] = {}
    for name, value in weights.items():
        if name in own and id(own[name]) in empty:
            kind, old = own[name].dtype, own[name]
            trained = isinstance(old, nn.Parameter)
            replaced[id(old)] = nn.Parameter(value.to(kind), old.requires_grad) if trained else value.to(kind)
    for name, tensor in own.items():
        if id(tensor) in replaced:
            holder, _, leaf = name.rpartition(".")
            kept = module.get_submodule(holder)
            (kept._parameters if leaf in kept._parameters else kept._buffers)[leaf] = replaced[id(tensor)]  # type: ignore[assignment]
    for name, value in mapped.items():
        own[name].data = value
    done = {name for name in own if name in mapped or id(own[name]) in replaced}
    rest = {name: value for name, value in weights.items() if name not in done}
    loaded = module.load_state_dict(rest, strict=False)
    return type(loaded)([name for name in loaded.missing_keys if name not in done], loaded.unexpected_keys)


def check_weights(module: nn.Module, where: str) -> None:
    """Check that a network holds no NaN or Inf; -Inf is allowed in buffers, where attention masks hold it.

    Raises:
        InputError: a parameter or buffer is not finite; the message names the first.
    """
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if value.is_meta:
            raise InputError(f"{where}: the tensor '{name}' has a shape and no values: it is on the meta device")
    found = not_finite(module)
    if found is not None:
        raise InputError(f"{where}: the tensor '{found[0]}' holds {found[1]} values that are NaN or Inf")


def _read_file(path: Path) -> object:
    if path.is_dir():
        raise InputError(f"'{path}' is a folder; a file of weights is needed, .pt or .safetensors")
    if not path.is_file():
        raise InputError(f"there is no weights file '{path}'")
    try:
        head = _head(path)
        if path.suffix == ".safetensors" or head[8:] == _SAFETENSORS_START:
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
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


def _head(path: Path) -> bytes:
    """Return the first nine bytes; a safetensors file has a length in eight of them, followed by JSON."""
    with path.open("rb") as file:
        return file.read(9)


def _unwrap_state_dict(held: object, own: set[str], path: Path) -> Mapping[str, Tensor]:
    while isinstance(held, Mapping):
        inner = next((held[key] for key in _WRAPPERS if isinstance(held.get(key), Mapping)), None)
        if inner is None:
            break
        held = inner
    if not isinstance(held, Mapping) or not held or not all(isinstance(value, Tensor) for value in held.values()):
        raise InputError(f"'{path}' holds no state dict: a mapping from names to tensors, alone or under 'state_dict'")
    weights: dict[str, Any] = {str(name): value for name, value in held.items()}
    while prefix := next((p for p in _PREFIXES if _all_start(weights, p) and not _all_start(own, p)), ""):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _all_start(names: Iterable[str], prefix: str) -> bool:
    return all(name.startswith(prefix) for name in names)


def _join_first(names: list[str], between: str) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return between.join(names[:_MAX_NAMES]) + more

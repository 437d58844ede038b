"""Load the network to compile, from a callable or by its registered name, and its weights from a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdcompile.core.network import Network
from tdcompile.core.registry import make
from tdcompile.errors import InputError
from tdcompile.frontend.state_dict_search import Expected, Found, find_state_dict, tied_names, top_level_keys
from tdcompile.frontend.weights_file import read_weights, split_reference
from tdcompile.frontend.wrappers import unwrapped
from tdcompile.ir.diagnostics import Diagnostic, DiagnosticCode
from tdcompile.ir.modules import not_finite
from tdcompile.support.formatting import join_first
from tdcompile.support.user_code import call_user_function, load_callable, names_file

__all__ = ["check_weights", "load_callable", "load_source", "load_weights"]


def load_source(source: str) -> tuple[nn.Module, Network | None]:
    """Return the network in eval mode, and its plug-in if the source is a registered name.

    Raises:
        InputError: the file, module, callable or registered name does not exist, or gives no ``nn.Module``.
    """
    if source.endswith(".onnx"):
        raise InputError(_no_source(source))
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


def _no_source(model: str) -> str:
    """Return why an ONNX model is no network to compile."""
    return (
        f"'{model}' is an ONNX model, and tdcompile compiles PyTorch networks: give the code that makes the network it "
        "was exported from, FILE.py:NAME, in float if the model is quantised, and --weights"
    )


def load_weights(module: nn.Module, reference: str | Path) -> tuple[Diagnostic, ...]:
    """Load a complete checkpoint into the module; no code in the file is executed.

    The weights may lie under a key of the file, such as ``state_dict``, and all names may have a common prefix.

    Args:
        module: the network, also in a wrapper such as ``DataParallel``; its parameters are changed.
        reference: a safetensors or PyTorch file, the index of a sharded checkpoint, the folder of either, or
            ``FILE#key`` to choose the weights under a key: ``w.pth#model_ema``, ``w.ckpt#state_dict.teacher``.

    Returns:
        Messages that say where the weights were found and what was left out.

    Raises:
        InputError: the file cannot be read, needs code, does not fit the network, holds several weights that fit, or
            holds NaN or Inf.
    """
    module = unwrapped(module)  # names in files have the prefix of a wrapper or not
    path, key = split_reference(reference)
    held = read_weights(path)
    found = find_state_dict(held, Expected.by(module), str(path), key)
    _load_state_dict(module, found, path, top_level_keys(held))
    check_weights(module, str(path))
    return tuple(_messages(found, path))


def _load_state_dict(module: nn.Module, found: Found, path: Path, keys: str) -> None:
    """Load a state dict.

    Raises:
        InputError: it does not fit the network; the message lists the file's ``keys`` if there are any.
    """
    weights, own = found.weights, module.state_dict()
    read = f" as read {place}" if (place := found.described()) else ""
    misfit, known = f"'{path}'{read} does not fit the network", f"; the file's keys are {keys}" if keys else ""
    shapes = [
        f"{name} is {tuple(value.shape)} in the file, {tuple(own[name].shape)} in the network"
        for name, value in weights.items()
        if name in own and value.shape != own[name].shape
    ]
    if shapes:
        raise InputError(f"{misfit}: {join_first(shapes, '; ')}{known}")
    tied = tied_names(module)
    _check_tied_weights(weights, tied, path)
    loaded = _assign_weights(module, weights)
    shared = {name for names in tied if not names.isdisjoint(weights) for name in names}
    missing = [name for name in loaded.missing_keys if name not in shared]
    if missing or loaded.unexpected_keys:
        parts = [("lacks", missing), ("has in excess", loaded.unexpected_keys)]
        said = "; it ".join(f"{verb} {join_first(names, ', ')}" for verb, names in parts if names)
        raise InputError(f"{misfit}: it {said}{known}")


def _messages(found: Found, path: Path) -> Iterable[Diagnostic]:
    if place := found.described():
        yield Diagnostic("info", DiagnosticCode.WEIGHTS, f"the weights of '{path}' are read {place}")
    if found.beside:
        names = join_first(found.beside, ", ")
        text = f"'{path}' holds tensors beside the weights, which are left out: {names}"
        yield Diagnostic("warning", DiagnosticCode.WEIGHTS, text)


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

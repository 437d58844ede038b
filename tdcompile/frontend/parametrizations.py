"""Replace weights that a parametrisation computes in every call by their current values."""

from __future__ import annotations

import copy
from itertools import chain

from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# torch's older parametrisations, which are hooks, and the functions that remove them.
_HOOKS = {WeightNorm: remove_weight_norm, SpectralNorm: remove_spectral_norm}


def without_parametrizations(module: nn.Module) -> nn.Module:
    """Return the network, or a copy with plain weights if any weight is parametrised (weight or spectral norm, ...).

    The copy shares every other tensor. A compressed layer has factors of its own, to which the parametrisation does not
    apply.

    Args:
        module: a network in eval mode, in which spectral norm does not update its estimates.
    """
    if not any(map(_is_parametrized, module.modules())):
        return module
    own = {id(tensor) for part in module.modules() if _is_parametrized(part) for tensor in part.parameters()}
    tensors = chain(module.parameters(), module.buffers())
    shared: dict[int, object] = {id(tensor): tensor for tensor in tensors if id(tensor) not in own}
    # A hook's last result is not a parameter, and torch does not copy computed tensors.
    shared |= {id(v): v.detach() for part in module.modules() for v in vars(part).values() if isinstance(v, Tensor)}
    plain = copy.deepcopy(module, shared)
    for part in list(plain.modules()):
        if parametrize.is_parametrized(part):
            kind = type(part)  # a class made for the original module, which must keep its weight property
            part.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
            for name in list(part.parametrizations):  # type: ignore[arg-type]  # a ModuleDict
                parametrize.remove_parametrizations(part, name)
        for hook in list(part._forward_pre_hooks.values()):
            if type(hook) in _HOOKS:
                _HOOKS[type(hook)](part, hook.name)  # type: ignore[attr-defined]  # both kinds have it
    return plain


def _is_parametrized(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module) or any(type(h) in _HOOKS for h in module._forward_pre_hooks.values())

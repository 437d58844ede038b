"""``unwrapped``: see through modules that only hold a network, such as ``DataParallel`` or an average of weights."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel

# torch's wrappers whose call is that of their attribute ``module``.
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
_COMPILED = "_orig_mod"  # what torch.compile returns holds the network under this name


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the network inside wrappers, or the module itself if it is none.

    Wrappers are those of torch for parallel training, compilation and averaged weights, and a module with one child and
    no ``forward``, as averages of weights in other libraries are.
    """
    while (inner := _held(module)) is not None:
        module = inner
    return module


def wrappers_of(module: nn.Module) -> list[str]:
    """Return the class names of the wrappers around a network, outermost first."""
    names = []
    while (inner := _held(module)) is not None:
        names.append("torch.compile" if _COMPILED in module._modules else type(module).__name__)
        module = inner
    return names


def without_compiled_parts(module: nn.Module) -> nn.Module:
    """Replace each part that ``torch.compile`` returned by the part it was made of, in place."""
    for parent in list(module.modules()):
        for name, part in list(parent.named_children()):
            if _COMPILED in part._modules:
                setattr(parent, name, unwrapped(part))
    return module


def _held(module: nn.Module) -> nn.Module | None:
    if isinstance(module, _WRAPPERS):
        held: nn.Module = module.module
        return held
    if _COMPILED in module._modules:
        return module._modules[_COMPILED]
    children = list(module.children())
    collection = isinstance(module, nn.ModuleList | nn.ModuleDict)
    bare = type(module).forward is nn.Module.forward and "forward" not in vars(module)
    return children[0] if bare and len(children) == 1 and not collection else None

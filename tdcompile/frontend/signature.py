"""``Call``: the arguments of a network's call, whose tensors may be nested and can be replaced."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tdcompile.errors import InputError, nearest
from tdcompile.ir.modules import register_trees


@dataclass(frozen=True)
class Call:
    """A network's call with example inputs.

    Attributes:
        tensors: all tensors in the arguments, in the order of ``forward``'s signature and of their nesting.
        names: name of each tensor: its argument, followed by the path inside it if nested.
        given: shapes and dtypes of the tensors that the user gave, as text.
    """

    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]
    given: str
    _signature: inspect.Signature
    _leaves: tuple[Any, ...]
    _spec: pytree.TreeSpec

    @classmethod
    def of(cls, module: nn.Module, inputs: Sequence[Any] | Mapping[str, Any] | Tensor) -> Call:
        """Bind example inputs to ``forward``: a tensor, the arguments in order, or a mapping by name.

        Raises:
            InputError: ``forward`` does not accept the arguments, or they contain no tensor.
        """
        if inputs is None:
            raise InputError(
                "give example inputs: a tensor, forward's arguments in order, or a mapping of them by name"
            )
        signature = inspect.signature(module.forward)
        given: tuple[Any, ...] = ()
        named: dict[str, Any] = {}
        if isinstance(inputs, Mapping):
            named = dict(inputs)
            _check_names(signature, named)
        else:
            given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        register_trees((given, named))
        try:
            bound = signature.bind(*given, **named)
        except TypeError as error:
            wanted = ", ".join(map(str, signature.parameters.values())) or "nothing"
            raise InputError(f"the inputs do not fit the network: {error}; it takes {wanted}") from error
        pairs, spec = pytree.tree_flatten_with_path(dict(bound.arguments))
        leaves = tuple(leaf for _, leaf in pairs)
        names = [_input_name(path) for path, leaf in pairs if isinstance(leaf, Tensor)]
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        if not tensors:
            raise InputError("the inputs hold no tensor: give at least one, (N, ...)")
        return cls(tensors, tuple(names), describe_shapes(tensors), signature, leaves, spec)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Call:
        """Return the call with other tensors."""
        return replace(self, tensors=tuple(tensors), _leaves=self._filled(tensors))

    def arguments(self, values: Sequence[Any], rest: Any = ...) -> dict[str, Any]:
        """Return the arguments by name, with a value in place of each tensor.

        Args:
            values: one value for each of ``tensors``.
            rest: value in place of every other leaf; by default the leaf's own.
        """
        arguments: dict[str, Any] = pytree.tree_unflatten(list(self._filled(values, rest)), self._spec)
        return arguments

    def _filled(self, values: Sequence[Any], rest: Any = ...) -> tuple[Any, ...]:
        remaining = iter(values)
        return tuple(
            next(remaining) if isinstance(leaf, Tensor) else (leaf if rest is ... else rest) for leaf in self._leaves
        )

    def split(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return ``(args, kwargs)`` of the call, with a value in place of each tensor."""
        bound = inspect.BoundArguments(self._signature, self.arguments(values))
        return bound.args, bound.kwargs

    def defaults(self) -> dict[str, Any]:
        """Return the arguments without tensors by name, with given or default values."""
        given = self.arguments(self.tensors)
        plain = {
            name: value
            for name, value in given.items()
            if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
        }
        return plain | {
            name: parameter.default
            for name, parameter in self._signature.parameters.items()
            if name not in given and parameter.default is not parameter.empty
        }

    @property
    def tensors_in_kwargs(self) -> list[str]:
        """Return the names of arguments with tensors that ``forward`` takes by ``**kwargs``."""
        last = [p.name for p in self._signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]
        given = self.arguments(self.tensors).get(last[0], {}) if last else {}
        return [name for name, value in given.items() if _contains_tensor(value)]

    @property
    def nested(self) -> bool:
        """Return whether an argument contains tensors rather than being one."""
        return any(
            not isinstance(value, Tensor) for value in self.arguments(self.tensors).values() if _contains_tensor(value)
        )


def describe_shapes(tensors: Sequence[Tensor]) -> str:
    """Return shapes and dtypes as text."""
    return ", ".join(f"{'x'.join(map(str, x.shape))}:{str(x.dtype).removeprefix('torch.')}" for x in tensors)


def _check_names(signature: inspect.Signature, named: Mapping[str, Any]) -> None:
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    for name in named:
        if name not in signature.parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise InputError(f"the network takes no input '{name}': {nearest(name, list(signature.parameters))}")


def _input_name(path: Sequence[Any]) -> str:
    parts = [str(getattr(step, "key", getattr(step, "idx", getattr(step, "name", step)))) for step in path]
    return re.sub(r"\W", "_", "_".join(parts))


def _contains_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))

"""Stable tags for module classes in saved folders, so that a class may move without making old folders unreadable."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

PREFIX = "tdcompile:"

C = TypeVar("C", bound=type[nn.Module])

_CLASSES: dict[str, type[nn.Module]] = {}
_TAGS: dict[type[nn.Module], str] = {}
_ALIASES: dict[str, str] = {}


def saved_as(tag: str, *aliases: str) -> Callable[[C], C]:
    """Register a module class under a stable tag.

    Args:
        tag: the class's name in saved folders; it never changes.
        aliases: ``module:name`` texts under which earlier versions saved the class.

    Raises:
        ValueError: the tag belongs to another class.
    """

    def register(kind: C) -> C:
        known = _CLASSES.get(tag)
        if known is not None and (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
            raise ValueError(f"the tag '{tag}' belongs to {known.__module__}.{known.__qualname__}")
        _CLASSES[tag] = kind
        _TAGS[kind] = PREFIX + tag
        _ALIASES.update(dict.fromkeys(aliases, PREFIX + tag))
        return kind

    return register


def tag_of(kind: type) -> str | None:
    """Return the tag of a class with its prefix, or None if the class has no tag."""
    return _TAGS.get(kind)


def class_of(name: str) -> type[nn.Module] | None:
    """Return the class of a tag or of an alias, or None if the name is neither."""
    tag = _ALIASES.get(name, name)
    return _CLASSES.get(tag.removeprefix(PREFIX)) if tag.startswith(PREFIX) else None

"""Find plug-ins in ``tdcompile.passes``, ``tdcompile.models`` and the entry points of installed packages."""

from __future__ import annotations

import importlib
import logging
import pkgutil
from functools import cache, lru_cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import TypeVar

from pydantic import AfterValidator

from tdcompile.core.plugin import Plugin
from tdcompile.errors import InputError, TdcompileError, nearest
from tdcompile.support.spec import Spec, parse_spec

PACKAGES = ("tdcompile.passes", "tdcompile.models")
ENTRY_POINTS = "tdcompile.plugins"

log = logging.getLogger("tdcompile")
P = TypeVar("P", bound=Plugin)


def find(kind: type[P]) -> dict[str, type[P]]:
    """Return the registered plug-ins of a kind by name, sorted: ``find(Decomposition)["tucker2"]``.

    A class is registered when it is defined. A new definition of the same name in the same module replaces the old one.
    A score and a selector may have the same name; two plug-ins of one kind may not.

    Raises:
        TdcompileError: two classes of this kind have the same name.
    """
    found: dict[str, type[P]] = {}
    for plugin in _all():
        if not issubclass(plugin, kind):
            continue
        known = found.get(plugin.name)
        again = known is not None and _place(known) == _place(plugin)  # a notebook cell that was run again
        if known is not None and not again:
            raise TdcompileError(f"two plug-ins are called '{plugin.name}': {known.__module__} and {plugin.__module__}")
        found[plugin.name] = plugin
    return dict(sorted(found.items()))


def get(kind: type[P], name: str) -> type[P]:
    """Return the plug-in class of this kind and name.

    Raises:
        InputError: there is none; the message suggests a similar name.
    """
    known = find(kind)
    if name not in known:
        raise InputError(f"there is no {_called(kind)} '{name}': {nearest(name, known)}")
    return known[name]


def make(kind: type[P], text: str | Spec) -> P:
    """Make a plug-in from its text form: ``make(RankSelector, "energy{keep=0.9}")``.

    Raises:
        InputError: a name or an option is unknown, or a value does not fit.
    """
    spec = parse_spec(text) if isinstance(text, str) else text
    return get(kind, spec.name).from_options(spec.options)


def declaring(kind: type[P], attribute: str) -> list[type[P]]:
    """Return the plug-ins of a kind whose own class sets an attribute to something that is not false, by name.

    This is how the core finds a plug-in for a role without its name. A subclass does not inherit the role.
    """
    return [plugin for plugin in find(kind).values() if vars(plugin).get(attribute)]


def only(kind: type[P], attribute: str) -> type[P]:
    """Return the plug-in that ``declaring`` finds.

    Raises:
        TdcompileError: no plug-in declares the attribute, or several do.
    """
    found = declaring(kind, attribute)
    if len(found) != 1:
        names = ", ".join(plugin.name for plugin in found) or "none"
        raise TdcompileError(f"exactly one {_called(kind)} must set '{attribute}', and these do: {names}")
    return found[0]


def registered(kind: type[Plugin]) -> AfterValidator:
    """Return the check of an option that names a plug-in.

    A field declares it: ``by: Annotated[str, registered(RankSelector)]``. A wrong name is then an error when the
    option is set, not when the plug-in is first used.
    """

    def check(text: str) -> str:
        make(kind, text)
        return text

    return AfterValidator(check)


def _called(kind: type[Plugin]) -> str:
    return {"RankSelector": "rank selector", "Importance": "score", "CostModel": "cost model"}.get(
        kind.__name__, kind.__name__.lower()
    )


def _all() -> tuple[type[Plugin], ...]:
    """Return all classes that set ``name`` themselves, in the order of their definition."""
    import_all()
    return tuple(plugin for plugin in _listed(Plugin.defined) if vars(plugin).get("name"))


@lru_cache(maxsize=1)
def _listed(defined: int) -> tuple[type[Plugin], ...]:
    return tuple(_subclasses(Plugin))  # whatever their names: a name may be set or taken away later


def _place(plugin: type[Plugin]) -> tuple[str, str]:
    return plugin.__module__, plugin.__qualname__


@cache
def import_all() -> None:
    """Import all plug-ins of tdcompile and of installed packages."""
    for package in PACKAGES:
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
            importlib.import_module(module.name)
    for point in entry_points(group=ENTRY_POINTS):
        _import_foreign(point.value, point.dist.name if point.dist else point.name)


def _import_foreign(target: str, distribution: str) -> ModuleType | None:
    """Import the plug-ins of another package; if the import fails, log a warning."""
    try:
        return importlib.import_module(target.partition(":")[0])
    except Exception as error:  # noqa: BLE001  # a foreign module may raise anything on import
        log.warning("the plug-ins of %s are not available: %s does not import: %s", distribution, target, error)
        return None


def foreign_packages() -> tuple[str, ...]:
    """Return the other packages whose plug-ins are imported; a saved file may name their classes."""
    return tuple(sorted({plugin.__module__.partition(".")[0] for plugin in _all()} - {"tdcompile"}))


def refresh() -> None:
    """Search for packages of plug-ins again, after one was installed."""
    import_all.cache_clear()
    _listed.cache_clear()


def _subclasses(kind: type[Plugin]) -> list[type[Plugin]]:
    return [found for child in kind.__subclasses__() for found in (child, *_subclasses(child))]

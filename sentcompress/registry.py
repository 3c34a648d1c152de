"""Finds and loads plugins, isolates broken ones, and turns a name into a component."""

from __future__ import annotations

import importlib
import operator
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from importlib import metadata
from typing import Any, get_origin

import pluggy
from pydantic import ValidationError

from sentcompress import __version__, contracts, hookspecs
from sentcompress.errors import PluginError, RecipeError, did_you_mean
from sentcompress.packages import entry_points, foreign_import, name_of, version_of

GROUP = "sentcompress"
KINDS = {
    "segmenter": "segmenters",
    "fusion": "fusions",
    "backbone": "backbones",
    "dataset": "datasets",
    "metric": "metrics",
    "memory": "memories",
}
"""Each kind of component, and the name of its hook and of the package of its built-ins."""


@dataclass
class Plugin:
    """One plugin: an entry point, or a package of built-ins."""

    name: str
    package: str
    version: str
    module: str
    error: str | None = None
    components: list[tuple[str, str]] = field(default_factory=list)
    """The ``(kind, name)`` pairs that it has registered."""

    @property
    def status(self) -> str:
        return "broken" if self.error else "ok"

    def importing(self) -> AbstractContextManager[None]:
        """For a block that imports its code: what it prints stays out of stdout, unless it is built in."""
        if self.package == "sentcompress":
            return nullcontext()
        return foreign_import(f"plugin '{self.name}' of package '{self.package}'")


@dataclass(frozen=True)
class Claim:
    """A plugin's claim to a component name."""

    plugin: Plugin
    target: Any
    """The class, or ``"module:Class"``."""


class Registry:
    """All plugins of this process. Broken ones are kept with their error and do not affect others."""

    def __init__(self) -> None:
        self.plugins: list[Plugin] = []
        self._claims: dict[tuple[str, str], list[Claim]] = {}
        for folder in KINDS.values():
            self._load(Plugin(folder, "sentcompress", __version__, f"sentcompress.{folder}"))
        for entry_point in _selected_entry_points():
            package, version = name_of(entry_point.dist), version_of(entry_point.dist)
            self._load(Plugin(entry_point.name, package, version, entry_point.value))

    def _load(self, plugin: Plugin) -> None:
        self.plugins.append(plugin)
        claims: list[tuple[str, str, Any]] = []
        # Each plugin has its own manager, so that a broken one is dropped entirely, with nothing half-registered.
        manager = pluggy.PluginManager(GROUP)
        manager.add_hookspecs(hookspecs)
        try:
            with plugin.importing():
                manager.register(_imported(plugin.module), name=plugin.name)
                manager.check_pending()
                for kind, suffix in KINDS.items():

                    def register(name: str, cls: type | str, kind: str = kind) -> None:
                        claims.append((kind, name, _checked_target(kind, name, cls)))

                    getattr(manager.hook, f"register_{suffix}")(register=register)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # importing a plugin may even call sys.exit()
            plugin.error = f"{type(error).__name__}: {error}"
            return
        for kind, name, target in claims:
            plugin.components.append((kind, name))
            self._claims.setdefault((kind, name), []).append(Claim(plugin, target))

    def names(self, kind: str) -> list[str]:
        """Names registered for a kind, sorted."""
        return sorted(name for k, name in self._claims if k == kind)

    def broken(self) -> list[Plugin]:
        return [plugin for plugin in self.plugins if plugin.error]

    def collisions(self) -> dict[tuple[str, str], list[Plugin]]:
        """Names that more than one plugin claims."""
        return {key: [c.plugin for c in claims] for key, claims in self._claims.items() if len(claims) > 1}

    def claims(self, kind: str, name: str) -> list[Claim]:
        """The plugins that claim a component: none, one, or several that collide."""
        return list(self._claims.get((kind, name), []))

    def owner(self, kind: str, name: str) -> Plugin:
        """The plugin that provides a component. Raises PluginError like :meth:`get`."""
        return self._claim(kind, name).plugin

    def get(self, kind: str, name: str) -> type:
        """Return the class of a component.

        Raises:
            PluginError: no plugin provides it, two claim it, or it cannot be imported.
        """
        claim = self._claim(kind, name)
        if not isinstance(claim.target, str):
            return claim.target
        plugin = claim.plugin
        module, _, attribute = claim.target.partition(":")
        try:
            with plugin.importing():
                found: type = _checked_class(kind, name, getattr(importlib.import_module(module), attribute))
                return found
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # as in _load
            raise PluginError(
                f"{kind} '{name}' of package '{plugin.package}' {plugin.version} cannot be imported: "
                f"{type(error).__name__}: {error}",
                fix=f"install its dependencies, or reinstall it: pip install --upgrade {plugin.package}",
            ) from error

    def find(self, kind: str, cls: type) -> tuple[str, Plugin] | None:
        """The name under which a class is registered, and its plugin, or None."""
        for (claimed, name), claims in self._claims.items():
            for claim in claims if claimed == kind else ():
                target = claim.target
                if isinstance(target, str):  # not imported here: an unused component has no class yet
                    module, _, attribute = target.partition(":")
                    target = getattr(sys.modules.get(module), attribute, None)
                if target is cls:
                    return name, claim.plugin
        return None

    def _claim(self, kind: str, name: str) -> Claim:
        claims = self.claims(kind, name)
        if len(claims) > 1:
            both = " and ".join(f"'{c.plugin.package}' (plugin '{c.plugin.name}')" for c in claims)
            raise PluginError(
                f"{kind} '{name}' is claimed by {both}",
                fix="uninstall one of them, or set SENTCOMPRESS_PLUGINS to the plugins to load",
            )
        if claims:
            return claims[0]
        message = f"no {kind} is called '{name}'.{did_you_mean(name, self.names(kind))}"
        for plugin in self.broken():
            message += f"\n  plugin '{plugin.name}' (package '{plugin.package}') is broken: {plugin.error}"
        raise PluginError(
            message,
            fix=f"use one of {', '.join(self.names(kind))}, or install the plugin that provides it "
            "('sentcompress plugins' lists all components)",
        )

    def options(self, kind: str, name: str, options: dict[str, Any] | None, where: str) -> Any:
        """Check a component's options against its ``Options`` class and return the instance.

        Args:
            where: the recipe field of the options, for messages.
        """
        model = self.get(kind, name).Options  # type: ignore[attr-defined]
        try:
            return model(**(options or {}))
        except ValidationError as error:
            raise RecipeError(describe_validation_error(error, model, where)) from None

    def create(self, kind: str, name: str, options: dict[str, Any] | None = None, **arguments: Any) -> Any:
        """Build a component from its name and raw options."""
        checked = self.options(kind, name, options, f"{kind}.options")
        return self.get(kind, name)(**arguments, options=checked)


@cache
def get_registry() -> Registry:
    """The registry of this process, built on first use."""
    return Registry()


def describe_component(kind: str, component: object) -> str:
    """A component or its class for messages, e.g. ``segmenter 'x' (its.module.Class, package 'its' 1.2)``."""
    cls = component if isinstance(component, type) else type(component)
    where = f"{cls.__module__}.{cls.__qualname__}"
    found = get_registry().find(kind, cls)
    if found is None:
        return f"{kind} {where}"
    name, plugin = found
    return f"{kind} '{name}' ({where}, package '{plugin.package}' {plugin.version})"


def _selected_entry_points() -> list[metadata.EntryPoint]:
    """The entry points of plugins; SENTCOMPRESS_PLUGINS=a,b restricts them by name (empty: none)."""
    wanted = os.environ.get("SENTCOMPRESS_PLUGINS")
    names = {name.strip() for name in (wanted or "").split(",") if name.strip()}
    if wanted is not None and not names:
        return []
    found = entry_points(GROUP)
    if wanted is None:
        return found
    missing = names - {entry_point.name for entry_point in found}
    if missing:
        raise PluginError(
            f"SENTCOMPRESS_PLUGINS names plugins that are not installed: {', '.join(sorted(missing))}",
            fix="install them, or correct the environment variable",
        )
    return [entry_point for entry_point in found if entry_point.name in names]


def _imported(target: str) -> Any:
    """The module of an entry point such as ``module`` or ``module:name``. Raises whatever its import raises."""
    module, _, attribute = target.partition("[")[0].strip().partition(":")
    imported = importlib.import_module(module.strip())
    if attribute.strip():  # the hooks are the module's, but a name that is not there is a mistake
        operator.attrgetter(attribute.strip())(imported)
    return imported


def _checked_target(kind: str, name: str, cls: Any) -> Any:
    if not isinstance(name, str) or not name or name != name.strip():
        raise TypeError(f"a {kind} must be registered under a non-empty name, not {name!r}")
    if isinstance(cls, str):
        if cls.count(":") != 1:
            raise TypeError(f"{kind} '{name}': write 'module:Class', not {cls!r}")
        return cls
    return _checked_class(kind, name, cls)


def _checked_class(kind: str, name: str, cls: Any) -> Any:
    contract = getattr(contracts, kind.capitalize())
    if not (isinstance(cls, type) and issubclass(cls, contract)):
        raise TypeError(
            f"{kind} '{name}' must be a subclass of sentcompress.{contract.__name__}, not {cls!r}"
        )
    return cls


def describe_validation_error(error: ValidationError, model: type, where: str) -> str:
    """Turn pydantic's error into lines that name the field, what is wrong, and a similar known key."""
    lines = []
    for item in error.errors(include_url=False):
        path = [str(part) for part in item["loc"]]
        field_name = ".".join([where, *path] if where else path)
        if item["type"] == "extra_forbidden":
            known = _fields_at(model, path[:-1])
            near = did_you_mean(path[-1], known)
            lines.append(f"{field_name}: unknown key.{near} Known keys: {', '.join(sorted(known)) or 'none'}")
        elif item["type"] == "missing":
            lines.append(f"{field_name}: required, but missing")
        else:
            given = item.get("input")
            quote = ""
            if item["type"] == "string_type" and isinstance(given, int | float | date):
                quote = "; put quotes around it"
            lines.append(f"{field_name}: {item['msg']} (got {_short(given)}){quote}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _fields_at(model: Any, path: list[str]) -> list[str]:
    """Field names of the nested model at a path."""
    parts = iter(path)
    for part in parts:
        info = getattr(model, "model_fields", {}).get(part)
        if info is None:
            return []
        candidates = [info.annotation, *getattr(info.annotation, "__args__", ())]
        model = next((c for c in candidates if hasattr(c, "model_fields")), None)
        if get_origin(info.annotation) is dict:
            next(parts, None)  # the key
    return list(getattr(model, "model_fields", {}))

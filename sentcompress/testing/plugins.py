"""check_plugin: the check of its kind for a component that is registered under a name."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from sentcompress.errors import InputError, did_you_mean
from sentcompress.registry import KINDS, get_registry


def check_plugin(kind: str, name: str, options: dict[str, Any] | None = None, **settings: Any) -> None:
    """Run ``check_<kind>`` on the registered component ``name``, exactly as a recipe would find it.

    Args:
        kind: ``segmenter``, ``fusion``, ``backbone``, ``dataset`` or ``metric``.
        options: what stands under ``options:`` in a recipe.
        settings: of the check, such as ``hidden_size=64`` for a fusion or ``causal_lm=model`` for a backbone.

    Raises:
        CheckFailed: the component breaks a promise of its contract; one sentence.
        PluginError: no plugin has it, two claim it, or its plugin is broken.
        InputError: there is no such kind.
    """
    __tracebackhide__ = True
    if kind not in KINDS:
        raise InputError(
            f"there is no kind of component called '{kind}'.{did_you_mean(kind, KINDS)}",
            fix=f"use one of {', '.join(KINDS)}",
        )
    component = get_registry().get(kind, name)
    # Imported late: a check may need torch, and a stranger may need one check only.
    check = getattr(import_module(f"sentcompress.testing.{KINDS[kind]}"), f"check_{kind}")
    check(component, options=options, **settings)

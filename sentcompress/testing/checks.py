"""What all checks share: check_plugin, and messages that name the component and the line. No torch."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from sentcompress import contracts
from sentcompress.errors import InputError, did_you_mean
from sentcompress.registry import KINDS, describe_component, describe_validation_error, get_registry

T = TypeVar("T")


class CheckFailed(AssertionError):
    """A component violates its contract; the message is one sentence."""


class Subject:
    """The component under test: builds it, calls it, and reports what is wrong with it.

    Args:
        kind: such as ``segmenter``.
        component: the class, or an instance; ``options`` are only for a class.
        options: raw options, or an instance of the class' ``Options``; None uses the defaults.

    Raises:
        CheckFailed: it is not a subclass of its contract, or it refuses the options.
    """

    def __init__(self, kind: str, component: Any, options: Any | None = None) -> None:
        contract = getattr(contracts, kind.capitalize())
        self.cls: type[Any] = component if isinstance(component, type) else type(component)
        self.name = describe_component(kind, self.cls)
        if not issubclass(self.cls, contract):
            self.fail(f"is not a {kind}", f"it must be a subclass of sentcompress.{contract.__name__}")
        if component is not self.cls:
            if options is not None:
                raise TypeError(f"options are only for a class; this {kind} already has its own")
            self.options = component.options
            return
        model = self.cls.Options
        try:
            self.options = options if isinstance(options, model) else model(**(options or {}))
        except ValidationError as error:
            reason = describe_validation_error(error, model, "options").replace("\n", "; ")
            raise CheckFailed(f"{self.name} refuses the options of this check: {reason}") from None

    def build(self, **arguments: Any) -> Any:
        """A new component, built as the registry builds it."""
        return self.call("its class", lambda: self.cls(**arguments, options=self.options))

    def call(self, what: str, function: Callable[[], T]) -> T:
        """Call ``function``; turn an exception into a CheckFailed that shows the line of the component."""
        try:
            return function()
        except Exception as error:
            reason = shown(" ".join(str(error).split()), 300, quote=False)
            message = f"{what} raised {type(error).__name__}: {reason}{place_of(error, self.cls)}"
            raise CheckFailed(f"{self.name}: {message}") from error

    def fail(self, problem: str, expected: str) -> NoReturn:
        """Raise CheckFailed with what is wrong and what the contract requires."""
        raise CheckFailed(f"{self.name} {problem}; {expected}")


def place_of(error: BaseException, cls: type) -> str:
    """``" (file.py:12)"``, the last line of the component's own file in a traceback, or an empty string."""
    own = getattr(sys.modules.get(cls.__module__), "__file__", None)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == own]
    return f" ({Path(own).name}:{lines[-1]})" if own and lines else ""


def shown(value: Any, width: int = 60, *, quote: bool = True) -> str:
    """A value for a message, shortened in the middle if it is long."""
    text = repr(value) if quote else str(value)
    half = width // 2
    return text if len(text) <= width else f"{text[: half - 2]} ... {text[-half + 3 :]}"


def check_plugin(kind: str, name: str, options: dict[str, Any] | None = None, **settings: Any) -> None:
    """Run ``check_<kind>`` on the registered component ``name``, which is found as in a recipe.

    Args:
        kind: ``segmenter``, ``fusion``, ``backbone``, ``dataset``, ``metric`` or ``memory``.
        options: as under ``options:`` in a recipe.
        settings: arguments of the check, such as ``hidden_size=64`` for a fusion or ``causal_lm=model`` for a backbone.

    Raises:
        CheckFailed: the component violates its contract; the message is one sentence.
        PluginError: no plugin provides it, two claim it, or its plugin is broken.
        InputError: there is no such kind.
    """
    __tracebackhide__ = True
    if kind not in KINDS:
        raise InputError(
            f"no kind of component is called '{kind}'.{did_you_mean(kind, KINDS)}",
            fix=f"use one of {', '.join(KINDS)}",
        )
    component = get_registry().get(kind, name)
    # Imported late, since some checks need torch.
    check = getattr(import_module("sentcompress.testing"), f"check_{kind}")
    check(component, options=options, **settings)

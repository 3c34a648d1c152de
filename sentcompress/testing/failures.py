"""How a check says what is wrong: one sentence, with the component's name and the place. No torch."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from sentcompress import contracts
from sentcompress.registry import describe_component, describe_validation_error

T = TypeVar("T")


class CheckFailed(AssertionError):
    """A component breaks a promise of its contract; the message is one sentence."""


class Subject:
    """The component under test: builds it, calls it, and words what is wrong with it.

    Args:
        kind: such as ``segmenter``.
        component: the class, or an instance (then without ``options``).
        options: raw options, or an instance of the class' ``Options``; None for the defaults.

    Raises:
        CheckFailed: not a class of its contract, or the options are refused.
    """

    def __init__(self, kind: str, component: Any, options: Any | None = None) -> None:
        contract = getattr(contracts, kind.capitalize())
        self.cls: type[Any] = component if isinstance(component, type) else type(component)
        self.name = describe_component(kind, self.cls)
        if not issubclass(self.cls, contract):
            self.fail("is of no use", f"it must be a subclass of sentcompress.{contract.__name__}")
        if component is not self.cls:
            if options is not None:
                raise TypeError(f"options are for a class; this {kind} has its own already")
            self.options = component.options
            return
        model = self.cls.Options
        try:
            self.options = options if isinstance(options, model) else model(**(options or {}))
        except ValidationError as error:
            reason = describe_validation_error(error, model, "options").replace("\n", "; ")
            raise CheckFailed(f"{self.name} refuses the options of this check: {reason}") from None

    def build(self, **arguments: Any) -> Any:
        """A new component, called as the registry calls it."""
        return self.call("its class", lambda: self.cls(**arguments, options=self.options))

    def call(self, what: str, function: Callable[[], T]) -> T:
        """What ``function`` returns; an exception of the component's becomes a failure that shows its line."""
        try:
            return function()
        except Exception as error:
            reason = shown(" ".join(str(error).split()), 300, quote=False)
            message = f"{what} raised {type(error).__name__}: {reason}{place_of(error, self.cls)}"
            raise CheckFailed(f"{self.name}: {message}") from error

    def fail(self, problem: str, expected: str) -> NoReturn:
        """Raise CheckFailed: what is wrong, and what the contract says."""
        raise CheckFailed(f"{self.name} {problem}; {expected}")


def place_of(error: BaseException, cls: type) -> str:
    """``" (file.py:12)"``, the last line of the component's own on the way to an exception, or nothing."""
    own = getattr(sys.modules.get(cls.__module__), "__file__", None)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == own]
    return f" ({Path(own).name}:{lines[-1]})" if own and lines else ""


def shown(value: Any, width: int = 60, *, quote: bool = True) -> str:
    """A value for a message, its middle left out where it is long."""
    text = repr(value) if quote else str(value)
    half = width // 2
    return text if len(text) <= width else f"{text[: half - 2]} ... {text[-half + 3 :]}"

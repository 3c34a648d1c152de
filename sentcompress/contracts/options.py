"""Options of a component: a described pydantic model, checked before anything is built."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """Base of every component's options: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Component:
    """Base of the torch-free components. ``options`` defaults to ``Options()`` of the class."""

    Options: ClassVar[type[Options]] = Options

    def __init__(self, options: Any | None = None) -> None:
        self.options: Any = self.Options() if options is None else options

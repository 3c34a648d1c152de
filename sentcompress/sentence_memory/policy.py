"""Several memories as one: what any of them keeps is kept, and one of them recalls."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from sentcompress.contracts import Memory, Tokens
from sentcompress.errors import InputError, did_you_mean
from sentcompress.registry import describe_validation_error, get_registry


class Policy:
    """A combination of memories, such as ``window+recall``.

    Attributes:
        name: the names of the memories, joined by ``+``.
        parts: the memories, by name.
    """

    def __init__(self, parts: dict[str, Memory]) -> None:
        self.name = "+".join(parts)
        self.parts = parts
        self._recalls = next((part for part in parts.values() if part.recall), None)

    @classmethod
    def parse(cls, name: str, options: dict[str, Any] | None = None) -> Policy:
        """Build the memories of a combination. Each takes the options that it knows.

        Args:
            name: names of memories, joined by ``+``.
            options: of all of them, by name.

        Raises:
            InputError: a name is empty or there twice, an option is unknown or wrong, or two memories recall.
            PluginError: there is no such memory.
        """
        names = [part.strip() for part in name.split("+")]
        if not all(names) or len(set(names)) < len(names):
            raise InputError(
                f"memory: '{name}' is not a list of different memories",
                fix="join names by +, such as window+recall",
            )
        registry, given = get_registry(), dict(options or {})
        models = {part: registry.get("memory", part).Options for part in names}  # type: ignore[attr-defined]
        known = {field for model in models.values() for field in model.model_fields}
        for field in given:
            if field not in known:
                raise InputError(
                    f"memory '{name}' has no option '{field}'.{did_you_mean(field, sorted(known))}",
                    fix=f"use {', '.join(sorted(known)) or 'no options'}",
                )
        parts: dict[str, Memory] = {}
        for part, model in models.items():
            own = {field: value for field, value in given.items() if field in model.model_fields}
            try:
                parts[part] = registry.get("memory", part)(options=model(**own))
            except ValidationError as error:
                raise InputError(
                    f"memory: {describe_validation_error(error, model, part)}", fix="correct this option"
                ) from None
        recalling = [part for part, memory in parts.items() if memory.recall]
        if len(recalling) > 1:
            raise InputError(
                f"memory: {' and '.join(recalling)} both recall sentences", fix="leave out one of them"
            )
        return cls(parts)

    def prepare(self, tokenizer: Any) -> None:
        """As :meth:`sentcompress.Memory.prepare`."""
        for part in self.parts.values():
            part.prepare(tokenizer)

    @property
    def options(self) -> dict[str, Any]:
        """All options with their values: :meth:`parse` builds the same policy from them."""
        return {k: v for part in self.parts.values() for k, v in part.options.model_dump().items()}

    @property
    def recall(self) -> int:
        """Sentences that each token recalls."""
        return self._recalls.recall if self._recalls else 0

    @property
    def candidates(self) -> int:
        """Sentences looked up by index; never fewer than are recalled."""
        return max(self._recalls.candidates, self.recall) if self._recalls else 0

    def keep(self, tokens: Tokens) -> Tensor:
        """Which tokens of earlier sentences are kept by any of the memories: bool ``[..., T]``."""
        kept = (part.keep(tokens) for part in self.parts.values())
        return reduce(torch.logical_or, kept, torch.zeros_like(tokens.age, dtype=torch.bool))

    def index(self, keys: Tensor) -> Tensor:
        """As :meth:`sentcompress.Memory.index`."""
        assert self._recalls is not None
        return self._recalls.index(keys)

    def scores(self, queries: Tensor, index: Tensor) -> Tensor:
        """As :meth:`sentcompress.Memory.scores`."""
        assert self._recalls is not None
        return self._recalls.scores(queries, index)

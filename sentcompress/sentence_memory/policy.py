"""Several memories as one: what any of them keeps is kept, and one of them recalls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import cached_property, reduce
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from sentcompress.contracts import Memory, Tokens
from sentcompress.errors import InputError, PluginError, SentCompressError, did_you_mean
from sentcompress.registry import describe_component, describe_validation_error, get_registry


class Policy:
    """A combination of memories, such as ``window+recall``.

    Attributes:
        name: the names of the memories, joined by ``+``.
        parts: the memories, by name.
    """

    def __init__(self, parts: dict[str, Memory], *, recalls: bool = True) -> None:
        self.name = "+".join(parts)
        self.parts = parts
        self._recalls = next((part for part in parts.values() if part.recall), None) if recalls else None

    @cached_property
    def without_recall(self) -> Policy:
        """The same memories in a block that recalls nothing."""
        return Policy(self.parts, recalls=False)

    @classmethod
    def parse(cls, name: str, options: dict[str, Any] | None = None, also: Iterable[str] = ()) -> Policy:
        """Build the memories of a combination. Each takes the options that it knows.

        Args:
            name: names of memories, joined by ``+``.
            options: of all of them, by name.
            also: names that stand beside these options, to find what a misspelt one means.

        Raises:
            InputError: a name is empty or there twice, an option is unknown or wrong, or two memories recall.
            PluginError: there is no such memory.
        """
        names = [part.strip() for part in str(name).split("+")]
        if not all(names) or len(set(names)) < len(names):
            raise InputError(
                f"memory: '{name}' is not a list of different memories",
                fix="join names by +, such as window+recall",
            )
        registry, given = get_registry(), dict(options or {})
        models = {part: registry.get("memory", part).Options for part in names}  # type: ignore[attr-defined]
        known = {field for model in models.values() for field in model.model_fields}
        beside = f"; every memory has {', '.join(sorted(also))}" if also else ""
        for field in given:
            if field not in known:
                raise InputError(
                    f"memory '{name}' has no option '{field}'.{did_you_mean(field, sorted({*known, *also}))}",
                    fix=f"use {', '.join(sorted(known)) or 'no options'}" + beside,
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
        """As :meth:`sentcompress.Memory.prepare`.

        Raises:
            PluginError: a memory breaks its contract: ``keep`` fails, depends on other tokens, or takes back a token.
        """
        for part in self.parts.values():
            _called(part, "prepare", lambda part=part: part.prepare(tokenizer))  # type: ignore[misc]
            _check_keep(part)

    @property
    def options(self) -> dict[str, Any]:
        """All options with their values: :meth:`parse` builds the same policy from them."""
        return {k: v for part in self.parts.values() for k, v in part.options.model_dump().items()}

    @property
    def changed_options(self) -> dict[str, Any]:
        """Options that do not have their default value."""
        parts = self.parts.values()
        return {k: v for part in parts for k, v in part.options.model_dump(exclude_defaults=True).items()}

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
        kept = (_kept(part, tokens) for part in self.parts.values())
        return reduce(torch.logical_or, kept, torch.zeros_like(tokens.age, dtype=torch.bool))

    def index(self, keys: Tensor) -> Tensor:
        """As :meth:`sentcompress.Memory.index`."""
        part = self._recalls
        assert part is not None
        index = _called(part, "index", lambda: part.index(keys))
        if not isinstance(index, Tensor) or index.dim() != 4 or index.shape[:3] != keys.shape[:3]:
            raise _broken(
                part, f"returned {_shown(index)} from index where {[*keys.shape[:3], 'C']} is expected"
            )
        return index

    def scores(self, queries: Tensor, index: Tensor) -> Tensor:
        """As :meth:`sentcompress.Memory.scores`."""
        part = self._recalls
        assert part is not None
        scores = _called(part, "scores", lambda: part.scores(queries, index))
        expected = [*queries.shape[:3], index.shape[2]]
        if not isinstance(scores, Tensor) or list(scores.shape) != expected:
            raise _broken(part, f"returned {_shown(scores)} from scores where {expected} is expected")
        return scores


def _called(part: Memory, method: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (SentCompressError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _broken(part, f"failed in {method}: {type(error).__name__}: {error}") from error


def _broken(part: Memory, problem: str) -> PluginError:
    return PluginError(
        f"{describe_component('memory', part)} {problem}",
        fix="report this to the memory's author (sentcompress.testing.check_memory shows it), or use another memory",
    )


def _shown(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _kept(part: Memory, tokens: Tokens) -> Tensor:
    kept = _called(part, "keep", lambda: part.keep(tokens))
    if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
        raise _broken(part, f"returned {_shown(kept)} from keep where booleans are expected")
    return kept


def _check_keep(part: Memory) -> None:
    """A few calls of ``keep``, in a millisecond; ``sentcompress.testing.check_memory`` has many more."""
    sentences, length = 12, 5
    number, offset = (
        n.flatten() for n in torch.meshgrid(torch.arange(sentences), torch.arange(length), indexing="ij")
    )
    tokens = Tokens(
        ids=7 * number + offset,
        position=length * number + offset,
        age=sentences - number,
        offset=offset,
        behind=length - 1 - offset,
        distance=length * (sentences - number),
    )

    def asked(change: Callable[[Tensor], Tensor], **others: Tensor) -> Tensor:
        values = {field.name: change(getattr(tokens, field.name)) for field in fields(Tokens)} | others
        return _kept(part, Tokens(**values))

    whole = asked(torch.clone)
    halves = [asked(lambda value, half=half: value.tensor_split([23])[half]) for half in (0, 1)]  # type: ignore[misc]
    if not (whole.equal(asked(torch.clone)) and whole.equal(torch.cat(halves))):
        raise _broken(part, "keeps a token or drops it depending on what else it is asked about")
    later = 3 * torch.arange(60)[:, None]
    ages = asked(torch.clone, age=tokens.age + later, distance=tokens.distance + length * later)
    if ages.dim() == 2 and bool((ages[1:] & ~ages[:-1]).any()):
        raise _broken(part, "keeps a token again that it has dropped")

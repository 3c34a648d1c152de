"""Texts longer than the LLM has positions: re-indexed positions, and keys rotated to them.

A token has its true position until the next one would reach the LLM's limit L. From then on, and again whenever the
limit is reached, everything moves down by L / 2: keys in the cache are rotated back (StreamingLLM, arXiv 2309.17453,
re-indexes inside the cache too). Distances to recent tokens stay true. Sentences that would move below the attention
sinks stay right behind them. Below the limit nothing changes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from sentcompress.contracts.causal_lm import position_limit
from sentcompress.errors import InputError


def moves_before(token: Tensor, limit: int) -> Tensor:
    """How often positions have moved down before a token has been read; int64 like ``token``, its place in the text."""
    half = limit // 2
    return torch.where(token < limit, 0, (token - limit) // half + 1)


def effective_position(token: Tensor, limit: int) -> Tensor:
    """The position that the LLM is given for a token: below ``limit``, whatever its place in the text."""
    return token - limit // 2 * moves_before(token, limit)


def moved_position(token: Tensor, offset: Tensor, moves: Tensor, limit: int, sinks: int) -> Tensor:
    """Where an earlier token stands after ``moves`` moves.

    Args:
        token: places in the text; those below ``sinks`` never move.
        offset: tokens of its sentence before it: a sentence that is moved as far as possible keeps its order.
    """
    moved = torch.maximum(token - limit // 2 * moves, sinks + offset)
    return torch.where((token < sinks) | (moves == 0), token, moved)


def rotary_limit(model: PreTrainedModel) -> int:
    """Positions within which an LLM's own keys keep their frequencies."""
    config = model.config.get_text_config(decoder=True)
    limit = position_limit(config)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Beyond, the LLM itself changes the frequencies, of keys that it has rotated already too.
        limit = min(limit, rope.get("original_max_position_embeddings") or limit)
    return limit


@dataclass(frozen=True)
class Reindexing:
    """Positions of a text that may be longer than the LLM's limit.

    Attributes:
        limit: all positions are below.
        sinks: first tokens of the text, which never move.
    """

    limit: int
    sinks: int

    def moves(self, token: int) -> int:
        """How often positions have moved down when a token of the text is read."""
        return int(moves_before(torch.tensor(token), self.limit))

    def positions(self, tokens: np.ndarray, offsets: np.ndarray, moves: int) -> np.ndarray:
        """Where earlier tokens stand after some moves, as :func:`moved_position`."""
        token, offset = torch.from_numpy(tokens), torch.from_numpy(offsets)
        return moved_position(token, offset, torch.tensor(moves), self.limit, self.sinks).numpy()


@dataclass(frozen=True)
class Rotation:
    """How the keys of one block turn with their position, by the LLM's own functions.

    Attributes:
        angles: its module that gives cosines and sines of positions; None for a block without positions.
        apply: its function that rotates.
        layer_type: the second argument of ``angles``, where it has one.
        single: ``apply`` takes one tensor, not queries and keys.
        first, last: channels of a head that turn.
    """

    angles: nn.Module | None
    apply: Callable[..., Any] | None = None
    layer_type: str | None = None
    single: bool = False
    first: int = 0
    last: int = 0

    def rotate(self, keys: Tensor, delta: Tensor) -> Tensor:
        """Keys as they would be at other positions.

        Args:
            keys: ``[B, heads, T, D]``, rotated to their positions.
            delta: new less old positions, int64 ``[B, T]``.

        Returns:
            ``[B, heads, T, D]``, same dtype. Computed in float, so that moving twice costs little precision.
        """
        if self.angles is None or self.apply is None:
            return keys
        full = keys.float()
        part = full[..., self.first : self.last]
        cos, sin = self.cos_sin(full, delta)
        turned = self.apply(part, cos, sin) if self.single else self.apply(part, part, cos, sin)[1]
        return torch.cat([full[..., : self.first], turned, full[..., self.last :]], -1).to(keys.dtype)

    def cos_sin(self, like: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Of angles, without the scale that YaRN and LongRoPE multiply by: the keys have it already."""
        assert self.angles is not None
        cos, sin = self.angles(like, delta, *([self.layer_type] if self.layer_type else []))
        scale = torch.hypot(cos, sin)
        return (cos / scale).to(like.device), (sin / scale).to(like.device)


def _candidates(model: PreTrainedModel, size: int, probe: Tensor) -> Iterator[Rotation]:
    """Every way to rotate a head of ``size`` channels that the LLM's modules offer, and no rotation."""
    yield Rotation(None)
    found = {id(module): module for module in model.modules() if "Rotary" in type(module).__name__}
    for module in {type(module): module for module in found.values()}.values():
        arguments = list(inspect.signature(module.forward).parameters)
        if arguments[:2] != ["x", "position_ids"]:
            continue
        types = getattr(module, "layer_types", None) if "layer_type" in arguments else None
        functions = inspect.getmembers(sys.modules[type(module).__module__], inspect.isfunction)
        for layer_type in types or [None]:
            try:
                cos, _ = Rotation(module, layer_type=layer_type).cos_sin(
                    probe, torch.zeros_like(probe[:, 0, :, 0]).long()
                )
            except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
                continue  # not for texts: images, or positions of several dimensions
            for name, apply in functions:
                names = list(inspect.signature(apply).parameters)
                if not name.startswith("apply_rotary") or not {"cos", "sin"} <= set(names[1:4]):
                    continue
                for width in {cos.shape[-1], 2 * cos.shape[-1]}:
                    if width <= size:
                        for first in {0, size - width}:
                            yield Rotation(module, apply, layer_type, names[1] == "cos", first, first + width)


@torch.no_grad()
def find_rotations(model: PreTrainedModel, limit: int) -> list[Rotation]:
    """How each block's keys turn, proven on the LLM itself: single tokens are read at several positions.

    A text of one token attends to nothing else, so its keys at two positions must be each other's, rotated.

    Raises:
        InputError: the keys do not turn with their positions, or not in a way that the LLM's own functions give.
    """
    kind = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise InputError(
            f"positions of {kind} cannot be re-indexed: it takes none",
            fix=f"use texts of at most {limit:,} tokens, or an LLM with rotary positions",
        )
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.linspace(3, vocabulary - 1, 3, device=model.device).long()
    places = torch.tensor([limit // 3, 0, limit // 2, limit - 1], device=model.device)
    ids, positions = torch.cartesian_prod(tokens, places).unbind(-1)
    cache, training = DynamicCache(), model.training
    model.eval()
    try:
        model(input_ids=ids[:, None], position_ids=positions[:, None], past_key_values=cache, use_cache=True)
    finally:
        model.train(training)
    found: list[Rotation] = []
    for layer in cache.layers:
        keys = layer.keys.unflatten(0, (3, 4))
        start, wanted = keys[:, :1].expand_as(keys).flatten(0, 1), keys.flatten(0, 1)
        delta = (places - places[0]).repeat(3).to(start.device)[:, None]
        errors = [
            (_error(candidate, start, delta, wanted), candidate)
            for candidate in _candidates(model, start.shape[-1], start.float())
        ]
        error, best = min(errors, key=lambda pair: pair[0])
        if error > (1e-3 if start.dtype == torch.float32 else 0.03):
            found = []
            break
        found.append(best)
    if all(rotation.angles is None for rotation in found):
        raise InputError(
            f"positions of {kind} cannot be re-indexed: no function of its own rotates its keys to another position",
            fix=f"use texts of at most {limit:,} tokens, or an LLM with rotary positions",
        )
    return found


def _error(rotation: Rotation, start: Tensor, delta: Tensor, wanted: Tensor) -> float:
    """How far rotated keys are from those that the LLM computes there, relative to their length."""
    try:
        rotated = rotation.rotate(start, delta)
    except (TypeError, ValueError, RuntimeError):
        return float("inf")  # the function is for tensors of another shape
    if rotated.shape != wanted.shape:
        return float("inf")
    return float((rotated.float() - wanted.float()).norm() / wanted.float().norm())


def reindex(
    model: PreTrainedModel, positions: str, max_positions: int | None, sinks: int, max_sentence_tokens: int
) -> tuple[Reindexing | None, list[Rotation]]:
    """What ``positions`` and ``max_positions`` of a memory ask for, with the rotation of each block.

    Raises:
        InputError: the limit is wrong for this LLM, or its positions cannot be re-indexed.
    """
    if positions == "original":
        return None, []
    largest, smallest = rotary_limit(model), 4 * (sinks + max_sentence_tokens)
    limit = largest if max_positions is None else max_positions
    if not isinstance(limit, int) or not smallest <= limit <= largest:
        raise InputError(
            f"positions cannot be re-indexed at {limit}: the LLM has {largest:,}, and sentences of "
            f"{max_sentence_tokens} tokens with {sinks} sinks need {smallest:,}",
            fix=f"set max_positions to {smallest:,} to {largest:,}"
            if smallest <= largest
            else "lower max_sentence_tokens",
        )
    return Reindexing(limit, sinks), find_rotations(model, limit)

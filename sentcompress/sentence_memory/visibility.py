"""Attention of many tokens in one pass, each with its memory in effect or in full: prompts, scoring, training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sentcompress.contracts import Tokens
from sentcompress.sentence_memory.policy import Policy

QUERIES = 256
"""Queries that are computed at once: masks and scores are ``[heads, this, tokens]``."""
Spans = list[list[tuple[int, int]]]
"""For each row, the first column of each sentence and the one after its last."""


@dataclass(frozen=True)
class Layout:
    """What is known of the tokens that a pass attends to, each field ``[B, T]`` int64.

    Attributes:
        ids: token ids.
        position: tokens of the text before it; -1 for padding, which nothing sees.
        sentence: number of its sentence in its text, from 0.
        offset: tokens of its sentence before it.
        behind: tokens of its sentence after it, as far as it is known.
        text: number of its text in the row, where several are packed into one.
    """

    ids: Tensor
    position: Tensor
    sentence: Tensor
    offset: Tensor
    behind: Tensor
    text: Tensor

    @classmethod
    def of(
        cls, ids: Tensor, sentence: Tensor, valid: Tensor | None = None, text: Tensor | None = None
    ) -> Layout:
        """The layout of texts whose sentences are known.

        Args:
            ids: ``[B, T]``.
            sentence: ``[B, T]`` numbers of sentences, which do not fall within a text.
            valid: ``[B, T]`` bool, False at padding.
            text: ``[B, T]`` numbers of packed texts; None if each row is one.
        """
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid.bool()
        text = torch.zeros_like(ids) if text is None else text
        same_text = valid[:, :, None] & valid[:, None, :] & (text[:, :, None] == text[:, None, :])
        earlier = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril(-1)
        same_sentence = same_text & (sentence[:, :, None] == sentence[:, None, :])
        position = (same_text & earlier).sum(-1).masked_fill(~valid, -1)
        return cls(
            ids=ids,
            position=position,
            sentence=sentence,
            offset=(same_sentence & earlier).sum(-1),
            behind=(same_sentence & earlier.T).sum(-1),
            text=text,
        )

    def columns(self, start: int, stop: int) -> Layout:
        """The layout of some of the tokens."""
        return Layout(*(getattr(self, name)[:, start:stop] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class View:
    """What some queries see, the same in all blocks of an LLM.

    Attributes:
        kept: bool ``[B, Q, T]``, or ``[B, Q, len(used)]``.
        used: columns that any of them sees, where nothing can be recalled; else None.
        may: bool ``[B, Q, T]``, what can be recalled; None if nothing can.
        groups: ``[B, T]`` int64, which of its row's spans each token is in.
        spans: where sentences begin and end.
    """

    kept: Tensor
    used: Tensor | None
    may: Tensor | None
    groups: Tensor
    spans: Spans


Masks = dict[tuple[int, int | None, bool], View]
"""By first query, sliding window, and whether the block recalls."""


def seen(
    policy: Policy, queries: Layout, tokens: Layout, first: int, in_full_from: int | None = None
) -> tuple[Tensor, Tensor]:
    """What each query attends to without recalling, and what it may recall.

    Args:
        queries: ``[B, Q]``, which are tokens ``first``, ``first + 1``, ... of ``tokens``.
        tokens: ``[B, T]``.
        in_full_from: from this token on, each sees all before it.

    Returns:
        bool ``[B, Q, T]``, twice. A query always sees itself, even at padding.
    """
    columns = torch.arange(tokens.ids.shape[1], device=tokens.ids.device)
    own = first + torch.arange(queries.ids.shape[1], device=tokens.ids.device)
    causal = columns[None, :] <= own[:, None]
    real = causal & (tokens.position[:, None, :] >= 0) & (queries.text[:, :, None] == tokens.text[:, None, :])
    age = queries.sentence[:, :, None] - tokens.sentence[:, None, :]
    fields = (tokens.ids, tokens.position, tokens.offset, tokens.behind)
    ids, position, offset, behind = (field[:, None, :] for field in fields)
    start = (queries.position - queries.offset)[:, :, None]
    about = Tokens(ids, position, age, offset, behind, distance=start - position + offset)
    kept = policy.keep(about)
    if in_full_from is not None:
        kept = kept | (columns >= in_full_from)
    older = real & (age > 0)
    return (real & (kept | (age == 0))) | (columns[None, :] == own[:, None]), older & ~kept


def best_of_each(scores: Tensor, groups: Tensor, number: int) -> Tensor:
    """The largest score in each group.

    Args:
        scores: ``[B, heads, Q, T]``.
        groups: ``[B, T]`` int64, below ``number``.

    Returns:
        ``[B, heads, Q, number]``; minus infinity for a group without members.
    """
    best = scores.new_full((*scores.shape[:3], number), -math.inf)
    return best.scatter_reduce_(3, groups[:, None, None, :].expand_as(scores), scores, "amax")


def chosen(scores: Tensor, number: int) -> Tensor:
    """The best groups of each query that have a score at all: bool, like ``scores`` ``[..., groups]``."""
    best = scores.topk(min(number, scores.shape[-1]), -1)
    found = best.values > -math.inf
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best.indices, found)


def best_of_spans(scores: Tensor, spans: Spans) -> Tensor:
    """As :func:`best_of_each`, where the members of a group stand together: faster for many queries.

    Args:
        scores: ``[B, heads, Q, T]``.
    """
    number = max(len(row) for row in spans)
    best = scores.new_full((*scores.shape[:3], number), -math.inf)
    for row, own in enumerate(spans):
        for group, (start, stop) in enumerate(own):
            best[row, :, :, group] = scores[row, :, :, start:stop].amax(-1)
    return best


@torch.no_grad()
def recalled(
    policy: Policy, query: Tensor, key: Tensor, index: Tensor, may: Tensor, groups: Tensor, spans: Spans
) -> Tensor:
    """Which tokens each query recalls: those of the sentences that answer it best.

    Args:
        query: ``[B, kv heads, G, Q, D]``; the G heads that share keys recall the same.
        key: ``[B, kv heads, T, D]``.
        index: ``[B, kv heads, T, C]``.
        may: bool ``[B, Q, T]``.
        groups: ``[B, T]`` int64, which of the row's spans each token is in.
        spans: where sentences begin and end.

    Returns:
        bool ``[B, kv heads, Q, T]``.
    """
    batch, heads, shared, queries, size = query.shape
    rows = query.reshape(batch, heads, shared * queries, size)
    out_of_reach = torch.zeros_like(may, dtype=torch.float32).masked_fill_(~may, -math.inf)[:, None]

    def best(scores: Tensor, number: int) -> Tensor:
        scores = scores.view(batch, heads, shared, queries, -1).amax(2).float().add_(out_of_reach)
        sentences = chosen(best_of_spans(scores, spans), number)
        of_tokens = [own.index_select(2, group) for own, group in zip(sentences, groups, strict=True)]
        return torch.stack(of_tokens) & may[:, None]

    if policy.candidates == policy.recall:
        return best(policy.scores(rows, index), policy.recall)
    found = best(policy.scores(rows, index), policy.candidates)
    exact = (rows @ key.transpose(-1, -2)).view(batch, heads, shared, queries, -1)
    return best(exact.masked_fill_(~found[:, :, None], -math.inf), policy.recall) & found


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention under a mask of each key-value head.

    Args:
        query: ``[B, kv heads, G, Q, D]``.
        key, value: ``[B, kv heads, T, D]``.
        mask: bool ``[B, kv heads or 1, Q, T]``.
        softcap: of the scores, as in Gemma 2.
        sinks: learned logits of the heads that take attention away, as in GPT-OSS.

    Returns:
        ``[B, kv heads, G, Q, D]``.
    """
    batch, heads, shared, queries, size = query.shape
    rows = query.reshape(batch, heads, shared * queries, size)
    mask = mask.expand(-1, -1, shared, -1) if queries == 1 else mask.repeat(1, 1, shared, 1)
    if softcap is None and sinks is None:
        out = functional.scaled_dot_product_attention(
            rows, key, value, attn_mask=mask, scale=scaling, dropout_p=dropout
        )
    else:
        scores = rows @ key.transpose(-1, -2) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        if sinks is not None:
            extra = sinks.view(1, heads, shared, 1).expand(batch, -1, -1, queries)
            scores = torch.cat([scores, extra.reshape(batch, heads, -1, 1).to(scores.dtype)], -1)
        weights = torch.softmax(scores.float(), -1).to(value.dtype)[..., : key.shape[2]]
        out = functional.dropout(weights, dropout) @ value
    return out.view(batch, heads, shared, queries, -1)


def attend_in_one_pass(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    policy: Policy,
    scaling: float,
    sliding_window: int | None = None,
    index: Tensor | None = None,
    stored: tuple[Tensor, Tensor] | None = None,
    masks: Masks | None = None,
    in_full: bool = False,
    **options: Any,
) -> Tensor:
    """Attention of the last Q of T tokens, each with its memory in effect, or in full.

    Gradients flow through all but the choice.

    Args:
        query: ``[B, heads, Q, D]``, of the last Q tokens.
        key, value: ``[B, kv heads, T, D]``.
        layout: of the T tokens.
        sliding_window: nothing further back is seen, where the LLM has such a window.
        index: of the keys, ``[B, kv heads, T, C]``; None computes it.
        stored: keys and values as slow storage returns them, where they differ from ``key`` and ``value``; what is
            recalled comes from there.
        masks: of the blocks before with the same layout and memory; filled here.
        in_full: each of the Q tokens sees all of them before it, and only older ones as the memory has them.
        options: of :func:`attend`.

    Returns:
        ``[B, heads, Q, D]``.
    """
    batch, heads, length, _ = query.shape
    past = key.shape[2] - length
    groups = key.shape[1]
    near = sliding_window is None or sliding_window >= length
    plain = near and options.get("softcap") is None and options.get("sinks") is None
    if in_full and plain and not past and bool((layout.position >= 0).all()):
        # The usual causal attention, which needs no masks. Heads are repeated, since not all kernels can group them.
        key, value = (t.repeat_interleave(heads // groups, 1) for t in (key, value))
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, dropout_p=options["dropout"]
        )
    masks = {} if masks is None else masks
    rows = query.view(batch, groups, heads // groups, length, -1)
    lossy = stored is not None
    store_key, store_value = stored if stored is not None else (key, value)
    if index is None and policy.recall:
        with torch.no_grad():
            index = policy.index(key)
    parts = []
    for start in range(0, length, QUERIES):
        stop = min(length, start + QUERIES)
        end = past + stop  # nothing after the last query is visible
        kind = start, sliding_window, bool(policy.recall)
        if kind not in masks:
            tokens = layout.columns(0, end)
            masks[kind] = _view(policy, tokens, past + start, sliding_window, past if in_full else None)
        view = masks[kind]
        queries, mask = rows[:, :, :, start:stop], view.kept[:, None]
        keys, values = key[:, :, :end], value[:, :, :end]
        if view.used is not None:
            keys, values = keys.index_select(2, view.used), values.index_select(2, view.used)
        elif index is not None and view.may is not None:
            stored_keys, stored_values = store_key[:, :, :end], store_value[:, :, :end]
            more = recalled(
                policy, queries, stored_keys, index[:, :, :end], view.may, view.groups, view.spans
            )
            if lossy:
                keys, values = torch.cat([keys, stored_keys], 2), torch.cat([values, stored_values], 2)
                mask = torch.cat([mask.expand(-1, groups, -1, -1), more], 3)
            else:
                mask = mask | more
        parts.append(attend(queries, keys, values, mask, scaling, **options))
    return torch.cat(parts, 3).reshape(batch, heads, length, -1)


def _view(
    policy: Policy, tokens: Layout, first: int, sliding_window: int | None, in_full_from: int | None
) -> View:
    """What the tokens from ``first`` on see of all ``tokens``."""
    block = tokens.columns(first, tokens.ids.shape[1])
    kept, may = seen(policy, block, tokens, first, in_full_from)
    if sliding_window is not None:
        near = block.position[:, :, None] - tokens.position[:, None, :] < sliding_window
        kept, may = kept & near, may & near
    if not policy.recall or not bool(may.any()):
        used = kept.flatten(0, 1).any(0).nonzero().flatten()
        return View(kept.index_select(2, used), used, None, tokens.ids, [])
    changes = torch.ones_like(tokens.sentence)
    before, after = (
        torch.stack([tokens.sentence, tokens.text])[..., cut] for cut in (slice(0, -1), slice(1, None))
    )
    changes[:, 1:] = (before != after).any(0)
    groups = changes.cumsum(1) - 1
    spans = []
    for row in changes:
        starts = row.nonzero().flatten().tolist()
        spans.append(list(pairwise([*starts, tokens.ids.shape[1]])))
    return View(kept, None, may, groups, spans)

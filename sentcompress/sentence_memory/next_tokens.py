"""Refuses tokens that cannot follow what a memory has read: another batch, another text, too many tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sentcompress.errors import InputError
from sentcompress.sentence_memory.token_table import Row


def check_call(
    rows: Sequence[Row], seen: int, limit: int, input_ids: Tensor | None, attention_mask: Tensor | None
) -> tuple[list[list[int]], list[list[bool]]]:
    """Check the tokens of one call of the LLM.

    Args:
        rows: the texts read so far; none before the first call.
        seen: tokens read so far, padding included.
        limit: tokens that a text may have.
        input_ids: ``[B, Q]``.
        attention_mask: ``[B, seen + Q]`` or None.

    Returns:
        the tokens, ``[B, Q]``, and which of them are not padding.

    Raises:
        InputError: these tokens cannot follow.
    """
    if input_ids is None:
        raise InputError("a sentence memory needs to see the tokens", fix="give input_ids, not inputs_embeds")
    batch, length = input_ids.shape
    if rows and len(rows) != batch:
        raise InputError(
            f"the memory holds a batch of {len(rows)}, but got one of {batch}",
            fix="call memory.reset(), or use a new memory",
        )
    if not length:
        raise InputError("there are no tokens to read", fix="give a prompt that is not empty")
    valid = torch.ones_like(input_ids)
    if attention_mask is not None:
        shape = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else None
        if shape != [batch, seen + length]:
            raise InputError(
                f"the attention mask has the shape {shape}, but {[batch, seen + length]} is needed",
                fix="give the mask of all tokens read so far and the new ones, with two dimensions",
            )
        valid = attention_mask[:, -length:]
    if seen + length > limit:
        raise InputError(
            f"{seen + length} tokens, but the LLM has {limit} positions",
            fix="give it a shorter text, or use positions='reindexed'",
        )
    return input_ids.tolist(), valid.bool().tolist()


def check_prompt(
    rows: Sequence[Row],
    seen: int,
    limit: int,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    *,
    whole: bool,
    longest: int,
) -> None:
    """Check a prompt of ``generate``, before any of it is read.

    Args:
        rows, seen, limit: as for :func:`check_call`.
        input_ids: ``[B, T]``.
        attention_mask: ``[B, all tokens]`` or None.
        whole: the prompt has what was read before; if not, it only has what follows.
        longest: tokens that ``input_ids`` and the output may have together.

    Raises:
        InputError: it is another text, padded in another way, has nothing to continue, or leaves the output no room.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if not bool(mask[:, -1:].all()):
        raise InputError(
            "a prompt is padded on the right, so its output would follow the padding",
            fix="set tokenizer.padding_side = 'left', and give no empty prompts",
        )
    length = input_ids.shape[1] + (0 if whole else seen)
    more = longest - input_ids.shape[1]
    room = limit + 1 - length  # the LLM does not read the last token that it writes
    if 1 <= room < more:
        raise InputError(
            f"prompt and output may have {length + more:,} tokens, but the LLM has {limit:,} positions; "
            "nothing was written",
            fix=f"use max_new_tokens={room} or less, a shorter prompt, or a memory with positions='reindexed'",
        )
    if not whole:
        return
    for number, row in enumerate(rows[: len(input_ids)]):
        known = input_ids[number, :seen][mask[number, :seen].bool()].tolist()
        if input_ids.shape[1] < seen and known == row.ids[: len(known)]:
            raise InputError(
                f"the memory has read prompt {number + 1} already, and {len(row.ids) - len(known):,} tokens after it, "
                "such as the answer",
                fix="call memory.reset() to read the prompt anew; to go on, give the whole text with the answer",
            )
        if known != row.ids:
            raise InputError(
                f"the memory holds another text, or other padding, than prompt {number + 1} begins with",
                fix="call memory.reset() before a new text, or use a new memory",
            )
    if rows and input_ids.shape[1] == seen:
        raise InputError(
            "the memory has read the whole prompt already",
            fix="give a longer prompt, or call memory.reset()",
        )

"""Text that an LLM writes token by token, with a sentence memory or without, shown while it is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from sentcompress.contracts.causal_lm import position_limit
from sentcompress.errors import InputError
from sentcompress.sentence_memory.sentence_cache import SentenceMemory
from sentcompress.text.lossless_tokenizer import lossless


class _Shown(BaseStreamer):
    """Hands on text as soon as its characters are complete. The prompt comes first and is left out."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        self._text, self._show = lossless(tokenizer).streamed(), show
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        if not self._is_prompt:
            self._show(self._text.add(value.flatten().tolist()))
        self._is_prompt = False

    def end(self) -> None:
        self._show(self._text.add([], ends=True))


def write_text(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    show: Callable[[str], None],
    *,
    memory: SentenceMemory | None = None,
    seed: int | None = None,
    max_new_tokens: int,
    **arguments: Any,
) -> None:
    """Continue a prompt with transformers' ``generate``, up to the LLM's last position if it has one.

    Args:
        show: called with the prompt, once it is known to fit, and then with each new piece of text.
        memory: new, or reset; None uses the LLM's own cache of all tokens.
        arguments: of ``generate``.

    Raises:
        InputError: the LLM has no positions left after the prompt.
    """
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    length = inputs["input_ids"].shape[1]
    limit = position_limit(model.config) if memory is None else memory.longest_text
    if length >= limit:
        raise InputError(
            f"the prompt has {length:,} tokens, but the LLM has {limit:,} positions", fix="shorten the prompt"
        )
    show(prompt)
    if seed is not None:
        torch.manual_seed(seed)
    model.generate(
        **inputs,
        past_key_values=memory,
        max_new_tokens=min(max_new_tokens, limit - length),
        pad_token_id=tokenizer.pad_token_id,
        streamer=_Shown(tokenizer, show),
        **arguments,
    )

"""Hooks that tell a memory which tokens its LLM reads, and the refusal of LLMs that take none."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from transformers import PreTrainedModel

from sentcompress.errors import InputError
from sentcompress.sentence_memory.attention import attention_configs

_attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@runtime_checkable
class ReadsTokens(Protocol):
    """What the hooks ask of a memory."""

    model: PreTrainedModel

    def begin_call(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> None:
        """Take the tokens of a call before the LLM computes."""

    def new_positions(self) -> Tensor | None:
        """Positions of these tokens, if they are not their own."""

    def end_call(self, *, complete: bool) -> None:
        """The LLM has computed, or has failed."""

    def check_prompt(self, input_ids: Tensor) -> None:
        """Refuse a prompt that does not begin with what was read."""


def follows(given: Sequence[int], known: Sequence[int]) -> bool:
    """Whether ``known``, which has no padding, is the beginning of ``given`` but for padding."""
    at = 0
    for token in given:
        if at == len(known):
            return True
        if token == known[at]:
            at += 1
        elif at:
            return False
    return at == len(known)


def check_tokenizer(model: PreTrainedModel, tokenizer: Any) -> None:
    """Refuse the tokenizer of an LLM with more tokens. Raises InputError."""
    known = len(model.get_input_embeddings().weight)
    if hasattr(tokenizer, "__len__") and len(tokenizer) > known:
        raise InputError(
            f"the tokenizer has {len(tokenizer):,} tokens, but the LLM knows {known:,}",
            fix="give the tokenizer that belongs to this LLM",
        )


def attach(model: PreTrainedModel) -> None:
    """Add hooks to an LLM, once, that tell a memory which tokens it reads."""
    if model in _attached:
        return
    if not getattr(model, "_supports_attention_backend", False) or not attention_configs(model):
        raise InputError(
            f"{type(model).__name__} does not compute attention through the attention interface of transformers",
            fix="use another LLM: Llama, Qwen, Mistral, Gemma, Phi, OPT, GPT-2 and most others do",
        )
    if getattr(model.config.get_text_config(decoder=True), "attention_chunk_size", None):
        raise InputError(
            f"{type(model).__name__} attends in chunks of its text, which a memory does not know",
            fix="use another LLM",
        )

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        memory = kwargs.get("past_key_values")
        if isinstance(memory, ReadsTokens):
            if memory.model is not model:
                raise InputError("the memory belongs to another LLM", fix="make one for this LLM")
            ids = kwargs.get("input_ids", args[0] if args else None)
            memory.begin_call(ids, kwargs.get("attention_mask"))
            if (positions := memory.new_positions()) is not None:
                kwargs["position_ids"] = positions

    def after(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        memory = kwargs.get("past_key_values")
        if isinstance(memory, ReadsTokens):
            memory.end_call(complete=output is not None)

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after, with_kwargs=True, always_call=True)
    prepare = model.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def checked(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        memory = kwargs.get("past_key_values")
        if isinstance(memory, ReadsTokens) and kwargs.get("is_first_iteration", False):
            memory.check_prompt(input_ids)
        return prepare(input_ids, *args, **kwargs)

    model.prepare_inputs_for_generation = checked
    _attached.add(model)

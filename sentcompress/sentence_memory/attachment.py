"""Tells a memory which tokens its LLM reads, and refuses LLMs and prompts that take none."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sentcompress.errors import InputError
from sentcompress.sentence_memory.attention import attention_configs, memory_attention

_locks: weakref.WeakKeyDictionary[PreTrainedModel, Any] = weakref.WeakKeyDictionary()
"""One call of an LLM at a time: its configuration says how it attends."""
_ATTACHED = "_takes_sentence_memories"
USE_ANOTHER = (
    "use another LLM: Llama, Qwen, Mistral, Gemma, Phi, OPT, GPT-2, GPT-NeoX and most others work "
    "(docs/memory.md)"
)
"""What to do about an LLM that does not take memories; the page has the same families."""


@runtime_checkable
class ReadsTokens(Protocol):
    """What an attached LLM asks of a memory."""

    model: PreTrainedModel

    def begin_call(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> None:
        """Take the tokens of a call before the LLM computes."""

    def new_positions(self) -> Tensor | None:
        """Positions of these tokens, if they are not their own."""

    def end_call(self, *, complete: bool) -> None:
        """The LLM has computed, or has failed."""

    def reading_prompt(
        self, input_ids: Tensor, attention_mask: Tensor | None, *, whole: bool, longest: int
    ) -> AbstractContextManager[None]:
        """For a block in which ``generate`` reads a prompt. Refuses a prompt that cannot follow what was read."""


def causal_lm(model: Any) -> PreTrainedModel:
    """The LLM within the wrappers of ``torch.compile`` and peft.

    Raises:
        InputError: it is not a causal LM of transformers.
    """
    model = getattr(model, "_orig_mod", model)
    model = getattr(model, "get_base_model", lambda: model)()
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise InputError(
            f"a sentence memory needs a causal LM of transformers, but got {type(model).__name__}",
            fix="load it with AutoModelForCausalLM.from_pretrained",
        )
    return model


def check_tokenizer(model: PreTrainedModel, tokenizer: Any) -> None:
    """Refuse an object that cannot decode, or the tokenizer of a larger LLM. Raises InputError."""
    if not callable(getattr(tokenizer, "decode", None)):
        raise InputError(
            f"a sentence memory needs the LLM's tokenizer, but got {type(tokenizer).__name__}",
            fix="load it with AutoTokenizer.from_pretrained",
        )
    known = len(model.get_input_embeddings().weight)
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    # Some LLMs have added tokens that they do not know themselves, such as the image of Gemma 3.
    ordinary = {*vocabulary.values()} - {*getattr(tokenizer, "added_tokens_decoder", ())}
    if (largest := max(ordinary, default=0)) >= known:
        raise InputError(
            f"the tokenizer has tokens up to number {largest:,}, but the LLM knows {known:,}, from 0",
            fix="give the tokenizer that belongs to this LLM",
        )


def attach(model: PreTrainedModel) -> None:
    """Make an LLM tell a memory which tokens it reads. Without a memory it computes as ever."""
    if hasattr(model, _ATTACHED):
        return
    if not getattr(model, "_supports_attention_backend", False) or not attention_configs(model):
        raise InputError(
            f"{type(model).__name__} does not compute attention through the attention interface of transformers",
            fix=USE_ANOTHER,
        )
    if getattr(model.config.get_text_config(decoder=True), "attention_chunk_size", None):
        raise InputError(
            f"{type(model).__name__} attends in chunks of its text, which a memory does not know",
            fix=USE_ANOTHER,
        )

    # Not hooks: those are left out by an interrupt (Ctrl-C), and where peft calls forward itself.
    forward, prefill = model.forward, model._prefill
    model.forward = functools.update_wrapper(functools.partial(_forward, model, forward), forward)
    model._prefill = functools.update_wrapper(functools.partial(_prefill, prefill), prefill)
    setattr(model, _ATTACHED, True)


@contextmanager
def attending(model: PreTrainedModel) -> Iterator[None]:
    """For a call in which an attached LLM attends through its cache; other threads wait."""
    with _locks.setdefault(model, threading.RLock()), memory_attention(model):
        yield


def _forward(model: PreTrainedModel, forward: Any, /, *args: Any, **kwargs: Any) -> Any:
    """In place of an LLM's forward. Copies of the LLM, and pickles, have this for themselves."""
    kwargs |= dict(zip(inspect.signature(forward).parameters, args, strict=False)) if args else {}
    memory = kwargs.get("past_key_values")
    if isinstance(memory, ReadsTokens):
        return _forward_with(memory, model, forward, kwargs)
    if torch.compiler.is_compiling():
        return forward(**kwargs)
    with _locks.setdefault(model, threading.RLock()):
        return forward(**kwargs)


@torch.compiler.disable(recursive=False)
def _forward_with(memory: ReadsTokens, model: PreTrainedModel, forward: Any, kwargs: dict[str, Any]) -> Any:
    if memory.model is not model:
        raise InputError("the memory belongs to another LLM", fix="make one for this LLM")
    with attending(model):
        memory.begin_call(kwargs.get("input_ids"), kwargs.get("attention_mask"))
        complete = False
        try:
            if (positions := memory.new_positions()) is not None:
                kwargs["position_ids"] = positions
            output = forward(**kwargs)
            complete = True
        finally:
            memory.end_call(complete=complete)
    return output


def _prefill(
    prefill: Any, /, input_ids: Tensor, settings: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """In place of the part of ``generate`` that reads the prompt: it still has what was read before."""
    memory = model_kwargs.get("past_key_values")
    reading: AbstractContextManager[None] = nullcontext()
    if isinstance(memory, ReadsTokens):
        if model_kwargs.get("use_cache") is False:
            raise InputError("use_cache=False leaves out the memory", fix="use use_cache=True")
        mask, length = model_kwargs.get("attention_mask"), input_ids.shape[1]
        # transformers leaves out a mask of ones, and notes its length.
        masked = getattr(settings, "_mask_length", length) if mask is None else mask.shape[1]
        reading = memory.reading_prompt(input_ids, mask, whole=masked == length, longest=settings.max_length)
    with reading:
        return prefill(input_ids, settings, model_kwargs, *args, **kwargs)

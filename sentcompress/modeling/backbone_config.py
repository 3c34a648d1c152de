"""The configuration of an LLM, changed by a recipe's fields, and the LLM with random weights that is built from it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import __version__ as transformers_version

from sentcompress.errors import (
    InputError,
    ModelFolderError,
    SentCompressError,
    did_you_mean,
    is_out_of_memory,
)
from sentcompress.recipe import BackboneSpec

FROM_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "model_type")
"""Fields of a configuration that a recipe may not set."""
_MAX_SIZES = {
    r"(layers|n_layer)$": 1_000,
    r"(size|dim|heads|embeddings|n_embd|n_head|n_inner|n_positions)$": 1_000_000,
}
"""Largest values of configuration fields that are sizes, to catch typing errors before a model is built."""


def shaped_config(base: dict[str, Any], fields: dict[str, Any], where: str) -> Any:
    """A transformers configuration with the fields that a recipe gives under ``where``.

    Args:
        base: the fields it has already, with ``model_type``.

    Raises:
        InputError: there is no such field, the tokenizer defines it, or a value does not fit.
    """
    rest = dict(base)
    model_type = rest.pop("model_type")
    known = AutoConfig.for_model(model_type).to_dict()
    for name in fields:
        if name in FROM_TOKENIZER:
            raise InputError(f"{where}.{name}: is set by the tokenizer or adapter", fix="remove it")
        if name not in known:
            raise InputError(f"{where}.{name}: not a field of '{model_type}'.{did_you_mean(name, known)}")
        most = next((most for pattern, most in _MAX_SIZES.items() if re.search(pattern, name)), None)
        value = fields[name]
        if most and value is not None and not (type(value) is int and 1 <= value <= most):
            raise InputError(f"{where}.{name}: must be a number from 1 to {most:,}, not {value!r}")
    try:
        config = AutoConfig.for_model(model_type, **{**rest, **fields})
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise InputError(f"{where}: {' '.join(str(error).split())}") from None
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"{where}.num_attention_heads: {config.num_attention_heads} does not divide hidden_size "
            f"{config.hidden_size}",
            fix="set it to a divisor of hidden_size",
        )
    return config


def refuse_unknown_code(spec: BackboneSpec, text: str, error: Exception) -> None:
    """Explain the two messages of transformers about model types that it has no code for."""
    if "trust_remote_code" in text:
        raise ModelFolderError(
            f"backbone.model: '{spec.model}' is of a type that transformers does not know: its code comes with the "
            "model (auto_map in config.json), and such code is never run",
            fix="use an LLM of a type that transformers knows, or a version of this one converted to such a type",
        ) from error
    if "does not recognize this architecture" in text:
        raise ModelFolderError(
            f"backbone.model: '{spec.model}' cannot be loaded: {text.partition('. ')[0]}",
            fix=f"install a newer transformers (here: {transformers_version}), or use another LLM",
        ) from error


def random_lm(spec: BackboneSpec, config: Any, attn_implementation: str) -> PreTrainedModel:
    """An LLM in fp32 with random weights, its embeddings with the scale of ``backbone.embed_init_std``.

    Raises:
        InputError: it cannot be built, or its embeddings are 0.
    """
    with explain_build(spec, config):
        lm = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).float()
    if spec.embed_init_std is not None:
        with torch.no_grad():
            table = lm.get_input_embeddings().weight
            if not table.is_meta and not table.any():
                raise InputError(
                    f"backbone.embed_init_std: with backbone.config={spec.config} all embeddings start at 0, and "
                    "cannot be scaled",
                    fix="give the initial weights in backbone.config a standard deviation above 0",
                )
            table *= spec.embed_init_std / table.std()
    return lm


@contextmanager
def explain_build(spec: BackboneSpec, config: Any) -> Iterator[None]:
    """Turn whatever a model raises while it is built from its configuration into a refusal with the reason.

    Raises:
        InputError: names the model, its type and what was raised.
    """
    try:
        yield
    except Exception as error:  # models raise anything
        if isinstance(error, SentCompressError) or is_out_of_memory(error):
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())
        changed = f" with backbone.config={spec.config}" if spec.config else ""
        raise InputError(
            f"backbone.model: '{spec.model}' (type '{config.model_type}') cannot be built from its configuration"
            f"{changed}: {text[:300]}",
            fix="correct backbone.config" if changed else "correct its config.json, or use another LLM",
        ) from error

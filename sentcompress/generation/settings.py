"""Options of generation, named as in transformers where it has them. Imports no torch.

A field here is all there is to an option: ``sentcompress generate``, ``SentenceLM.generate(**settings)`` and the
harness's ``gen_kwargs`` follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, Field, ValidationError, model_validator

from sentcompress.errors import InputError
from sentcompress.recipe.sections import DecodingOptions
from sentcompress.registry import describe_validation_error

LLM_LIMITS = ("max_new_tokens", "do_sample", "repetition_penalty", "seed")
LLM_SAMPLING = ("temperature", "top_k", "top_p")
"""Settings that transformers' ``generate`` has too; these only with ``do_sample``."""
MIN_TEMPERATURE = 1e-6
"""Smaller ones would divide logits to infinity."""


class GenerationSettings(DecodingOptions):
    """Sampling and stopping; greedy unless ``do_sample``. The decoding options are in the recipe's sections too."""

    model_config = ConfigDict(frozen=True)

    max_new_tokens: int | None = Field(default=None, ge=1)
    """Maximum number of tokens to write; end marks are not counted."""
    max_new_sentences: int | None = Field(default=None, ge=1)
    """Maximum number of sentences to write; finishing the last sentence of the prompt counts as one."""
    max_sentence_tokens: int | None = Field(default=None, ge=1)
    """Maximum number of tokens per sentence; without it, the model's limit."""
    do_sample: bool = False
    """Sample tokens instead of taking the most likely one."""
    temperature: float = Field(default=1.0, ge=MIN_TEMPERATURE)
    """Divides the logits when sampling."""
    top_k: int = Field(default=0, ge=0)
    """Sample from the k most likely tokens; 0 samples from all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most likely tokens that together have this probability."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Above 1 makes tokens already seen less likely."""
    stop_threshold: float = Field(default=0.5, ge=0, le=1)
    """Stop when the predicted probability of stopping reaches this value; 1 never stops."""
    seed: int | None = Field(default=None, ge=0)
    """Seed for sampling."""
    use_cache: bool = Field(default=True, json_schema_extra={"option": False})
    """Keep keys and values of backbone and decoder; False computes everything again at each step (for checks)."""
    sentence_lengths: tuple[int, ...] | None = Field(default=None, json_schema_extra={"option": False})
    """For benchmarks with untrained weights: exact tokens of each sentence in turn, cycled. Nothing else ends a
    sentence."""

    @model_validator(mode="after")
    def _compile_needs_the_cache(self) -> GenerationSettings:
        if self.compile and not self.use_cache:
            raise ValueError("compile needs the cache: leave use_cache true, or compile false")
        return self

    def for_llm(self) -> dict[str, Any]:
        """These settings as arguments of transformers' ``generate``, for an LLM that writes token by token.

        Raises:
            InputError: one of them is only for a SentenceLM.
        """
        changed = self.model_dump(exclude_defaults=True)
        if only := sorted(set(changed) - {*LLM_LIMITS, *LLM_SAMPLING}):
            option = f"--{only[0].replace('_', '-')}"
            raise InputError(
                f"{option} is for a SentenceLM, not for an LLM that writes token by token",
                fix=f"leave out {option}, or give the folder of a SentenceLM, such as OUT/graft",
            )
        arguments = {name: getattr(self, name) for name in LLM_LIMITS}
        if self.do_sample:
            arguments |= {name: getattr(self, name) for name in LLM_SAMPLING}
        return arguments

    @classmethod
    def given(cls, settings: GenerationSettings | None) -> GenerationSettings:
        """What a caller gave, or the defaults. Raises InputError for anything else, such as a dict."""
        if settings is None:
            return DEFAULT_SETTINGS
        if not isinstance(settings, cls):
            raise InputError(
                f"settings must be a GenerationSettings, not {type(settings).__name__}",
                fix="write GenerationSettings(max_new_tokens=64)",
            )
        return settings

    @classmethod
    def checked(cls, values: Mapping[str, Any], where: str = "") -> GenerationSettings:
        """Settings as a user gave them.

        Args:
            where: what stands before a field's name in messages.

        Raises:
            InputError: a field is unknown or its value does not fit; the message names it.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise InputError(describe_validation_error(error, cls, where)) from None


DEFAULT_SETTINGS = GenerationSettings(max_new_tokens=128)
"""Settings of a call that names none."""

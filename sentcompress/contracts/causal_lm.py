"""CausalLMBackbone: the base of most adapters, since the decoders of transformers are so similar."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from sentcompress.contracts.backbone import Backbone

_MAPPINGS = (MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
_POSITION_LIMITS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
)
UNLIMITED_POSITIONS = 1 << 20
"""Longest sequence of an LLM whose configuration does not set a limit."""
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The cache's name in the arguments and outputs of transformers' models: ``cache`` since 5.24."""


class CausalLMBackbone(Backbone):
    """Wraps a transformers decoder that accepts ``inputs_embeds``, ``position_ids`` and a four-dimensional mask.

    A subclass for a family usually sets only ``model_types`` and ``aliases``.

    Args:
        decoder: the LLM without its output head, such as a ``LlamaModel``.
        options: the adapter's options.
    """

    def __init__(self, decoder: PreTrainedModel, options: Any | None = None) -> None:
        super().__init__()
        self.options = options or self.Options()
        self.config = decoder.config
        self.decoder = decoder
        self._takes = frozenset(inspect.signature(decoder.forward).parameters)
        self._windows = sliding_windows(decoder.config)

    @classmethod
    def attention_implementations(cls, config: Any) -> tuple[str, ...]:
        models = [found for mapping in _MAPPINGS if (found := mapping.get(type(config), None)) is not None]
        return ("sdpa", "eager") if all(getattr(m, "_supports_sdpa", True) for m in models) else ("eager",)

    @classmethod
    def from_causal_lm(cls, model: PreTrainedModel, options: Any | None = None) -> CausalLMBackbone:
        return cls(cast(PreTrainedModel, model.base_model), options)

    @classmethod
    def from_config(cls, config: Any, options: Any | None = None) -> CausalLMBackbone:
        attention = getattr(config, "_attn_implementation", None) or "sdpa"
        if attention not in (possible := cls.attention_implementations(config)):
            attention = possible[0]
        backbone = cls(AutoModel.from_config(config, attn_implementation=attention), options)
        backbone.drop_token_embeddings()
        return backbone

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def max_positions(self) -> int:
        return position_limit(self.config)

    @property
    def blocks(self) -> nn.ModuleList:
        number = self.config.num_hidden_layers
        found = [m for m in self.decoder.children() if isinstance(m, nn.ModuleList) and len(m) == number]
        if not found:  # not an AttributeError, which nn.Module would replace by its own
            raise ValueError(f"{type(self.decoder).__name__} has no list of {number} blocks")
        return found[0]

    def token_embeddings(self, input_ids: Tensor) -> Tensor:
        table = self.decoder.get_input_embeddings()
        if table is None:
            raise RuntimeError("the token embeddings were dropped")
        return table(input_ids)

    def drop_token_embeddings(self) -> None:
        self.decoder.set_input_embeddings(None)

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Any | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, Any | None]:
        if use_cache and past_key_values is None:
            # Every layer caches the full length, so that one mask fits all; sliding windows are in the mask.
            past_key_values = DynamicCache()
        more: dict[str, Any] = {CACHE: past_key_values}
        if "position_ids" in self._takes:
            more["position_ids"] = position_ids
        output = self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=self._masks(attention_mask, inputs_embeds.dtype),
            use_cache=use_cache,
            **more,
        )
        return output.last_hidden_state, getattr(output, CACHE) if use_cache else None

    def _masks(self, allowed: Tensor, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """The additive mask for a bool mask ``[R, 1, N, P + N]``; one per layer type if their windows differ."""
        masks = {
            kind: additive_mask(_within(allowed, window), dtype) for kind, window in self._windows.items()
        }
        return next(iter(masks.values())) if len(masks) == 1 else masks


def position_limit(config: Any) -> int:
    """The maximum length in an LLM's configuration, whatever its family calls it."""
    limits = (getattr(config, name, None) for name in _POSITION_LIMITS)
    return next((int(limit) for limit in limits if limit and limit > 0), UNLIMITED_POSITIONS)


def additive_mask(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Map True to 0 and False to the lowest number, so that no attention implementation adds a mask of its own."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
        ~allowed, torch.finfo(dtype).min
    )


def sliding_windows(config: Any) -> dict[str, int | None]:
    """The sliding window of each layer type; None for full attention."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    if not kinds:
        return {"all": window}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def _within(allowed: Tensor, window: int | None) -> Tensor:
    """Restrict a mask ``[R, 1, N, P + N]`` to the last ``window`` columns."""
    queries, keys = allowed.shape[-2:]
    if window is None or keys <= window:
        return allowed
    columns = torch.arange(keys, device=allowed.device)
    return allowed & (columns > columns[keys - queries :, None] - window)

"""OPT, 125M to 30B by configuration; 350M with its projections and post-norm."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, OPTModel

from sentcompress.contracts import Backbone


def _shape(hidden_size: int, layers: int, heads: int, **changes: Any) -> dict[str, Any]:
    """An OPT configuration as published (arXiv 2205.01068, table 1)."""
    return {
        "model_type": "opt",
        "vocab_size": 50272,
        "hidden_size": hidden_size,
        "word_embed_proj_dim": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * hidden_size,
        "max_position_embeddings": 2048,
        **changes,
    }


class OPTBackbone(Backbone):
    """Feeds an OPT decoder with latents.

    OPT-350M reads token embeddings of 512 through ``project_in`` into blocks of 1,024 and returns through
    ``project_out``. The latents are as wide as the blocks, so the projections stay outside: ``project_in`` is
    part of the token embedding, ``project_out`` of the LLM's output head.
    """

    model_types: ClassVar[tuple[str, ...]] = ("opt",)
    aliases: ClassVar[dict[str, str]] = {
        "opt-tiny": "package:sentcompress/pretrained/opt-tiny",
        "opt-125m": "facebook/opt-125m",
        "opt-350m": "facebook/opt-350m",
        "opt-1.3b": "facebook/opt-1.3b",
        "opt-2.7b": "facebook/opt-2.7b",
        "opt-6.7b": "facebook/opt-6.7b",
        "opt-13b": "facebook/opt-13b",
        "opt-30b": "facebook/opt-30b",
    }

    published_configs: ClassVar[dict[str, dict[str, Any]]] = {
        "facebook/opt-125m": _shape(768, 12, 12),
        "facebook/opt-350m": _shape(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
        "facebook/opt-1.3b": _shape(2048, 24, 32),
        "facebook/opt-2.7b": _shape(2560, 32, 32),
        "facebook/opt-6.7b": _shape(4096, 32, 32),
        "facebook/opt-13b": _shape(5120, 40, 40),
        "facebook/opt-30b": _shape(7168, 48, 56),
    }

    def __init__(self, model: OPTModel, options: Any | None = None) -> None:
        super().__init__()
        self.options = options or self.Options()
        self.config: OPTConfig = model.config
        self.decoder = model.decoder
        # Held outside the module tree, so that they are not part of a grafted model's weights.
        self._projections: tuple[nn.Module | None, nn.Module | None] = (
            self.decoder.project_in,
            self.decoder.project_out,
        )
        self.decoder.project_in = None
        self.decoder.project_out = None

    @classmethod
    def from_causal_lm(cls, model: OPTForCausalLM, options: Any | None = None) -> OPTBackbone:
        return cls(model.model, options)

    @classmethod
    def from_config(cls, config: OPTConfig, options: Any | None = None) -> OPTBackbone:
        backbone = cls(OPTModel(config), options)
        backbone.drop_token_embeddings()
        return backbone

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def blocks(self) -> nn.ModuleList:
        return self.decoder.layers

    def token_embeddings(self, input_ids: Tensor) -> Tensor:
        if self.decoder.embed_tokens is None:
            raise RuntimeError("the token embeddings were dropped")
        embeddings = self.decoder.embed_tokens(input_ids)
        project_in = self._projections[0]
        return embeddings if project_in is None else project_in(embeddings)

    def project_out(self, hidden_states: Tensor) -> Tensor:
        """What the LLM's own output head reads: ``[..., H] -> [..., word_embed_proj_dim]``."""
        project_out = self._projections[1]
        return hidden_states if project_out is None else project_out(hidden_states)

    def drop_token_embeddings(self) -> None:
        self.decoder.embed_tokens = None
        self._projections = (None, None)

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Any | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, Any | None]:
        # Additive and explicit, so that eager and SDPA mean the same by it and neither decides on causality.
        dtype = inputs_embeds.dtype
        mask = torch.zeros(attention_mask.shape, dtype=dtype, device=inputs_embeds.device)
        mask = mask.masked_fill(~attention_mask, torch.finfo(dtype).min)
        output = self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        return output.last_hidden_state, output.past_key_values if use_cache else None

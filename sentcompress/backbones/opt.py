"""OPT, 125M to 30B by configuration; 350M with its projections and post-norm."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, OPTModel, PreTrainedModel

from sentcompress.contracts.causal_lm import CausalLMBackbone


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


class OPTBackbone(CausalLMBackbone):
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

    tiny_configs: ClassVar[tuple[dict[str, Any], ...]] = tuple(
        {**_shape(32, 3, 4), "vocab_size": 500, "ffn_dim": 64, "max_position_embeddings": 128, **more}
        for more in (
            {"init_std": 0.1},
            {"init_std": 0.1, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        )
    )

    def __init__(self, decoder: PreTrainedModel, options: Any | None = None) -> None:
        super().__init__(decoder, options)
        # Held outside the module tree, so that they are not part of a grafted model's weights.
        self._projections: tuple[nn.Module | None, nn.Module | None] = (
            self.decoder.project_in,
            self.decoder.project_out,
        )
        self.decoder.project_in = None
        self.decoder.project_out = None

    @classmethod
    def from_causal_lm(cls, model: OPTForCausalLM, options: Any | None = None) -> OPTBackbone:
        return cls(model.model.decoder, options)

    @classmethod
    def from_config(cls, config: OPTConfig, options: Any | None = None) -> OPTBackbone:
        backbone = cls(OPTModel(config).decoder, options)
        backbone.drop_token_embeddings()
        return backbone

    def token_embeddings(self, input_ids: Tensor) -> Tensor:
        embeddings = super().token_embeddings(input_ids)
        project_in = self._projections[0]
        return embeddings if project_in is None else project_in(embeddings)

    def project_out(self, hidden_states: Tensor) -> Tensor:
        project_out = self._projections[1]
        return hidden_states if project_out is None else project_out(hidden_states)

    def drop_token_embeddings(self) -> None:
        super().drop_token_embeddings()
        self._projections = (None, None)

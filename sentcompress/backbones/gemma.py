"""Gemma 1, 2 and 3 (text)."""

from __future__ import annotations

from typing import Any, ClassVar

from sentcompress.contracts.causal_lm import CausalLMBackbone


def _shape(
    model_type: str, vocab: int, hidden: int, feedforward: int, layers: int, heads: int, kv_heads: int
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": feedforward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 256,
    }


class GemmaBackbone(CausalLMBackbone):
    """Gemma 1 to 3: embeddings scaled by the root of the width, soft-capped scores, alternating windows.

    Where transformers scales the embeddings differs by version: in the table, or in the decoder's forward. Latents
    stand for what the decoder is given, and their scale is measured there, so both come out the same.
    """

    model_types: ClassVar[tuple[str, ...]] = ("gemma", "gemma2", "gemma3_text")
    aliases: ClassVar[dict[str, str]] = {
        "gemma-2b": "google/gemma-2b",
        "gemma-7b": "google/gemma-7b",
        "gemma-2-2b": "google/gemma-2-2b",
        "gemma-2-9b": "google/gemma-2-9b",
        "gemma-3-270m": "google/gemma-3-270m",
        "gemma-3-1b": "google/gemma-3-1b-pt",
    }
    published_configs: ClassVar[dict[str, dict[str, Any]]] = {
        "google/gemma-2b": _shape("gemma", 256000, 2048, 16384, 18, 8, 1),
        "google/gemma-7b": _shape("gemma", 256000, 3072, 24576, 28, 16, 16),
        "google/gemma-2-2b": _shape("gemma2", 256000, 2304, 9216, 26, 8, 4),
        "google/gemma-2-9b": _shape("gemma2", 256000, 3584, 14336, 42, 16, 8),
        "google/gemma-3-270m": _shape("gemma3_text", 262144, 640, 2048, 18, 4, 1),
        "google/gemma-3-1b-pt": _shape("gemma3_text", 262144, 1152, 6912, 26, 4, 1),
    }
    tiny_configs: ClassVar[tuple[dict[str, Any], ...]] = tuple(
        {
            "model_type": model_type,
            "vocab_size": 500,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "max_position_embeddings": 128,
            "initializer_range": 0.1,
            **more,
        }
        for model_type, more in (
            ("gemma", {}),
            ("gemma2", {"sliding_window": 4, "attn_logit_softcapping": 2.0}),
            ("gemma3_text", {"sliding_window": 4, "sliding_window_pattern": 2}),
        )
    )

    @classmethod
    def attention_implementations(cls, config: Any) -> tuple[str, ...]:
        # SDPA has no soft-capping: transformers computes it without, and says so only in a warning.
        return ("eager",) if getattr(config, "attn_logit_softcapping", None) else ("sdpa", "eager")

"""GPT-2, of all sizes."""

from __future__ import annotations

from typing import Any, ClassVar

from sentcompress.contracts.causal_lm import CausalLMBackbone


def _shape(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_positions": 1024,
    }


class GPT2Backbone(CausalLMBackbone):
    """GPT-2: learned positions, which its decoder adds to the latents as it does to tokens."""

    model_types: ClassVar[tuple[str, ...]] = ("gpt2",)
    aliases: ClassVar[dict[str, str]] = {
        "distilgpt2": "distilbert/distilgpt2",
        "gpt2": "openai-community/gpt2",
        "gpt2-medium": "openai-community/gpt2-medium",
        "gpt2-large": "openai-community/gpt2-large",
        "gpt2-xl": "openai-community/gpt2-xl",
    }
    published_configs: ClassVar[dict[str, dict[str, Any]]] = {
        "distilbert/distilgpt2": _shape(768, 6, 12),
        "openai-community/gpt2": _shape(768, 12, 12),
        "openai-community/gpt2-medium": _shape(1024, 24, 16),
        "openai-community/gpt2-large": _shape(1280, 36, 20),
        "openai-community/gpt2-xl": _shape(1600, 48, 25),
    }
    tiny_configs: ClassVar[tuple[dict[str, Any], ...]] = (
        {
            "model_type": "gpt2",
            "vocab_size": 500,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 128,
            "initializer_range": 0.1,
            "bos_token_id": 2,
            "eos_token_id": 2,
        },
    )

"""Phi 1, 1.5, 2 and 3."""

from __future__ import annotations

from typing import Any, ClassVar

from sentcompress.contracts.causal_lm import CausalLMBackbone

_TINY: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
}


class PhiBackbone(CausalLMBackbone):
    """Phi 1 to 3: parallel blocks and partly rotary heads (Phi), fused projections and a window (Phi-3)."""

    model_types: ClassVar[tuple[str, ...]] = ("phi", "phi3")
    aliases: ClassVar[dict[str, str]] = {
        "phi-1": "microsoft/phi-1",
        "phi-1.5": "microsoft/phi-1_5",
        "phi-2": "microsoft/phi-2",
        "phi-3-mini": "microsoft/Phi-3-mini-4k-instruct",
    }
    published_configs: ClassVar[dict[str, dict[str, Any]]] = {
        name: {
            "model_type": model_type,
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": feedforward,
            "num_hidden_layers": layers,
            "num_attention_heads": 32,
            "max_position_embeddings": positions,
            **more,
        }
        for name, model_type, vocab, hidden, feedforward, layers, positions, more in (
            ("microsoft/phi-1", "phi", 51200, 2048, 8192, 24, 2048, {"partial_rotary_factor": 0.5}),
            ("microsoft/phi-1_5", "phi", 51200, 2048, 8192, 24, 2048, {"partial_rotary_factor": 0.5}),
            ("microsoft/phi-2", "phi", 51200, 2560, 10240, 32, 2048, {"partial_rotary_factor": 0.4}),
            (
                "microsoft/Phi-3-mini-4k-instruct",
                "phi3",
                32064,
                3072,
                8192,
                32,
                4096,
                {"sliding_window": 2047},
            ),
        )
    }
    tiny_configs: ClassVar[tuple[dict[str, Any], ...]] = (
        {"model_type": "phi", **_TINY},
        {"model_type": "phi3", **_TINY, "num_key_value_heads": 2, "sliding_window": 4},
    )

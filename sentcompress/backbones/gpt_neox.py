"""GPT-NeoX: Pythia."""

from __future__ import annotations

from typing import Any, ClassVar

from sentcompress.contracts.causal_lm import CausalLMBackbone


def _shape(hidden: int, layers: int, heads: int, vocab: int = 50304) -> dict[str, Any]:
    """As published (arXiv 2304.01373, table 1)."""
    return {
        "model_type": "gpt_neox",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
    }


class GPTNeoXBackbone(CausalLMBackbone):
    """Pythia and GPT-NeoX: attention and feed-forward in parallel, rotary positions on a part of each head."""

    model_types: ClassVar[tuple[str, ...]] = ("gpt_neox",)
    aliases: ClassVar[dict[str, str]] = {
        f"pythia-{size}": f"EleutherAI/pythia-{size}"
        for size in ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")
    }
    published_configs: ClassVar[dict[str, dict[str, Any]]] = {
        "EleutherAI/pythia-70m": _shape(512, 6, 8),
        "EleutherAI/pythia-160m": _shape(768, 12, 12),
        "EleutherAI/pythia-410m": _shape(1024, 24, 16),
        "EleutherAI/pythia-1b": _shape(2048, 16, 8),
        "EleutherAI/pythia-1.4b": _shape(2048, 24, 16),
        "EleutherAI/pythia-2.8b": _shape(2560, 32, 32),
        "EleutherAI/pythia-6.9b": _shape(4096, 32, 32, vocab=50432),
        "EleutherAI/pythia-12b": _shape(5120, 36, 40, vocab=50688),
    }
    tiny_configs: ClassVar[tuple[dict[str, Any], ...]] = tuple(
        {
            "model_type": "gpt_neox",
            "vocab_size": 500,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "rotary_pct": 0.25,
            "initializer_range": 0.1,
            "use_parallel_residual": parallel,
        }
        for parallel in (True, False)
    )

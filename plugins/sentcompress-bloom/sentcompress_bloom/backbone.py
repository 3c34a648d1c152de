"""BLOOM, which encodes positions in the attention scores."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

import sentcompress


def _shape(hidden_size: int, layers: int, heads: int) -> dict[str, Any]:
    """The published configuration (arXiv 2211.05100, table 3)."""
    return {
        "model_type": "bloom",
        "vocab_size": 250880,
        "hidden_size": hidden_size,
        "n_layer": layers,
        "n_head": heads,
    }


class BloomBackbone(sentcompress.CausalLMBackbone):
    """BLOOM: ALiBi, a penalty on distance, instead of position ids; transformers computes it from a padding mask."""

    model_types: ClassVar[tuple[str, ...]] = ("bloom",)
    aliases: ClassVar[dict[str, str]] = {
        "bloom-560m": "bigscience/bloom-560m",
        "bloom-1.1b": "bigscience/bloom-1b1",
        "bloom-1.7b": "bigscience/bloom-1b7",
        "bloom-3b": "bigscience/bloom-3b",
        "bloom-7.1b": "bigscience/bloom-7b1",
        "bloomz-560m": "bigscience/bloomz-560m",
    }
    published_configs: ClassVar[dict[str, dict[str, Any]]] = {
        "bigscience/bloom-560m": _shape(1024, 24, 16),
        "bigscience/bloom-1b1": _shape(1536, 24, 16),
        "bigscience/bloom-1b7": _shape(2048, 24, 16),
        "bigscience/bloom-3b": _shape(2560, 30, 32),
        "bigscience/bloom-7b1": _shape(4096, 30, 32),
        "bigscience/bloomz-560m": _shape(1024, 24, 16),
    }
    tiny_configs: ClassVar[tuple[dict[str, Any], ...]] = tuple(
        {
            "model_type": "bloom",
            "vocab_size": 500,
            "hidden_size": 48,
            "n_layer": 3,
            "n_head": heads,
            "initializer_range": 0.1,
            "apply_residual_connection_post_layernorm": post_norm,
        }
        # The slopes are computed differently if the number of heads is not a power of two.
        for heads, post_norm in ((4, False), (6, True))
    )

    def __init__(self, decoder: PreTrainedModel, options: Any | None = None) -> None:
        super().__init__(decoder, options)
        decoder.build_alibi_tensor = alibi

    @classmethod
    def attention_implementations(cls, config: Any) -> tuple[str, ...]:  # noqa: ARG003
        return ("eager",)  # the only one transformers has for BLOOM


def alibi(mask: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """ALiBi for the mask of each position: ``[R, 1, N, P + N]`` additive to ``[R * heads, N, P + N]``.

    transformers uses a padding mask ``[R, P + N]``, so its positions continue across packed documents. Here the
    position of a key is its index among the keys that the query may attend to. Only distances
    matter, so any start is correct.
    """
    positions = (mask == 0).cumsum(-1) - 1
    # For keys at positions 0 and 1, transformers returns [0, slope] for each head.
    slopes = build_alibi_tensor(torch.ones(1, 2, device=mask.device), heads, torch.float32)[:, 0, 1]
    return (slopes[:, None, None] * positions).flatten(0, 1).to(dtype)

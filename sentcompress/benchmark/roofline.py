"""How many bytes a token has to be read for, and how fast this machine reads."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sentcompress.modeling.sentence_lm import SentenceLM

COPY_BYTES = 2**28
"""Far larger than a processor's cache."""


def bandwidth(device: torch.device, size: int = COPY_BYTES) -> float:
    """Bytes/s of memory traffic of a large copy (read and written), the best of a few."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(4):
        _synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        best = max(best, 2 * size / (time.perf_counter() - began))
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def module_bytes(module: nn.Module, *, embeddings: bool = False) -> int:
    """Bytes of a module's weights that are read whole at each call: lookup tables are not."""
    tables = (
        {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)} if not embeddings else set()
    )
    unique = {id(p): p for p in module.parameters() if id(p) not in tables}
    return sum(p.numel() * p.element_size() for p in unique.values())


def backbone_cache_bytes(config: Any, element_size: int) -> int:
    """Bytes of keys and values of one position, from a transformers configuration."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * element_size)


def backbone_bytes_per_token(backbone: PreTrainedModel, text_tokens: float) -> float:
    """Weights (output head included) and cache a token-level step reads."""
    head = backbone.get_output_embeddings().weight
    tables = {id(m.weight) for m in backbone.modules() if isinstance(m, nn.Embedding)}
    weights = module_bytes(backbone) + (head.numel() * head.element_size() if id(head) in tables else 0)
    return weights + text_tokens * backbone_cache_bytes(backbone.config, head.element_size())


def sentence_bytes_per_token(model: SentenceLM, text_tokens: float, sentence_tokens: float) -> float:
    """Decoder and output head at each token and end mark; encoder, backbone and its cache once a sentence."""
    head = model.vae.output_weight
    size = head.element_size()
    decoder = float(module_bytes(model.vae.decoder) + head.numel() * size)
    blocks = model.vae.config.decoder_layers
    decoder += 2 * blocks * model.vae.config.hidden_size * size * sentence_tokens / 2
    cells = text_tokens / sentence_tokens * model.latents
    cache = backbone_cache_bytes(model.backbone.config, size)
    once = module_bytes(model.vae.encoder) + module_bytes(model.backbone) + module_bytes(model.termination)
    steps = (sentence_tokens + 1) / sentence_tokens
    return decoder * steps + (once + cells * cache) / sentence_tokens

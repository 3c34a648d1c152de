"""What a token of text costs to decode: operations, bytes that have to be read; and how fast this machine reads."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sentcompress.estimate.costs import DecodingCost
from sentcompress.modeling.int8 import Int8Linear
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


def _weights(module: nn.Module) -> list[nn.Parameter]:
    """A module's weights that are read whole at each call, a shared one once: lookup tables are not."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    return list({id(p): p for p in module.parameters() if id(p) not in tables}.values())


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights that are read whole at each call."""
    whole = sum(p.numel() * p.element_size() for p in _weights(module))
    return whole + sum(layer.int8.nbytes for layer in _in_8_bits(module))


def _in_8_bits(module: nn.Module) -> list[Int8Linear]:
    return [m for m in module.modules() if isinstance(m, Int8Linear)]


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


def sentence_bytes_per_token(
    model: SentenceLM, text_tokens: float, sentence_tokens: float, head_bytes: int | None = None
) -> float:
    """Decoder and output head at each token and end mark; encoder, backbone and its cache once a sentence.

    Args:
        head_bytes: what the output head reads a step; None for the full head.
    """
    vae, head = model.vae, model.vae.output_weight
    size = head.element_size()
    idle, once = _told(model)
    unpack = _unpack(model)
    head_bytes = head.numel() * size if head_bytes is None else head_bytes
    decoder = float(module_bytes(vae.decoder) + head_bytes - (idle + unpack) * size)
    decoder += 2 * vae.config.decoder_layers * vae.config.hidden_size * size * _seen(model, sentence_tokens)
    cells = text_tokens / sentence_tokens * model.latents
    cache = backbone_cache_bytes(model.backbone.config, size)
    parts = (vae.encoder, vae.fusion, model.backbone, model.termination)
    sentence = sum(module_bytes(part) for part in parts) + (once + unpack) * size
    steps = (sentence_tokens + 1) / sentence_tokens
    return decoder * steps + (sentence + cells * cache) / sentence_tokens


def _told(model: SentenceLM) -> tuple[float, float]:
    """Weights of what tells the blocks about the latents: those not used a token, and those used once a latent."""
    blocks: Any = getattr(model.vae.decoder, "blocks", ())
    told = sum(products(block.condition) for block in blocks if block.condition is not None)
    if model.vae.config.conditioning != "cross-attention":
        return told, told / model.latents
    # Queries and output, keys and values; with one latent, values and output once, and nothing else.
    return (told / 2 if model.latents > 1 else told), told / 2


def _unpack(model: SentenceLM) -> int:
    """Weights of the decoder's ``unpack_size``, used once a sentence."""
    unpack = getattr(model.vae.decoder, "unpack", None)
    return 0 if unpack is None else products(unpack.read)


def _seen(model: SentenceLM, sentence_tokens: float) -> float:
    """Positions a token of the decoder looks back on, on average."""
    prefix = getattr(model.vae.decoder, "prefix", 0)
    return sentence_tokens / 2 + prefix + model.vae.config.decoder_context


def products(module: nn.Module) -> int:
    """Multiplications a position costs in a module's matrices."""
    whole = sum(p.numel() for p in _weights(module) if p.ndim > 1)
    return whole + sum(m.int8.out_features * m.int8.in_features for m in _in_8_bits(module))


def backbone_flops_per_token(backbone: PreTrainedModel, text_tokens: float) -> float:
    """Floating-point operations of one decoding step: two for each weight, and attention to the text before it."""
    config: Any = backbone.config
    head = backbone.get_output_embeddings()
    blocks = products(backbone.base_model)
    attention = 4 * config.num_hidden_layers * config.hidden_size * text_tokens
    return 2 * (blocks + head.weight.numel()) + attention


def sentence_flops_per_token(model: SentenceLM, text_tokens: float, sentence_tokens: float) -> float:
    """The same for the sentence model.

    Decoder and head run at each token and end mark (the decoder at the prefix of a sentence too), encoder and fusion
    at each token, the backbone ``k`` times a sentence.
    """
    config, vae, k = model.vae.config, model.vae, model.latents
    width = config.hidden_size
    prefix = getattr(vae.decoder, "prefix", 0)
    idle, once = _told(model)
    unpack = _unpack(model)
    decoder = 2.0 * (products(vae.decoder) - idle - unpack)
    decoder += 4 * config.decoder_layers * width * _seen(model, sentence_tokens)
    encoder = 2.0 * products(vae.encoder) + 4 * config.encoder_layers * width * sentence_tokens
    cells = text_tokens / sentence_tokens * k
    backbone = 2 * products(model.backbone) + 4 * model.backbone.config.num_hidden_layers * width * cells
    sentence = (
        decoder * (sentence_tokens + 1 + prefix)
        + 2 * vae.output_weight.numel() * (sentence_tokens + 1)
        + encoder * sentence_tokens
        + 2 * vae.fusion.products(sentence_tokens)
        + backbone * k
        + 2 * (once * k + unpack)
    )
    return sentence / sentence_tokens


def decoding_cost(
    model: SentenceLM | PreTrainedModel, text_tokens: float, sentence_tokens: float
) -> DecodingCost:
    """What one more token costs at batch 1.

    Args:
        text_tokens: tokens of the text before it.
        sentence_tokens: mean length of a sentence.
    """
    if isinstance(model, SentenceLM):
        flops = sentence_flops_per_token(model, text_tokens, sentence_tokens)
        size = sentence_bytes_per_token(model, text_tokens, sentence_tokens)
    else:
        flops = backbone_flops_per_token(model, text_tokens)
        size = backbone_bytes_per_token(model, text_tokens)
    return DecodingCost(flops=flops, bytes=size, text_tokens=text_tokens, sentence_tokens=sentence_tokens)

"""What a token of text costs to decode: operations, and bytes that have to be read at this machine's bandwidth."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sentcompress.errors import InputError
from sentcompress.modeling.device_map import blocks_of
from sentcompress.modeling.int8 import Int8Linear
from sentcompress.modeling.pruning import cut_config
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.modeling.split import Split, split_of

COPY_BYTES = 2**28
"""Far larger than a processor's cache."""
TRAINING_PASSES = 3
"""Forward passes that a training step costs: the backward pass takes as much arithmetic as two."""
FLOPS_PER_PRODUCT = 2
"""A multiplication and an addition for each weight."""
ATTENTION_FLOPS = 2 * FLOPS_PER_PRODUCT
"""For each position attended to, block and channel: a product with its key and one with its value."""


def products_per_token(outside: float, backbone: float, tokens_per_position: float) -> float:
    """Weights that a token of text is multiplied by.

    Args:
        outside: weights outside the backbone, used for every token.
        backbone: weights of the backbone, used once for each of its positions.
        tokens_per_position: of text; 1 for a token-level model.
    """
    return outside + backbone / tokens_per_position


def training_flops(products: float) -> float:
    """Floating-point operations of training on so many products of a weight and a state, the backward pass included."""
    return float(TRAINING_PASSES * FLOPS_PER_PRODUCT * products)


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
    """A module's weights that are read whole at each call, a shared one once; lookup tables are left out."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    return list({id(p): p for p in module.parameters() if id(p) not in tables}.values())


def _int8_layers(module: nn.Module) -> list[Int8Linear]:
    return [m for m in module.modules() if isinstance(m, Int8Linear)]


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights that are read whole at each call."""
    whole = sum(p.numel() * p.element_size() for p in _weights(module))
    return whole + sum(layer.int8.nbytes for layer in _int8_layers(module))


def products(module: nn.Module) -> int:
    """Weights of a module's matrices: the multiplications that each position costs."""
    whole = sum(p.numel() for p in _weights(module) if p.ndim > 1)
    return whole + sum(m.int8.out_features * m.int8.in_features for m in _int8_layers(module))


def backbone_cache_bytes(config: Any, element_size: int) -> int:
    """Bytes of keys and values of one position, from a transformers configuration."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * element_size)


def attended_positions(config: Any, positions: float) -> float:
    """Positions that a token attends to, the mean over blocks: fewer than there are where a window slides.

    Args:
        config: a transformers configuration.
        positions: tokens before it.
    """
    window = getattr(config, "sliding_window", None)
    number = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * number
    sliding = kinds.count("sliding_attention") if window else 0
    return ((number - sliding) * positions + sliding * min(positions, window or positions)) / number


def _attention_width(config: Any) -> int:
    """Channels of all heads of a block together."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_attention_heads * width)


def backbone_bytes_per_token(backbone: PreTrainedModel, text_tokens: float) -> float:
    """Weights (output head included) and cache that a token-level step reads."""
    head = backbone.get_output_embeddings().weight
    tables = {id(m.weight) for m in backbone.modules() if isinstance(m, nn.Embedding)}
    weights = module_bytes(backbone) + (head.numel() * head.element_size() if id(head) in tables else 0)
    return weights + _backbone_cache(backbone, text_tokens)


def _backbone_cache(backbone: PreTrainedModel, text_tokens: float) -> float:
    """Bytes of the cache that a token-level step reads: all that it holds of the text."""
    config, size = backbone.config, backbone.get_output_embeddings().weight.element_size()
    return attended_positions(config, text_tokens) * backbone_cache_bytes(config, size)


def backbone_flops_per_token(backbone: PreTrainedModel, text_tokens: float) -> float:
    """Floating-point operations of one decoding step: its products, and attention to the text before it.

    All experts of a mixture count, so this is an upper bound there.
    """
    weights = products(backbone.base_model) + backbone.get_output_embeddings().weight.numel()
    return FLOPS_PER_PRODUCT * weights + _attention_flops(backbone.config, text_tokens)


def _attention_flops(config: Any, positions: float) -> float:
    """Of a step of all blocks after so many positions."""
    blocks = config.num_hidden_layers * _attention_width(config)
    return float(ATTENTION_FLOPS * blocks * attended_positions(config, positions))


def _split_parts(lm: PreTrainedModel, made: Split) -> list[list[nn.Module]]:
    """The first, middle and last blocks."""
    blocks = [*blocks_of(lm)]
    return [blocks[: made.first], blocks[made.first : made.after], blocks[made.after :]]


def split_flops_per_token(
    lm: PreTrainedModel, made: Split, text_tokens: float, sentence_tokens: float
) -> float:
    """Floating-point operations of a token of a split LLM.

    First and last blocks and the output head run at each token, middle and last blocks once per sentence.
    """
    parts = _split_parts(lm, made)
    first, middle, last = (sum(products(block) for block in part) for part in parts)
    outside = products(lm.base_model) - first - middle - last + lm.get_output_embeddings().weight.numel()
    weights = outside + first + last + (middle + last) / sentence_tokens
    sentences, config = text_tokens / sentence_tokens, lm.config
    attended = len(parts[0]) * attended_positions(cut_config(config, range(made.first)), text_tokens)
    # What a window hides is computed and masked.
    attended += len(parts[1]) * sentences / sentence_tokens
    attended += len(parts[2]) * (text_tokens + sentences) * (1 + 1 / sentence_tokens)
    return FLOPS_PER_PRODUCT * weights + ATTENTION_FLOPS * _attention_width(config) * attended


def split_bytes_per_token(
    lm: PreTrainedModel, made: Split, text_tokens: float, sentence_tokens: float
) -> float:
    """Weights and caches that a token of a split LLM reads; its middle blocks once per sentence."""
    middle = sum(module_bytes(block) for block in _split_parts(lm, made)[1])
    weights = backbone_bytes_per_token(lm, 0) - middle * (1 - 1 / sentence_tokens)
    return weights + split_caches(lm, made, text_tokens, sentence_tokens)[1]


def split_caches(
    lm: PreTrainedModel, made: Split, text_tokens: float, sentence_tokens: float
) -> tuple[float, float]:
    """Bytes of a text's cache, and how many of them a token reads."""
    config, size, sentences = (
        lm.config,
        lm.get_output_embeddings().weight.element_size(),
        text_tokens / sentence_tokens,
    )
    of_block = backbone_cache_bytes(config, size) / config.num_hidden_layers
    near = attended_positions(cut_config(config, range(made.first)), text_tokens)
    # The middle and last blocks keep all of them, whatever their windows are.
    positions = (near, sentences, text_tokens + sentences)
    parts = zip(_split_parts(lm, made), positions, strict=True)
    first, middle, last = (len(part) * of_block * number for part, number in parts)
    return first + middle + last, first + middle / sentence_tokens + last


def sentence_bytes_per_token(
    model: SentenceLM, text_tokens: float, sentence_tokens: float, head_bytes: int | None = None
) -> float:
    """Decoder and output head at each token and end mark; encoder, backbone and its cache once per sentence.

    Args:
        head_bytes: what the output head reads at each step; None for the full head.
    """
    vae, head = model.vae, model.vae.output_weight
    size = head.element_size()
    idle, per_latent = _conditioning_weights(model)
    unpack = _unpack_weights(model)
    head_bytes = head.numel() * size if head_bytes is None else head_bytes
    decoder = float(module_bytes(vae.decoder) + head_bytes - (idle + unpack) * size)
    parts = (vae.encoder, vae.fusion, model.backbone, model.termination)
    sentence = sum(module_bytes(part) for part in parts) + (per_latent + unpack) * size
    steps = (sentence_tokens + 1) / sentence_tokens
    of_decoder, of_backbone = _sentence_caches(model, text_tokens, sentence_tokens)
    return (decoder + of_decoder) * steps + (sentence + of_backbone) / sentence_tokens


def _sentence_caches(model: SentenceLM, text_tokens: float, sentence_tokens: float) -> tuple[float, float]:
    """Bytes of a text's caches: the decoder's, read at each token and end mark, and the backbone's, once a sentence."""
    vae, size = model.vae, model.vae.output_weight.element_size()
    config = model.backbone.config
    context = _decoder_context(model, sentence_tokens)
    positions = attended_positions(config, _backbone_positions(model, text_tokens, sentence_tokens))
    decoder = 2 * vae.config.decoder_layers * vae.config.hidden_size * size * context
    return decoder, positions * backbone_cache_bytes(config, size)


def sentence_flops_per_token(model: SentenceLM, text_tokens: float, sentence_tokens: float) -> float:
    """Floating-point operations of a token that the sentence model writes.

    Decoder and head run at each token and end mark (the decoder at the prefix of a sentence too), encoder and fusion
    at each token, the backbone once per latent of a sentence.
    """
    config, vae, latents = model.vae.config, model.vae, model.latents
    width = config.hidden_size
    prefix = getattr(vae.decoder, "prefix", 0)
    idle, per_latent = _conditioning_weights(model)
    unpack = _unpack_weights(model)
    decoder = float(FLOPS_PER_PRODUCT) * (products(vae.decoder) - idle - unpack)
    context = _decoder_context(model, sentence_tokens)
    decoder += ATTENTION_FLOPS * config.decoder_layers * width * context
    encoder = float(FLOPS_PER_PRODUCT) * products(vae.encoder)
    encoder += ATTENTION_FLOPS * config.encoder_layers * width * sentence_tokens
    positions = _backbone_positions(model, text_tokens, sentence_tokens)
    backbone = FLOPS_PER_PRODUCT * products(model.backbone) + _attention_flops(
        model.backbone.config, positions
    )
    sentence = (
        decoder * (sentence_tokens + 1 + prefix)
        + FLOPS_PER_PRODUCT * vae.output_weight.numel() * (sentence_tokens + 1)
        + encoder * sentence_tokens
        + FLOPS_PER_PRODUCT * vae.fusion.products(sentence_tokens)
        + backbone * latents
        + FLOPS_PER_PRODUCT * (per_latent * latents + unpack)
    )
    return sentence / sentence_tokens


def _backbone_positions(model: SentenceLM, text_tokens: float, sentence_tokens: float) -> float:
    """Positions of the backbone that stand for so much text."""
    return text_tokens / sentence_tokens * model.latents


def _conditioning_weights(model: SentenceLM) -> tuple[float, float]:
    """Weights that condition the decoder's blocks on the latents: those idle at a token, those used once per latent."""
    blocks: Any = getattr(model.vae.decoder, "blocks", ())
    weights = sum(products(block.condition) for block in blocks if block.condition is not None)
    if model.vae.config.conditioning != "cross-attention":
        return weights, weights / model.latents
    # Keys and values are made once per latent; queries and output are used at every token. A single latent gets all
    # the attention, so only values and output are needed, once.
    return (weights / 2 if model.latents > 1 else weights), weights / 2


def _unpack_weights(model: SentenceLM) -> int:
    """Weights of the decoder's ``unpack_size``, used once per sentence."""
    unpack = getattr(model.vae.decoder, "unpack", None)
    return 0 if unpack is None else products(unpack.read)


def _decoder_context(model: SentenceLM, sentence_tokens: float) -> float:
    """Mean number of positions that a token of the decoder attends to."""
    prefix = getattr(model.vae.decoder, "prefix", 0)
    return sentence_tokens / 2 + prefix + model.vae.config.decoder_context


def decoding_cost(
    model: SentenceLM | PreTrainedModel, text_tokens: float, sentence_tokens: float
) -> tuple[float, float]:
    """What one more token costs at batch 1: floating-point operations, and bytes of weights and caches that are read.

    Args:
        text_tokens: tokens of the text before it.
        sentence_tokens: mean length of a sentence.
    """
    if isinstance(model, SentenceLM):
        flops = sentence_flops_per_token(model, text_tokens, sentence_tokens)
        size = sentence_bytes_per_token(model, text_tokens, sentence_tokens)
    elif (made := split_of(model)) is not None:
        flops = split_flops_per_token(model, made, text_tokens, sentence_tokens)
        size = split_bytes_per_token(model, made, text_tokens, sentence_tokens)
    else:
        flops = backbone_flops_per_token(model, text_tokens)
        size = backbone_bytes_per_token(model, text_tokens)
    return flops, size


def serving_cost(
    model: SentenceLM | PreTrainedModel, text_tokens: float, sentence_tokens: float, memory_bytes: float
) -> float:
    """Bytes read for a token in the largest batch of texts whose caches fit into the memory beside the weights.

    Weights are read once for all texts, caches for each text.

    Args:
        text_tokens: tokens of each text.
        sentence_tokens: mean length of a sentence.

    Raises:
        InputError: the memory has no room for the weights and one text.
    """
    if isinstance(model, SentenceLM):
        of_decoder, of_backbone = _sentence_caches(model, text_tokens, sentence_tokens)
        stored = of_decoder + of_backbone
        read = (of_decoder * (sentence_tokens + 1) + of_backbone) / sentence_tokens
    elif (made := split_of(model)) is not None:
        stored, read = split_caches(model, made, text_tokens, sentence_tokens)
    else:
        stored = read = _backbone_cache(model, text_tokens)
    held = sum(p.nbytes for p in model.parameters())
    batch = (memory_bytes - held) / stored
    if batch < 1:
        raise InputError(
            f"opponents.serving_bytes: {memory_bytes:,.0f} have no room for {held:,} bytes of weights and a text of "
            f"{text_tokens:,.0f} tokens ({stored:,.0f} bytes)",
            fix="raise it, or lower text_tokens",
        )
    weights = decoding_cost(model, text_tokens, sentence_tokens)[1] - read
    return weights / batch + read

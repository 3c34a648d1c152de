"""What parameters cost to train, and the record of what a token costs to write: each formula once. No torch.

Training keeps weights, gradients and AdamW's moments in fp32, whatever the precision of its products.
"""

from __future__ import annotations

from sentcompress.provenance import Record

FP32_BYTES = 4
ADAMW_MOMENTS = 2
TRAINING_PASSES = 3
"""Forward passes that a training step costs: the backward pass takes as much arithmetic as two."""
FLOPS_PER_PRODUCT = 2
"""A multiplication and an addition for each weight."""


class DecodingCost(Record):
    """Computed from shapes: the cost of one more token of text at batch 1, in the middle of a document."""

    flops: float
    """Floating-point operations."""
    bytes: float
    """Of weights and caches that have to be read."""
    text_tokens: float
    """Tokens of the text before it."""
    sentence_tokens: float
    """Mean length of a sentence."""


def weight_bytes(parameters: float) -> float:
    """Bytes of fp32 weights."""
    return FP32_BYTES * parameters


def gradient_bytes(trainable: float) -> float:
    """Bytes of the gradients of trainable parameters."""
    return FP32_BYTES * trainable


def optimizer_bytes(trainable: float, *, ema: bool = False) -> float:
    """Bytes of AdamW's two moments and, with ``ema``, of the averaged weights."""
    return (ADAMW_MOMENTS + ema) * FP32_BYTES * trainable


def training_bytes(parameters: float, trainable: float, *, ema: bool = False) -> float:
    """Bytes of weights, gradients and optimizer state; activations not included."""
    return weight_bytes(parameters) + gradient_bytes(trainable) + optimizer_bytes(trainable, ema=ema)


def checkpoint_bytes(parameters: float, trainable: float, *, ema: bool = False) -> float:
    """Bytes of a checkpoint's training state: weights and optimizer state. Its model file has the weights again."""
    return weight_bytes(parameters) + optimizer_bytes(trainable, ema=ema)


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

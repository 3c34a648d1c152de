"""Figures of the SentenceVAE paper (arXiv 2408.00655), shown beside measured figures and marked as the paper's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

VAE_PERPLEXITY = {
    ("opt-125m", 1): 3.605,
    ("opt-125m", 2): 2.588,
    ("opt-125m", 4): 1.649,
    ("opt-350m", 1): 2.406,
    ("opt-350m", 2): 1.845,
    ("opt-350m", 4): 1.384,
    ("opt-1.3b", 1): 1.622,
    ("opt-1.3b", 2): 1.292,
    ("opt-1.3b", 4): 1.115,
}
"""Experiment 1: teacher-forced perplexity of self-reconstruction, by backbone and blocks."""

SLLM = {
    ("opt-125m", 1): (26.75, 31.68, 214.57, 652.78, 73.15, 12.03),
    ("opt-125m", 2): (26.75, 44.60, 214.57, 539.80, 73.15, 7.08),
    ("opt-125m", 4): (26.75, 14.32, 214.57, 332.12, 73.15, 10.00),
    ("opt-350m", 1): (25.18, 24.84, 144.33, 481.39, 197.59, 29.98),
    ("opt-350m", 2): (25.18, 14.81, 144.33, 442.23, 197.59, 26.78),
    ("opt-350m", 4): (25.18, 10.17, 144.33, 315.61, 197.59, 17.73),
    ("opt-1.3b", 1): (15.95, 8.76, 119.07, 479.71, 400.01, 57.07),
    ("opt-1.3b", 2): (15.95, 3.84, 119.07, 553.95, 400.01, 55.14),
}
"""Experiment 2: perplexity, output tokens/s and memory (KB per token) of OPT and of the SLLM."""


class PaperFigures(NamedTuple):
    """Figures of an OPT model and of the SLLM made of it."""

    opt_perplexity: float
    perplexity: float
    opt_speed: float
    speed: float
    """Output tokens per second."""
    opt_memory: float
    memory: float
    """KB per token."""


def vae_note(recipe: dict[str, Any]) -> list[str]:
    """The paper's perplexity of reconstruction for a recipe's backbone and depth; empty where it has none."""
    perplexity = VAE_PERPLEXITY.get(_model_and_blocks(recipe))
    return [] if perplexity is None else [_note(f"teacher-forced perplexity {perplexity}")]


def sllm_note(recipe: dict[str, Any], line: Callable[[PaperFigures], str]) -> list[str]:
    """A line on the paper's SLLM for a recipe's backbone and depth; empty where the paper has none."""
    figures = SLLM.get(_model_and_blocks(recipe))
    return [] if figures is None else [_note(line(PaperFigures(*figures)))]


def _model_and_blocks(recipe: dict[str, Any]) -> tuple[str, int]:
    try:
        return str(recipe["backbone"]["model"]).rpartition("/")[2], int(recipe["vae"]["encoder_layers"])
    except (KeyError, TypeError, ValueError):
        return "", 0


def _note(line: str) -> str:
    return f"The paper's figures (its own hardware and text, and not causal: see the docs): {line}"

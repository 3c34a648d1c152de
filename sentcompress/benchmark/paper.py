"""Figures of the SentenceVAE paper (arXiv 2408.00655), to stand beside ours, always marked as the paper's."""

from __future__ import annotations

from typing import Any

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
"""Experiment 2: perplexity, output tokens/s and memory KB a token of OPT and of the SLLM."""


def paper_row(recipe: dict[str, Any], part: str) -> str:
    """What the paper printed for a recipe's backbone and depth; empty when it has no such row."""
    try:
        model = str(recipe["backbone"]["model"]).rpartition("/")[2]
        key = (model, int(recipe["vae"]["encoder_layers"]))
    except (KeyError, TypeError, ValueError):
        return ""
    if part == "reconstruct":
        return f"teacher-forced perplexity {VAE_PERPLEXITY[key]}" if key in VAE_PERPLEXITY else ""
    if key not in SLLM:
        return ""
    base_ppl, ppl, base_speed, speed, base_memory, memory = SLLM[key]
    return {
        "quality": f"perplexity {ppl}, OPT {base_ppl} (not fine-tuned on the same text)",
        "speed": f"{speed} output tokens/s, OPT {base_speed}: {speed / base_speed:.2f}x",
        "memory": f"{memory} KB a token, OPT {base_memory} KB",
    }.get(part, "")

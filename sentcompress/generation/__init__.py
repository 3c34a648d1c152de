"""Sentence-by-sentence generation with a SentenceLM, and reconstruction with a SentenceVAE."""

from sentcompress.generation.backbone_cache import Prefix
from sentcompress.generation.engine import Generation, SentenceGenerator
from sentcompress.generation.round_trip import Difference, differences, reconstruct
from sentcompress.generation.settings import GenerationSettings

__all__ = [
    "Difference",
    "Generation",
    "GenerationSettings",
    "Prefix",
    "SentenceGenerator",
    "differences",
    "reconstruct",
]

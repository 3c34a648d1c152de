"""Sentence-by-sentence generation with a SentenceLM, and reconstruction with a SentenceVAE.

torch is imported only when a name that needs it is used: the command line reads GenerationSettings without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentcompress.generation.engine import SentenceGenerator
    from sentcompress.generation.prefix import Prefix
    from sentcompress.generation.round_trip import Difference, differences, reconstruct
    from sentcompress.generation.settings import GenerationSettings
    from sentcompress.generation.text_batch import Generation

_MODULES = {
    "Difference": "round_trip",
    "Generation": "text_batch",
    "GenerationSettings": "settings",
    "Prefix": "prefix",
    "SentenceGenerator": "engine",
    "differences": "round_trip",
    "reconstruct": "round_trip",
}

__all__ = [
    "Difference",
    "Generation",
    "GenerationSettings",
    "Prefix",
    "SentenceGenerator",
    "differences",
    "reconstruct",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"sentcompress.generation.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

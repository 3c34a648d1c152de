"""sentcompress turns a decoder LLM into one that reads and writes a sentence at a time (arXiv 2408.00655).

``import sentcompress`` is fast: torch is imported only when a name that needs it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentcompress.contracts import (
        Backbone,
        CausalLMBackbone,
        Dataset,
        DatasetOptions,
        Document,
        Fusion,
        Memory,
        Metric,
        Options,
        Reconstruction,
        Segmenter,
        SegmenterOptions,
        Tokens,
    )
    from sentcompress.hookspecs import hookimpl
    from sentcompress.modeling import SentenceLM, SentenceLMConfig, SentenceVAE, SentenceVAEConfig
    from sentcompress.modeling.saved_models import load_split
    from sentcompress.sentence_memory.sentence_cache import SentenceMemory

__version__ = "0.1.0"

_CONTRACTS = (
    "Backbone",
    "CausalLMBackbone",
    "Dataset",
    "DatasetOptions",
    "Document",
    "Fusion",
    "Memory",
    "Metric",
    "Options",
    "Reconstruction",
    "Segmenter",
    "SegmenterOptions",
    "Tokens",
)
_EXPORTS = dict.fromkeys(_CONTRACTS, "sentcompress.contracts") | {
    "hookimpl": "sentcompress.hookspecs",
    "load_split": "sentcompress.modeling.saved_models",
    "SentenceLM": "sentcompress.modeling",
    "SentenceLMConfig": "sentcompress.modeling",
    "SentenceMemory": "sentcompress.sentence_memory.sentence_cache",
    "SentenceVAE": "sentcompress.modeling",
    "SentenceVAEConfig": "sentcompress.modeling",
}

__all__ = [
    "Backbone",
    "CausalLMBackbone",
    "Dataset",
    "DatasetOptions",
    "Document",
    "Fusion",
    "Memory",
    "Metric",
    "Options",
    "Reconstruction",
    "Segmenter",
    "SegmenterOptions",
    "SentenceLM",
    "SentenceLMConfig",
    "SentenceMemory",
    "SentenceVAE",
    "SentenceVAEConfig",
    "Tokens",
    "__version__",
    "hookimpl",
    "load_split",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

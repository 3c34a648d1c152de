"""The classes that plugin authors subclass. Importing this package does not import torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sentcompress.contracts.components import (
    Component,
    Dataset,
    DatasetOptions,
    Document,
    Metric,
    Options,
    Reconstruction,
    Segmenter,
    SegmenterOptions,
    UserInput,
)

if TYPE_CHECKING:
    from sentcompress.contracts.backbone import Backbone
    from sentcompress.contracts.causal_lm import CausalLMBackbone
    from sentcompress.contracts.fusion import Fusion
    from sentcompress.contracts.memory_policy import Memory, Tokens

_NEED_TORCH = {
    "Fusion": "sentcompress.contracts.fusion",
    "Backbone": "sentcompress.contracts.backbone",
    "CausalLMBackbone": "sentcompress.contracts.causal_lm",
    "Memory": "sentcompress.contracts.memory_policy",
    "Tokens": "sentcompress.contracts.memory_policy",
}

__all__ = [
    "Backbone",
    "CausalLMBackbone",
    "Component",
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
    "UserInput",
]


def __getattr__(name: str) -> Any:
    if name in _NEED_TORCH:
        return getattr(import_module(_NEED_TORCH[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Tools for plugin authors: a check for each kind of component, and tiny models built without a download.

Importing this package is cheap, since the pytest plugin imports it whenever pytest starts. Names are imported on use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentcompress.testing.backbones import check_backbone
    from sentcompress.testing.checks import CheckFailed, check_plugin
    from sentcompress.testing.datasets import check_dataset
    from sentcompress.testing.fusions import check_fusion
    from sentcompress.testing.metrics import check_metric
    from sentcompress.testing.policies import check_memory
    from sentcompress.testing.segmenters import check_segmenter
    from sentcompress.testing.texts import tiny_tokenizer
    from sentcompress.testing.tiny import OPT_TWINS, tiny_opt, tiny_passages, tiny_sentence_lm, tiny_vae

_MODULES = {
    "CheckFailed": "checks",
    "OPT_TWINS": "tiny",
    "check_backbone": "backbones",
    "check_dataset": "datasets",
    "check_fusion": "fusions",
    "check_memory": "policies",
    "check_metric": "metrics",
    "check_plugin": "checks",
    "check_segmenter": "segmenters",
    "tiny_opt": "tiny",
    "tiny_passages": "tiny",
    "tiny_sentence_lm": "tiny",
    "tiny_tokenizer": "texts",
    "tiny_vae": "tiny",
}

__all__ = [
    "OPT_TWINS",
    "CheckFailed",
    "check_backbone",
    "check_dataset",
    "check_fusion",
    "check_memory",
    "check_metric",
    "check_plugin",
    "check_segmenter",
    "tiny_opt",
    "tiny_passages",
    "tiny_sentence_lm",
    "tiny_tokenizer",
    "tiny_vae",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

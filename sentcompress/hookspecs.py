"""All hooks of plugins. A plugin implements any of them with ``@sentcompress.hookimpl``.

``register(name, cls)`` takes a class, or ``"module:Class"``, which is imported only when it is used.
A package announces its module in the entry-point group ``sentcompress``.
"""

from collections.abc import Callable

import pluggy

hookspec = pluggy.HookspecMarker("sentcompress")
hookimpl = pluggy.HookimplMarker("sentcompress")

Register = Callable[[str, "type | str"], None]


@hookspec
def register_segmenters(register: Register) -> None:
    """Add ways to split text into sentences: ``register(name, type[Segmenter])``."""


@hookspec
def register_fusions(register: Register) -> None:
    """Add ways to turn the hidden states of a sentence into latents: ``register(name, type[Fusion])``."""


@hookspec
def register_backbones(register: Register) -> None:
    """Add families of decoder LLMs: ``register(name, type[Backbone])``."""


@hookspec
def register_datasets(register: Register) -> None:
    """Add sources of documents: ``register(name, type[Dataset])``."""


@hookspec
def register_metrics(register: Register) -> None:
    """Add figures that ``bench quality`` reports: ``register(name, type[Metric])``."""


@hookspec
def register_memories(register: Register) -> None:
    """Add what a pretrained LLM's tokens attend to: ``register(name, type[Memory])``."""

"""Registers the backbone ``bloom`` with sentcompress."""

import sentcompress


@sentcompress.hookimpl
def register_backbones(register):
    # A string, so that the module is imported only when the backbone is used.
    register("bloom", "sentcompress_bloom.backbone:BloomBackbone")

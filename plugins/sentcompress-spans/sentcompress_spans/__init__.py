"""Registers the fusion ``spans`` with sentcompress."""

import sentcompress


@sentcompress.hookimpl
def register_fusions(register):
    # A string, so that the module is imported only when the fusion is used.
    register("spans", "sentcompress_spans.fusion:SpanPooling")

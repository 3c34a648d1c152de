"""Registers the segmenter ``sentencex`` with sentcompress."""

import sentcompress


@sentcompress.hookimpl
def register_segmenters(register):
    # A string, so that the module is imported only when the segmenter is used.
    register("sentencex", "sentcompress_sentencex.segmenter:SentencexSegmenter")

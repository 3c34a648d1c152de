"""Registers the metric ``sacrebleu`` with sentcompress."""

import sentcompress


@sentcompress.hookimpl
def register_metrics(register):
    # A string, so that the module is imported only when the metric is used.
    register("sacrebleu", "sentcompress_sacrebleu.metric:SacreBLEU")

"""Built-in segmenters, registered exactly as a stranger's are."""

from sentcompress.hookspecs import Register, hookimpl


@hookimpl
def register_segmenters(register: Register) -> None:
    register("regex", "sentcompress.segmenters.regex:RegexSegmenter")
    register("nltk", "sentcompress.segmenters.nltk:PunktSegmenter")
    register("fixed", "sentcompress.segmenters.fixed:FixedSegmenter")

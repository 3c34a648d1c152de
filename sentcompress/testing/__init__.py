"""For tests, ours and plugin authors': tiny real models, built in milliseconds without any download."""

from sentcompress.testing.tiny import OPT_TWINS, tiny_opt, tiny_passages, tiny_sentence_lm, tiny_vae

__all__ = ["OPT_TWINS", "tiny_opt", "tiny_passages", "tiny_sentence_lm", "tiny_vae"]

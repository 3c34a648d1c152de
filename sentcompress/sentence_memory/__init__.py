"""Sentence memory: a pretrained LLM that attends to older sentences through a small cache.

:class:`SentenceMemory` is a cache of transformers, for its ordinary ``generate``.
"""

"""Memory: which older tokens a pretrained LLM can still attend to, sentence by sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sentcompress.contracts.components import Component
from sentcompress.contracts.components import Options as BaseOptions


@dataclass(frozen=True)
class Tokens:
    """Tokens of earlier sentences, as a memory sees them: integer tensors that broadcast to ``[..., T]``.

    Attributes:
        ids: token ids.
        position: tokens of the text before it; 0 is the first token.
        age: sentences between its own and the one that is being written; 1 is the sentence before. Where many tokens
            are read at once, lower ages may be asked about too, and position -1; their answers are not used.
        offset: tokens of its sentence before it; 0 is the first of its sentence.
        behind: tokens of its sentence after it; 0 is the last of its sentence.
        distance: tokens from the beginning of its sentence to the one that is being written.
    """

    ids: Tensor
    position: Tensor
    age: Tensor
    offset: Tensor
    behind: Tensor
    distance: Tensor


class Memory(Component):
    """What a token attends to beside its own sentence. Memories are combined by ``+``: what any of them has is there.

    A memory keeps tokens (:meth:`keep`), or recalls sentences (:attr:`recall`, :meth:`index`, :meth:`scores`), or both.
    The same object serves all blocks of an LLM, so it must not change while it is used.
    """

    Options: ClassVar[type[BaseOptions]] = BaseOptions
    tokenizer: Any = None
    """The LLM's tokenizer, set by :meth:`prepare`."""

    def prepare(self, tokenizer: Any) -> None:
        """Prepare for an LLM, such as by looking up token ids. Called once, before anything else."""
        self.tokenizer = tokenizer

    def keep(self, tokens: Tokens) -> Tensor:
        """Which tokens of earlier sentences stay in the cache, whatever is asked later; none unless overridden.

        A token that was dropped cannot return: what is not kept at one age must not be kept at a higher one. The
        sentence that is being written is always kept.

        Returns:
            bool ``[..., T]``.
        """
        return torch.zeros_like(tokens.age, dtype=torch.bool)

    @property
    def recall(self) -> int:
        """Sentences that each token recalls, in each block and key-value head, of those that are not kept whole."""
        return 0

    @property
    def candidates(self) -> int:
        """Sentences looked up first by their index; the best ``recall`` of them by their exact keys are recalled.

        With as many as ``recall`` (the default), the index alone decides.
        """
        return self.recall

    def index(self, keys: Tensor) -> Tensor:
        """What stays on the device of stored keys, so that sentences can be found; only called with ``recall``.

        Args:
            keys: ``[B, heads, T, D]``, after the rotation by position if the LLM has one.

        Returns:
            ``[B, heads, T, C]`` of any dtype, small.
        """
        raise NotImplementedError(
            f"{type(self).__name__} recalls sentences, so it must implement index(keys)"
        )

    def scores(self, queries: Tensor, index: Tensor) -> Tensor:
        """How relevant each stored token is to each query. A sentence counts as much as its best token.

        Args:
            queries: ``[B, heads, Q, D]``; queries that share a key-value head are rows of the same head.
            index: ``[B, heads, T, C]``, as :meth:`index` returned it.

        Returns:
            ``[B, heads, Q, T]``, floating point.
        """
        raise NotImplementedError(
            f"{type(self).__name__} recalls sentences, so it must implement scores(...)"
        )

"""Sentences are short and uneven; the models work on real tokens only.

Linear layers see one flat row a token, ``[T, ...]``; only attention lays sentences out side by side,
``[S, L, ...]``. So padding costs nothing where nearly all the arithmetic is.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Ragged:
    """The layout of ``S`` sentences with ``T`` tokens in all, the longest of ``L`` tokens.

    Args:
        lengths: ``[S]`` int64, tokens of each sentence, each at least 1.
        streams: ``[S]`` int64, the text each sentence belongs to; those of one text stand together, in order.
            None: each is a text of its own.
    """

    def __init__(self, lengths: Tensor, streams: Tensor | None = None) -> None:
        self.lengths = lengths
        self.streams = streams
        self.num_sentences = int(lengths.shape[0])
        self.max_length = int(lengths.max()) if self.num_sentences else 0
        columns = torch.arange(self.max_length, device=lengths.device)
        self.mask = columns[None, :] < lengths[:, None]
        """``[S, L]`` bool, True at tokens; padding is on the right."""
        self.index = self.mask.flatten().nonzero().squeeze(1)
        """``[T]`` int64, where each token lies in the flattened ``[S * L]``."""

    @property
    def positions(self) -> Tensor:
        """``[T]`` position of each token in its sentence, from 0."""
        return self.index % self.max_length

    @property
    def sentence_ids(self) -> Tensor:
        """``[T]`` number of the sentence each token belongs to."""
        return self.index // self.max_length

    def pad(self, flat: Tensor) -> Tensor:
        """``[T, ...] -> [S, L, ...]``, zeros at padding."""
        if self.index.numel() == self.mask.numel():
            return flat.reshape(self.num_sentences, self.max_length, *flat.shape[1:])
        padded = flat.new_zeros(self.mask.numel(), *flat.shape[1:]).index_copy(0, self.index, flat)
        return padded.view(self.num_sentences, self.max_length, *flat.shape[1:])

    def unpad(self, padded: Tensor) -> Tensor:
        """``[S, L, ...] -> [T, ...]``."""
        return padded.reshape(-1, *padded.shape[2:]).index_select(0, self.index)

    def longer_by(self, extra: int) -> Ragged:
        """The layout in which every sentence has ``extra`` more positions."""
        return Ragged(self.lengths + extra, self.streams)

    # ---- sentences of one text, for attention across sentence borders

    @property
    def starts(self) -> Tensor:
        """``[S]`` where each sentence begins among the ``T`` positions."""
        return self.lengths.cumsum(0) - self.lengths

    @property
    def stream_starts(self) -> Tensor:
        """``[S]`` where the text of each sentence begins among the ``T`` positions."""
        if self.streams is None:
            return self.starts
        begins = torch.ones_like(self.streams, dtype=torch.bool)
        begins[1:] = self.streams[1:] != self.streams[:-1]
        return torch.where(begins, self.starts, 0).cummax(0).values

    @property
    def stream_positions(self) -> Tensor:
        """``[T]`` place of each position in its text, from 0."""
        places = torch.arange(len(self.index), device=self.lengths.device)
        return places - self.stream_starts[self.sentence_ids]

    def with_context(self, flat: Tensor, context: int) -> Tensor:
        """``[T, ...] -> [S, context + L, ...]``: each sentence behind the ``context`` positions before it."""
        columns = torch.arange(-context, self.max_length, device=self.lengths.device)
        places = (self.starts[:, None] + columns).clamp(0, len(self.index) - 1)
        return flat.index_select(0, places.flatten()).view(*places.shape, *flat.shape[1:])

    def context_mask(self, context: int) -> Tensor:
        """``[S, L, context + L]`` bool: a position sees the context of its own text, and its sentence so far."""
        columns = torch.arange(-context, self.max_length, device=self.lengths.device)
        before = (columns < 0) & (self.starts[:, None] + columns >= self.stream_starts[:, None])
        rows = torch.arange(self.max_length, device=self.lengths.device)
        own = (columns >= 0) & (columns <= rows[:, None])
        return before[:, None, :] | own

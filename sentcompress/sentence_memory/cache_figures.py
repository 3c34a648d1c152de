"""What a sentence memory holds and what it recalled, in figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from sentcompress.sentence_memory.slow_storage import stored_bytes
from sentcompress.sentence_memory.token_table import TokenTable


class CacheFigures(Cache):
    """The part of a sentence memory that says what it holds.

    Attributes:
        layers: of each block, :class:`~sentcompress.sentence_memory.block_cache.BlockCache`.
        recall_blocks: numbers of the blocks that recall.
    """

    layers: list[Any]
    recall_blocks: list[int]
    _table: TokenTable
    _attended: list[Tensor]

    def device_bytes(self) -> int:
        """Bytes of everything that lies with the LLM: kept and recalled tokens, and the index."""
        tensors = (t for layer in self.layers for t in (layer.keys, layer.values, layer.index, layer.held))
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def storage_bytes(self) -> int:
        """Bytes in slow storage."""
        return stored_bytes(storage for layer in self.layers for storage in layer.storage)

    def full_bytes(self) -> int:
        """Bytes that a cache of all tokens read so far would hold, without padding."""
        return sum(layer.token_bytes for layer in self.layers) * sum(len(row.ids) for row in self._table.rows)

    def text_bytes(self, number: int) -> tuple[int, int, int]:
        """The same three figures of one text of the batch, without the room to grow that it has in each.

        Returns:
            bytes on the device, in slow storage, and of a full cache.
        """
        row = self._table.rows[number]
        sizes = [layer.text_bytes(number, int((row.slots >= 0).sum())) for layer in self.layers]
        device, stored = map(sum, zip(*sizes, strict=True))
        return device, stored, sum(layer.token_bytes for layer in self.layers) * len(row.ids)

    def attended_share(self) -> float:
        """Share of the tokens read so far that the last one attended to, a mean of blocks, heads and texts.

        NaN if the last one did not come alone.
        """
        if not self._attended:
            return float("nan")
        lengths = torch.tensor([len(row.ids) for row in self._table.rows])
        shares = [(seen.sum(2).float().mean(1).cpu() / lengths).mean() for seen in self._attended]
        return float(torch.stack(shares).mean())

    def recalled_sentences(self) -> list[list[tuple[int, int]]]:
        """For each text, first and last token (exclusive) of the sentences that the last token recalled in any block.

        Empty if the last one did not come alone.
        """
        return [[*shares] for shares in self.recall_shares()]

    def recalled_number(self) -> int:
        """How many sentences the last token of each text recalled, all texts together."""
        stored = self._table._stored
        if not (self._attended and self.recall_blocks) or stored is None:
            return 0
        held = torch.cat(
            [self.layers[n].recalled(self._attended[n]).flatten(1).cpu() for n in self.recall_blocks], 1
        )
        sentences = stored.sentence.gather(1, held.clamp_min(0)).masked_fill_(held < 0, stored.sentences)
        found = torch.zeros(len(held), stored.sentences + 1, dtype=torch.bool)
        return int(found.scatter_(1, sentences, True)[:, :-1].sum())

    def recall_shares(self, texts: Sequence[int] | None = None) -> list[dict[tuple[int, int], float]]:
        """For each text and each of its :meth:`recalled_sentences`: the share of the heads that recalled it.

        Heads are the key-value heads of :attr:`recall_blocks`: each looks up sentences of its own.

        Args:
            texts: numbers of texts of the batch; None for all.
        """
        numbers = range(len(self._table.rows)) if texts is None else texts
        if not (self._attended and self.recall_blocks):
            return [{} for _ in numbers]
        places = [self.layers[n].recalled(self._attended[n]) for n in self.recall_blocks]
        heads = sum(held.shape[1] for held in places)
        shares = []
        for number in numbers:
            row = self._table.rows[number]
            held = torch.cat([each[number].flatten().cpu() for each in places])
            # -1, which becomes 0, is a slot that was not used.
            times = torch.bincount(held + 1, minlength=len(row.stored) + 1)[1:]
            shares.append({span: most / heads for span, most in row.stored_spans(times.numpy()).items()})
        return shares

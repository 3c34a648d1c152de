"""Older sentences in slow storage, recalled for each token that needs them."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from sentcompress.contracts import Memory
from sentcompress.contracts import Options as BaseOptions


class Recall(Memory):
    """Store older sentences; for each token, recall those whose keys answer its query best."""

    class Options(BaseOptions):
        recall: int = Field(default=4, ge=1)
        """Sentences that each token recalls, in each block and key-value head."""

    @property
    def recall(self) -> int:
        return int(self.options.recall)

    def index(self, keys: Tensor) -> Tensor:
        return keys

    def scores(self, queries: Tensor, index: Tensor) -> Tensor:
        return queries @ index.to(queries.dtype).transpose(-1, -2)

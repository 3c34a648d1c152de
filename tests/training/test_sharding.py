"""Shards that cannot be written. Sharded training is tested in tests/test_distributed.py."""

from __future__ import annotations

import pytest
import torch

from sentcompress.errors import StorageError
from sentcompress.training.sharding import write_shards


def test_the_process_that_cannot_write_its_shard_is_named(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "parts").write_text("in the way")
    with pytest.raises(StorageError, match="process 0 cannot write its shard"):
        write_shards(tmp_path / "checkpoint" / "parts", {"a": torch.ones(2)})

"""Files of shards, and shards that cannot be written. Sharded training is tested in tests/test_distributed.py."""

from __future__ import annotations

import pytest
import torch

from sentcompress.errors import StorageError
from sentcompress.training.sharding import read_shards, write_shards

TENSORS = {
    "model/weight": torch.arange(6.0).reshape(3, 2),
    "optimizer/exp_avg/weight": torch.ones(3, 2, dtype=torch.bfloat16),
    "optimizer/step/weight": torch.tensor(7.0),
    "model/empty": torch.zeros(0, 2),
}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


def test_shards_are_read_as_they_were_written(tmp_path):
    write_shards(tmp_path / "parts", TENSORS)
    assert_equal(read_shards(tmp_path / "parts", {"weight": torch.zeros(3, 2)}), TENSORS)


def test_the_files_are_those_of_torch(tmp_path):
    """Earlier versions let torch write and read them, which needs torch 2.8."""
    storage = pytest.importorskip("torch.distributed.checkpoint.hf_storage", reason="needs torch 2.8")
    checkpoint = torch.distributed.checkpoint
    tensors = {name: tensor for name, tensor in TENSORS.items() if tensor.numel()}

    writer = storage.HuggingFaceStorageWriter(str(tmp_path / "theirs"), save_distributed=True)
    checkpoint.save(tensors, storage_writer=writer, no_dist=True)
    assert_equal(read_shards(tmp_path / "theirs", {}), tensors)

    write_shards(tmp_path / "ours", tensors)
    theirs, ours = ({path.name for path in (tmp_path / name).iterdir()} for name in ("theirs", "ours"))
    assert theirs == ours
    read = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    reader = storage.HuggingFaceStorageReader(str(tmp_path / "ours"))
    checkpoint.load(read, storage_reader=reader, no_dist=True)
    assert_equal(read, tensors)


def test_the_process_that_cannot_write_its_shard_is_named(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "parts").write_text("in the way")
    with pytest.raises(StorageError, match="process 0 cannot write its shard"):
        write_shards(tmp_path / "checkpoint" / "parts", {"a": torch.ones(2)})

"""Slow storage: what is appended comes back, in any order, from every kind of storage."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sentcompress.errors import InputError, StorageError
from sentcompress.sentence_memory.slow_storage import KINDS, SlowStorage, make_storage

HEADS, KEY, VALUE = 3, 8, 6


def filled(
    kind: str, lengths: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[SlowStorage, list[Tensor], list[Tensor]]:
    """A storage, and the keys and values ``[heads, L, D]`` of each row, appended in turns of 7 tokens."""
    storage = make_storage(kind, len(lengths))
    keys = [torch.randn(HEADS, n, KEY, dtype=dtype) for n in lengths]
    values = [torch.randn(HEADS, n, VALUE, dtype=dtype) for n in lengths]
    for start in range(0, max(lengths), 7):
        for row, length in enumerate(lengths):
            if start < length:
                part = slice(start, min(start + 7, length))
                storage.append(row, keys[row][:, part], values[row][:, part])
    return storage, keys, values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_appended_comes_back(kind: str, dtype: torch.dtype):
    """With rows of different lengths, and after it has grown twice."""
    lengths = (500, 1, 377)
    storage, keys, values = filled(kind, lengths, dtype)
    assert [storage.length(row) for row in range(3)] == list(lengths)
    close = {"atol": 0.03, "rtol": 0} if kind == "int8" else {"atol": 0, "rtol": 0}
    rows = torch.tensor([0, 2, 2, 1, 0, 0])
    heads = torch.tensor([2, 0, 1, 1, 0, 2])
    tokens = torch.tensor([499, 376, 0, 0, 254, 255])
    read = storage.read()
    for found, all_read, kept in zip(storage.gather(rows, heads, tokens), read, (keys, values), strict=True):
        wanted = torch.stack([kept[r][h, t] for r, h, t in zip(rows, heads, tokens, strict=True)])
        torch.testing.assert_close(found, wanted, **close)
        assert all_read.shape[:3] == (3, HEADS, 500)
        for row, length in enumerate(lengths):
            torch.testing.assert_close(all_read[row, :, :length], kept[row], **close)
            assert (all_read[row, :, length:] == 0).all(), "a shorter row must be finite where it is masked"
    torch.testing.assert_close(storage.read(250, 260)[0], read[0][:, :, 250:260], atol=0, rtol=0)


def test_bytes_are_those_of_the_tensors():
    exact = {kind: filled(kind, (300, 300), torch.bfloat16)[0].bytes for kind in KINDS}
    capacity = 256 + 64
    assert exact["host"] == exact["file"] == capacity * 2 * HEADS * (KEY + VALUE) * 2
    assert exact["int8"] == capacity * 2 * HEADS * (KEY + VALUE + 2 * 2)


def test_eight_bits_keep_large_small_and_zero_numbers():
    storage = make_storage("int8", 1)
    keys = torch.tensor([3e5, 1e-3, 0.0])[:, None, None] * torch.linspace(-1, 1, KEY)
    storage.append(0, keys, -keys)
    found, values = storage.read()
    largest = keys.abs().amax(-1, keepdim=True)
    assert ((found[0] - keys).abs() <= largest / 127 * 0.501).all()
    assert torch.equal(values, -found)


@pytest.mark.parametrize("kind", KINDS)
def test_reset_forgets_and_frees(kind: str):
    storage, keys, values = filled(kind, (300,))
    storage.reset()
    assert storage.bytes == storage.length(0) == 0
    storage.append(0, keys[0][:, :5], values[0][:, :5])
    assert storage.read()[0].shape == (1, HEADS, 5, KEY)


def test_a_file_lies_in_its_folder_and_leaves_nothing(tmp_path: Path):
    storage = make_storage("file", 1, tmp_path)
    storage.append(0, torch.ones(HEADS, 400, KEY), torch.ones(HEADS, 400, VALUE))
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert str(tmp_path) in mapped.read_text()
        storage.reset()
        assert str(tmp_path) not in mapped.read_text()
    del storage
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At the moment the file must grow, not by a signal at a later write; what was stored stays readable."""
    storage = make_storage("file", 1, tmp_path)
    keys, values = torch.randn(HEADS, 250, KEY), torch.randn(HEADS, 250, VALUE)
    storage.append(0, keys, values)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(StorageError, match=r"the disk is full; the sentence memory needs a file of .* MiB"):
        storage.append(0, keys, values)
    assert storage.length(0) == 250
    assert torch.equal(storage.read()[0][0], keys)


def test_without_fallocate_the_space_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    storage = make_storage("file", 1, tmp_path)
    keys, values = torch.randn(HEADS, 250, KEY), torch.randn(HEADS, 250, VALUE)
    for _ in range(2):
        storage.append(0, keys, values)
    assert torch.equal(storage.read()[1][0], torch.cat([values, values], 1))


def test_bad_choices_are_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"storage='hots' is unknown\. Did you mean 'host'"):
        make_storage("hots", 1)
    with pytest.raises(InputError, match="'int8' has no folder"):
        make_storage("int8", 1, tmp_path)
    with pytest.raises(StorageError, match="missing: cannot hold a file: No such file"):
        make_storage("file", 1, tmp_path / "missing").append(0, torch.ones(1, 1, 2), torch.ones(1, 1, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_share_their_beginning(kind: str):
    """Without a copy, and each row goes on by itself; the tokens are those of a storage that holds them all."""
    first, keys, values = filled(kind, (300,))
    both, whole = make_storage(kind, 2), make_storage(kind, 2)
    both.share(first.stored(), keys[0])
    assert both.bytes < first.bytes
    for row, more in enumerate((5, 320)):
        new = torch.randn(HEADS, more, KEY), torch.randn(HEADS, more, VALUE)
        whole.append(row, keys[0], values[0])
        found = both.gather(torch.tensor([row]), torch.tensor([1]), torch.tensor([299]))
        torch.testing.assert_close(found[0][0], keys[0][1, 299], atol=0.03, rtol=0)
        for storage in (both, whole):
            storage.append(row, *new)
    first.append(0, keys[0], values[0])  # the other one goes on too
    assert both.lengths == whole.lengths == [305, 620]
    where = (
        torch.tensor([0, 0, 1, 1, 1]),
        torch.tensor([0, 2, 1, 1, 0]),
        torch.tensor([299, 304, 0, 300, 619]),
    )
    for a, b in zip(both.gather(*where) + both.read(), whole.gather(*where) + whole.read(), strict=True):
        assert torch.equal(a, b)
    again = make_storage(kind, 1)
    again.share([part[:, 1:] for part in both.stored()], keys[0])
    assert torch.equal(again.read()[1][0], whole.read()[1][1])

"""Slow storage: what is appended comes back, in any order, from every kind of storage."""

from __future__ import annotations

import errno
import itertools
import os
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sentcompress.errors import InputError, StorageError
from sentcompress.sentence_memory.slow_storage import KINDS, SlowStorage, gather, make_storage, stored_bytes

HEADS, KEY, VALUE = 3, 8, 6


def filled(kind: str, length: int, dtype: torch.dtype = torch.float32) -> tuple[SlowStorage, Tensor, Tensor]:
    """A storage, and the keys and values ``[heads, L, D]`` in it, appended in turns of 7 tokens."""
    storage = make_storage(kind)
    keys, values = (
        torch.randn(HEADS, length, KEY, dtype=dtype),
        torch.randn(HEADS, length, VALUE, dtype=dtype),
    )
    for start in range(0, length, 7):
        storage.append(keys[:, start : start + 7], values[:, start : start + 7])
    return storage, keys, values


def tolerance(kind: str) -> dict[str, float]:
    return {"atol": 0.03 if kind == "int8" else 0, "rtol": 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_appended_comes_back(kind: str, dtype: torch.dtype):
    """After it has grown twice."""
    storage, keys, values = filled(kind, 500, dtype)
    assert storage.length == 500
    for found, kept in zip(storage.read(), (keys, values), strict=True):
        torch.testing.assert_close(found, kept, **tolerance(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_a_batch_recalls_from_each_text(kind: str):
    """Texts of different lengths; one has stored nothing yet."""
    texts = [filled(kind, length) for length in (500, 1, 377)]
    storages = [texts[0][0], texts[1][0], make_storage(kind), texts[2][0]]
    rows = torch.tensor([0, 0, 0, 1, 3, 3])
    heads = torch.tensor([2, 0, 2, 1, 0, 1])
    tokens = torch.tensor([499, 254, 255, 0, 376, 0])
    found = gather(storages, rows, heads, tokens)
    for number, kept in enumerate(found, 1):
        text = {0: 0, 1: 1, 3: 2}
        wanted = torch.stack(
            [
                texts[text[r]][number][h, t]
                for r, h, t in zip(*map(Tensor.tolist, (rows, heads, tokens)), strict=True)
            ]
        )
        torch.testing.assert_close(kept, wanted, **tolerance(kind))
    alone = gather(storages[:1], rows[:3], heads[:3], tokens[:3])
    assert all(torch.equal(one, both[:3]) for one, both in zip(alone, found, strict=True))


def test_bytes_are_those_of_the_tensors():
    exact = {kind: stored_bytes([filled(kind, 300, torch.bfloat16)[0]]) for kind in KINDS}
    capacity = 256 + 64
    assert exact["host"] == exact["file"] == capacity * HEADS * (KEY + VALUE) * 2
    assert exact["int8"] == capacity * HEADS * (KEY + VALUE + 2 * 2)


def test_eight_bits_keep_large_small_and_zero_numbers():
    storage = make_storage("int8")
    keys = torch.tensor([3e5, 1e-3, 0.0])[:, None, None] * torch.linspace(-1, 1, KEY)
    storage.append(keys, -keys)
    found, values = storage.read()
    largest = keys.abs().amax(-1, keepdim=True)
    assert ((found - keys).abs() <= largest / 127 * 0.501).all()
    assert torch.equal(values, -found)


def test_a_file_lies_in_its_folder_and_leaves_nothing(tmp_path: Path):
    storage = make_storage("file", tmp_path)
    storage.append(torch.ones(HEADS, 400, KEY), torch.ones(HEADS, 400, VALUE))
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert str(tmp_path) in mapped.read_text()
    del storage
    if mapped.exists():
        assert str(tmp_path) not in mapped.read_text()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At the moment the file must grow, not by a signal at a later write; what was stored stays readable."""
    storage = make_storage("file", tmp_path)
    keys, values = torch.randn(HEADS, 250, KEY), torch.randn(HEADS, 250, VALUE)
    storage.append(keys, values)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(StorageError, match=r"the disk is full; the sentence memory needs a file of .* MiB"):
        storage.append(keys, values)
    assert storage.length == 250
    assert torch.equal(storage.read()[0], keys)


def test_many_texts_need_many_open_files(tmp_path: Path):
    def store() -> None:
        for text in texts:
            text.append(torch.ones(1, 1, 2), torch.ones(1, 1, 2))

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    texts = [make_storage("file", tmp_path) for _ in range(20)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 10, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"too many files are open(.|\n)*ulimit -n"):
            store()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_without_fallocate_the_space_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    storage = make_storage("file", tmp_path)
    keys, values = torch.randn(HEADS, 250, KEY), torch.randn(HEADS, 250, VALUE)
    for _ in range(2):
        storage.append(keys, values)
    assert torch.equal(storage.read()[1], torch.cat([values, values], 1))


def test_bad_choices_are_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"storage='hots' is unknown\. Did you mean 'host'"):
        make_storage("hots")
    with pytest.raises(InputError, match="'int8' has no folder"):
        make_storage("int8", tmp_path)
    with pytest.raises(StorageError, match="missing: cannot hold a file: No such file"):
        make_storage("file", tmp_path / "missing").append(torch.ones(1, 1, 2), torch.ones(1, 1, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_texts_share_their_beginning(kind: str):
    """Without a copy, and each goes on by itself; the tokens are those of a storage that holds them all."""
    first, keys, values = filled(kind, 300)
    texts, wholes = [make_storage(kind), make_storage(kind)], [make_storage(kind), make_storage(kind)]
    beginning = first.stored()
    for text, whole, more in zip(texts, wholes, (5, 320), strict=True):
        text.share(beginning, keys)
        torch.testing.assert_close(
            text.gather(torch.tensor([1]), torch.tensor([299]))[0][0], keys[1, 299], **tolerance(kind)
        )
        whole.append(keys, values)
        for storage, new in itertools.product((text, whole), [torch.randn(HEADS, more, KEY + VALUE)]):
            storage.append(new[..., :KEY], new[..., KEY:])
    assert stored_bytes(texts) < stored_bytes(wholes)
    first.append(keys, values)  # the other ones go on too
    where = torch.tensor([0, 2, 1, 1, 0]), torch.tensor([299, 304, 0, 300, 619])
    for text, whole, number in zip(texts, wholes, (2, 5), strict=True):
        places = [part[:number] for part in where]
        for a, b in zip(
            text.gather(*places) + text.read(), whole.gather(*places) + whole.read(), strict=True
        ):
            assert torch.equal(a, b)
    again = make_storage(kind)
    again.share(texts[1].stored(), keys)
    assert torch.equal(again.read()[1], wholes[1].read()[1])

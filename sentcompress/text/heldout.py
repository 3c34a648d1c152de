"""Which documents are held out: decided by a hash of their text, so by nothing that can change."""

from __future__ import annotations

import hashlib

import numpy as np

from sentcompress.errors import DataError

HASH_BYTES = 16


def text_hash(data: bytes) -> bytes:
    """What decides whether a document is held out, of its text in UTF-8."""
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


def choose_heldout(hashes: bytes | bytearray, wanted: int) -> set[int]:
    """Indexes of the held-out documents: those with the ``wanted`` lowest hashes, whatever their order.

    Identical texts are always on the same side. At most half of the documents are held out.

    Args:
        hashes: :func:`text_hash` of each document, one after the other.

    Raises:
        DataError: no document can be held out and another one be left for training.
    """
    # Big-endian numbers are in the order of their bytes.
    keys = np.frombuffer(hashes, dtype=">u8").reshape(-1, HASH_BYTES // 8)
    count = len(keys)
    if count < 2:
        raise DataError(
            f"the corpus has {count} document(s) with text; at least 2 are needed, one to train on and one to hold out",
            fix="add documents, or name what separates those of one file (data.options.separator of 'text')",
        )
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    room = min(wanted, count // 2)
    heldout: list[int] = []
    start = 0
    while start < count and len(heldout) < room:
        stop = start + 1
        while stop < count and (keys[order[stop]] == keys[order[start]]).all():
            stop += 1
        # A group of copies may take more than the room there is, but never what is left for training.
        if len(heldout) + stop - start < count:
            heldout += order[start:stop].tolist()
        start = stop
    if not heldout:
        raise DataError(
            f"no document can be held out: the {count} documents all have the same text",
            fix="add documents with other texts",
        )
    return set(heldout)


def first_copies(hashes: bytes | bytearray, chosen: set[int]) -> set[int]:
    """The first of those that have the same text: what is held out is scored once, however often it is there."""
    first: dict[bytes, int] = {}
    for index in sorted(chosen):
        first.setdefault(bytes(hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]), index)
    return set(first.values())

"""Chooses held-out documents by a hash of their text, so that the choice does not depend on anything else."""

from __future__ import annotations

import hashlib

import numpy as np

from sentcompress.errors import DataError

HASH_BYTES = 16


def text_hash(data: bytes) -> bytes:
    """The hash of a document's UTF-8 text, which decides whether it is held out."""
    return hashlib.blake2b(data, digest_size=HASH_BYTES).digest()


def choose_heldout(hashes: bytes | bytearray, wanted: int) -> set[int]:
    """The indexes of the held-out documents: those with the ``wanted`` lowest hashes, whatever their order.

    Copies of a text are held out together or not at all. At most half of the documents are held out.

    Args:
        hashes: the :func:`text_hash` of each document, one after the other.

    Raises:
        DataError: there are too few different documents to hold one out and train on another.
    """
    # Big-endian numbers sort like their bytes.
    keys = np.frombuffer(hashes, dtype=">u8").reshape(-1, HASH_BYTES // 8)
    count = len(keys)
    if count < 2:
        raise DataError(
            f"the corpus has {count} document(s) with text; at least 2 are needed: one to train on and one to hold out",
            fix="add documents, or split a file into documents (data.options.separator of the dataset 'text')",
        )
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    room = min(wanted, count // 2)
    heldout: list[int] = []
    start = 0
    while start < count and len(heldout) < room:
        stop = start + 1
        while stop < count and (keys[order[stop]] == keys[order[start]]).all():
            stop += 1
        # A group of copies may exceed the wanted number, but must leave documents for training.
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
    """The first copy of each text: a held-out text is scored only once, however often it occurs."""
    first: dict[bytes, int] = {}
    for index in sorted(chosen):
        first.setdefault(bytes(hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]), index)
    return set(first.values())

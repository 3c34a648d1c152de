"""Which documents are held out: decided by a hash of their text, so by nothing that can change."""

from __future__ import annotations

from collections.abc import Sequence

from sentcompress.errors import DataError


def choose_heldout(hashes: Sequence[bytes], wanted: int) -> set[int]:
    """Indexes of the held-out documents: those with the ``wanted`` lowest hashes, whatever their order.

    Identical texts are always on the same side. At most half of the documents are held out.

    Args:
        hashes: blake2b of each document's text.

    Raises:
        DataError: no document can be held out and another one be left for training.
    """
    if len(hashes) < 2:
        raise DataError(
            f"the corpus has {len(hashes)} document(s) with text; at least 2 are needed, one to train on "
            "and one to hold out",
            fix="add documents, or name what separates those of one file (data.options.separator of 'text')",
        )
    groups: dict[bytes, list[int]] = {}
    for index, value in enumerate(hashes):
        groups.setdefault(value, []).append(index)
    room = min(wanted, len(hashes) // 2)
    heldout: list[int] = []
    for value in sorted(groups):
        if len(heldout) >= room:
            break
        # A group of copies may take more than the room there is, but never what is left for training.
        if len(heldout) + len(groups[value]) < len(hashes):
            heldout += groups[value]
    if not heldout:
        raise DataError(
            f"no document can be held out: the {len(hashes)} documents all have the same text",
            fix="add documents with other texts",
        )
    return set(heldout)

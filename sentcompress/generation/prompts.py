"""Where a prompt ends: after a whole sentence, or in the middle of one."""

from __future__ import annotations

from sentcompress.contracts import Segmenter
from sentcompress.text.segmentation import checked_split

PROBE = "The next sentence stands here."


def ends_in_sentence(text: str, segmenter: Segmenter) -> bool:
    """Whether the segmenter would cut right behind ``text`` if another sentence followed."""
    follow = PROBE if text[-1:].isspace() else f" {PROBE}"
    end = 0
    for piece in checked_split(text + follow, segmenter):
        end += len(piece)
        if end == len(text):
            return True
    return False

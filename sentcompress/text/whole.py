"""Documents tokenized whole, not by sentences, for token-level models; cached beside the corpus. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sentcompress.text.batches import in_batches
from sentcompress.text.building import ATTEMPTS, build_folder, damaged_again
from sentcompress.text.cache import FORMAT, CacheDamage, publish, read_meta, seal
from sentcompress.text.corpus import Corpus
from sentcompress.text.encoding import offsets, token_dtype
from sentcompress.text.progress import Bar, speaker

_TEXTS_AT_ONCE = 32
_LONGEST_TEXT = 1 << 21
"""Characters tokenized at once: what the tokenizer says of a text takes 200 bytes a token."""


@dataclass(frozen=True)
class WholeTokens:
    """Tokens of all documents of a corpus, without special tokens.

    Attributes:
        tokens: flat, memory-mapped.
        offsets: ``[D + 1]`` into ``tokens``.
    """

    tokens: np.ndarray
    offsets: np.ndarray


def open_whole(corpus: Corpus, *, progress: bool = True) -> WholeTokens:
    """Open a corpus' whole-document tokens from the cache, making them first where they are not there.

    Raises:
        StorageError: the cache cannot be written.
    """
    folder = corpus.folder.parent.parent / "whole" / corpus.key
    built = 0
    while built < ATTEMPTS:
        try:
            meta = read_meta(folder, corpus.key)
        except CacheDamage:
            with build_folder(folder, speaker(progress).print) as temporary:
                if temporary is None:  # another process was building it
                    continue
                _fill(temporary, corpus, progress)
                publish(temporary, folder, corpus.key)
                built += 1
        else:
            return WholeTokens(
                np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r"),
                np.load(folder / "offsets.npy", mmap_mode="r", allow_pickle=False),
            )
    raise damaged_again(folder)


def _fill(folder: Path, corpus: Corpus, progress: bool) -> None:
    dtype = token_dtype(corpus.backend)
    counts = np.zeros(corpus.num_documents, dtype=np.int64)
    total = int(corpus.sentence_bytes.sum())
    with (
        (folder / "tokens.bin").open("wb") as file,
        Bar("tokenizing whole documents", total, enabled=progress) as bar,
    ):
        for batch in in_batches(_texts(corpus), lambda text: len(text[1]), _LONGEST_TEXT, _TEXTS_AT_ONCE):
            texts = [text for _, text in batch]
            # The tokenizer's own threads share them out.
            encodings = corpus.backend.encode_batch_fast(texts, add_special_tokens=False)
            for (document, _), encoding in zip(batch, encodings, strict=True):
                np.array(encoding.ids, dtype=dtype).tofile(file)
                counts[document] += len(encoding.ids)
            bar.advance(sum(len(text.encode("utf-8")) for text in texts))
    np.save(folder / "offsets.npy", offsets(counts))
    seal(folder, {"format": FORMAT, "key": corpus.key, "dtype": dtype})


def _texts(corpus: Corpus) -> Iterator[tuple[int, str]]:
    """All documents with their numbers, very long ones in parts."""
    for document in range(corpus.num_documents):
        for text in _parts(corpus.document_text(document)):
            yield document, text


def _parts(text: str) -> Iterator[str]:
    """A text of at most ``_LONGEST_TEXT`` as it is, a longer one cut before line ends or spaces."""
    start = 0
    while len(text) - start > _LONGEST_TEXT:
        low, high = start + _LONGEST_TEXT // 2, start + _LONGEST_TEXT
        cut = max(text.rfind("\n", low, high), text.rfind(" ", low, high))
        stop = high if cut < 0 else cut
        yield text[start:stop]
        start = stop
    yield text[start:]

"""Documents tokenized whole, cut nowhere, for token-level models; cached beside the corpus. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sentcompress.text.building import ATTEMPTS, build_folder, damaged_again
from sentcompress.text.cache import FORMAT, CacheDamage, publish, read_meta, seal
from sentcompress.text.corpus import Corpus
from sentcompress.text.encoding import offsets, token_dtype
from sentcompress.text.progress import Bar, speaker

_DOCUMENTS_AT_ONCE = 32
_CHARACTERS_AT_ONCE = 1 << 20


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
    counts: list[int] = []
    total = int(corpus.sentence_bytes.sum())
    with (
        (folder / "tokens.bin").open("wb") as file,
        Bar("tokenizing whole documents", total, enabled=progress) as bar,
    ):
        for texts in _batches(corpus):
            # The tokenizer's own threads share the documents out.
            for encoding in corpus.backend.encode_batch_fast(texts, add_special_tokens=False):
                np.array(encoding.ids, dtype=dtype).tofile(file)
                counts.append(len(encoding.ids))
            bar.advance(sum(len(text.encode("utf-8")) for text in texts))
    np.save(folder / "offsets.npy", offsets(np.array(counts)))
    seal(folder, {"format": FORMAT, "key": corpus.key, "dtype": dtype})


def _batches(corpus: Corpus) -> Iterator[list[str]]:
    """All documents, a few at once: what the tokenizer says of a text takes many times its memory."""
    texts: list[str] = []
    for document in range(corpus.num_documents):
        texts.append(corpus.document_text(document))
        if len(texts) == _DOCUMENTS_AT_ONCE or sum(map(len, texts)) >= _CHARACTERS_AT_ONCE:
            yield texts
            texts = []
    if texts:
        yield texts

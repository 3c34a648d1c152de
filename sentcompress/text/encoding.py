"""Documents to token arrays, in this process or in worker processes. No torch."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from types import ModuleType

import numpy as np

from sentcompress.contracts import Segmenter
from sentcompress.errors import PluginError, SentCompressError
from sentcompress.text.documents import Span
from sentcompress.text.lossless_tokenizer import LosslessTokenizer
from sentcompress.text.segmentation import Sentence, checked_split, in_batches, tokenize_pieces

BATCH_BYTES = 256 << 10
"""Text per task: small enough for a smooth progress bar, large enough to outweigh the cost of passing it."""
BYTES_PER_WORKER = 6 << 20
"""With less text, starting a worker process takes longer than it saves."""
MAX_WORKERS = 16


@dataclass
class Encoded:
    """The token arrays of a batch of documents."""

    sentences: np.ndarray
    """``[documents]`` sentences of each document."""
    lengths: np.ndarray
    """``[sentences]`` tokens of each sentence."""
    byte_lengths: np.ndarray
    """``[sentences]`` UTF-8 bytes of each sentence."""
    tokens: np.ndarray
    """The tokens of all sentences."""
    too_long: int
    """Sentences that had to be split further."""


class Encoder:
    """Splits documents of a text file into sentences and tokenizes them."""

    def __init__(
        self, text_file: Path, segmenter: Segmenter, tokenizer: LosslessTokenizer, dtype: str
    ) -> None:
        self.text = np.memmap(text_file, dtype=np.uint8, mode="r")
        self.segmenter = segmenter
        self.tokenizer = tokenizer
        self.dtype = dtype

    def __call__(self, spans: Sequence[Span]) -> Encoded:
        """Encode documents. Raises PluginError or DataError that name the document."""
        counts: list[int] = []
        lengths, byte_lengths, tokens = array("q"), array("q"), array("I")
        self._too_long = 0
        for span in spans:
            before, size = len(lengths), 0
            try:
                for piece, ids in self._sentences(span):
                    lengths.append(len(ids))
                    byte_lengths.append(len(piece.encode("utf-8")))
                    tokens.extend(ids)
                    size += byte_lengths[-1]
            except SentCompressError as error:
                raise type(error)(f"{span.source}: {error.message}", fix=error.fix) from error.__cause__
            counts.append(len(lengths) - before)
            if size != span.stop - span.start:
                raise PluginError(
                    f"{span.source}: the sentences have {size} bytes, but the text has {span.stop - span.start}"
                )
        return Encoded(
            np.array(counts, dtype=np.int64),
            np.array(lengths, dtype=np.int64),
            np.array(byte_lengths, dtype=np.int64),
            np.array(tokens, dtype=self.dtype),
            self._too_long,
        )

    def _sentences(self, span: Span) -> Iterator[Sentence]:
        text = bytes(self.text[span.start : span.stop]).decode("utf-8")
        pieces = checked_split(text, self.segmenter)
        del text  # so that a large document is in memory only once
        self._too_long += yield from tokenize_pieces(pieces, self.tokenizer, self.segmenter.max_tokens)


def token_dtype(vocab_size: int) -> str:
    """The smallest integer type that holds every token."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def offsets(counts: np.ndarray) -> np.ndarray:
    """``[n]`` counts to ``[n + 1]`` offsets, int64."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def batches_of(spans: Iterable[Span]) -> Iterator[list[Span]]:
    """Consecutive documents, about BATCH_BYTES in each batch."""
    return in_batches(spans, lambda span: span.stop - span.start, BATCH_BYTES)


def choose_workers(total_bytes: int) -> int:
    """The number of worker processes for a text of this size; with 1, the work is done in this process."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(available, MAX_WORKERS, total_bytes // BYTES_PER_WORKER))


def encode_documents(
    text_file: Path,
    spans: Callable[[], Iterable[Span]],
    segmenter: Segmenter,
    tokenizer: LosslessTokenizer,
    dtype: str,
    workers: int,
    say: Callable[[str], None],
) -> Generator[Encoded, None, None]:
    """Encode all documents in order, in worker processes if ``workers`` > 1 and they can be used.

    Args:
        spans: iterates over all documents each time it is called.
    """
    done = 0
    workers = min(workers, -(-text_file.stat().st_size // BATCH_BYTES))
    payload = _pickled(segmenter, say) if workers > 1 else None
    if payload is not None:
        try:
            with closing(
                _encode_in_workers(text_file, batches_of(spans()), payload, tokenizer, dtype, workers)
            ) as results:
                for result in results:
                    yield result
                    done += 1
            return
        except BrokenProcessPool:
            say(
                "the worker processes died (memory, or a segmenter that they cannot import); continuing without them"
            )
        except OSError as error:
            say(f"worker processes cannot be started ({error.strerror or error}); continuing without them")
    encoder = Encoder(text_file, segmenter, tokenizer, dtype)
    for batch in islice(batches_of(spans()), done, None):
        yield encoder(batch)


def _pickled(segmenter: Segmenter, say: Callable[[str], None]) -> bytes | None:
    """The segmenter for worker processes, or None if they cannot import its class."""
    if type(segmenter).__module__ == "__main__":
        return None
    try:
        return pickle.dumps(segmenter)
    except Exception as error:
        say(f"using one process, since segmenter {type(segmenter).__qualname__} cannot be pickled ({error})")
        return None


def _encode_in_workers(
    text_file: Path,
    batches: Iterator[list[Span]],
    payload: bytes,
    tokenizer: LosslessTokenizer,
    dtype: str,
    workers: int,
) -> Generator[Encoded, None, None]:
    # New processes instead of forks: this one may have threads of torch, tokenizers or progress bars that hold locks.
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), _start_worker, (str(text_file), payload, tokenizer, dtype)
    )
    waiting: deque[Future[Encoded]] = deque()
    try:
        with _without_main():
            for batch in islice(batches, workers):
                waiting.append(pool.submit(_work, batch))
        for batch in batches:
            if len(waiting) > 3 * workers:
                yield waiting.popleft().result()
            waiting.append(pool.submit(_work, batch))
        while waiting:
            yield waiting.popleft().result()
    except BaseException:
        # Their results are no longer needed, and a large document may take long.
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide ``__main__`` while processes start: spawn would run a user's unguarded script again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


_encoder: Encoder | None = None
"""The encoder of a worker process."""


def _start_worker(text_file: str, payload: bytes, tokenizer: LosslessTokenizer, dtype: str) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _encoder = Encoder(Path(text_file), pickle.loads(payload), tokenizer, dtype)


def _end_with_parent() -> None:
    """Exit with the parent: when it is killed, its workers would wait for work forever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(spans: list[Span]) -> Encoded:
    assert _encoder is not None
    return _encoder(spans)

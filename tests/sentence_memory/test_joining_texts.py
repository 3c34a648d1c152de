"""Texts that join and leave the batch of a sentence memory go on as they would alone."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from sentcompress import SentenceMemory
from sentcompress.errors import InputError
from sentcompress.sentence_memory.slow_storage import KINDS
from sentcompress.testing import tiny_tokenizer

# No sentence twice: of two that are alike, rounding would say which one is recalled.
TEXT = (
    "The sun is up. The bird sings in the tree. We are glad to see it. Nobody knows why the king left. "
    "He went home! Did he? It rained all day and the river rose. The end came soon. Then a ship sailed by. "
    "Our friends had bread and milk. Who told them so? Winter is long in the north, but we have wood. "
    "A child asked for the old song. Two men sat down and sang. The night was dark and full of stars."
)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENIZER = tiny_tokenizer()


def make_llm(kind: Any, config: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    return kind(config(**SIZES | {"vocab_size": len(TOKENIZER)} | changes)).eval()


@pytest.fixture(scope="module")
def llm() -> Any:
    return make_llm(
        LlamaForCausalLM, LlamaConfig, intermediate_size=64, num_key_value_heads=2, initializer_range=0.3
    )


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    """Three texts of 90 tokens."""
    ids = TOKENIZER.encode(TEXT)
    return [ids[start : start + 90] for start in (0, 13, 40)]


def make_memory(llm: Any, name: str = "window+recall", **options: Any) -> SentenceMemory:
    chosen = {"recent_sentences": 1, "recall": 2} if "recall" in name else {"recent_sentences": 1}
    return SentenceMemory(
        llm, TOKENIZER, name, max_sentence_tokens=9, **{"recall_blocks": "all"} | chosen | options
    )


class Batch:
    """Texts of one memory, each given its next token by a step."""

    def __init__(self, llm: Any, memory: SentenceMemory) -> None:
        self.llm, self.memory = llm, memory
        self.texts: list[tuple[list[int], int, list[Tensor]]] = []

    @torch.no_grad()
    def read(self, memory: SentenceMemory, text: list[int], start: int, stop: int) -> None:
        """Read the beginning of a text, which joins then."""
        ids = torch.tensor([text[start:stop]])
        logits = self.llm(
            input_ids=ids, past_key_values=memory, position_ids=torch.arange(start, stop)[None]
        ).logits
        if memory is not self.memory:
            self.memory.join(memory)
        self.texts.append((text, stop, [logits[0, -1]]))

    @torch.no_grad()
    def steps(self, number: int) -> None:
        for _ in range(number):
            places = torch.tensor([[place] for _, place, _ in self.texts])
            tokens = torch.tensor([[text[place]] for text, place, _ in self.texts])
            logits = self.llm(input_ids=tokens, past_key_values=self.memory, position_ids=places).logits
            for row, (text, place, found) in enumerate(self.texts):
                found.append(logits[row, -1])
                self.texts[row] = text, place + 1, found

    def leave(self, *rows: int) -> list[Tensor]:
        """Let texts leave; all their logits."""
        stay = [row for row in range(len(self.texts)) if row not in rows]
        self.memory.batch_select_indices(torch.tensor(stay, dtype=torch.long))
        left = [torch.stack(self.texts[row][2]) for row in rows]
        self.texts = [self.texts[row] for row in stay]
        return left

    def alone(self, memory: SentenceMemory, text: list[int], start: int, steps: int) -> Tensor:
        """The logits of a text that is read alone."""
        batch = Batch(self.llm, memory)
        batch.read(memory, text, 0, start)
        batch.steps(steps)
        return torch.stack(batch.texts[0][2])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("window", {}),
        ("window+recall", {}),
        ("window+recall", {"recall_blocks": [1]}),
        ("window+recall", {"storage": "int8"}),
        ("window+recall", {"storage": "file"}),
        ("window+recall", {"cache_bits": 8}),
        # All sentences: the first block cannot tell a word of one from that of another, where both stand at the sinks.
        ("window+recall", {"positions": "reindexed", "max_positions": 52, "recall": 20}),
        ("window+entries+recall", {"recall": 1}),
    ],
)
def test_texts_come_and_go(llm: Any, texts: list[list[int]], name: str, options: dict[str, Any]):
    """One of them longer than the others, one begins with a prefix that was read before, one joins when others left."""
    first, second, third = texts
    batch = Batch(llm, make_memory(llm, name, **options))
    batch.read(batch.memory, first, 0, 50)
    batch.steps(3)
    batch.read(make_memory(llm, name, **options), second, 0, 7)
    batch.steps(20)
    prefix = make_memory(llm, name, **options)
    with torch.no_grad():
        llm(input_ids=torch.tensor([third[:30]]), past_key_values=prefix)
    batch.read(prefix.copy(), third, 30, 41)
    batch.steps(5)
    (found_first,) = batch.leave(0)
    batch.steps(20)
    batch.read(make_memory(llm, name, **options), first, 0, 20)
    batch.steps(10)
    found_second, again = batch.leave(0, 2)
    batch.steps(3)
    (found_third,) = batch.leave(0)
    assert batch.memory.get_seq_length() == batch.memory.device_bytes() == batch.memory.storage_bytes() == 0

    close = {"atol": 2e-4 if options.get("cache_bits") is None else 0.02, "rtol": 1e-3}

    def same(found: Tensor, text: list[int], start: int) -> None:
        wanted = batch.alone(make_memory(llm, name, **options), text, start, len(found) - 1)
        torch.testing.assert_close(found, wanted, **close)

    same(found_first, first, 50)
    same(found_second, second, 7)
    same(again, first, 20)
    alone = Batch(llm, prefix)
    alone.read(prefix, third, 30, 41)
    alone.steps(len(found_third) - 1)
    torch.testing.assert_close(found_third, torch.stack(alone.texts[0][2]), **close)


@pytest.mark.parametrize(
    ("kind", "config", "changes"),
    [
        (
            OPTForCausalLM,
            OPTConfig,
            {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 100},
        ),
        (GPTNeoXForCausalLM, GPTNeoXConfig, {"intermediate_size": 64}),
    ],
)
def test_other_families(texts: list[list[int]], kind: Any, config: Any, changes: dict[str, Any]):
    llm = make_llm(kind, config, **changes)
    batch = Batch(llm, make_memory(llm))
    batch.read(batch.memory, texts[0], 0, 60)
    batch.read(make_memory(llm), texts[1], 0, 5)
    batch.steps(25)
    for text, start, found in zip(texts, (60, 5), batch.leave(0, 1), strict=False):
        wanted = batch.alone(make_memory(llm), text, start, 25)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_place_is_free_for_the_next_text(llm: Any, texts: list[list[int]]):
    """What a long text took is given back, and its positions do not limit the others."""
    llm = make_llm(OPTForCausalLM, OPTConfig, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=95)
    batch = Batch(llm, make_memory(llm))
    batch.read(batch.memory, texts[0], 0, 80)
    for _ in range(4):
        batch.read(make_memory(llm), texts[1], 0, 60)
        batch.steps(10)
        batch.leave(0)
    small = make_memory(llm)
    batch.alone(small, texts[1], 60, 10)
    assert batch.memory.device_bytes() <= small.device_bytes() * 1.1
    assert batch.memory.storage_bytes() == small.storage_bytes()


def test_texts_that_have_stored_nothing(llm: Any, texts: list[list[int]]):
    """They stay when one leaves that has, and others join and store."""
    batch = Batch(llm, make_memory(llm))
    batch.read(batch.memory, texts[0], 0, 60)
    batch.read(make_memory(llm), texts[1], 0, 3)
    batch.steps(1)
    batch.leave(0)
    for start in (4, 50):
        batch.read(make_memory(llm), texts[2], 0, start)
    batch.steps(35)
    for text, start, found in zip((1, 2, 2), (3, 4, 50), batch.leave(0, 1, 2), strict=True):
        wanted = batch.alone(make_memory(llm), texts[text], start, len(found) - 1)
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)


def test_a_text_leaves_before_positions_of_another_move(llm: Any, texts: list[list[int]]):
    """It takes the slots with it that only its tokens needed."""
    options = {"positions": "reindexed", "max_positions": 52, "recent_sentences": 20}
    batch = Batch(llm, make_memory(llm, "window", **options))
    batch.read(batch.memory, texts[0], 0, 80)
    batch.read(make_memory(llm, "window", **options), texts[1], 0, 50)
    batch.steps(2)
    longer = batch.memory.device_bytes()
    batch.leave(0)
    assert batch.memory.device_bytes() * 2 < longer
    batch.steps(20)
    (found,) = batch.leave(0)
    wanted = batch.alone(make_memory(llm, "window", **options), texts[1], 50, 22)
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_reset_forgets_and_frees(llm: Any, texts: list[list[int]], kind: str):
    memory = make_memory(llm, storage=kind)
    batch = Batch(llm, memory)
    batch.read(memory, texts[0], 0, 60)
    (storage,) = memory.layers[0].storage
    assert storage.length > 0
    freed = weakref.ref(storage)
    del storage
    memory.reset()
    assert freed() is None
    assert memory.storage_bytes() == memory.device_bytes() == 0
    found = batch.alone(memory, texts[1], 40, 5)
    assert torch.equal(found, batch.alone(make_memory(llm, storage=kind), texts[1], 40, 5))
    assert memory.layers[0].storage[0].read()[0].shape[1] == memory.layers[0].storage[0].length > 0


def test_recalled_sentences_are_those_of_each_text(llm: Any, texts: list[list[int]]):
    batch = Batch(llm, make_memory(llm))
    batch.read(batch.memory, texts[0], 0, 70)
    batch.read(make_memory(llm), texts[1], 0, 40)
    batch.steps(5)
    for number, start in enumerate((70, 40)):
        memory = make_memory(llm)
        batch.alone(memory, texts[number], start, 5)
        assert batch.memory.recall_shares()[number] == memory.recall_shares()[0]


def test_what_cannot_join(llm: Any, texts: list[list[int]]):
    memory = make_memory(llm)
    with pytest.raises(InputError, match="different LLMs or settings"):
        memory.join(make_memory(llm, recall=1))
    other = make_memory(make_llm(LlamaForCausalLM, LlamaConfig, intermediate_size=64))
    with pytest.raises(InputError, match="different LLMs or settings"):
        memory.join(other)
    Batch(llm, memory).read(memory, texts[0], 0, 20)
    with pytest.raises(InputError, match="twice"):
        memory.batch_select_indices(torch.tensor([0, 0]))


def test_a_batch_that_was_joined_in_part_is_not_used(
    llm: Any, texts: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    """The device may run out of memory in the midst of it."""

    def fails(_: Any) -> None:
        raise MemoryError

    batch, other = Batch(llm, make_memory(llm)), make_memory(llm)
    batch.read(batch.memory, texts[0], 0, 20)
    with monkeypatch.context() as patch:
        patch.setattr(batch.memory.layers[1], "join", fails)
        with pytest.raises(MemoryError):
            batch.read(other, texts[1], 0, 20)
    for use in (lambda: batch.steps(1), lambda: make_memory(llm).join(batch.memory)):
        with pytest.raises(InputError, match="incomplete"):
            use()
    batch.memory.reset()
    batch.alone(batch.memory, texts[0], 20, 2)

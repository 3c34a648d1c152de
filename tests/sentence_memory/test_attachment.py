"""An LLM that takes memories: interrupts, threads, copies, and prompts that cannot follow what was read."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sentcompress import SentenceMemory
from sentcompress.errors import InputError, PluginError
from sentcompress.testing import tiny_sentence_lm, tiny_tokenizer

TEXT = (
    "The sun is up. The bird sings in the tree. We are glad to see it. Nobody knows why the king left. " * 3
)


@functools.cache
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "initializer_range": 0.3, "vocab_size": len(tokenizer())}
    return LlamaForCausalLM(LlamaConfig(**sizes, **more)).eval()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.tensor([tokenizer().encode(TEXT)[:80]])


def memory(model: Any, **options: Any) -> SentenceMemory:
    defaults = {"recent_sentences": 1, "recall": 2, "max_sentence_tokens": 9, "full_prompts": False}
    return SentenceMemory(model, tokenizer(), "window+recall", prove=False, **defaults | options)


def written(model: Any, ids: Tensor, cache: SentenceMemory | None = None, **more: Any) -> Tensor:
    cache = cache or memory(model)
    return model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=6, do_sample=False, **more)


class TestCalls:
    def test_after_an_interrupt_the_llm_is_as_before(self, model: PreTrainedModel, ids: Tensor) -> None:
        own, cache = model(input_ids=ids).logits, memory(model)

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = model.lm_head.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=ids, past_key_values=cache)
        hook.remove()
        assert torch.equal(model(input_ids=ids).logits, own)
        with pytest.raises(InputError, match="incomplete"):
            model(input_ids=ids, past_key_values=cache)
        cache.reset()
        model(input_ids=ids, past_key_values=cache)

    def test_an_interrupt_while_tokens_are_read(
        self, model: PreTrainedModel, ids: Tensor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = memory(model)
        monkeypatch.setattr(cache.policy, "keep", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=ids, past_key_values=cache)
        monkeypatch.undo()
        with pytest.raises(InputError, match="incomplete"):
            model(input_ids=ids, past_key_values=cache)

    def test_threads_take_turns(self, model: PreTrainedModel, ids: Tensor) -> None:
        texts = [ids[:, start : start + 40] for start in (0, 10, 20, 30)]
        alone = [written(model, text) for text in texts]
        plain = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        found: list[bool] = []

        def write(text: Tensor, expected: Tensor) -> None:
            found.append(torch.equal(written(model, text), expected))

        def write_without() -> None:
            found.append(torch.equal(model.generate(input_ids=ids, max_new_tokens=6, do_sample=False), plain))

        threads = [threading.Thread(target=write, args=pair) for pair in zip(texts, alone, strict=True)]
        threads.append(threading.Thread(target=write_without))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [True] * 5
        assert model.config._attn_implementation == "sdpa"

    def test_copies_and_pickles_of_an_attached_llm(self, model: PreTrainedModel, ids: Tensor) -> None:
        expected = written(model, ids)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(written(other, ids), expected)
            with pytest.raises(InputError, match="another LLM"):
                written(other, ids, memory(model))

    def test_within_peft_and_compile(self, model: PreTrainedModel, ids: Tensor) -> None:
        expected = written(model, ids)
        logits = model(input_ids=ids, past_key_values=memory(model)).logits
        wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj"]))
        for other in (wrapped, torch.compile(model, backend="eager")):
            assert torch.equal(written(other, ids), expected)
            again = other(input_ids=ids, past_key_values=memory(other)).logits
            torch.testing.assert_close(again, logits)

    def test_tokens_and_memory_by_position(self, model: PreTrainedModel, ids: Tensor) -> None:
        by_name = model(input_ids=ids, past_key_values=memory(model)).logits
        assert torch.equal(model(ids, None, None, memory(model)).logits, by_name)

    def test_gradients_are_refused_when_they_are_asked_for(self, model: PreTrainedModel, ids: Tensor) -> None:
        loss = model(input_ids=ids, labels=ids, past_key_values=memory(model)).loss
        with pytest.raises(InputError, match="train-memory"):
            loss.backward()

    def test_another_dtype(self, model: PreTrainedModel, ids: Tensor) -> None:
        cache = memory(model)
        model(input_ids=ids[:, :50], past_key_values=cache)
        model.to(torch.bfloat16)
        with pytest.raises(InputError, match=r"computes in torch.bfloat16 now"):
            model(input_ids=ids[:, 50:], past_key_values=cache)


class TestCopies:
    @pytest.mark.parametrize("storage", ["host", "int8", "file"])
    def test_a_deep_copy_goes_on_by_itself(self, model: PreTrainedModel, ids: Tensor, storage: str) -> None:
        batch = torch.cat([ids, ids.flip(1)])
        first, rest = {"input_ids": batch[:, :50]}, {"input_ids": batch[:, 50:]}
        whole = memory(model, storage=storage)
        model(**first, past_key_values=whole)
        other = copy.deepcopy(whole)
        assert other.model is model
        assert other.storage_bytes() == whole.storage_bytes() > 0
        model(input_ids=batch[:, :9], past_key_values=whole)
        again = memory(model, storage=storage)
        model(**first, past_key_values=again)
        expected = model(**rest, past_key_values=again).logits
        assert torch.equal(model(**rest, past_key_values=other).logits, expected)

    def test_a_deep_copy_of_a_loaded_prefix(
        self, model: PreTrainedModel, ids: Tensor, tmp_path: Path
    ) -> None:
        cache = memory(model)
        model(input_ids=ids[:, :50], past_key_values=cache)
        cache.save(tmp_path / "prefix")
        with pytest.raises(InputError, match="rows: 0"):
            SentenceMemory.load(tmp_path / "prefix", model, tokenizer(), rows=0)
        loaded = SentenceMemory.load(tmp_path / "prefix", model, tokenizer())
        assert torch.equal(written(model, ids, copy.deepcopy(loaded)), written(model, ids, loaded))

    def test_pickles_are_refused(self, model: PreTrainedModel) -> None:
        for copied in (pickle.dumps, copy.copy):
            with pytest.raises(InputError, match=r"memory\.save"):
                copied(memory(model))


class TestPrompts:
    @pytest.mark.parametrize("size", [7, 79, 200])
    def test_read_in_chunks(self, model: PreTrainedModel, ids: Tensor, size: int) -> None:
        cache = memory(model)
        first = written(model, ids, cache, prefill_chunk_size=size)
        assert torch.equal(first, written(model, ids))
        turn = torch.cat([first, ids[:, :20]], 1)
        assert torch.equal(written(model, turn, cache, prefill_chunk_size=size), written(model, turn))
        with pytest.raises(InputError, match="another text"):
            written(model, turn.flip(1).repeat(1, 2), cache, prefill_chunk_size=size)

    def test_only_what_follows(self, model: PreTrainedModel, ids: Tensor) -> None:
        cache = memory(model)
        model(input_ids=ids[:, :50], past_key_values=cache)
        rest = written(model, ids[:, 50:], cache, attention_mask=torch.ones_like(ids))
        assert torch.equal(rest[:, 30:], written(model, ids)[:, 80:])

    def test_other_padding_than_before(self, model: PreTrainedModel, ids: Tensor) -> None:
        both, mask = ids[:, :40].repeat(2, 1), torch.ones(2, 40, dtype=torch.long)
        mask[1, :10] = 0
        cache = memory(model)
        out = written(model, both, cache, attention_mask=mask)
        longer = torch.cat([out[:, 5:], ids[:, :20].repeat(2, 1)], 1)  # five columns of padding fewer
        mask = torch.cat([mask[:, 5:], torch.ones(2, 26, dtype=torch.long)], 1)
        with pytest.raises(InputError, match="other padding"):
            written(model, longer[1:].repeat(2, 1), cache, attention_mask=mask[1:].repeat(2, 1))

    def test_padded_on_the_right(self, model: PreTrainedModel, ids: Tensor) -> None:
        mask = torch.ones(2, 80, dtype=torch.long)
        for padding in (slice(60, None), slice(None)):
            mask[1, padding] = 0
            with pytest.raises(InputError, match="padding_side = 'left'"):
                written(model, ids.repeat(2, 1), attention_mask=mask)

    def test_nothing_to_continue(self, model: PreTrainedModel, ids: Tensor) -> None:
        cache = memory(model)
        model(input_ids=ids, past_key_values=cache)
        with pytest.raises(InputError, match="whole prompt already"):
            written(model, ids, cache)

    def test_the_same_prompt_again(self, model: PreTrainedModel, ids: Tensor) -> None:
        cache, prompt = memory(model), ids[:, :50]
        first = written(model, prompt, cache)
        with pytest.raises(InputError, match=r"has read prompt 1 already, and 5 tokens after it") as refused:
            written(model, prompt, cache)
        assert "memory.reset()" in str(refused.value.fix)
        cache.reset()
        assert torch.equal(written(model, prompt, cache), first)
        with pytest.raises(InputError, match="another text"):
            written(model, prompt.flip(1), cache)

    def test_without_a_cache(self, model: PreTrainedModel, ids: Tensor) -> None:
        with pytest.raises(InputError, match="use_cache"):
            written(model, ids, use_cache=False)


def test_arguments_of_the_wrong_type(model: PreTrainedModel) -> None:
    for name, value in (
        ("memory", None),
        ("max_sentence_tokens", "8"),
        ("max_sentence_tokens", 2.5),
        ("storage", None),
        ("segmenter", 3),
        ("positions", 3),
        ("cache_bits", "8"),
        ("full_prompts", "yes"),
    ):
        with pytest.raises((InputError, PluginError), match=name):
            SentenceMemory(model, tokenizer(), prove=False, **{name: value})
    with pytest.raises(InputError, match="re-indexed at x"):
        SentenceMemory(model, tokenizer(), prove=False, positions="reindexed", max_positions="x")


def test_misspelt_arguments_of_its_own(model: PreTrainedModel) -> None:
    for name, meant in (
        ("storag", "storage"),
        ("cache_bit", "cache_bits"),
        ("recal_blocks", "recall_blocks"),
        ("recent_sentence", "recent_sentences"),
    ):
        with pytest.raises(InputError, match=rf"no option '{name}'\. Did you mean '{meant}'\?") as refused:
            SentenceMemory(model, tokenizer(), "window", prove=False, **{name: 8})
        assert "every memory has cache_bits, folder, " in str(refused.value.fix)


def test_what_is_no_llm_or_no_tokenizer(model: PreTrainedModel) -> None:
    for llm, words, problem in (
        ("gpt2", tokenizer(), "causal LM of transformers, but got str"),
        (torch.nn.Linear(1, 1), tokenizer(), "but got Linear"),
        (model.model, tokenizer(), "but got LlamaModel"),
        (tiny_sentence_lm(), tokenizer(), "but got SentenceLM"),
        (model, None, "tokenizer, but got NoneType"),
        (model, "gpt2", "tokenizer, but got str"),
    ):
        with pytest.raises(InputError, match=problem):
            SentenceMemory(llm, words)


def test_the_tokenizer_of_a_larger_llm(model: PreTrainedModel) -> None:
    known = len(model.get_input_embeddings().weight)
    larger = copy.deepcopy(tokenizer())
    larger.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert len(larger) == known + 1
    SentenceMemory(model, larger, prove=False)  # a token that the LLM need not know
    model.resize_token_embeddings(max(tokenizer().get_vocab().values()) // 2)
    with pytest.raises(InputError, match=r"tokens up to number \d+, but the LLM knows \d+"):
        SentenceMemory(model, tokenizer(), prove=False)

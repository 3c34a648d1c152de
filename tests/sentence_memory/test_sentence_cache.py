"""A sentence memory as the cache of an LLM: the same logits in all the ways it is used, and clear refusals."""

from __future__ import annotations

import functools
import math
import threading
from itertools import pairwise

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    TextIteratorStreamer,
    pipeline,
)

from sentcompress import SentenceMemory
from sentcompress.errors import InputError, PluginError
from sentcompress.testing import tiny_tokenizer

TEXT = (
    "The sun is up. The bird sings in the tree. We are glad to see it. Nobody knows why the king left. "
    "He went home! Did he? It rained all day and the river rose. The end came soon. "
) * 3
POLICIES = {
    "window": {"recent_sentences": 1},
    "window+entries": {"recent_sentences": 1},
    "window+recall": {"recent_sentences": 1, "recall": 2},
    "window+entries+recall": {"recent_sentences": 2, "recall": 1},
    "recall": {"recall": 3},
}


@functools.cache
def tokenizer():
    return tiny_tokenizer()


def _model(kind=LlamaForCausalLM, config=LlamaConfig, **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = sizes | {"num_key_value_heads": 2, "initializer_range": 0.3, "vocab_size": len(tokenizer())}
    return kind(config(**settings | changes)).eval()


@pytest.fixture(scope="module")
def model():
    return _model()


@pytest.fixture(scope="module")
def ids():
    return torch.tensor([tokenizer().encode(TEXT)[:100]])


def memory(model, name="window+recall", **options):
    defaults = {"max_sentence_tokens": 9, "full_prompts": False, "prove": False} | POLICIES[name]
    return SentenceMemory(model, tokenizer(), name, **defaults | options)


@torch.no_grad()
def in_parts(model, ids, cache, cuts, mask=None):
    """Logits of a text that is read in parts."""
    logits = []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        more = {}
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            more = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        logits.append(model(input_ids=ids[:, start:stop], past_key_values=cache, **more).logits)
    return torch.cat(logits, 1)


class TestLogits:
    @pytest.mark.parametrize("storage", ["host", "int8", "file"])
    @pytest.mark.parametrize("name", POLICIES)
    def test_steps_and_parts_equal_one_pass(self, model, ids, name, storage):
        whole = in_parts(model, ids, memory(model, name, storage=storage), [])
        steps = in_parts(model, ids, memory(model, name, storage=storage), range(30, 100))
        parts = in_parts(model, ids, memory(model, name, storage=storage), [1, 40, 41, 75])
        torch.testing.assert_close(steps, whole, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("bits", [2, 4])
    def test_so_they_do_when_candidates_are_compared(self, model, ids, bits):
        """In a batch of uneven texts, of which some have fewer sentences than candidates.

        Not with 1 bit: there the last bit of a query can decide between two sentences.
        """
        options = {"index_bits": bits, "recall": 2, "candidates": 3}
        both = torch.cat([ids, torch.cat([ids[:, :70] * 0, ids[:, 40:70]], 1)])
        mask = torch.ones_like(both)
        mask[1, :70] = 0
        whole = in_parts(model, both, memory(model, **options), [], mask)
        steps = in_parts(model, both, memory(model, **options), range(30, 100), mask)
        alone = in_parts(model, ids[:, 40:70], memory(model, **options), [])
        torch.testing.assert_close(steps[0], whole[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(steps[1, 70:], whole[1, 70:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(steps[1, 70:], alone[0], atol=1e-4, rtol=1e-4)
        more = in_parts(model, both, memory(model, **options | {"candidates": 99}), [], mask)
        assert not torch.allclose(whole[0], more[0])

    @pytest.mark.parametrize("storage", ["host", "file"])
    @pytest.mark.parametrize("name", POLICIES)
    def test_so_they_do_in_8_bits(self, model, ids, name, storage):
        whole = in_parts(model, ids, memory(model, name, storage=storage, cache_bits=8), [])
        steps = in_parts(model, ids, memory(model, name, storage=storage, cache_bits=8), range(30, 100))
        parts = in_parts(model, ids, memory(model, name, storage=storage, cache_bits=8), [1, 40, 41, 75])
        exact = in_parts(model, ids, memory(model, name), [])
        # Rounding can tip a code over to its neighbour.
        assert (steps - whole).abs().mean() < 2e-3
        assert (parts - whole).abs().mean() < 2e-3
        assert 0 < (whole - exact).abs().mean() < 0.3 * exact.std()

    def test_everything_kept_or_recalled_gives_the_llms_own(self, model, ids):
        own = model(input_ids=ids).logits
        for options in ({"name": "window", "recent_sentences": 99}, {"recall": 99}):
            steps = in_parts(model, ids, memory(model, **options), range(20, 100))
            torch.testing.assert_close(steps, own, atol=5e-5, rtol=1e-5)

    def test_what_is_dropped_changes_them(self, model, ids):
        assert (
            in_parts(model, ids, memory(model, "window"), []) - model(input_ids=ids).logits
        ).abs().max() > 1

    @pytest.mark.parametrize("name", POLICIES)
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_uneven_prompts_equal_each_alone(self, model, ids, name, side):
        texts = [ids[:, :70], ids[:, 25:70]]
        pad = torch.zeros(1, 25, dtype=torch.long)
        padded = [pad, texts[1]] if side == "left" else [texts[1], pad]
        both = torch.cat([texts[0], torch.cat(padded, 1)])
        mask = torch.ones_like(both)
        real = slice(25, None) if side == "left" else slice(0, 45)
        mask[1] = 0
        mask[1, real] = 1
        alone = [in_parts(model, text, memory(model, name), []) for text in texts]
        for cuts in ([], range(30, 70)):
            together = in_parts(model, both, memory(model, name), cuts, mask)
            torch.testing.assert_close(together[:1], alone[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(together[1:, real], alone[1], atol=1e-4, rtol=1e-4)

    def test_a_sliding_window_of_the_llm_is_kept_to(self, ids):
        model = _model(MistralForCausalLM, MistralConfig, sliding_window=12)
        own = model(input_ids=ids).logits
        for options in ({"name": "window", "recent_sentences": 99}, {"recall": 99}):
            steps = in_parts(model, ids, memory(model, **options), range(20, 100))
            torch.testing.assert_close(steps, own, atol=5e-5, rtol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, ids, dtype):
        model = _model().to(dtype)
        own = model(input_ids=ids).logits
        steps = in_parts(model, ids, memory(model, recall=99), range(20, 100))
        assert steps.dtype == dtype
        assert (steps - own).abs().max() < 0.1 * own.abs().max()

    def test_the_llm_is_as_before_without_it(self, model, ids):
        before = model(input_ids=ids).logits
        in_parts(model, ids, memory(model), [50])
        assert torch.equal(model(input_ids=ids).logits, before)
        assert model.config._attn_implementation == "sdpa"


class TestGenerate:
    def test_everything_kept_writes_what_the_llm_writes(self, model, ids):
        own = model.generate(input_ids=ids, max_new_tokens=25, do_sample=False)
        kept = memory(model, "window", recent_sentences=99)
        assert torch.equal(
            model.generate(input_ids=ids, past_key_values=kept, max_new_tokens=25, do_sample=False), own
        )

    def test_sampled_batches_of_uneven_prompts(self, model):
        inputs = tokenizer()([TEXT[:200], TEXT[:90]], return_tensors="pt", padding=True, padding_side="left")
        settings = {"max_new_tokens": 12, "do_sample": True, "top_p": 0.9}
        texts = []
        for _ in range(2):
            torch.manual_seed(1)
            texts.append(model.generate(**inputs, past_key_values=memory(model), **settings))
        assert torch.equal(*texts)
        assert texts[0].shape == (2, inputs["input_ids"].shape[1] + 12)

    def test_several_outputs_of_a_prompt(self, model, ids):
        settings = {"max_new_tokens": 5, "do_sample": True, "num_return_sequences": 3}
        assert len(model.generate(input_ids=ids, past_key_values=memory(model), **settings)) == 3

    def test_streamed_in_a_thread(self, model, ids):
        streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True)
        settings = {
            "past_key_values": memory(model),
            "max_new_tokens": 8,
            "do_sample": False,
            "streamer": streamer,
        }
        thread = threading.Thread(target=model.generate, kwargs={"input_ids": ids, **settings})
        thread.start()
        text = "".join(streamer)
        thread.join()
        again = model.generate(
            input_ids=ids, past_key_values=memory(model), max_new_tokens=8, do_sample=False
        )
        assert text == tokenizer().decode(again[0, 100:])

    def test_in_a_pipeline(self, model):
        write = pipeline("text-generation", model=model, tokenizer=tokenizer())
        out = write(TEXT[:100], past_key_values=memory(model), max_new_tokens=5, do_sample=False)
        assert out[0]["generated_text"].startswith(TEXT[:100])

    def test_the_next_turn_continues(self, model, ids):
        cache = memory(model)
        first = model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
        turn = torch.cat([first, ids[:, :20]], 1)
        second = model.generate(input_ids=turn, past_key_values=cache, max_new_tokens=6, do_sample=False)
        fresh = model.generate(
            input_ids=turn, past_key_values=memory(model), max_new_tokens=6, do_sample=False
        )
        assert torch.equal(second, fresh)

    def test_reset_makes_it_new(self, model, ids):
        cache = memory(model)
        expected = model.generate(
            input_ids=ids[:, 50:], past_key_values=cache, max_new_tokens=6, do_sample=False
        )
        cache.reset()
        model.generate(input_ids=ids[:, :50], past_key_values=cache, max_new_tokens=6, do_sample=False)
        cache.reset()
        assert cache.get_seq_length() == cache.device_bytes() == cache.storage_bytes() == 0
        again = model.generate(
            input_ids=ids[:, 50:], past_key_values=cache, max_new_tokens=6, do_sample=False
        )
        assert torch.equal(again, expected)


class TestSize:
    def test_the_cache_stops_growing(self, model, ids):
        long = ids.repeat(1, 6)
        sizes = []
        for length in (200, 400, 600):
            cache = memory(model, "window")
            in_parts(model, long[:, :length], cache, [length - 20])
            sizes.append(cache.device_bytes())
        assert max(sizes) <= 1.5 * min(sizes)
        assert sizes[-1] < 0.3 * cache.full_bytes()

    def test_a_window_by_tokens_or_share(self, model, ids):
        long = ids.repeat(1, 4)
        for options, least, most in (({"recent_tokens": 60}, 60, 90), ({"recent_share": 0.5}, 180, 230)):
            cache = memory(model, "window", **options)
            in_parts(model, long, cache, [399])
            seen = cache.attended_share() * 400
            assert least - 9 - 4 <= seen <= most, options
        with pytest.raises(InputError, match="exclude each other"):
            memory(model, "window", recent_tokens=5, recent_share=0.1)

    @pytest.mark.parametrize("cache_bits", [None, 8])
    def test_a_window_by_bytes(self, model, ids, cache_bits, tmp_path):
        token_bytes = 2 * 2 * 2 * (8 * 4 if cache_bits is None else 8 + 2)  # blocks, keys and values, heads
        long, budget = ids.repeat(1, 6), 60 * token_bytes + 7
        cache = memory(model, "window", recent_bytes=budget, cache_bits=cache_bits)
        assert cache.policy.options["recent_tokens"] == 60
        sizes = []
        for start in range(0, 400, 50):
            in_parts(model, long[:, start : start + 50], cache, range(1, 50))
            sizes.append(cache.device_bytes())
        on_top = 4 + 9 + 31  # sinks, the sentence being written, and room to grow
        assert budget - 9 * token_bytes <= max(sizes) <= budget + on_top * token_bytes
        assert (
            max(sizes[2:]) == min(sizes[2:]) < 0.3 * cache.full_bytes() * (1 if cache_bits is None else 0.5)
        )
        exact = memory(model, "window", recent_tokens=60, cache_bits=cache_bits)
        in_parts(model, long[:, :400], exact, range(1, 400))
        assert exact.device_bytes() == cache.device_bytes()
        cache.save(tmp_path / "prefix")
        for other in (cache.copy(), SentenceMemory.load(tmp_path / "prefix", model, tokenizer())):
            assert other.policy.options == cache.policy.options
            assert other.device_bytes() == cache.device_bytes()
        with pytest.raises(
            InputError, match=rf"9 bytes are less than one token.*\n.*at least {token_bytes}$"
        ):
            memory(model, "window", recent_bytes=9, cache_bits=cache_bits)

    def test_a_budget_that_cannot_be(self, model):
        for name, options, message in (
            ("window", {"recent_tokens": 5}, "recent_bytes and recent_tokens exclude each other"),
            ("window+recall", {"recent_share": 0.5}, "recent_bytes and recent_share exclude each other"),
            ("recall", {}, r"'recall' keeps no recent tokens.*\n.*window\+recall"),
            ("window", {"recent_bytes": "2MB"}, "recent_bytes: '2MB'"),
            ("window", {"recent_bytes": 0}, "recent_bytes: 0"),
        ):
            given = {"recent_sentences": 1} if "window" in name else {}
            with pytest.raises(InputError, match=message):
                SentenceMemory(model, tokenizer(), name, **{"recent_bytes": 10**6, **given, **options})

    def test_what_the_last_token_attended_to(self, model, ids):
        cache = memory(model, "window", recent_sentences=99)
        in_parts(model, ids, cache, [99])
        assert cache.attended_share() == 1
        whole = memory(model)
        in_parts(model, ids, whole, [])
        assert math.isnan(whole.attended_share())

    def test_which_sentences_the_last_token_recalled(self, model, ids):
        recall = 2
        cache = memory(model, recall=recall, recall_blocks="all")
        in_parts(model, ids, cache, [99])
        (shares,) = cache.recall_shares()
        assert cache.recalled_sentences() == [[*shares]]
        # Each of the heads recalls as many sentences as it may, each of them whole.
        assert sum(shares.values()) == pytest.approx(recall)
        assert all(0 < share <= 1 for share in shares.values())
        starts = cache._table.rows[0].starts
        assert {first for first, _ in shares} <= {*starts[:-2]}, "the last ones are there without that"
        assert {last for _, last in shares} <= {*starts[1:]}
        alike = memory(model, recall=99, recall_blocks=[1])
        in_parts(model, ids, alike, [99])
        assert alike.recall_shares() == [dict.fromkeys(pairwise(starts[:-1]), 1.0)]
        window = memory(model, "window")
        in_parts(model, ids, window, [99])
        assert window.recall_shares() == [{}]

    def test_sentences_without_an_end_are_cut(self, model):
        words = torch.tensor([tokenizer().encode("on and " * 200)])
        cache = memory(model, "window", max_sentence_tokens=9)
        in_parts(model, words, cache, [50])
        assert cache.device_bytes() < 0.2 * cache.full_bytes()

    def test_8_bits_are_half_of_16(self, ids):
        model = _model(head_dim=64).to(torch.bfloat16)
        sizes = []
        for bits in (None, 8):
            cache = memory(model, cache_bits=bits)
            in_parts(model, ids, cache, [80])
            sizes.append(
                (cache.device_bytes() - sum(b.index.nbytes for b in cache.layers), cache.storage_bytes())
            )
            assert cache.full_bytes() == 100 * 2 * 2 * 2 * 64 * 2
        assert sizes[1][0] < 0.6 * sizes[0][0]
        assert sizes[1][1] < 0.6 * sizes[0][1]

    def test_slow_storage_takes_what_leaves(self, model, ids):
        sizes = {}
        for storage in ("host", "int8"):
            cache = memory(model, storage=storage)
            in_parts(model, ids, cache, [80])
            sizes[storage] = cache.storage_bytes()
        assert 0 < sizes["int8"] < sizes["host"]
        assert memory(model, "window").storage_bytes() == 0


def test_a_memory_is_shown_in_one_line(model, ids):
    cache = SentenceMemory(model, tokenizer(), prove=False)
    assert repr(cache) == "SentenceMemory(window+recall; 0 tokens read)"
    cache = memory(model, "window", storage="file", sinks=4)
    in_parts(model, ids, cache, [])
    more = "recent_sentences=1, max_sentence_tokens=9, storage='file', full_prompts=False"
    assert repr(cache) == f"SentenceMemory(window, {more}; 100 tokens read)"
    assert repr(cache.copy()) == repr(cache)


class TestRefusals:
    def test_beam_search(self, model, ids):
        with pytest.raises(InputError, match="beam search"):
            model.generate(input_ids=ids, past_key_values=memory(model), num_beams=2, max_new_tokens=5)

    def test_assisted_decoding(self, model, ids):
        settings = {"prompt_lookup_num_tokens": 2, "max_new_tokens": 5, "do_sample": False}
        with pytest.raises((InputError, ValueError), match=r"take back tokens|crop"):
            model.generate(input_ids=ids, past_key_values=memory(model), **settings)

    def test_another_text_without_reset(self, model, ids):
        cache = memory(model)
        model.generate(input_ids=ids[:, :50], past_key_values=cache, max_new_tokens=3, do_sample=False)
        with pytest.raises(InputError, match="another text"):
            model.generate(input_ids=ids.flip(1), past_key_values=cache, max_new_tokens=3, do_sample=False)

    def test_another_batch(self, model, ids):
        cache = memory(model)
        model(input_ids=ids, past_key_values=cache)
        with pytest.raises(InputError, match="batch of 1, but got one of 2"):
            model(input_ids=ids[:, :1].repeat(2, 1), past_key_values=cache)

    def test_an_empty_prompt(self, model):
        with pytest.raises(InputError, match="no tokens"):
            model(input_ids=torch.zeros(1, 0, dtype=torch.long), past_key_values=memory(model))

    def test_embeddings_in_place_of_tokens(self, model, ids):
        with pytest.raises(InputError, match="needs to see the tokens"):
            model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=memory(model))

    def test_another_llm(self, model, ids):
        other = _model()
        memory(other)  # has hooks now
        with pytest.raises(InputError, match="another LLM"):
            other(input_ids=ids, past_key_values=memory(model))

    def test_a_failed_call(self, model, ids):
        cache = memory(model)
        with pytest.raises(InputError):
            model(input_ids=ids, attention_mask=torch.ones(1, 3), past_key_values=cache)
        model(input_ids=ids, past_key_values=cache)  # nothing was read by the refused call
        hook = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=ids[:, :1], past_key_values=cache)
        hook.remove()
        assert model.config._attn_implementation == "sdpa"
        for _ in range(2):
            with pytest.raises(InputError, match="incomplete"):
                model(input_ids=ids[:, :1], past_key_values=cache)

    def test_names_and_options(self, model):
        for name, options, error, message in (
            ("windw", {}, PluginError, "window"),
            ("window+", {}, InputError, "join names by"),
            ("window+window", {}, InputError, "different memories"),
            ("window", {"recent": 3}, InputError, "recent_sentences"),
            ("window", {"recent_sentences": -1}, InputError, "recent_sentences"),
            ("window", {"storage": "tape"}, InputError, "tape"),
            ("window", {"cache_bits": 4}, InputError, "cache_bits"),
            ("window", {"max_sentence_tokens": 0}, InputError, "max_sentence_tokens"),
        ):
            with pytest.raises(error, match=message):
                SentenceMemory(model, tokenizer(), name, prove=False, **options)

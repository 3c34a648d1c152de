"""``full_prompts``: tokens of one call see each other in full, those of other calls as the memory has them."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from sentcompress import SentenceMemory
from sentcompress.errors import InputError
from sentcompress.sentence_memory.visibility import Layout, seen
from sentcompress.testing import tiny_tokenizer

TEXT = (
    "The sun is up. The bird sings in the tree. We are glad to see it. Nobody knows why the king left. "
    "He went home! Did he? It rained all day and the river rose. The end came soon. "
) * 3
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@functools.cache
def tokenizer():
    return tiny_tokenizer()


@functools.cache
def llm(kind=LlamaForCausalLM, config=LlamaConfig, **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = sizes | {"num_key_value_heads": 2, "initializer_range": 0.3, "vocab_size": len(tokenizer())}
    return kind(config(**settings | changes)).eval()


@functools.cache
def ids():
    return torch.tensor([tokenizer().encode(TEXT)[:100]])


def memory(model, name="window+recall", **options):
    more = {"recall": 1} if "recall" in name else {}
    settings = {"max_sentence_tokens": 9, "recent_sentences": 1, "full_prompts": True, "prove": False} | more
    return SentenceMemory(model, tokenizer(), name, **settings | options)


@torch.no_grad()
def logits(model, text, cache, cuts=(), mask=None):
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, text.shape[1]], strict=True):
        more = {}
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            more = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        parts.append(model(input_ids=text[:, start:stop], past_key_values=cache, **more).logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", ["window", "window+entries", "window+recall"])
@pytest.mark.parametrize("options", [{}, {"storage": "int8"}, {"storage": "file"}])
def test_a_prompt_has_the_llms_own_logits(name, options):
    model = llm()
    torch.testing.assert_close(logits(model, ids(), memory(model, name, **options)), model(ids()).logits)
    assert (
        logits(model, ids(), memory(model, name, full_prompts=False)) - model(ids()).logits
    ).abs().max() > 1


def test_by_default_only_a_prompt_of_generate_is_read_in_full():
    model = llm()
    settings = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}

    def last(**options):
        cache = memory(model, **options)
        return model.generate(ids(), past_key_values=cache, do_sample=False, **settings).logits[0]

    in_full, in_effect = last(full_prompts=True), last(full_prompts=False)
    torch.testing.assert_close(in_full, model(ids()).logits[:, -1])
    assert (in_full - in_effect).abs().max() > 0.1
    assert torch.equal(last(full_prompts=None), in_full)
    assert torch.equal(last(full_prompts=None, positions="reindexed"), in_full)
    moved = {"positions": "reindexed", "max_positions": 60}  # the text is longer
    assert torch.equal(last(full_prompts=None, **moved), last(full_prompts=False, **moved))
    called = logits(model, ids(), memory(model, full_prompts=None))[:, -1]
    torch.testing.assert_close(called, in_effect)


@pytest.mark.parametrize("size", [12, 200])
def test_with_a_sliding_window_too(size):
    model = llm(MistralForCausalLM, MistralConfig, sliding_window=size)
    torch.testing.assert_close(logits(model, ids(), memory(model)), model(ids()).logits, **CLOSE)
    parts = logits(model, ids(), memory(model, recall=99), [60, 80])
    torch.testing.assert_close(parts, model(ids()).logits, **CLOSE)


@pytest.mark.parametrize("config", [GptOssConfig, Gemma2Config])
def test_with_sinks_or_capped_scores(config):
    more = {"head_dim": 8, "num_hidden_layers": 1}
    model = llm(AutoModelForCausalLM.from_config, config, **more)
    torch.testing.assert_close(logits(model, ids(), memory(model)), model(ids()).logits, **CLOSE)


def test_the_next_turn_of_a_chat():
    """As two direct calls under full_prompts=True."""
    model, chat, called = llm(), memory(llm(), full_prompts=None), memory(llm())
    settings = {"max_new_tokens": 6, "do_sample": False}
    first = model.generate(ids()[:, :60], past_key_values=chat, **settings)
    turn = torch.cat([first, ids()[:, 60:]], 1)
    found = model.generate(
        turn, past_key_values=chat, output_logits=True, return_dict_in_generate=True, **settings
    )
    steps = [60, 61, 62, 63, 64, 65]  # the last of the six is not in the cache before the next turn
    expected = logits(model, turn, called, steps)[:, -1]
    torch.testing.assert_close(found.logits[0], expected, **CLOSE)


def test_in_8_bits():
    model = llm()
    own = model(ids()).logits
    found = logits(model, ids(), memory(model, cache_bits=8))
    assert 0 < (found - own).abs().mean() < 0.1 * own.std()


@pytest.mark.parametrize("side", ["left", "right"])
def test_uneven_prompts_equal_each_alone(side):
    model, texts = llm(), [ids()[:, :70], ids()[:, 25:70]]
    pad = torch.zeros(1, 25, dtype=torch.long)
    both = torch.cat([texts[0], torch.cat([pad, texts[1]] if side == "left" else [texts[1], pad], 1)])
    real = slice(25, None) if side == "left" else slice(0, 45)
    mask = torch.ones_like(both)
    mask[1] = 0
    mask[1, real] = 1
    found = logits(model, both, memory(model), mask=mask)
    torch.testing.assert_close(found[:1], model(texts[0]).logits, **CLOSE)
    torch.testing.assert_close(found[1:, real], model(texts[1]).logits, **CLOSE)


@pytest.mark.parametrize("cuts", [range(60, 100), [60, 80]])
def test_later_calls_see_earlier_ones_as_the_memory_has_them(cuts):
    """Against the LLM itself under a mask: each call in full, and a window of what was read before."""
    model, cache = llm(), memory(llm(), "window")
    found = logits(model, ids(), cache, cuts)
    fields = cache._table.rows[0].layout(np.arange(100))
    layout = Layout(**{name: torch.from_numpy(value)[None] for name, value in fields.items()}, text=0 * ids())
    kept, _ = seen(cache.policy, layout, layout, 0)
    for start, stop in zip([0, *cuts], [*cuts, 100], strict=True):
        kept[:, start:stop, start:stop] |= torch.ones(stop - start, stop - start).tril().bool()
    expected = model(ids(), attention_mask=torch.where(kept, 0.0, torch.finfo().min)[:, None]).logits
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("cuts", [range(60, 100), [60, 80]])
def test_later_calls_recall_from_a_full_prompt(cuts):
    """With everything recalled they see all of it, from storage."""
    model = llm()
    found = logits(model, ids(), memory(model, recall=99), cuts)
    torch.testing.assert_close(found, model(ids()).logits, **CLOSE)
    less = logits(model, ids(), memory(model), cuts)
    torch.testing.assert_close(less[:, :60], found[:, :60], **CLOSE)
    assert (less - found).abs().max() > 0.1


def test_its_cache_is_no_larger():
    model, sizes = llm(), []
    for full in (True, False):
        cache = memory(model, full_prompts=full)
        logits(model, ids(), cache, [99])
        sizes.append((cache.device_bytes(), cache.storage_bytes(), cache.attended_share()))
    assert sizes[0] == sizes[1]


def test_saved_and_copied_it_stays_so(tmp_path):
    model, first = llm(), memory(llm())
    logits(model, ids()[:, :60], first)
    first.save(tmp_path / "prefix")
    loaded = SentenceMemory.load(tmp_path / "prefix", model, tokenizer())
    copied = first.copy()
    expected = logits(model, ids()[:, 60:], first)
    for cache in (loaded, copied):
        torch.testing.assert_close(logits(model, ids()[:, 60:], cache), expected)


@pytest.mark.parametrize(
    "options", [{"full_prompts": 1}, {"full_prompts": "yes"}, {"positions": "reindexed"}]
)
def test_what_it_cannot_do_is_refused(options):
    with pytest.raises(InputError, match="full_prompts"):
        memory(llm(), **options)

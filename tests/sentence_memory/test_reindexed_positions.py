"""Texts longer than the LLM has positions: on both sides of the limit, in all the ways a memory is used."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sentcompress import SentenceMemory
from sentcompress.errors import InputError
from sentcompress.sentence_memory.slow_storage import KINDS
from sentcompress.testing import tiny_tokenizer

LIMIT = 64
POLICIES: dict[str, dict[str, Any]] = {
    "window": {"recent_sentences": 1},
    "window+entries": {"recent_sentences": 1},
    "window+recall": {"recent_sentences": 1, "recall": 2},
}


@functools.cache
def tokenizer() -> Any:
    return tiny_tokenizer()


def llama(positions: int = LIMIT) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "initializer_range": 0.3, "vocab_size": len(tokenizer())}
    return LlamaForCausalLM(LlamaConfig(**sizes, **more, max_position_embeddings=positions)).eval()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return llama()


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """No token is there twice: the same token in two old sentences has the same key, and who recalls one of them
    decides by rounding errors."""
    order = torch.randperm(len(tokenizer()) - 10, generator=torch.Generator().manual_seed(1))
    return 10 + order[None, :150]


def memory(model: PreTrainedModel, name: str = "window+recall", **options: Any) -> SentenceMemory:
    defaults = {"max_sentence_tokens": 9, "positions": "reindexed", "prove": False, **POLICIES[name]}
    return SentenceMemory(model, tokenizer(), name, **{**defaults, **options})


@torch.no_grad()
def logits(
    model: PreTrainedModel, ids: Tensor, cache: SentenceMemory, cuts: Any = (), mask: Tensor | None = None
) -> Tensor:
    """Of a text that is read in parts."""
    found = []
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        more = {} if mask is None else {"attention_mask": mask[:, :stop]}
        found.append(model(input_ids=ids[:, start:stop], past_key_values=cache, **more).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_changes_before_the_limit(model: PreTrainedModel, ids: Tensor, name: str):
    for cuts in ((), range(20, LIMIT)):
        own = logits(model, ids[:, :LIMIT], memory(model, name, positions="original"), cuts)
        assert torch.equal(logits(model, ids[:, :LIMIT], memory(model, name), cuts), own)


def test_beyond_it_a_window_sees_what_an_llm_with_more_positions_sees(model: PreTrainedModel, ids: Tensor):
    """Without sinks it depends on distances alone, and they are true."""
    options = {"recent_sentences": 1, "sinks": 0}
    longer = llama(4096)
    wanted = logits(longer, ids, memory(longer, "window", positions="original", **options))
    for cuts in ((), range(60, 150), (50, 64, 65, 130)):
        found = logits(model, ids, memory(model, "window", **options), cuts)
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("window", {}),
        ("window+entries", {}),
        *(("window+recall", {"storage": kind}) for kind in KINDS),
        ("window+recall", {"cache_bits": 8, "index_bits": 2}),
    ],
)
def test_steps_and_parts_equal_one_pass(
    model: PreTrainedModel, ids: Tensor, name: str, options: dict[str, Any]
):
    whole = logits(model, ids, memory(model, name, **options))
    for cuts in (range(50, 150), (1, 63, 64, 65, 100, 130)):
        found = logits(model, ids, memory(model, name, **options), cuts)
        if "cache_bits" in options or options.get("storage") == "int8":
            # Rounded where a token stands at that time, so that other sentences may be recalled.
            assert (found - whole).abs().mean() < 0.05 * whole.abs().mean()
        else:
            torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_uneven_prompts_equal_each_alone(model: PreTrainedModel, ids: Tensor, name: str, side: str):
    """Their positions move at different steps."""
    texts = [ids[:, :140], ids[:, 45:140]]
    pad = torch.zeros(1, 45, dtype=torch.long)
    both = torch.cat([texts[0], torch.cat([pad, texts[1]] if side == "left" else [texts[1], pad], 1)])
    real = slice(45, None) if side == "left" else slice(0, 95)
    mask = torch.ones_like(both)
    mask[1] = 0
    mask[1, real] = 1
    alone = [logits(model, text, memory(model, name)) for text in texts]
    for cuts in ((), range(50, 140), (70, 120)):
        together = logits(model, both, memory(model, name), cuts, mask)
        torch.testing.assert_close(together[:1], alone[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together[1:, real], alone[1], atol=1e-4, rtol=1e-4)


def test_a_text_moves_in_the_step_in_which_another_needs_room(model: PreTrainedModel, ids: Tensor):
    options, pad = {"max_sentence_tokens": 2, "sinks": 0}, 29
    alone = logits(model, ids[:, pad:], memory(model, "window+entries", **options))
    mask = torch.ones(2, ids.shape[1], dtype=torch.long)
    mask[1, :pad] = 0
    cache = memory(model, "window+entries", **options)
    together = logits(model, ids.repeat(2, 1), cache, range(50, 150), mask)
    torch.testing.assert_close(together[1:, pad:], alone, atol=1e-4, rtol=1e-4)


def test_generate_writes_on_beyond_the_limit(model: PreTrainedModel, ids: Tensor):
    settings = {"max_new_tokens": 90, "do_sample": False, "eos_token_id": -1, "pad_token_id": 1}
    prompt = ids[:, :50]
    written = model.generate(prompt, past_key_values=memory(model, full_prompts=False), **settings)
    scores = logits(model, written[:, :-1], memory(model))
    assert written[0, 50:].tolist() == scores[0, 49:].argmax(-1).tolist()
    with pytest.raises(InputError, match=r"65 tokens, but the LLM has 64 positions\n.*positions='reindexed'"):
        logits(model, written[:, :65], memory(model, positions="original"))


def test_generate_refuses_more_than_the_positions_before_it_writes(model: PreTrainedModel, ids: Tensor):
    prompt, settings = ids[:, :50], {"do_sample": False, "eos_token_id": -1, "pad_token_id": 1}
    cache = memory(model, positions="original")
    message = r"may have 140 tokens, but the LLM has 64 positions.*\n.*max_new_tokens=15 or less.*'reindexed'"
    with pytest.raises(InputError, match=message):
        model.generate(prompt, past_key_values=cache, max_new_tokens=90, **settings)
    assert cache.get_seq_length() == 0
    written = model.generate(prompt, past_key_values=cache, max_new_tokens=5, **settings)
    with pytest.raises(InputError, match="max_new_tokens=10 or less"):
        model.generate(written, past_key_values=cache, max_new_tokens=11, **settings)
    rest, mask = written[:, 54:], torch.ones_like(written)
    with pytest.raises(InputError, match=r"may have 66 tokens.*\n.*max_new_tokens=10 or less"):
        model.generate(rest, attention_mask=mask, past_key_values=cache, max_new_tokens=11, **settings)
    assert model.generate(written, past_key_values=cache, max_new_tokens=10, **settings).shape[1] == 65


def test_a_prefix_beyond_the_limit_goes_on(model: PreTrainedModel, ids: Tensor, tmp_path: Any):
    original = memory(model)
    logits(model, ids[:, :110], original)
    original.save(tmp_path / "prefix")
    others = [original.copy(), SentenceMemory.load(tmp_path / "prefix", model, tokenizer())]
    wanted = logits(model, ids[:, 110:], original, range(1, 40))
    for other in others:
        found = logits(model, ids[:, 110:], other, range(1, 40))
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "clipped"}, "positions='clipped' is unknown"),
        ({"positions": "original", "max_positions": 50}, "max_positions is only for positions='reindexed'"),
        ({"max_positions": 65}, r"re-indexed at 65: the LLM has 64, .*\n.*set max_positions to 52 to 64"),
        ({"max_positions": 51}, "re-indexed at 51"),
        ({"max_sentence_tokens": 64}, r"sinks need 272\n.*lower max_sentence_tokens"),
    ],
)
def test_bad_choices_are_named(model: PreTrainedModel, options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        memory(model, **options)


def test_another_llm_is_refused(model: PreTrainedModel, ids: Tensor):
    """One without a memory of its own has no hooks, and would ignore this one in silence."""
    with pytest.raises(InputError, match="not the one that the memory was made for"):
        logits(llama(), ids, memory(model))

"""An LLM's batch: texts that join at different steps get the tokens that ``generate`` gives each, in shared calls."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from sentcompress.errors import NumericsError
from sentcompress.generation import GenerationSettings
from sentcompress.sentence_memory.sentence_cache import SentenceMemory
from sentcompress.serving.limits import ServeLimits
from sentcompress.serving.llm_engine import LLMEngine
from sentcompress.serving.scheduler import Job
from sentcompress.testing import tiny_tokenizer
from sentcompress.text.lossless_tokenizer import lossless

TOKENIZER = tiny_tokenizer()
PROMPTS = (
    "The sun is up. The bird sings in the tree. We are glad to see it. Nobody knows why the king left.",
    "He went home!",
    "It rained all day and the river rose. The end came soon. Did he?",
)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2}
BART = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "forced_eos_token_id": None,
}
LONGROPE = {
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 128,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 4.0, 8.0],
    },
}
WITHOUT_MEMORY = ("bart", "bloom", "lfm2")
TOGETHER = ("llama", "sliding window", "opt", "gpt2", "bloom")
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, GATED),
    "sliding window": (MistralForCausalLM, MistralConfig, GATED | {"sliding_window": 9}),
    "opt": (OPTForCausalLM, OPTConfig, SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "bloom": (BloomForCausalLM, BloomConfig, {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    # These two do not read texts of different lengths in one call: it takes no positions, ...
    "bart": (BartForCausalLM, BartConfig, BART),
    # ... and the longest text decides how keys are rotated.
    "longrope": (Phi3ForCausalLM, Phi3Config, GATED | LONGROPE),
    "lfm2": (Lfm2ForCausalLM, Lfm2Config, GATED | {"layer_types": ["conv", "full_attention"]}),
}


def make_llm(family: str) -> Any:
    kind, config, sizes = FAMILIES[family]
    torch.manual_seed(0)
    ends = {"eos_token_id": None, "pad_token_id": None, "bos_token_id": None}
    llm = kind(config(**sizes, vocab_size=len(TOKENIZER), **ends)).eval()
    with torch.no_grad():
        for weight in llm.parameters():
            weight.mul_(4 if weight.dim() == 2 else 1)  # so that rounding does not decide
    llm.calls = 0
    llm.register_forward_hook(lambda *_: setattr(llm, "calls", llm.calls + 1))
    return llm


def make_job(prompt: str, number: int) -> Job:
    settings = GenerationSettings(max_new_tokens=number)
    return Job(prompt, settings, lambda _: None, time.monotonic() + 60, number)


def written(engine: LLMEngine, begins: dict[int, Job]) -> dict[Job, list[str]]:
    """The pieces of jobs, each added before a step."""
    texts: dict[Job, list[str]] = {job: [] for job in begins.values()}
    open_jobs, step = set(texts), 0
    while open_jobs:
        if step in begins:
            (begun,) = engine.add([begins[step]])
            assert not isinstance(begun, Exception), begun
        for job, piece in engine.step():
            texts[job].append(piece.text)
            if piece.finish_reason:
                open_jobs.remove(job)
        step += 1
    return texts


def wanted(llm: Any, job: Job, memory: SentenceMemory | None = None) -> str:
    ids = torch.tensor([TOKENIZER(job.prompt)["input_ids"]])
    cache = {}
    if memory is not None:
        memory.reset()
        cache["past_key_values"] = memory
    found = llm.generate(input_ids=ids, do_sample=False, max_new_tokens=job.new_tokens, **cache)
    return lossless(TOKENIZER).streamed().add(found[0, ids.shape[1] :].tolist(), ends=True)


@pytest.mark.parametrize("with_memory", [False, True], ids=["own cache", "memory"])
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_join_and_leave(family: str, with_memory: bool):
    llm = make_llm(family)
    if with_memory and family in WITHOUT_MEMORY:
        pytest.skip("takes no sentence memory")

    def make_memory() -> SentenceMemory | None:
        if not with_memory:
            return None
        return SentenceMemory(
            llm, TOKENIZER, recent_sentences=1, recall=2, max_sentence_tokens=9, prove=False
        )

    engine = LLMEngine(llm, TOKENIZER, make_memory(), ServeLimits())
    numbers = (30, 40, 12)
    begins = {
        step: make_job(prompt, number)
        for step, prompt, number in zip((0, 3, 5), PROMPTS, numbers, strict=True)
    }
    llm.calls = 0
    texts = written(engine, begins)
    calls = llm.calls
    for job, pieces in texts.items():
        assert "".join(pieces) == wanted(llm, job, make_memory())
    together = family in TOGETHER
    assert calls == len(numbers) + (3 + 39 if together else sum(numbers) - len(numbers))
    assert engine.figures().device_bytes == 0


@pytest.mark.parametrize("with_memory", [False, True], ids=["own cache", "memory"])
def test_a_long_text_does_not_change_how_others_are_rotated(with_memory: bool):
    llm = make_llm("longrope")
    memory = SentenceMemory(llm, TOKENIZER, recent_sentences=1, recall=2) if with_memory else None
    engine = LLMEngine(llm, TOKENIZER, memory, ServeLimits())
    texts = written(engine, {0: make_job(" ".join(PROMPTS * 2), 40), 1: make_job(PROMPTS[1], 30)})
    for job, pieces in texts.items():
        assert "".join(pieces) == wanted(llm, job, memory)


@pytest.mark.parametrize("with_memory", [False, True], ids=["own cache", "memory"])
@pytest.mark.parametrize("family", ["llama", "sliding window", "gpt2", "bloom", "lfm2"])
def test_short_prompts_are_read_in_one_call(family: str, with_memory: bool):
    """One of them is refused; the others do not notice."""
    llm = make_llm(family)
    if with_memory and family in WITHOUT_MEMORY:
        pytest.skip("takes no sentence memory")
    memory = (
        SentenceMemory(llm, TOKENIZER, recent_sentences=1, recall=2, prove=False) if with_memory else None
    )
    engine = LLMEngine(llm, TOKENIZER, memory, ServeLimits(max_prompt_tokens=100))
    first, *others = (make_job(prompt, 9) for prompt in PROMPTS)
    others.insert(1, make_job("He went home! " * 20, 9))
    engine.add([first])
    llm.calls = 0
    begun = engine.add(others)
    assert llm.calls == (2 if family == "lfm2" else 1)
    assert "but this server takes 100" in str(begun[1])
    found = {first: "", others[0]: "", others[2]: ""}
    for _ in range(9):
        for job, piece in engine.step():
            found[job] += piece.text
    for job, text in found.items():
        assert text == wanted(llm, job, memory)


def test_a_prompt_whose_positions_move_is_read_by_itself():
    """It is not read in full, and the others of its call would not be either."""
    llm = make_llm("llama")
    moving = {"positions": "reindexed", "max_positions": 52, "max_sentence_tokens": 9}
    memory = SentenceMemory(llm, TOKENIZER, recent_sentences=1, recall=1, prove=False, **moving)
    engine = LLMEngine(llm, TOKENIZER, memory, ServeLimits())
    short, long = make_job(PROMPTS[2], 12), make_job(" ".join(PROMPTS), 12)
    assert engine.joining([short, long]) == 2
    engine.add([short, long])
    text = "".join(piece.text for _ in range(12) for job, piece in engine.step() if job is short)
    assert text == wanted(llm, short, memory)


def test_a_beginning_without_a_word_is_no_empty_prompt():
    """A chat's system message may be empty."""
    llm = make_llm("llama")
    job = make_job("\nHe went home!", 3)
    job.prefix, job.rendered = "\n", True
    (pieces,) = written(LLMEngine(llm, TOKENIZER, None, ServeLimits()), {0: job}).values()
    assert "".join(pieces) == wanted(llm, job)


def test_a_long_prompt_is_read_by_itself():
    engine = LLMEngine(make_llm("llama"), TOKENIZER, None, ServeLimits())
    short, long = make_job("He went home!", 3), make_job("He went home! " * 200, 3)
    assert engine.joining([short, short]) == 1, "nobody knows yet what its cache is like"
    engine.add([short])
    assert engine.joining([make_job("He went home!", 3) for _ in range(9)]) == 9
    assert engine.joining([short, long, short]) == 1
    assert engine.joining([long, short]) == 1


def test_texts_that_are_dropped_leave_the_others_alone():
    llm = make_llm("llama")
    engine = LLMEngine(llm, TOKENIZER, None, ServeLimits())
    jobs = [make_job(prompt, 20) for prompt in PROMPTS]
    engine.add(jobs)
    found = dict.fromkeys(jobs, "")
    for step in range(20):
        for job, piece in engine.step():
            found[job] += piece.text
        if step == 5:
            engine.drop(jobs[0])
            engine.drop(jobs[0])
            shorter = engine.figures().device_bytes
        elif step == 4:
            longer = engine.figures().device_bytes
    assert shorter < longer, "the longest text takes its padding with it"
    for job in jobs[1:]:
        assert found[job] == wanted(llm, job)
    assert not [*engine.step()]


def test_a_text_that_cannot_go_on_leaves_the_others_alone():
    """In half precision, some texts make an LLM overflow; nothing can be sampled then."""
    llm = make_llm("llama")
    engine = LLMEngine(llm, TOKENIZER, None, ServeLimits())
    jobs = [make_job(prompt, 9) for prompt in PROMPTS]
    jobs[1].settings = GenerationSettings(max_new_tokens=9, do_sample=True)
    engine.add(jobs)
    found: dict[Job, list[Any]] = {job: [] for job in jobs}
    for step in range(9):
        if step == 4:
            engine._batches[0].texts[1].logits.fill_(float("nan"))
        for job, piece in engine.step():
            found[job].append(piece)
    assert len(found[jobs[1]]) == 5
    assert isinstance(found[jobs[1]][4], NumericsError)
    for job in (jobs[0], jobs[2]):
        assert "".join(piece.text for piece in found[job]) == wanted(llm, job)


@pytest.mark.parametrize("with_memory", [False, True])
def test_a_text_that_fails_to_join_leaves_the_others_alone(
    monkeypatch: pytest.MonkeyPatch, with_memory: bool
):
    llm = make_llm("llama")
    memory = SentenceMemory(llm, TOKENIZER, recent_sentences=1, recall=2) if with_memory else None
    engine = LLMEngine(llm, TOKENIZER, memory, ServeLimits())
    first, broken, last = (make_job(prompt, 9) for prompt in PROMPTS)
    engine.add([first])
    found = {first: "", last: ""}

    def fails(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("sentcompress.serving.llm_engine.Sampler", fails)
        with pytest.raises(MemoryError):
            engine.add([broken])
    engine.drop(broken)
    for step in range(12):
        if step == 3:
            engine.add([last])
        for job, piece in engine.step():
            found[job] += piece.text
    for job, text in found.items():
        assert text == wanted(llm, job, memory)


@pytest.mark.parametrize("with_memory", [False, True])
def test_what_each_text_holds(with_memory: bool):
    """Without the room that longer texts of the batch make it have."""
    llm = make_llm("llama")
    memory = SentenceMemory(llm, TOKENIZER, recent_sentences=1, recall=2) if with_memory else None
    states = []
    for prompts in ((PROMPTS[1],), (PROMPTS[0], PROMPTS[1])):
        engine = LLMEngine(llm, TOKENIZER, memory, ServeLimits())
        jobs = [make_job(prompt, 10) for prompt in prompts]
        for job in jobs:
            job.reports_cache = True
        engine.add(jobs)
        pieces = [[*engine.step()] for _ in range(5)]
        states.append([piece.cache for step in pieces for job, piece in step if job is jobs[-1]])
    assert states[0] == states[1]
    token = 2 * 2 * 2 * 8 * 4
    lengths = [len(TOKENIZER(PROMPTS[1])["input_ids"]) + step for step in range(1, 6)]
    assert [state.full_bytes for state in states[0]] == [length * token for length in lengths]
    if not with_memory:
        assert [state.device_bytes for state in states[0]] == [length * token for length in lengths]


@torch.no_grad()
@pytest.mark.parametrize("with_memory", [False, True])
def test_beginnings_that_stay_read(monkeypatch: pytest.MonkeyPatch, with_memory: bool):
    """Those used least recently go. However many there are, a step asks none of them for its size."""
    llm = make_llm("llama")
    memory = SentenceMemory(llm, TOKENIZER, recent_sentences=1, recall=2) if with_memory else None
    engine = LLMEngine(llm, TOKENIZER, memory, ServeLimits(prompt_cache_bytes=60_000))

    def cached(name: str) -> int:
        job = make_job(f"You are {name}. {PROMPTS[0]}", 1)
        job.prefix, job.rendered = f"You are {name}.", True
        (begun,) = engine.add([job])
        engine.drop(job)
        assert not isinstance(begun, Exception), begun
        return begun.cached_tokens

    def held() -> int:
        now = engine.figures()
        return now.device_bytes + now.host_bytes

    assert cached("Adam") == 0 < cached("Adam")
    one = held()
    assert cached("Eve") == 0 < cached("Adam")
    assert one < held()
    for number in range(60_000 // one):
        assert cached("Adam") > 0 == cached(f"number {number}")
    assert cached("Eve") == 0
    now = held()
    assert now <= 60_000
    monkeypatch.setattr("sentcompress.serving.llm_engine.cache_bytes", None)
    assert held() == now
    engine.reset()
    assert held() == 0

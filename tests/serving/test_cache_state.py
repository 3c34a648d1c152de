"""``stream_options.include_cache``: what a text's cache holds, chunk by chunk, and what it recalls."""

from __future__ import annotations

import pytest

from sentcompress.serving.cache_state import TokenPlaces
from sentcompress.serving.limits import ServeLimits
from sentcompress.testing import tiny_tokenizer

PROMPT = "Größe counts. " + "The people are free. The year was good! Who knows? " * 4 + "And so"


def streamed(server, **options):
    chunks = server.complete(PROMPT, stream=True, stream_options=options, max_tokens=40)
    return [chunk.choices[0] for chunk in chunks if chunk.choices]


def test_each_chunk_says_what_the_cache_holds(server, kind):
    plain, choices = streamed(server, include_usage=True), streamed(server, include_cache=True)
    assert [choice.text for choice in choices[1:]] == [choice.text for choice in plain], (
        "the text is the same"
    )
    assert all("cache" not in choice.model_extra for choice in plain), "who does not ask gets nothing"
    caches = [choice.model_extra["cache"] for choice in choices]
    assert caches[0].pop("prompt") == PROMPT
    assert all("prompt" not in cache for cache in caches[1:])
    assert [cache["completion_tokens"] for cache in caches] == sorted(c["completion_tokens"] for c in caches)
    assert caches[0]["completion_tokens"] == 0 < caches[-1]["completion_tokens"]
    full = [cache["full_bytes"] for cache in caches]
    assert full == sorted(full)
    assert full[-1] > full[0]
    for cache in caches:
        held, full = cache["device_bytes"], cache["full_bytes"]
        # A memory has more than it saves while a text is as short as this one.
        assert {"llm": held == full, "sentence": 0 < held < full, "memory": held > 0}[kind]
        assert (cache["host_bytes"] > 0) == (kind == "memory")


def test_full_bytes_are_those_of_the_llm(server, kind, opt_tiny):
    caches = [choice.model_extra["cache"] for choice in streamed(server, include_cache=True)]
    if kind == "sentence":
        config = server.service.scheduler.engine.generator.model.backbone.config
    else:
        config = opt_tiny[0].config
    of_token = 2 * config.num_hidden_layers * config.hidden_size * 4
    first, last = caches[0], caches[-1]
    assert first["full_bytes"] == first["prompt_tokens"] * of_token
    written = last["prompt_tokens"] + last["completion_tokens"]
    # The last token of an LLM's text is not read any more.
    assert last["full_bytes"] == (written - (kind != "sentence")) * of_token


def test_recalled_sentences_are_places_in_prompt_and_text(server, kind):
    choices = streamed(server, include_cache=True)
    text = PROMPT + "".join(choice.text for choice in choices)
    recalled = [choice.model_extra["cache"]["recalled"] for choice in choices]
    if kind != "memory":
        assert not any(recalled)
        return
    assert not recalled[0], "the prompt is read in full"
    assert all(recalled[1:])
    found = {text[start:end].strip() for spans in recalled for start, end, _ in spans}
    assert found & {"The people are free.", "The year was good!", "Who knows?", "Größe counts."}
    # Pieces of longer sentences apart, they begin where sentences of the text do.
    assert all(0 < share <= 1 for spans in recalled for _, _, share in spans)
    assert all(0 <= start < end <= len(text) for spans in recalled for start, end, _ in spans)
    heads = 2  # sentences that each head may recall
    assert all(sum(share for *_, share in spans) <= heads + 0.01 for spans in recalled)


def test_every_choice_and_chats_too(server):
    chunks = server.complete(
        ["The people", "Our army is"], n=2, stream=True, stream_options={"include_cache": True}, max_tokens=3
    )
    prompts: dict[int, str] = {}
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        prompts.setdefault(choice.index, choice.model_extra["cache"].get("prompt"))
    assert prompts == {0: "The people", 1: "The people", 2: "Our army is", 3: "Our army is"}
    chat = server.client.chat.completions.create(
        model="test",
        messages=[{"role": "user", "content": "Who?"}],
        max_completion_tokens=3,
        stream=True,
        stream_options={"include_cache": True},
    )
    first = next(iter(chat)).choices[0]
    assert first.delta.role == "assistant"
    assert first.model_extra["cache"]["prompt"] == "<user> Who?\n<assistant>"


def test_a_text_that_ends_beside_others_is_reported_to_its_end(make_engine, run_server):
    """Its row has left the batch by then."""
    limits = ServeLimits(max_batch=4)
    engine, tokenizer = make_engine(limits)
    with run_server(engine, tokenizer, limits) as server:
        for tokens in (1, 30):
            choices = server.complete(
                PROMPT, n=3, stream=True, stream_options={"include_cache": True}, max_tokens=tokens
            )
            ends = [c.choices[0] for c in choices if c.choices[0].finish_reason]
            assert len(ends) == 3
            assert all(end.model_extra["cache"]["device_bytes"] > 0 for end in ends)


@pytest.mark.parametrize("encoded", [True, False, None])
def test_places_of_tokens(encoded):
    tokenizer, text = tiny_tokenizer(), "Größe counts. The people are free."
    ids = tokenizer(text, add_special_tokens=bool(encoded))["input_ids"]
    places = TokenPlaces(tokenizer, text, ids, encoded)
    pieces = [slice(*places.span(n, n + 1)) for n in range(len(ids))]
    assert "".join(text[piece] for piece in pieces) == text
    assert places.span(0, len(ids)) == (0, len(text))
    places.add(" It")
    places.add(" is")
    assert places.span(len(ids), len(ids) + 2) == (len(text), len(text) + 6)
    assert places.span(len(ids) + 1, len(ids) + 2) == (len(text) + 3, len(text) + 6)

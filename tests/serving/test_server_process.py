"""The command itself: the page's programs against it, signals, and what is refused before it starts."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2 as httpx
import openai
import pytest

from sentcompress.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def start(*options: str) -> tuple[subprocess.Popen[str], str, list[str]]:
    """A server on a free port: its process, its URL and the lines that it logs."""
    command = [sys.executable, "-m", "sentcompress", "serve", *options, "--port", "0"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stderr=subprocess.PIPE, text=True
    )
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r" at (http://\S+)/v1 ", line):
            threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True).start()
            return process, found[1], lines
    raise AssertionError("".join(lines))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """What the page starts, on another port."""
    words = shlex.split(re.search(r"^sentcompress serve opt-tiny .+$", PAGE, re.M)[0])[2:]
    process, url, _ = start(*words)
    yield url
    process.terminate()
    assert process.wait(60) == 0


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.+?)^```$", page, re.M | re.S)


@pytest.mark.slow
@pytest.mark.parametrize("page", [PAGE, README], ids=["serving.md", "README"])
def test_the_python_of_the_pages_streams_an_answer(url: str, page: str):
    (code,) = (block for block in blocks(page, "python") if "127.0.0.1:8000" in block)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code.replace("http://127.0.0.1:8000", url), "page", "exec"), {})
    assert printed.getvalue().strip()


@pytest.mark.slow
def test_a_new_user_needs_three_commands():
    shell = "".join(block for block in blocks(README, "bash") if "sentcompress serve" in block)
    commands = [line for line in shell.splitlines() if line]
    assert len(commands) == 2, "and the Python that asks"
    assert commands[0].startswith("pip install -c constraints.txt -e '.[serve]'")
    assert commands[1] == re.search(r"^sentcompress serve opt-tiny .+$", PAGE, re.M)[0]


@pytest.mark.slow
def test_the_curl_commands_of_the_page_run(url: str):
    (block,) = (block for block in blocks(PAGE, "bash") if block.startswith("curl"))
    commands = block.replace("\\\n", "").splitlines()
    assert len(commands) == 4
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", command.replace("http://127.0.0.1:8000", url).replace("curl ", "curl -sf ")],
            capture_output=True,
            text=True,
            check=True,
        )
        assert re.search(r'"text_completion"|"list"|"ok"|sentcompress_batch_size', done.stdout)


@pytest.mark.slow
def test_a_chat_template_from_a_file(tmp_path: Path):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:")
    process, url, _ = start("opt-tiny", "--chat-template", str(template), "--name", "tiny")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Who are you?"}], max_tokens=5
    )
    assert answer.usage.completion_tokens == 5
    process.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_a_running_answer_end(number: int):
    process, url, lines = start("opt-tiny")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    stream = iter(
        client.completions.create(
            model="opt-tiny", prompt="The state of the Union is", max_tokens=300, temperature=0, stream=True
        )
    )
    next(stream)
    process.send_signal(number)
    assert sum(1 for _ in stream) >= 298
    assert process.wait(60) == 0, lines
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


@pytest.mark.slow
def test_the_short_form_of_the_chaos_script():
    done = subprocess.run(
        # Without its two measurements of speed, which mean little beside other tests.
        [
            sys.executable,
            "tools/chaos/serve.py",
            "--short",
            "--only",
            "clients",
            "hostile",
            "disconnects",
            "kills",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "**no**" not in done.stdout


# ---- what is refused


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``said(*words)``: the message with which ``sentcompress serve`` ends with code 2."""

    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as exit:
            main(["serve", *words])
        assert exit.value.code == 2
        return capsys.readouterr().err

    return run


def test_without_the_extra_the_command_says_what_to_install():
    # In a process of its own: a package imported anew would replace the one that other tests have.
    code = "import sys; sys.modules['fastapi'] = None\nfrom sentcompress.cli import main\nmain(['serve', 'opt-tiny'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "pip install 'sentcompress[serve]'" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["opt-tiny", "--host", "0.0.0.0"], "there is no API key"),
        (["opt-tiny", "--api-key-file", "nowhere.txt"], "--api-key-file: nowhere.txt: No such file"),
        (["opt-tiny", "--memory-option", "recall=2", "--port", "0"], "--memory-option needs a memory"),
        (["opt-tiny", "--quantize", "decoder", "--port", "0"], "--quantize is for a SentenceLM"),
        (
            ["opt-tiny", "--memory", "window", "--memory-option", "recal=2", "--port", "0"],
            "no option 'recal'",
        ),
        (["nowhere/model", "--port", "0"], "nowhere/model"),
        (["opt-tiny", "--chat-template", "nowhere.jinja", "--port", "0"], "--chat-template: nowhere.jinja"),
        (["opt-tiny", "--max-batch", "0"], "max_batch"),
        (["opt-tiny", "--request-seconds", "nan"], "request_seconds"),
    ],
)
def test_what_is_wrong_is_said_before_the_server_starts(said, monkeypatch, words, says):
    monkeypatch.delenv("SENTCOMPRESS_API_KEY", raising=False)
    message = said(*words)
    assert says in message
    assert "Traceback" not in message

"""The page at ``/``: what it is served with; and in a headless Chromium, what a person sees."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service as Driver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from sentcompress.generation import GenerationSettings
from sentcompress.serving.limits import ServeLimits
from sentcompress.serving.llm_engine import LLMEngine
from sentcompress.serving.sentence_engine import SentenceEngine
from sentcompress.serving.try_page import PAGE

KEY = "0123456789abcdef-key"
LIMITS = ServeLimits(max_prompt_tokens=400, max_new_tokens=300)
PROMPT = "The people are free. The year was good to us! Who would have thought it? " * 3 + "And so"
ROOT = Path(__file__).resolve().parents[2]
# Chromium looks for its maker's servers unless told not to; root has no sandbox.
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1200,1100"
)


@pytest.fixture(scope="module")
def sentence_server(generator, run_server):
    engine = SentenceEngine(generator, GenerationSettings(), LIMITS)
    with run_server(engine, generator.tokenizer, LIMITS, key=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def memory_server(opt_tiny, make_memory, run_server):
    with run_server(LLMEngine(*opt_tiny, make_memory(), LIMITS), opt_tiny[1], LIMITS) as server:
        yield server


# ---- how it is served


def test_it_needs_no_key_and_lets_nothing_else_in(sentence_server):
    for path, (_, kind) in PAGE.items():
        answer = httpx.get(sentence_server.url + path)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
        policy = answer.headers["content-security-policy"].split("; ")
        assert {"default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'"} <= {
            *policy
        }
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "http" not in answer.text.replace("http://www.w3.org/2000/svg", ""), "nothing from elsewhere"
        assert "innerHTML" not in answer.text
    assert httpx.get(f"{sentence_server.url}/v1/models").status_code == 401
    assert httpx.post(sentence_server.url).status_code == 405
    for path in ("/page", "/page/index.html", "/page.js/../guard.py", "/..%2fguard.py"):
        assert httpx.get(sentence_server.url + path).status_code in (401, 404)


@pytest.mark.slow
def test_the_wheel_has_it(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        assert {f"sentcompress/serving/page/{name}" for name, _ in PAGE.values()} <= {*wheel.namelist()}


# ---- in a browser


class Browser:
    """A Chromium with the page open."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get(f"{url}/")
        self.driver.get_log("browser")  # forgets those of pages before

    def find(self, name: str):
        return self.driver.find_element(By.ID, name)

    def text(self, name: str) -> str:
        return self.find(name).get_attribute("textContent")

    def all(self, selector: str) -> list[str]:
        return [
            each.get_attribute("textContent") for each in self.driver.find_elements(By.CSS_SELECTOR, selector)
        ]

    def wait(self, condition) -> None:
        WebDriverWait(self.driver, 60, 0.05).until(lambda _: condition())

    def enter(self, name: str, value: str) -> None:
        field = self.find(name)
        field.clear()
        field.send_keys(value)

    def write(self, prompt: str, tokens: int) -> None:
        """Fill in the form and press the button."""
        self.enter("prompt", prompt)
        self.enter("tokens", str(tokens))
        self.find("write").click()

    def until_done(self) -> str:
        """The status in the end; errors in the console fail."""
        self.wait(self.find("write").is_enabled)
        assert [
            entry for entry in self.driver.get_log("browser") if "status of 40" not in entry["message"]
        ] == []
        return self.text("status")


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chromium = webdriver.Chrome(options, Driver(driver))
    yield chromium
    chromium.quit()


@pytest.fixture
def page(chromium) -> Browser:
    return Browser(chromium)


@pytest.mark.slow
def test_a_text_is_written_with_what_it_recalls(page, memory_server):
    page.open(memory_server.url)
    page.wait(lambda: page.text("model") == "test")
    assert not page.find("key-field").is_displayed()
    page.write(PROMPT, 40)
    assert page.until_done() == "Done: as many tokens as allowed"
    assert page.text("text") == PROMPT + memory_server.text(PROMPT, max_tokens=40)
    assert page.text("error") == ""
    marks = page.all("#text mark")
    assert any(mark in PROMPT and mark.endswith((".", "!", "?")) for mark in marks), marks
    listed = page.all("#recalled li")
    assert len(listed) == 3
    assert all("%: " in item for item in listed)
    page.driver.find_element(By.CSS_SELECTOR, "#recalled button").click()
    prompt, new = map(int, page.text("count").split(" + "))
    assert (prompt, new) == (len(memory_server.service.template._tokenizer(PROMPT)["input_ids"]), 40)
    assert float(page.text("rate")) > 0
    curves = page.driver.find_elements(By.CSS_SELECTOR, "#graph .curve")
    assert [curve.get_attribute("class") for curve in curves] == ["curve full", "curve host", "curve device"]
    assert all(curve.get_attribute("d").count("L") >= 30 for curve in curves), "a point for each chunk"
    label = page.find("graph").get_attribute("aria-label")
    assert all(page.text(name) in label for name in ("device", "host", "full"))
    loaded = page.driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert loaded
    assert all(name.startswith((memory_server.url, "data:")) for name in loaded)


@pytest.mark.slow
def test_text_is_shown_as_text(page, memory_server):
    hostile = "<img src=x onerror='window.hacked = 1'><script>window.hacked = 1</script> &amp; \U0001f600 <b>so</b>."
    prompt = f"{hostile} The people are free. Congress has met. " + hostile.replace("\U0001f600", "") * 2
    page.open(memory_server.url)
    # chromedriver types no characters beyond the first 65,536.
    page.driver.execute_script("document.getElementById('prompt').value = arguments[0]", prompt)
    page.enter("tokens", "30")
    page.find("write").click()
    page.until_done()
    assert page.text("text") == prompt + memory_server.text(prompt, max_tokens=30)
    assert page.driver.execute_script("return window.hacked") is None
    assert page.driver.find_elements(By.CSS_SELECTOR, "#text img, #text script, #text b, li img") == []
    recalled = [mark for mark in page.all("#text mark") if not mark.strip()]
    assert recalled == []
    blocked = page.driver.execute_script(
        "const script = document.createElement('div');"
        "try { script.innerHTML = '<p>'; return false } catch (error) { return error.name === 'TypeError' }"
    )
    assert blocked, "the policy refuses HTML that is made of text"
    page.driver.get_log("browser")


@pytest.mark.slow
def test_a_sentence_model_with_a_key(page, sentence_server):
    page.open(sentence_server.url)
    page.wait(page.find("key-field").is_displayed)
    page.enter("key", "wrong-wrong-wrong-wrong")
    page.write(PROMPT, 60)
    page.until_done()
    assert "Incorrect API key" in page.text("error")
    assert page.text("text") == ""
    page.enter("key", KEY)
    page.find("write").click()
    assert page.until_done().startswith("Done")
    assert page.text("error") == ""
    text = page.text("text")
    assert text.startswith(PROMPT)
    assert len(text) > len(PROMPT)
    assert not page.find("legend").is_displayed(), "a SentenceLM recalls nothing"
    assert int(page.text("share").removesuffix("%")) < 100
    stored = "return [localStorage.length, sessionStorage.length, document.cookie, location.href]"
    assert page.driver.execute_script(stored) == [0, 0, "", f"{sentence_server.url}/"]
    page.driver.refresh()
    assert page.find("key").get_attribute("value") == ""


@pytest.mark.slow
def test_stopping_ends_the_request(page, memory_server):
    page.open(memory_server.url)
    page.write(PROMPT, 300)
    page.wait(lambda: page.text("count") != "–")
    page.find("stop").click()
    assert page.until_done() == "Stopped"
    page.wait(lambda: memory_server.figures.running == 0)
    written = int(page.text("count").split(" + ")[1])
    assert written < 300
    assert not page.find("stop").is_enabled()
    page.write("The state of the Union is", 5)
    assert page.until_done() == "Done: as many tokens as allowed"


@pytest.mark.slow
def test_chats_and_errors(page, memory_server):
    page.open(memory_server.url)
    page.find("chat").click()
    page.write("Who are you?", 5)
    page.until_done()
    assert page.text("text").startswith("<user> Who are you?\n<assistant>")
    page.write("Who are you?", 301)
    page.until_done()
    assert "at most 300 tokens" in page.text("error")
    assert page.text("status") == ""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_readable(page, memory_server, scheme):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    page.open(memory_server.url)
    for width in (1200, 360):
        page.driver.set_window_size(width, 900)
        wide = page.driver.execute_script("return document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, "nothing lies beside the window"
    names = ("--ink", "--soft", "--device", "--host", "--full", "--error")
    for name in names:
        for back in ("--back", "--paper"):
            assert contrast(page, name, back) >= 4.5, (name, back)
    assert contrast(page, "--line", "--back") >= 3


def contrast(page, *names: str) -> float:
    """The contrast of two of the page's colours, as WCAG has it."""
    luminances = []
    for name in names:
        code = page.driver.execute_script(
            "return getComputedStyle(document.documentElement).getPropertyValue(arguments[0]).trim()", name
        )
        digits = code.removeprefix("#")
        digits = digits if len(digits) == 6 else "".join(digit * 2 for digit in digits)
        channels = [int(digits[n : n + 2], 16) / 255 for n in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminances.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    darker, lighter = sorted(luminances)
    return (lighter + 0.05) / (darker + 0.05)

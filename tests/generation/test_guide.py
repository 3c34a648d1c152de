"""The Python of docs/generation.md does what the page says, word for word, on a tiny model."""

import re
from pathlib import Path

from sentcompress.testing import tiny_sentence_lm

PAGE = Path(__file__).resolve().parents[2] / "docs" / "generation.md"


def test_the_pages_python_runs(tokenizer, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "out" / "quickstart" / "graft"
    model = tiny_sentence_lm(len(tokenizer), vae={"max_sentence_tokens": 64})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.+?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 2
    exec(compile("\n".join(blocks), str(PAGE), "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) >= 4

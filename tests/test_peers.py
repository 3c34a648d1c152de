"""tools/peers: the task file, what writes it, and what reads it where sentcompress is not installed."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sentcompress.benchmark.needles import make_tasks
from sentcompress.text.lossless_tokenizer import lossless

TOOLS = Path(__file__).resolve().parents[1] / "tools" / "peers"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ROWS, EXPORT = load("kvpress_rows"), load("export_tasks")


def written(folder: Path, *tasks: object) -> Path:
    path = folder / "tasks.jsonl"
    path.write_text("".join(json.dumps(task) + "\n" for task in tasks), encoding="utf-8")
    return path


def test_what_is_exported_is_read(tmp_path, tokenizer):
    code = lossless(tokenizer)
    text = EXPORT.text_task(0, [1, *code.encode("One sentence. And another one, in two parts.")], 5, code)
    documents = [[f"Sentence {n} of document {d} says little. " for n in range(90)] for d in range(2)]
    (planted,) = make_tasks(documents, code, lengths=[500], tasks=1, kinds=["number"])
    needle = EXPORT.needle_task(0, planted, code, 1)
    read_text, read_needle = ROWS.read_tasks(written(tmp_path, text, needle))
    assert read_text["scored"].dtype == torch.int64
    assert len(read_text["scored"]) == 5
    assert read_text["bytes"] == len(code.decode(read_text["scored"].tolist()).encode())
    assert code.decode(read_needle["context"][1:].tolist()) == planted.text
    assert code.decode(read_needle["question"].tolist()) == planted.questions[0]
    assert code.decode(read_needle["answer"].tolist()) == planted.answer


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"kind": "text", "id": "a", "context": [1], "scored": [2]}', "'bytes' is missing"),
        ('{"kind": "tale", "id": "a"}', "'tale' is missing or not a kind"),
        ('{"kind": "text", "id": "a", "context": [], "scored": [2], "bytes": 1}', "no token ids"),
        ('{"kind": "text", "id": "a", "context": ["b"], "scored": [2], "bytes": 1}', "line 1"),
        ("{", "line 1"),
        ("", "no tasks"),
    ],
)
def test_a_line_that_is_no_task_is_named(tmp_path, line, said):
    path = tmp_path / "tasks.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        ROWS.read_tasks(path)


def test_what_runs_peers_needs_no_sentcompress():
    """They run in an environment that cannot have it: kvpress needs an older transformers."""
    for path in TOOLS.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [name for node in ast.walk(tree) for name in imported(node)]
        ours = any(name.startswith("sentcompress") for name in names)
        assert ours == (path.name in ("export_tasks.py", "memory_rows.py")), path


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []

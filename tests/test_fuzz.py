"""Hostile input: a sample of each kind of ``tools/chaos/fuzz.py``, and what it has found."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from sentcompress.cli.app import main
from sentcompress.cli.common import console
from sentcompress.datasets import _files, jsonl
from sentcompress.errors import DataError, ModelFolderError, RecipeError
from sentcompress.files import printable
from sentcompress.modeling.saved_models import load_saved_tokenizer, load_sentence_lm
from sentcompress.recipe import load_recipe
from sentcompress.recipe.reading import read_yaml
from sentcompress.testing import tiny_sentence_lm
from sentcompress.text.lossless_tokenizer import lossless

TOOL = Path(__file__).resolve().parent.parent / "tools" / "chaos" / "fuzz.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("recipes", 60),
        ("models", 30),
        ("tokenizers", 30),
        ("checkpoints", 20),
        ("texts", 40),
        ("bombs", 3),
        ("commands", 12),
    ],
)
def test_a_sample_finds_nothing(kind, count):
    command = [sys.executable, str(TOOL), kind, "--count", str(count), "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=850)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert ", 0 findings" in done.stdout


def test_the_tool_finds_what_is_wrong(monkeypatch):
    spec = importlib.util.spec_from_file_location("fuzz", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    class Wrong(tool.Kind):
        def run(self, rng):
            raise KeyError("not ours")

    monkeypatch.setitem(tool.KINDS, "wrong", Wrong)
    monkeypatch.setenv("SENTCOMPRESS_CACHE", "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    said: list[str] = []
    assert tool.fuzz("wrong", range(3), 0, said.append) == 3
    assert "KeyError" in said[0]


# What it found

LAUGHS = "\n".join(
    ["a: &a [x, x]", *(f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]" for p, c in itertools.pairwise("abcdefghi"))]
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, "expands to over"),
        ("a: &a [*a]", "expands to over"),
        ("graft: " + "[" * 50_000, "nested too deeply"),
        ("graft: " + "{a: " * 200, "nested too deeply"),
        ("name: " + "x" * 300_000, "over 262,144 characters"),
    ],
    ids=["billion laughs", "inside itself", "deep lists", "deep mappings", "long"],
)  # fmt: skip
def test_yaml_that_would_take_for_ever(tmp_path, text, reason):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=reason):
        load_recipe(str(path))


def test_aliases_in_reason_are_fine():
    assert read_yaml("a: &a [1, 2]\nb: *a") == {"a": [1, 2], "b": [1, 2]}
    with pytest.raises(yaml.YAMLError):
        read_yaml("!!python/object/apply:os.system ['true']")


def test_weights_that_lack_a_tensor_are_refused(tmp_path):
    """They were once filled with random numbers, and a warning."""
    tiny_sentence_lm().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors["\x1b[31m" + name] = tensors.pop(name)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelFolderError, match="1 tensor is missing"):
        load_sentence_lm(tmp_path)


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_escape_sequences_are_shown_and_not_obeyed(capsys, monkeypatch, debug):
    monkeypatch.setenv("SENTCOMPRESS_DEBUG", "")  # put back afterwards
    with pytest.raises(SystemExit):
        main(["validate", "\x1b[2J\u202egnp", *debug])
    err = capsys.readouterr().err
    assert ("Traceback" in err) == bool(debug)
    assert "\\x1b[2J\\u202egnp" in err
    assert "\x1b" not in err
    assert printable("a\tb\n\ud800") == "a\tb\n\\ud800"
    screen = console()
    with screen.capture() as shown:
        screen.print("a \x1b]0;title\x07 name", markup=False)
    assert "\x1b" not in shown.get()


@pytest.mark.parametrize("end", [b"", b"\n", b"\n\n"])
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_zip_bomb_is_refused_before_it_is_in_memory(tmp_path, monkeypatch, suffix, end):
    """bombs 96, seed 0: the line ended in the very piece of the file that made it too long."""
    monkeypatch.setattr(_files, "LARGEST_DOCUMENT", 1 << 20)
    path = tmp_path / f"bomb{suffix}"
    line = json.dumps({"text": "a" * (64 << 20)}).encode() + end
    if suffix.endswith("gz"):
        path.write_bytes(gzip.compress(line))
    else:
        path.write_bytes(pytest.importorskip("zstandard").compress(line))
    assert path.stat().st_size < 200_000
    dataset = jsonl.JsonlDataset(jsonl.JsonlOptions(paths=[str(path)]))
    with pytest.raises(DataError, match=r":1: a line of over 1 MiB"):
        list(dataset.documents())


@pytest.mark.parametrize("value", [{"a": 1}, ["sentence-lm"], None, 7])
def test_a_model_type_that_is_no_text_is_refused(tmp_path, value):
    """models 398 and 1381, seed 0."""
    tiny_sentence_lm().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFolderError, match="holds a model of type"):
        load_sentence_lm(tmp_path)


def test_a_tokenizer_whose_merges_name_a_token_it_lacks_is_refused(tmp_path, tokenizer):
    """tokenizers 1692, seed 0: the library reads it, and builds no other one of what it has read."""
    tokenizer.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    parts = values["model"]["merges"][-1]
    vocabulary = values["model"]["vocab"]
    del vocabulary["".join(parts if isinstance(parts, list) else parts.split())]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises((ModelFolderError, DataError), match="out of vocabulary"):
        lossless(load_saved_tokenizer(tmp_path))

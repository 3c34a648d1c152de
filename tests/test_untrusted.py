"""What SECURITY.md says of model folders: no pickle is loaded and no code run, from whatever option a path comes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from sentcompress.cli import main
from sentcompress.testing import tiny_opt


class Planted:
    """Pickled, it leaves a mark as soon as it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, (f"open({str(self.mark)!r}, 'w').close()",))


@pytest.fixture(scope="module")
def shop(tmp_path_factory, tokenizer, text_files):
    """A recipe, its backbone and its finished run."""
    folder = tmp_path_factory.mktemp("untrusted")
    tiny_opt(len(tokenizer)).save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    training = {"steps": 1, "eval_batches": 1, "precision": "fp32"}
    recipe = {
        "name": "tiny",
        "backbone": {"model": str(folder / "backbone")},
        "segmenter": {"name": "regex", "options": {"max_tokens": 24}},
        "data": {"name": "text", "options": {"paths": [str(text_files)], "heldout_documents": 3}},
        "train_vae": {**training, "sentences_per_batch": 8},
        "graft": {**training, "passages_per_batch": 1, "max_sentences": 8},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                "run",
                str(folder / "recipe.yaml"),
                "--out",
                str(folder / "run"),
                "--set",
                "bench.metrics=[data]",
            ]
        )
    assert stopped.value.code == 0
    return folder


def commands(shop: Path, out: Path) -> dict[str, tuple[str, list[str]]]:
    """By option: the folder that is to be replaced by a bad one, and a command with BAD in its place."""
    recipe, run = str(shop / "recipe.yaml"), str(shop / "run")
    return {
        "generate": ("run/graft", ["generate", "BAD", "The people met here."]),
        "reconstruct": ("run/vae", ["reconstruct", "BAD", "The people met here."]),
        "backbone": (
            "backbone",
            ["graft", recipe, "--vae", f"{run}/vae", "--set", "backbone.model=BAD", "--out", str(out)],
        ),
        "vae": ("run/vae", ["graft", recipe, "--vae", "BAD", "--out", str(out)]),
        "teacher": (
            "run/baseline",
            ["graft", recipe, "--vae", f"{run}/vae", "--set", "graft.teacher=BAD", "--out", str(out)],
        ),
        "bench": ("run/graft", ["bench", "quality", "BAD", "--out", str(out)]),
    }


OPTIONS = ("generate", "reconstruct", "backbone", "vae", "teacher", "bench")


def ends_badly(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    said = capsys.readouterr().err
    assert stopped.value.code in (1, 2), said
    assert "Traceback" not in said
    assert "--debug" not in said
    return said


@pytest.mark.parametrize("option", OPTIONS)
def test_a_pickle_is_never_loaded(shop, tmp_path, capsys, option):
    import torch

    good, words = commands(shop, tmp_path / "out")[option]
    bad, mark = tmp_path / "bad", tmp_path / "mark"
    shutil.copytree(shop / good, bad)
    (bad / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Planted(mark)}, bad / "pytorch_model.bin")
    ends_badly([str(bad) if word == "BAD" else word.replace("=BAD", f"={bad}") for word in words], capsys)
    assert not mark.exists()


@pytest.mark.parametrize("option", OPTIONS)
def test_no_code_that_comes_with_a_model_is_run(shop, tmp_path, capsys, option):
    good, words = commands(shop, tmp_path / "out")[option]
    bad, mark = tmp_path / "bad", tmp_path / "mark"
    shutil.copytree(shop / good, bad)
    config = json.loads((bad / "config.json").read_text())
    classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
    config |= {"model_type": "planted", "auto_map": dict.fromkeys(classes, "planted.Planted")}
    (bad / "config.json").write_text(json.dumps(config))
    (bad / "planted.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    ends_badly([str(bad) if word == "BAD" else word.replace("=BAD", f"={bad}") for word in words], capsys)
    assert not mark.exists()

"""What a command does when its standard streams are closed, full, gone, or in another encoding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sentcompress.testing import tiny_opt, tiny_sentence_lm

COMMAND = f"{sys.executable} -m sentcompress"
FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has /dev/full")


def shell(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash in which ``sentcompress`` is this installation."""
    return subprocess.run(
        ["bash", "-c", line.replace("sentcompress ", f"{COMMAND} ")],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        check=False,
        timeout=120,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer, text_files: Path) -> Path:
    """A folder with a model to generate with (``lm``) and a recipe to train (``recipe.yaml``)."""
    folder = tmp_path_factory.mktemp("place")
    tiny_sentence_lm(len(tokenizer)).save_pretrained(folder / "lm")
    tokenizer.save_pretrained(folder / "lm")
    tiny_opt(len(tokenizer)).save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    recipe = {
        "name": "tiny",
        "backbone": {"model": "backbone"},
        "data": {"name": "text", "options": {"paths": [str(text_files)], "heldout_documents": 2}},
        "train_vae": {
            "steps": 3,
            "sentences_per_batch": 4,
            "eval_batches": 1,
            "precision": "fp32",
            "log_every": 1,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("command", "streams", "code"),
    [
        ("plugins --json", "2>&- <&-", 0),
        ("plugins --json", ">&-", 0),
        ("validate quickstart", ">&- 2>&- <&-", 0),
        ("validate no", ">&- 2>&- <&-", 2),
    ],
)
def test_closed_streams_change_no_exit_code(tmp_path: Path, command: str, streams: str, code: int):
    done = shell(f"sentcompress {command} {streams}", tmp_path)
    assert done.returncode == code, done.stderr
    assert b"Error" not in done.stderr
    if streams == "2>&- <&-":
        assert "segmenters" in json.loads(done.stdout)


@FULL
@pytest.mark.parametrize("command", ["recipes", "plugins --json", "--version"])
def test_a_full_disk_behind_stdout_is_named(tmp_path: Path, command: str):
    done = shell(f"sentcompress {command} > /dev/full", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: standard output cannot be written: No space left on device")
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


def test_a_reader_that_has_had_enough_is_no_error_message(tmp_path: Path):
    done = shell("sentcompress plugins --json | head -c 1; exit ${PIPESTATUS[0]}", tmp_path)
    assert done.returncode in (0, 1)  # the pipe may hold everything before its reader ends
    assert done.stderr == b""


@pytest.mark.slow
@pytest.mark.parametrize(
    "streams", [">&- 2>&- <&-", pytest.param("2> /dev/full", marks=FULL), "2> >(head -c 1 > /dev/null)"]
)
def test_a_training_does_not_depend_on_its_audience(place: Path, tmp_path: Path, streams: str):
    done = shell(f"sentcompress train-vae {place}/recipe.yaml --out {tmp_path}/out {streams}", place)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "vae" / "config.json").is_file()
    lines = (tmp_path / "out" / "vae" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines][-1] == 3  # and nothing else was printed into a file


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (r"sentcompress generate lm $'caf\xe9'", "the prompt: character 4"),
        (r"printf 'caf\xe9 x' | sentcompress generate lm -", "standard input: not UTF-8 (byte 3)"),
        (r"printf '\xff\xfeH\0i\0' | sentcompress generate lm -", "standard input: not UTF-8 (byte 0)"),
        (r"sentcompress reconstruct lm $'caf\xe9'", "the sentence: character 4"),
        (r"sentcompress validate $'caf\xe9.yaml'", r"no recipe file 'caf\udce9.yaml'"),
        (r"sentcompress validate quickstart --set $'description=caf\xe9'", "not valid YAML"),
        ("sentcompress generate lm - <&-", "the prompt is empty"),
    ],
)
def test_text_that_is_not_utf8_is_refused(place: Path, line: str, said: str):
    done = shell(line, place)
    assert done.returncode == 2
    assert said in done.stderr.decode()
    assert "fix:" in done.stderr.decode()
    assert b"Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_text_outside_ascii_passes_through_any_locale(place: Path, environment: dict[str, str]):
    text = "Grüße — 你好"
    for line in (f"sentcompress generate lm '{text}'", f"printf '{text}' | sentcompress generate lm -"):
        done = shell(f"{line} --max-new-tokens 2", place, **environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith((text.encode("ascii", "replace"), text.encode()))


def test_a_folder_whose_name_is_not_utf8_is_refused_before_the_training(place: Path, tmp_path: Path):
    done = shell(f"sentcompress train-vae {place}/recipe.yaml --out {tmp_path}/$'caf\\xe9'", place)
    assert done.returncode == 2
    assert rb"caf\udce9: no model can be saved there" in done.stderr
    assert not list(tmp_path.iterdir())

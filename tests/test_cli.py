"""The command line: help without torch, exit codes, messages, the way from options to a recipe."""

from __future__ import annotations

import errno
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from sentcompress import __version__
from sentcompress.cli import app, main, train
from sentcompress.cli.error_messages import explain, report
from sentcompress.cli.options import override
from sentcompress.errors import InputError, PluginError, RecipeError, SentCompressError

LISTED = (
    "run",
    "sweep",
    "train-vae",
    "graft",
    "baseline",
    "launch",
    "generate",
    "reconstruct",
    "bench",
    "recipes",
    "validate",
    "plugins",
)


@pytest.fixture(autouse=True)
def no_debug(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SENTCOMPRESS_DEBUG", "")  # main may set it: undone after the test


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    captured = capsys.readouterr()
    return caught.value.code, captured.out, captured.err


def modules_after(*arguments: str) -> set[str]:
    code = (
        "import sys\nfrom sentcompress.cli import main\n"
        f"try:\n    main({list(arguments)!r})\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print('\\nMODULES', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("MODULES")[2].split())


def test_help_answers_in_under_a_second_without_torch():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "sentcompress", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 1.0
    assert not modules_after("--help") & {"torch", "transformers", "pydantic", "rich"}


@pytest.mark.parametrize(
    "arguments",
    [("plugins",), ("plugins", "--json"), ("recipes",), ("validate", "paper/vae-768-h1"), ("run", "--help")],
)
def test_light_commands_do_not_import_torch(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SENTCOMPRESS_PLUGINS", "")  # other plugins may import what they like
    assert not modules_after(*arguments) & {"torch", "transformers"}


def test_every_command_is_listed_and_its_help_ends_with_examples():
    top = CliRunner().invoke(app, ["--help"], prog_name="sentcompress").output
    for command in LISTED:
        assert f"\n  {command} " in top
        text = CliRunner().invoke(app, [command, "--help"], prog_name="sentcompress").output
        assert f"    sentcompress {command}" in text.partition("Examples:")[2]


def test_version(capsys):
    assert call(capsys, "--version") == (0, f"sentcompress {__version__}\n", "")


def test_usage_errors_exit_2(capsys):
    for arguments, text in (
        (["validate"], "Missing argument"),
        (["nothing"], "No such command"),
        (["run", "quickstart", "--colour"], "No such option"),
        (["run", "quickstart", "--on-bad-line", "shrug"], "shrug"),
    ):
        code, _, err = call(capsys, *arguments)
        assert (code, text in err) == (2, True), err


def test_the_bare_command_shows_help():
    done = CliRunner().invoke(app, [], prog_name="sentcompress")
    assert "Commands:" in done.output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell: str):
    command = [sys.executable, "-c", "from sentcompress.cli import main; main()"]

    def ask(variable: str, **more: str) -> str:
        environment = os.environ | {"_SENTCOMPRESS_COMPLETE": variable} | more
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.stdout

    assert "_SENTCOMPRESS_COMPLETE" in ask(f"source_{shell}")
    if shell == "bash":
        assert ask("complete_bash", COMP_WORDS="sentcompress tr", COMP_CWORD="1").split() == [
            "train-vae",
            "train-memory",
        ]
    else:
        offered = ask(
            f"complete_{shell}",
            _TYPER_COMPLETE_ARGS="sentcompress tr",
            _TYPER_COMPLETE_FISH_ACTION="get-args",
        )
        assert "train-vae" in offered
        assert "graft" not in offered


# Failures


def test_our_errors_print_message_and_fix_and_exit_with_their_code(capsys):
    code, out, err = call(capsys, "validate", "quickstrat-not-there")
    assert (code, out) == (2, "")
    assert err.startswith("error: no recipe file 'quickstrat-not-there'")
    assert "\n  fix: give the path" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("place", ["before", "after", "environment"])
def test_debug_adds_the_traceback(place: str, capsys, monkeypatch: pytest.MonkeyPatch):
    arguments = ["validate", "not-there"]
    if place == "before":
        arguments.insert(0, "--debug")
    elif place == "after":
        arguments.append("--debug")
    else:
        monkeypatch.setenv("SENTCOMPRESS_DEBUG", "1")
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert "Traceback (most recent call last)" in err
    assert "error: no recipe file 'not-there'" in err


def test_debug_after_two_dashes_is_an_argument(capsys):
    code, _, err = call(capsys, "validate", "--", "--debug")
    assert code == 2
    assert "error: no recipe file '--debug'" in err
    assert "Traceback" not in err


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "parts"),
    [
        (PluginError("no such plugin", fix="get it"), 3, ["error: no such plugin\n  fix: get it"]),
        (RecipeError("bad"), 2, ["error: bad\n"]),
        (raised_from(RuntimeError("outer"), RecipeError("inner")), 2, ["error: inner"]),
        (MemoryError(), 1, ["out of memory", "train_vae.sentences_per_batch", "gradient_checkpointing"]),
        (OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), 1, ["CUDA out of memory", "batch_sizes"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, ["fix: lower train_vae"]),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            1,
            ["no space left on the disk: /x/y", "free"],
        ),
        (ValueError("I/O error: No space left on device (os error 28)"), 1, ["no space left on the disk"]),
        (
            PermissionError(errno.EACCES, "Permission denied", "/x"),
            2,
            ["error: /x: Permission denied\n  fix: check the permissions"],
        ),
        (KeyError("k"), 1, ["error: KeyError: 'k'", "run again with --debug for the traceback"]),
        (ValueError("\n first\nsecond"), 1, ["error: ValueError: first\n"]),
        (ValueError(), 1, ["error: ValueError: (no message)"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_every_failure_is_one_message_and_a_code(error: Exception, code: int, parts: list[str], capsys):
    assert report(error) == code
    err = capsys.readouterr().err
    for part in parts:
        assert part in err
    assert "Traceback" not in err


def test_an_error_chain_that_bites_its_tail_ends():
    one, two = ValueError("one"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert "ValueError: one" in str(explain(one))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom"), MemoryError()])
def test_failures_inside_a_command(error: BaseException, capsys, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("sentcompress.recipe.load_recipe", fail)
    code, _, err = call(capsys, "validate", "quickstart")
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert "Traceback" not in err


# From options to a recipe


def test_data_becomes_a_dataset_by_suffix_and_content(tmp_path: Path):
    line = json.dumps({"text": "One. Two."}).encode() + b"\n"
    pretty = json.dumps([{"text": "One."}, {"text": "Two."}], indent=1).encode()
    rows = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["One.", "Two."]}), rows)
    for name, content, dataset in (
        ("a.txt", b"Plain text.", "text"),
        ("b.jsonl", line, "jsonl"),
        ("c.data", b"\xef\xbb\xbf" + line, "jsonl"),
        ("d.txt", b"[not json", "text"),
        ("e.txt", b"", "text"),
        ("f.jsonl.zst", b"any", "jsonl"),
        ("F.JSONL.GZ", gzip.compress(line), "jsonl"),
        ("g.gz", gzip.compress(line), "jsonl"),
        ("h.bin", b"\xff\xfe\x00", "text"),
        ("i.ndjson", line, "jsonl"),
        ("j.json", pretty, "jsonl"),
        ("k.json", b'{\n"text": "One."\n}', "jsonl"),
        ("l.json.xz", lzma.compress(pretty), "jsonl"),
        ("M.PARQUET", rows.getvalue(), "parquet"),
        ("n", rows.getvalue(), "parquet"),
        ("o.feather", b"any", "parquet"),
        ("p.csv", b"text\nOne.\n", "csv"),
        ("q.TSV.bz2", b"any", "csv"),
        ("r.html", b"<p>One.</p>", "text"),
    ):
        (tmp_path / name).write_bytes(content)
        section = train.data_section(str(tmp_path / name))
        assert (section["name"], section["options"]) == (dataset, {"paths": [str(tmp_path / name)]}), name


def test_data_may_be_a_folder_or_a_glob(tmp_path: Path):
    folder = tmp_path / "corpus"
    (folder / "part").mkdir(parents=True)
    with pytest.raises(InputError, match="no file there"):
        train.data_section(str(folder))
    (folder / "a.txt").write_text("text")
    assert train.data_section(str(folder)) == {"name": "text", "options": {"paths": [str(folder)]}}
    (folder / "part" / "b.jsonl").write_text("{}\n")
    section = train.data_section(f"{folder}/")
    assert section == {"name": "jsonl", "options": {"paths": [f"{folder}/"]}}
    assert train.data_section(f"{folder}/*/*.jsonl")["name"] == "jsonl"
    with pytest.raises(InputError, match=r"--data .*nothing.* no file there"):
        train.data_section(str(tmp_path / "nothing*"))


@pytest.mark.parametrize(
    ("files", "dataset", "left_out"),
    [
        (["a.jsonl", "b.txt", "c/d.txt", "README.md"], "jsonl", "2 *.txt, 1 *.md"),
        (["a.parquet", "b.jsonl.gz", "_SUCCESS"], "jsonl", "1 *.parquet, 1 without a suffix"),
        (["a.parquet", "b.md", "c.json"], "parquet", "1 *.json, 1 *.md"),
        (["a.txt", "metadata.csv", "b.html", "c.rst"], "text", "1 *.csv, 1 *.html, 1 *.rst"),
        (["a.csv.gz", "README.md", "LICENSE.txt"], "csv", "1 *.md, 1 *.txt"),
        (["README.md", "b.png"], "text", "1 *.png"),
        (["a.txt", ".ipynb_checkpoints/a.jsonl", "__MACOSX/b.csv", ".DS_Store", "._a.jsonl"], "text", ""),
    ],
)
def test_a_mixed_folder_says_what_is_left_out(
    tmp_path: Path, capsys, files: list[str], dataset: str, left_out: str
):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert train.data_section(str(tmp_path))["name"] == dataset
    said = capsys.readouterr().err
    assert f"left out: {left_out}. " in said if left_out else not said
    assert "glob" in said or not left_out


def test_data_that_no_dataset_reads_is_named(tmp_path: Path):
    (tmp_path / "b.docx").touch()
    with pytest.raises(InputError, match=r"only 1 \*\.docx") as caught:
        train.data_section(str(tmp_path))
    (tmp_path / "a.json").write_text("[]")
    assert train.data_section(str(tmp_path)) == {
        "name": "jsonl",
        "options": {"paths": [f"{tmp_path}/**/*.json"]},
    }
    assert "glob" in str(caught.value.fix)
    (tmp_path / "c.jsonl").touch()
    (tmp_path / "d.txt").touch()
    (tmp_path / "README.md").touch()
    with pytest.raises(InputError, match=r"several kinds: 1 of 'jsonl', 1 of 'text'"):
        train.data_section(f"{tmp_path}/*")
    with pytest.raises(InputError, match="empty path"):
        train.data_section("")


def test_the_backbone_brings_its_adapter(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nbackbone: {name: opt, model: opt-125m, options: {}, init: random}\n")
    backbone = train.resolve(str(recipe), None, backbone="gpt2", revision="v1").backbone
    assert (backbone.name, backbone.model, backbone.revision, backbone.init) == (
        None,
        "gpt2",
        "v1",
        "pretrained",
    )
    backbone = train.resolve(str(recipe), None, revision="v1").backbone
    assert (backbone.name, backbone.model, backbone.revision) == ("opt", "opt-125m", "v1")


def test_options_change_the_recipe_and_set_has_the_last_word(tmp_path: Path):
    corpus = tmp_path / "a.jsonl"
    corpus.write_text('{"text": "A."}\n')
    resolved = train.resolve(
        "paper/sllm-125m-h1",
        [override("graft.vae", str(tmp_path)), "graft.vae=last/word", "seed=9"],
        backbone="opt-350m",
        data=str(corpus),
        on_bad_line="skip",
    )
    assert resolved.backbone.model == "opt-350m"
    assert resolved.data.options == {"paths": [str(corpus)], "on_bad_line": "skip"}
    assert (resolved.graft.vae, resolved.seed) == ("last/word", 9)


@pytest.mark.parametrize(
    ("arguments", "stages"),
    [
        (["run", "paper/vae-768-h1"], None),
        (["train-vae", "paper/vae-768-h1"], ["vae"]),
        (["graft", "paper/sllm-125m-h1"], ["graft"]),
        (["baseline", "paper/sllm-125m-h1"], ["baseline"]),
    ],
)
def test_stage_commands_hand_over_what_was_asked(arguments, stages, capsys, monkeypatch: pytest.MonkeyPatch):
    from sentcompress import pipeline as runner

    calls = []
    monkeypatch.setattr(
        runner, "run_recipe", lambda recipe, out, **more: calls.append((recipe.name, out, more))
    )
    name = "paper-" + arguments[1].removeprefix("paper/")
    is_run = arguments[0] == "run"
    if is_run:  # only the stages are looked at here; the benchmark behind them has tests of its own
        arguments = [*arguments, "--set", "bench.metrics=[]"]

    assert call(capsys, *arguments)[0] == 0
    assert calls.pop() == (name, Path("out") / name, {"stages": stages, "resume": is_run, "overwrite": False})
    assert call(capsys, *arguments, "--out", "x", "--overwrite")[0] == 0
    assert calls.pop() == (name, Path("x"), {"stages": stages, "resume": False, "overwrite": True})
    assert call(capsys, *arguments, "--no-resume" if is_run else "--resume")[0] == 0
    assert calls.pop()[2] == {"stages": stages, "resume": not is_run, "overwrite": False}


def test_the_folder_of_a_vae_is_recorded_as_a_path(capsys, monkeypatch: pytest.MonkeyPatch):
    """``--vae out/vae/`` and ``--vae out/vae`` are one run: the recorded recipe decides whether it can be resumed."""
    from sentcompress import pipeline

    recipes = []
    monkeypatch.setattr(pipeline, "run_recipe", lambda recipe, *_, **__: recipes.append(recipe))
    assert call(capsys, "graft", "paper/sllm-125m-h1", "--vae", "out/vae/")[0] == 0
    assert recipes[0].graft.vae == "out/vae"


# Listings


def test_recipes_are_listed_with_their_description(capsys):
    code, out, _ = call(capsys, "recipes")
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("paper/vae-768-h1 "))
    assert "SentenceVAE of width 768" in line


def test_validate(capsys):
    code, out, _ = call(capsys, "validate", "paper/vae-768-h1", "--set", "seed=4")
    assert code == 0
    assert out.startswith("paper/vae-768-h1: ok (paper-vae-768-h1, digest ")
    code, _, err = call(capsys, "validate", "paper/vae-768-h1", "--set", "sed=4")
    assert code == 2
    assert "sed: unknown key. Did you mean 'seed'?" in err


def test_plugins_show(capsys):
    code, out, _ = call(capsys, "plugins", "show", "regex")
    assert code == 0
    assert out.startswith(f"segmenter regex (sentcompress {__version__})")
    row = next(line for line in out.splitlines() if line.startswith("max_tokens"))
    assert "int, >= 2, <= 4096" in row
    assert "Longest sentence in tokens" in row
    code, out, _ = call(capsys, "plugins", "show", "sum-norm")
    assert code == 0
    code, _, err = call(capsys, "plugins", "show", "regexx")
    assert code == 3
    assert "Did you mean 'regex'?" in err


def test_bench_segments(capsys):
    code, out, _ = call(capsys, "bench", "segments", "--markdown")
    assert code == 0
    assert "| regex" in out


def test_every_error_class_has_one_of_the_documented_codes():
    def descendants(cls: type) -> set[type]:
        return {cls}.union(*(descendants(sub) for sub in cls.__subclasses__()))

    assert {cls.exit_code for cls in descendants(SentCompressError)} == {1, 2, 3, 75}

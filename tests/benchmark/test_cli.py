"""``sentcompress bench`` as it is typed."""

from __future__ import annotations

import json
import shutil

import pytest

from sentcompress.cli import main


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([*arguments])
    out, err = capsys.readouterr()
    return int(exit_.value.code or 0), out, err


@pytest.fixture(scope="module")
def folder(run_folder, tmp_path_factory):
    copy = tmp_path_factory.mktemp("cli") / "run"
    shutil.copytree(run_folder, copy)
    return copy


def test_bench_all_ends_with_the_table_and_the_report(capsys, folder):
    code, out, _ = call(capsys, "bench", "all", str(folder), "--set", "bench.repeats=1")
    assert code == 0
    lines = out.rstrip().splitlines()
    assert lines[-1] == f"report: {folder / 'bench' / 'report.html'}"
    for title in (
        "Causality",
        "Quality",
        "Generated text",
        "Reconstruction",
        "Speed",
        "Memory",
        "Data",
        "Segmenters",
    ):
        assert any(line.startswith(title) for line in lines), title
    assert "22 of 22 checks passed" in out
    assert "Coverage proven" in out
    saved = json.loads((folder / "bench" / "results.json").read_text(encoding="utf-8"))
    assert saved["recipe"]["bench"]["repeats"] == 1


def test_single_parts_print_their_own_table_only(capsys, folder, tmp_path):
    out_folder = str(tmp_path / "out")
    code, out, _ = call(capsys, "bench", "causality", str(folder / "graft"), "--out", out_folder)
    assert code == 0
    assert "Quality" not in out
    code, out, _ = call(capsys, "bench", "data", str(folder), "--out", out_folder)
    assert code == 0
    assert "cutting overhead" in out
    assert "Causality" not in out
    code, out, _ = call(capsys, "bench", "compare", out_folder, out_folder)
    assert code == 0
    assert "future max delta" in out
    assert "caution" not in out


def test_bench_text_prints_its_tables_beside_the_causality_it_rests_on(capsys, folder, tmp_path):
    backbone = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))["backbone"]["model"]
    arguments = ("bench", "text", str(folder), "--judge", backbone, "--out", str(tmp_path))
    code, out, err = call(capsys, *arguments, "--set", "bench.text_new_tokens=12")
    assert code == 0, err
    assert "Generated text after the same prompts" in out
    assert "difference from the baseline" in out
    assert "\nhuman " in out
    assert f"Judge: {backbone}" in out
    assert "Quality" not in out


def test_random_weights_need_no_trained_model(capsys, folder, text_files, tmp_path):
    backbone = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))["backbone"]["model"]
    settings = (
        "bench.prompt_tokens=12",
        "bench.new_tokens=12",
        "bench.repeats=1",
        "bench.batch_sizes=[1]",
        "segmenter.options.max_tokens=24",
        "data={name: text, options: {paths: ['" + str(text_files) + "']}}",
    )
    overrides = [word for setting in settings for word in ("--set", setting)]
    for part in ("speed", "memory"):
        arguments = (
            "bench",
            part,
            "--backbone",
            backbone,
            "--init",
            "random",
            "--out",
            str(tmp_path / "out"),
        )
        code, out, err = call(capsys, *arguments, *overrides)
        assert code == 0, err
        assert "training tokens in this run 0" in out
    saved = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert saved["speed"]["trained"] is False
    assert {row["part"] for row in saved["rows"]} == {"speed", "memory"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bench", "all", "/nowhere"), "no folder"),
        (("bench", "speed"), "--init random"),
        (("bench", "speed", "RUN", "--init", "random"), "either DIR"),
        (("bench", "quality", "RUN", "--set", "bench.repeat=1"), "repeats"),
        (("bench", "compare", "RUN"), "at least two"),
        (("bench", "quality", "RUN", "--by", "length,positon"), "Did you mean 'position'?"),
        (("bench", "all", "RUN", "--by", "index", "--set", "bench.metrics=[data]"), "only concerns quality"),
        (("bench", "text", "RUN", "--judge", "smollm2-135n"), "Did you mean 'smollm2-135m'?"),
        (("bench", "text", "RUN", "--set", "bench.text_top_p=0"), "bench.text_top_p"),
        (("bench", "quality", "RUN", "--set", "bench.by=[lenght]"), "bench.by.0: Input should be 'position'"),
    ],
)
def test_wrong_use_is_said(capsys, folder, arguments, message):
    code, _, err = call(capsys, *(str(folder) if word == "RUN" else word for word in arguments))
    assert code == 2
    assert message in err


def test_speed_options_reach_the_results(capsys, folder, tmp_path):
    arguments = ("--head", "shortlist-exact", "--quantize", "encoder,decoder", "--profile", "--device", "cpu")
    code, out, err = call(
        capsys,
        *("bench", "speed", str(folder), *arguments, "--out", str(tmp_path)),
        *("--set", "bench.repeats=1", "--set", "bench.cache=int8", "--set", "bench.break_even=false"),
    )
    assert code == 0, err
    assert "Where the time goes, sentence model, batch 1" in out
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    speed = results["speed"]
    assert speed["head"] == "shortlist-exact"
    assert speed["quantized"] == ["encoder", "decoder"]
    assert {"output_ratio", "prefill_ratio", "fallback_rate", "roofline_share"} <= set(speed)
    assert speed["break_even"] == {}
    notes = [row["note"] for row in results["rows"] if row["system"] == "sentence model"]
    assert all("head shortlist-exact; cache int8; 8 bits: encoder, decoder" in note for note in notes)


def test_quality_is_measured_of_the_weights_in_8_bits(capsys, folder, tmp_path):
    plain, small = (
        (str(tmp_path / name), names) for name, names in (("a", "[]"), ("b", "[decoder,backbone]"))
    )
    figures = []
    for place, parts in (plain, small):
        code, _, err = call(
            capsys, "bench", "quality", str(folder), "--out", place, "--set", f"bench.quantize={parts}"
        )
        assert code == 0, err
        scores = json.loads((tmp_path / place / "results.json").read_text(encoding="utf-8"))["quality"]
        figures.append({score["system"]: score["bits_per_byte"] for score in scores})
    assert figures[0]["sentence model"] != figures[1]["sentence model"]
    assert figures[1]["sentence model"] == pytest.approx(figures[0]["sentence model"], rel=0.01)
    assert figures[0]["baseline, equal data"] == figures[1]["baseline, equal data"]


def test_the_sweep_of_speeds_ends_with_its_file(capsys, folder, tmp_path):
    grid = ("--batch-sizes", "1,2", "--prompt-tokens", "8", "--sentence-tokens", "2,6")
    small = ("--set", "bench.repeats=1", "--set", "bench.new_tokens=6")
    code, out, err = call(capsys, "bench", "sweep", str(folder), *grid, *small, "--out", str(tmp_path))
    assert code == 0, err
    assert "Speed beside the backbone" in out
    assert out.rstrip().endswith(f"figures: {tmp_path / 'speed-sweep.json'}")
    code, _, err = call(capsys, "bench", "sweep", str(folder), "--batch-sizes", "1,two")
    assert code == 2
    assert "--batch-sizes: '1,two' is not a list of numbers" in err

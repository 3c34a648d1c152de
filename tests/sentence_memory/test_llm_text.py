"""``sentcompress generate`` with an LLM: its own text, streamed; with a memory; and the folder of a trained memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import sentcompress
from sentcompress.cli import main
from sentcompress.errors import InputError, ModelFolderError
from sentcompress.generation import GenerationSettings
from sentcompress.segmenters.regex import RegexSegmenter
from sentcompress.sentence_memory.llm_text import write_text
from sentcompress.testing import tiny_opt

PROMPT = "The people of this nation have seen it. Congress met here. It read a law? A few men"
Generate = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """The folder of a tiny LLM."""
    folder = tmp_path_factory.mktemp("llm")
    torch.manual_seed(0)
    tiny_opt(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def trained(tmp_path: Path, llm: Path) -> Path:
    """A folder as ``train-memory`` writes it."""
    folder = tmp_path / "memory"
    folder.mkdir()
    for file in llm.iterdir():
        (folder / file.name).symlink_to(file)
    spec = {"name": "regex", "options": {}, "state": RegexSegmenter().state()}
    options = {"recent_sentences": 1, "sinks": 2}
    settings = {"memory": "window", "options": options, "segmenter": spec, "max_sentence_tokens": 32}
    settings["recall_blocks"] = []
    (folder / "memory.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def generate(capsys: pytest.CaptureFixture[str]) -> Generate:
    """Runs the command; returns what it wrote to stdout and stderr."""

    def run(model: Path, *options: str, prompt: str = PROMPT) -> tuple[str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["generate", str(model), prompt, "--max-new-tokens", "20", *options])
        printed = capsys.readouterr()
        assert ended.value.code == 0, printed.err
        return printed.out, printed.err

    return run


def test_an_llm_writes_what_transformers_generate_writes(llm: Path, tokenizer: Any, generate: Generate):
    model = AutoModelForCausalLM.from_pretrained(llm)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    expected = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    text, said = generate(llm)
    assert text == PROMPT + tokenizer.decode(expected, skip_special_tokens=True) + "\n"
    assert "memory" not in said
    everything = ("--memory", "window", "--memory-option", "recent_sentences=1000")
    assert generate(llm, *everything)[0] == text


def test_the_memory_changes_the_text_and_its_size_is_said(llm: Path, generate: Generate):
    text, _ = generate(llm)
    small = ("--memory", "window", "--memory-option", "recent_sentences=0", "--memory-option", "sinks=0")
    forgetful, said = generate(llm, *small)
    assert forgetful != text
    assert re.search(
        r"^The memory window holds \d\.\d MiB\. A cache of all tokens would hold \d\.\d MiB\.$", said, re.M
    )
    said = generate(llm, "--memory", "window+recall", "--memory-option", "recent_sentences=0")[1]
    assert re.search(
        r"^The memory window\+recall holds .* MiB, and \d\.\d MiB in slow storage\. ", said, re.M
    )


def test_what_takes_long_is_said_while_it_runs(llm: Path, trained: Path, generate: Generate):
    loading, testing = f"generate: loading {llm} ...\n", "generate: testing it with the memory window ...\n"
    assert generate(llm)[1].endswith(loading)
    said = generate(llm, "--memory", "window")[1]
    assert said.index(loading) < said.index(testing) < said.index("The memory window holds")
    assert testing in generate(trained)[1]


def test_a_budget_in_bytes(llm: Path, trained: Path, tokenizer: Any, generate: Generate):
    model = AutoModelForCausalLM.from_pretrained(llm)
    token_bytes = model.config.num_hidden_layers * 2 * model.config.hidden_size * 4
    budget = ("--memory-option", f"recent_bytes={7 * token_bytes - 1}")
    fixed = ("--memory-option", "recent_tokens=6")
    assert generate(llm, "--memory", "window", *budget)[0] == generate(llm, "--memory", "window", *fixed)[0]
    assert generate(trained, *budget)[0] == generate(trained, *fixed)[0]
    settings = json.loads((trained / "memory.json").read_text())
    settings["options"] = {"recent_bytes": 6 * token_bytes}
    (trained / "memory.json").write_text(json.dumps(settings))
    for changes, tokens in (({}, 6), ({"recent_bytes": 8 * token_bytes}, 8)):
        memory = sentcompress.SentenceMemory.from_folder(trained, model, tokenizer, **changes)
        assert memory.policy.options["recent_tokens"] == tokens


def test_sampling_is_that_of_transformers_and_repeats_with_a_seed(llm: Path, generate: Generate):
    sampled = ("--do-sample", "--temperature", "2", "--top-k", "50", "--top-p", "0.95", "--seed")
    first, again, other = (generate(llm, *sampled, seed, "--memory", "window")[0] for seed in "112")
    assert first == again != other
    arguments = GenerationSettings(max_new_tokens=5, temperature=2.0).for_llm()
    assert "temperature" not in arguments, "transformers warns of it without do_sample"
    assert arguments["max_new_tokens"] == 5
    with pytest.raises(InputError, match="--max-new-sentences is for a SentenceLM"):
        GenerationSettings(max_new_sentences=1).for_llm()


def test_text_ends_where_the_positions_end(llm: Path, tokenizer: Any):
    model = AutoModelForCausalLM.from_pretrained(llm)
    limit = model.config.max_position_embeddings
    words = tokenizer.decode(tokenizer(PROMPT * 20)["input_ids"][: limit - 3])
    for memory in (None, sentcompress.SentenceMemory(model, tokenizer, "window")):
        pieces: list[str] = []
        write_text(model, tokenizer, words, pieces.append, memory=memory, max_new_tokens=50, do_sample=False)
        room = limit - len(tokenizer(words)["input_ids"])
        assert pieces[0] == words
        assert 0 < len([piece for piece in pieces[1:] if piece]) <= room
    pieces = []
    with pytest.raises(InputError, match=rf"tokens, but the LLM has {limit} positions"):
        write_text(model, tokenizer, PROMPT * 20, pieces.append, max_new_tokens=1)
    assert not pieces, "a prompt that does not fit is not shown"


def test_text_goes_on_where_positions_are_reindexed(tmp_path: Path, tokenizer: Any, generate: Generate):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=96, **shape)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = ("positions=reindexed", "max_sentence_tokens=16")
    memory = ("--memory", "window", *(word for option in options for word in ("--memory-option", option)))
    text, _ = generate(tmp_path, *memory, "--max-new-tokens", "200")
    assert len(tokenizer(text)["input_ids"]) > 150


def test_a_trained_memory_is_used_unless_another_is_named(trained: Path, llm: Path, generate: Generate):
    text, said = generate(trained)
    assert "The memory window holds" in said
    own = ("--memory", "window", "--memory-option", "recent_sentences=1", "--memory-option", "sinks=2")
    assert generate(llm, *own)[0] == text
    assert generate(trained, "--memory-option", "recent_sentences=1000")[0] == generate(llm)[0]
    assert "The memory window+recall holds" in generate(trained, "--memory", "window+recall")[1]


def test_the_folder_of_a_trained_memory_in_python(trained: Path, llm: Path, tokenizer: Any):
    model = AutoModelForCausalLM.from_pretrained(trained)
    memory = sentcompress.SentenceMemory.from_folder(trained, model, tokenizer)
    assert memory.policy.options.items() >= {"recent_sentences": 1, "sinks": 2}.items()
    changed = sentcompress.SentenceMemory.from_folder(trained, model, tokenizer, sinks=0)
    assert changed.policy.options["sinks"] == 0
    with pytest.raises(ModelFolderError, match=r"has no memory\.json: its LLM was not trained with a memory"):
        sentcompress.SentenceMemory.from_folder(llm, model, tokenizer)
    settings = json.loads((trained / "memory.json").read_text())
    for change, says in (
        ({"options": {"recent_sentence": 1}}, "has no option 'recent_sentence'"),
        ({"options": {"sinks": -1}}, "sinks"),
        ({"memory": "windows"}, "windows"),
    ):
        (trained / "memory.json").write_text(json.dumps(settings | change))
        with pytest.raises(ModelFolderError, match=rf"memory\.json: .*{says}"):
            sentcompress.SentenceMemory.from_folder(trained, model, tokenizer)
    for damage in ("{", "[]", '{"memory": "window"}'):
        (trained / "memory.json").write_text(damage)
        with pytest.raises(ModelFolderError, match=r"memory\.json: damaged"):
            sentcompress.SentenceMemory.from_folder(trained, model, tokenizer)

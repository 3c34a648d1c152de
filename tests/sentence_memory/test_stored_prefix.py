"""A text that was read once: saved, loaded, shared by many prompts, and refused where it does not belong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sentcompress import SentenceMemory
from sentcompress.errors import InputError, StorageError
from sentcompress.sentence_memory.slow_storage import KINDS

OPTIONS: dict[str, Any] = {"recent_sentences": 2, "recall": 2, "max_sentence_tokens": 12}


def tiny_llama(vocabulary: int, seed: int = 0, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **settings})).eval()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> PreTrainedModel:
    return tiny_llama(len(tokenizer))


@pytest.fixture(scope="module")
def texts(tokenizer: Any, make_text: Any) -> tuple[Tensor, Tensor]:
    """A document and a question, ``[1, T]`` each."""
    document, question = (tokenizer(make_text(n, n), return_tensors="pt").input_ids for n in (12, 2))
    return document[:, :200], question[:, :20]


@torch.no_grad()
def read(model: PreTrainedModel, memory: SentenceMemory, *parts: Tensor) -> Tensor:
    """Logits of the last part."""
    return [model(input_ids=part, past_key_values=memory).logits for part in parts][-1]


@pytest.fixture(scope="module")
def saved(model: PreTrainedModel, tokenizer: Any, texts: Any, tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "prefix"
    memory = SentenceMemory(model, tokenizer, **OPTIONS)
    read(model, memory, texts[0])
    memory.save(folder)
    return folder


@pytest.mark.parametrize(
    "options", [*({"storage": kind} for kind in KINDS), {"cache_bits": 8}], ids=[*KINDS, "8 bits"]
)
def test_a_loaded_prefix_goes_on_as_if_it_had_been_read(
    options: dict[str, Any], model: PreTrainedModel, tokenizer: Any, texts: Any, tmp_path: Path
):
    """In one pass and token by token, after reading the document in one pass and three single tokens."""
    document, question = texts
    original = SentenceMemory(model, tokenizer, **OPTIONS, **options)
    read(model, original, document[:, :-3], *document[:, -3:].split(1, 1))
    assert original.storage_bytes() > 0
    original.save(tmp_path / "prefix")
    others = [
        original.copy(),
        *(SentenceMemory.load(tmp_path / "prefix", model, tokenizer) for _ in range(2)),
    ]
    assert all(other.full_bytes() == original.full_bytes() for other in others)
    steps = question.split(1, 1)
    wanted = read(model, original, *steps)
    for other in others[:2]:
        torch.testing.assert_close(read(model, other, *steps), wanted, atol=1e-5, rtol=1e-5)
        assert other.get_seq_length() == original.get_seq_length()
    torch.testing.assert_close(read(model, others[2], question)[:, -1:], wanted, atol=1e-5, rtol=1e-5)


def test_many_prompts_share_a_prefix(model: PreTrainedModel, tokenizer: Any, texts: Any, saved: Path):
    """Prompts of a batch, each as if it were alone; padding lies between the text and a shorter prompt."""
    document, question = texts
    long, short = question[:, :11], question[:, 3:10]
    one = SentenceMemory.load(saved, model, tokenizer)
    many = SentenceMemory.load(saved, model, tokenizer, rows=3)
    assert many.storage_bytes() == one.storage_bytes()
    padded = torch.cat([short.new_zeros(1, 4), short], 1)
    ids = torch.cat([torch.cat([document, part], 1) for part in (long, padded, long)])
    mask = torch.ones_like(ids)
    mask[1, document.shape[1] :][:4] = 0
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1, "pad_token_id": 1}
    outputs = model.generate(input_ids=ids, attention_mask=mask, past_key_values=many, **settings)[:, -12:]
    for row, part in enumerate((long, short, long)):
        memory = one.copy()
        alone = model.generate(input_ids=torch.cat([document, part], 1), past_key_values=memory, **settings)[
            0, -12:
        ]
        assert outputs[row].tolist() == alone.tolist()


def test_a_prefix_is_only_read(model: PreTrainedModel, tokenizer: Any, texts: Any, saved: Path):
    before = (saved / "prefix.safetensors").read_bytes()
    read(model, SentenceMemory.load(saved, model, tokenizer), texts[1], *texts[1].split(1, 1))
    assert (saved / "prefix.safetensors").read_bytes() == before


def test_what_does_not_belong_is_refused(model: PreTrainedModel, tokenizer: Any, saved: Path, tmp_path: Path):
    vocabulary = len(tokenizer)
    for other, differs in (
        (tiny_llama(vocabulary, seed=1), "weights differs"),
        (
            tiny_llama(vocabulary, rope_parameters={"rope_type": "default", "rope_theta": 7.0}),
            "configuration",
        ),
        (tiny_llama(vocabulary).to(torch.bfloat16), r"dtype differs \(float32, here bfloat16\)"),
    ):
        with pytest.raises(InputError, match=rf"prefix: the prefix belongs to another LLM: its .*{differs}"):
            SentenceMemory.load(saved, other, tokenizer)
    with pytest.raises(InputError, match="does not hold a saved prefix"):
        SentenceMemory.load(tmp_path, model, tokenizer)
    header = json.loads((saved / "prefix.json").read_text())
    for change, message in (
        ({"version": 2}, "format version 2, but this sentcompress reads 1"),
        ({"tokens": "many"}, "damaged: prefix.json: tokens: "),
        ({"shapes": {}}, "damaged: prefix.safetensors has other tensors than prefix.json says"),
    ):
        folder = tmp_path / "changed"
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        (folder / "prefix.json").write_text(json.dumps({**header, **change}))
        with pytest.raises(InputError, match=message):
            SentenceMemory.load(folder, model, tokenizer)


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_a_torn_file_is_refused(
    size: int, model: PreTrainedModel, tokenizer: Any, saved: Path, tmp_path: Path
):
    folder = shutil.copytree(saved, tmp_path / "torn")
    file = folder / "prefix.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(InputError, match=r"torn: the saved prefix is damaged: prefix\.safetensors: "):
        SentenceMemory.load(folder, model, tokenizer)
    file.unlink()
    with pytest.raises(InputError, match=r"damaged: prefix\.safetensors: "):
        SentenceMemory.load(folder, model, tokenizer)


def test_what_cannot_be_saved_is_named(
    model: PreTrainedModel, tokenizer: Any, texts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    memory = SentenceMemory(model, tokenizer, **OPTIONS)
    with pytest.raises(InputError, match="a prefix is one text, but this memory holds 0"):
        memory.save(tmp_path / "prefix")
    read(model, memory, texts[0].expand(2, -1))
    with pytest.raises(InputError, match="holds 2"):
        memory.copy()
    memory.reset()
    read(model, memory, texts[0])
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(InputError, match="is not a saved prefix; left unchanged"):
        memory.save(tmp_path)
    memory.save(tmp_path / "prefix")
    memory.save(tmp_path / "prefix")  # replaces it

    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("sentcompress.sentence_memory.stored_prefix.save_file", full)
    with pytest.raises(StorageError, match=r"the disk is full .*\n.*choose another folder"):
        memory.save(tmp_path / "prefix")
    assert SentenceMemory.load(tmp_path / "prefix", model, tokenizer).get_seq_length() == texts[0].shape[1]

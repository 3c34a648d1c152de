"""The tokenizer that pretraining makes."""

from __future__ import annotations

import pytest
import torch

from sentcompress.registry import get_registry
from sentcompress.text.lossless_tokenizer import lossless
from sentcompress.training.inputs import load_inputs
from sentcompress.training.tokenizer import train_tokenizer, training_texts


@pytest.fixture
def dataset(make_recipe):
    recipe = make_recipe()
    return get_registry().create("dataset", recipe.data.name, recipe.data.options)


def test_special_tokens_are_those_of_opt(dataset):
    tokenizer = train_tokenizer(training_texts(dataset), 400)
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<s>", "<pad>", "</s>", "<unk>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2, 1)
    assert len(tokenizer) == 400
    assert tokenizer("a").input_ids[0] == 2


@pytest.mark.parametrize("text", ["The Union, 1862 …", "\x00 \ufffd 日本 🇺🇸\r\n", " </s> is text  "])
def test_any_text_comes_back_and_its_bytes_are_counted(dataset, text):
    tokenizer = train_tokenizer(training_texts(dataset), 400)
    exact = lossless(tokenizer)
    exact.check()
    ids = exact.encode(text)
    assert exact.decode(ids) == text
    assert sum(exact.byte_sizes(ids, text)) == len(text.encode())
    assert exact.token_sizes[:4].tolist() == [0, 0, 0, 0]


def test_it_sees_the_training_documents_only(dataset, make_recipe):
    texts = list(training_texts(dataset))
    corpus = load_inputs(make_recipe(), train_tokenizer(iter(texts), 400)).corpus
    assert texts == [corpus.document_text(int(d)) for d in corpus.train]
    assert not set(texts) & {corpus.document_text(int(d)) for d in corpus.heldout}


def test_training_it_twice_gives_the_same(dataset):
    one, two = (train_tokenizer(training_texts(dataset), 400).backend_tokenizer.to_str() for _ in range(2))
    assert one == two


def test_bits_per_byte_of_a_uniform_model(make_recipe, make_job):
    """log2(V) bits per token: every target is scored exactly once."""
    job = make_job(make_recipe())
    with torch.no_grad():
        for parameter in job.model.parameters():
            parameter.zero_()
        figures = job.evaluate(job.model.eval())
    vocabulary = len(job.text.tokenizer)
    targets = torch.cat([job._heldout.batch(i)["labels"][:, 1:].flatten() for i in range(2)])
    size = len(job.text.tokenizer.decode(targets[targets != 2].tolist()).encode())
    expected = len(targets) * torch.tensor(vocabulary, dtype=torch.float64).log2() / size
    assert figures["bits_per_byte"] == pytest.approx(float(expected), rel=1e-3)
    assert figures["nats_per_token"] == pytest.approx(float(torch.tensor(vocabulary).log()), rel=1e-5)

"""A byte-level BPE trained on a corpus's training documents, with OPT's special tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sentcompress.contracts import Dataset
from sentcompress.text.heldout import choose_heldout, text_hash

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
"""Ids 0 to 3, as in OPT; ``</s>`` begins and ends texts."""
START = "</s>"
_SURROGATES = re.compile("[\ud800-\udfff]")


def training_texts(dataset: Dataset) -> Iterator[str]:
    """Texts of the training documents, the same ones as in the corpus."""
    hashes = b"".join(text_hash(text.encode()) for text in _texts(dataset))
    heldout = choose_heldout(hashes, int(getattr(dataset.options, "heldout_documents", 20)))
    for index, text in enumerate(_texts(dataset)):
        if index not in heldout:
            yield text


def _texts(dataset: Dataset) -> Iterator[str]:
    limit = getattr(dataset.options, "max_documents", None)
    for document in islice(dataset.documents(), limit):
        text = _SURROGATES.sub("\ufffd", document.text)
        if text.strip():
            yield text


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer. It can encode any text, since all 256 bytes are tokens.

    Args:
        texts: training documents.
        vocab_size: maximum number of tokens; a small corpus gives fewer.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A {START} $B", special_tokens=[(START, SPECIAL.index(START))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=START,
        eos_token=START,
        unk_token="<unk>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )

"""Which sentences the last token recalled, as a memory reports them."""

from __future__ import annotations

import torch

from sentcompress.modeling.llm_loading import load_backbone_tokenizer, load_causal_lm
from sentcompress.recipe import BackboneSpec
from sentcompress.sentence_memory.sentence_cache import SentenceMemory

TEXT = (
    "The people are free. Congress has met. The treasury is full! We meet again. Our army is paid. And so we"
)


@torch.no_grad()
def test_recalled_sentences_are_older_ones_and_whole():
    spec = BackboneSpec(model="opt-tiny")
    model, tokenizer = load_causal_lm(spec).eval(), load_backbone_tokenizer(spec)
    memory = SentenceMemory(model, tokenizer, recent_sentences=1, recall=1, recall_blocks="all")
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    model(ids[:, :-1], past_key_values=memory)
    assert memory.recalled_sentences() == [[]], "they did not come alone"
    model(ids[:, -1:], past_key_values=memory)
    (spans,) = memory.recalled_sentences()
    starts = memory._table.rows[0].starts
    assert spans
    assert len(spans) < len(starts) - 1, "not all of them"
    for start, end in spans:
        assert start in starts
        assert end in starts, "up to the next one"
        assert end <= starts[-2], "the last and the current one are not recalled"
    window = SentenceMemory(model, tokenizer, "window", recent_sentences=1)
    model(ids[:, :-1], past_key_values=window)
    model(ids[:, -1:], past_key_values=window)
    assert window.recalled_sentences() == [[]]

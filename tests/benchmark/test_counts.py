"""How large a model is, counted from its weights."""

from __future__ import annotations

from sentcompress.benchmark.models import count


def test_shared_weights_are_counted_once(parts):
    total, tables = count(parts.baseline)  # OPT: its token table is its head, its positions are looked up
    assert total == sum(p.numel() for p in parts.baseline.parameters())
    assert tables == parts.baseline.model.decoder.embed_positions.weight.numel()
    ours, looked_up = count(parts.sentence_lm)
    assert ours == sum(p.numel() for p in parts.sentence_lm.parameters())
    vae = parts.sentence_lm.vae
    positions = count(parts.sentence_lm.backbone)[1]
    assert looked_up >= vae.embed_tokens.weight.numel() + vae.decoder_embed_tokens.weight.numel() + positions

"""How large a model is, counted from its weights."""

from __future__ import annotations

from sentcompress.benchmark.model_counts import count


def test_shared_weights_are_counted_once(bench_models):
    total, tables = count(
        bench_models.baseline
    )  # OPT: its token table is its head, its positions are looked up
    assert total == sum(p.numel() for p in bench_models.baseline.parameters())
    assert tables == bench_models.baseline.model.decoder.embed_positions.weight.numel()
    ours, looked_up = count(bench_models.sentence_lm)
    assert ours == sum(p.numel() for p in bench_models.sentence_lm.parameters())
    vae = bench_models.sentence_lm.vae
    positions = count(bench_models.sentence_lm.backbone)[1]
    assert looked_up >= vae.embed_tokens.weight.numel() + vae.decoder_embed_tokens.weight.numel() + positions

"""How large a model is and what it was trained on, counted from its weights and from what its stages wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sentcompress.benchmark.models import Missing, Parts
from sentcompress.benchmark.records import ModelCounts
from sentcompress.files import read_json
from sentcompress.modeling.sentence_lm import SentenceLM


def model_counts(
    model: nn.Module, parts: Parts, stages: Sequence[str], mean_sentence_tokens: float
) -> ModelCounts:
    """Count a model of a run.

    Args:
        model: the sentence model, or a token-level one of the same backbone.
        stages: it was trained in; the last one says how much of it learned. None for a model as it came.
        mean_sentence_tokens: of the held-out text.
    """
    records = {stage: _record(parts, stage) for stage in stages}
    if "graft" in records:  # its SentenceVAE may come from another run
        records = {"vae": _record(parts, "vae")} | records
    learned = records[stages[-1]].get("trainable_parameters") if stages else 0
    per_position = mean_sentence_tokens / model.latents if isinstance(model, SentenceLM) else 1.0
    total, tables = count(model)
    backbone, positions = count(parts.sentence_lm.backbone)
    return ModelCounts(
        parameters=total,
        trainable_parameters=learned,
        backbone_parameters=backbone - positions,
        table_parameters=tables,
        tokens_per_position=per_position,
        training_tokens={name: about["tokens"] for name, about in records.items() if "tokens" in about},
    )


def count(model: nn.Module) -> tuple[int, int]:
    """All weights, shared ones once; and those of embedding tables that nothing multiplies with.

    A table that is also the output head (tied embeddings) is no mere table.
    """
    tables: dict[int, int] = {}
    others: dict[int, int] = {}
    for module in model.modules():
        kind = tables if isinstance(module, nn.Embedding) else others
        kind.update({id(p): p.numel() for p in module.parameters(recurse=False)})
    if isinstance(model, SentenceLM):  # its head is a weight, not a module, where embeddings are tied
        others[id(model.vae.output_weight)] = model.vae.output_weight.numel()
    return sum((tables | others).values()), sum(size for key, size in tables.items() if key not in others)


def _record(parts: Parts, stage: str) -> dict[str, Any]:
    """What a stage wrote of itself; empty where there is nothing."""
    if stage == "vae" and parts.recipe.graft.vae:
        folder = Path(parts.recipe.graft.vae)
    elif parts.folder is None:
        return {}
    else:
        try:
            folder = parts.folder.stage(stage)
        except Missing:
            return {}
    about = read_json(folder / "run.json")
    return about if isinstance(about, dict) else {}

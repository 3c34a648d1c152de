"""Training throughput in real tokens/s: the graft, the same graft fed as the paper does, its token-level twin.

    python tools/measure/training_speed.py opt-125m
    python tools/measure/training_speed.py opt-125m --precision bf16
    python tools/measure/training_speed.py opt-tiny --steps 9

Random weights in the backbone's shape, State of the Union addresses, recipe ``strong``. Steps alternate between the
three, whole steps: building the batch, forward, backward, AdamW as in training. "Padded" is one document a batch, 64
sentences of 64 tokens, padding computed like text, as the paper's set-up and the public implementations do.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from sentcompress.benchmark.models import Models
from sentcompress.estimate.shapes import random_models
from sentcompress.modeling.losses import TokenLoss
from sentcompress.recipe import load_recipe
from sentcompress.text.sampling import START, PassageSampler
from sentcompress.text.token_sampling import PassageTokenSampler
from sentcompress.training.jobs.token_level import TokenLM
from sentcompress.training.preparation import build_optimizer

PAD = 64
"""Sentences a document and tokens a sentence of the padded batches."""
Step = Callable[[int], tuple[int, float]]


def padded(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch of one passage, filled up to 64 x 64 with padding that is computed like text."""
    sentences, width = batch["input_ids"].shape
    ids = torch.ones(PAD, PAD, dtype=torch.long)
    ids[:sentences, :width] = batch["input_ids"]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "sentence_index": torch.tensor([[START, *range(PAD)]]),
        "passage_ids": torch.zeros(1, PAD + 1, dtype=torch.long),
        "scored": torch.ones(PAD, dtype=torch.bool),
        "last": torch.zeros(PAD, dtype=torch.bool),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("backbone")
    parser.add_argument("--steps", type=int, default=5, help="alternating steps after one to warm up")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="of products; weights are fp32"
    )
    asked = parser.parse_args()
    recipe = load_recipe(
        "strong",
        [f"backbone.model={asked.backbone}", "backbone.config={}", "segmenter.options.max_tokens=64"],
    )
    parts = Models(recipe, None)
    model, backbone = random_models(recipe)
    model.train()
    twin = TokenLM(backbone).train()
    loss = TokenLoss(gamma=0.0)
    corpus, graft = parts.corpus, recipe.graft
    pad = int(model.config.pad_token_id)

    def passages(number: int, sentences: int) -> PassageSampler:
        return PassageSampler(
            corpus, corpus.train, number, sentences, 1, recipe.seed, pad, start=graft.start_latent
        )

    packed = passages(graft.passages_per_batch, graft.max_sentences)
    alone = passages(1, PAD)
    tokens = PassageTokenSampler(packed, 2048, pad, parts.bos_token_id)
    adam = {
        "sentence": build_optimizer(model, graft)[0],
        "twin": build_optimizer(twin, graft)[0],
    }

    def products() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=asked.precision == "bf16")

    def graft_step(sampler: PassageSampler, change: Callable[[Any], Any]) -> Step:
        def step(index: int) -> tuple[int, float]:
            began = time.perf_counter()
            batch = sampler.batch(index)
            waited = time.perf_counter() - began
            real = int(batch["attention_mask"].sum())
            with products():
                found = model(**change(batch), token_loss=loss).loss
            found.backward()
            adam["sentence"].step()
            adam["sentence"].zero_grad()
            return real, waited

        return step

    def twin_step(index: int) -> tuple[int, float]:
        began = time.perf_counter()
        batch = tokens.batch(index)
        waited = time.perf_counter() - began
        with products():
            found = twin(**batch)[0].mean()
        found.backward()
        adam["twin"].step()
        adam["twin"].zero_grad()
        return int(batch["attention_mask"].sum()), waited

    systems: dict[str, Step] = {
        "graft": graft_step(packed, lambda batch: batch),
        "graft, padded to 64 x 64, one document at a time": graft_step(alone, padded),
        "token-level twin": twin_step,
    }
    rates: dict[str, list[float]] = {name: [] for name in systems}
    waits: dict[str, list[float]] = {name: [] for name in systems}
    for index in range(asked.steps + 1):
        for name, step in systems.items():
            began = time.perf_counter()
            real, waited = step(index)
            took = time.perf_counter() - began
            if index:
                rates[name].append(real / took)
                waits[name].append(waited / took)
    ours = rates["graft"]
    for name, values in rates.items():
        ratios = [a / b for a, b in zip(ours, values, strict=True)]
        print(
            f"{name}: {statistics.median(values):,.0f} real tokens/s; the graft is {statistics.median(ratios):.2f}x "
            f"({min(ratios):.2f} to {max(ratios):.2f}); "
            f"building the batch {statistics.median(waits[name]):.1%} of a step"
        )


if __name__ == "__main__":
    main()

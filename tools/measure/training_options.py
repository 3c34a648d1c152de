"""What each option of training brings: time of a step, and activations kept for the backward pass.

    python tools/measure/training_options.py opt-125m
    python tools/measure/training_options.py opt-tiny --steps 9

Random weights in the backbone's shape, State of the Union addresses, recipe ``strong``. Each option is set against the
settings as they are, in alternating steps over the same sentences: forward and backward. ``--also bf16 compile`` adds
what is meant for GPUs: on a CPU without bf16 a step takes a minute, and compiling many.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from sentcompress.benchmark.models import Models
from sentcompress.estimate.shapes import random_models
from sentcompress.estimate.training_memory import count_saved
from sentcompress.modeling import losses
from sentcompress.modeling.losses import TokenLoss
from sentcompress.modeling.sentence_lm import SentenceLM
from sentcompress.recipe import load_recipe
from sentcompress.text.sampling import PassageSampler
from sentcompress.training.tuning import recompute_activations

Batch = dict[str, Tensor]
Change = Callable[[Batch], Batch]
AS_IT_IS = "as it is"


def same(batch: Batch) -> Batch:
    return batch


def one_passage_a_row(batch: Batch) -> Batch:
    """Without packing: each passage in a row of its own, filled up to the longest."""
    ids, index = batch["passage_ids"], batch["sentence_index"]
    passages = [index[ids == passage] for passage in ids[ids >= 0].unique()]
    width = max(map(len, passages))
    rows = torch.full((len(passages), width), -1)
    for row, cells in zip(rows, passages, strict=True):
        row[: len(cells)] = cells
    numbers = torch.arange(len(passages))[:, None].expand(-1, width)
    return {**batch, "sentence_index": rows, "passage_ids": torch.where(rows != -1, numbers, -1)}


def padding_is_text(batch: Batch) -> Batch:
    """Encoder and decoder compute the padding of short sentences as if it were tokens."""
    mask = torch.ones_like(batch["attention_mask"])
    return {**batch, "input_ids": batch["input_ids"].clamp_min(0), "attention_mask": mask}


@contextmanager
def whole_logits() -> Iterator[None]:
    """The loss over all logits of the batch at once."""
    before, losses.MIN_ROWS = losses.MIN_ROWS, 2**31
    try:
        yield
    finally:
        losses.MIN_ROWS = before


def recomputed(model: SentenceLM) -> SentenceLM:
    recompute_activations(model)
    return model


def compiled(model: SentenceLM) -> SentenceLM:
    model.compile()
    return model


def kept_bytes(step: Callable[[], Tensor], model: SentenceLM) -> int:
    """Bytes saved for the backward pass, weights left out."""
    loss, total = count_saved(step, {p.untyped_storage().data_ptr() for p in model.parameters()})
    loss.backward()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("backbone")
    parser.add_argument("--steps", type=int, default=5, help="alternating steps after one to warm up")
    parser.add_argument("--also", nargs="*", choices=["bf16", "compile"], default=[])
    asked = parser.parse_args()
    recipe = load_recipe("strong", [f"backbone.model={asked.backbone}", "backbone.config={}"])
    corpus, graft = Models(recipe, None).corpus, recipe.graft
    model, _ = random_models(recipe)
    model.train()
    pad = int(model.config.pad_token_id)
    sampler = PassageSampler(
        corpus,
        corpus.train,
        graft.passages_per_batch,
        graft.max_sentences,
        1,
        recipe.seed,
        pad,
        start=graft.start_latent,
    )
    plain: Callable[[], AbstractContextManager[None]] = nullcontext
    options: dict[str, tuple[SentenceLM, Change, Callable[[], AbstractContextManager[None]]]] = {
        AS_IT_IS: (model, same, plain),
        "passages not packed": (model, one_passage_a_row, plain),
        "padding of sentences computed": (model, padding_is_text, plain),
        "loss over whole logits": (model, same, whole_logits),
        "gradient_checkpointing": (recomputed(copy.deepcopy(model)), same, plain),
    }
    if "bf16" in asked.also:
        options["precision: bf16"] = (model, same, lambda: torch.autocast("cpu", torch.bfloat16))
    if "compile" in asked.also:
        options["compile"] = (compiled(copy.deepcopy(model)), same, plain)
    loss = TokenLoss(gamma=0.0)
    seconds: dict[str, list[float]] = {name: [] for name in options}
    kept: dict[str, int] = {}
    failed: dict[str, str] = {}
    for index in range(asked.steps + 1):
        batch = sampler.batch(index)
        for name, (candidate, change, around) in options.items():
            if name in failed:
                continue
            changed = change(batch)

            def forward(candidate: SentenceLM = candidate, changed: Batch = changed) -> Tensor:
                return candidate(**changed, token_loss=loss).loss

            began = time.perf_counter()
            try:
                with around():
                    if index:
                        forward().backward()
                    else:
                        kept[name] = kept_bytes(forward, candidate)
            except Exception as error:  # an option that this machine cannot have is a result too
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                continue
            seconds[name] += [time.perf_counter() - began] if index else []
            candidate.zero_grad()
    for name, values in seconds.items():
        if name in failed:
            print(f"{name}: failed, {failed[name]}")
            continue
        ratios = [a / b for a, b in zip(values, seconds[AS_IT_IS], strict=True)]
        print(
            f"{name}: {statistics.median(values):.2f} s a step, {statistics.median(ratios):.2f}x the time "
            f"({min(ratios):.2f} to {max(ratios):.2f}); keeps {kept[name] / 2**20:,.0f} MiB, "
            f"{kept[name] / kept[AS_IT_IS]:.2f}x"
        )


if __name__ == "__main__":
    main()

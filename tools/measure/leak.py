"""How much a missing causal mask is worth: the same graft, once causal and once with the mask off on purpose.

``python tools/measure/leak.py quickstart --vae out/quickstart/vae --out out/leak``

The published code of this method ran the backbone without a mask (docs/results/leak.md). Two SentenceLMs are grafted
on the same passages for as many steps: a causal one, and one whose backbone sees every sentence of its passage, later
ones too. Both are scored by the same scorer, once as they were trained and once with the mask the other way round.
A leaky model is never saved as one: its adapter exists here only, and ``bench`` would refuse it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sentcompress.backbones.opt import OPTBackbone
from sentcompress.benchmark.causality_checks import check_causality
from sentcompress.benchmark.heldout_text import heldout_documents
from sentcompress.benchmark.scoring import score_sentence_model
from sentcompress.modeling import SentenceLM
from sentcompress.modeling.saved_models import load_sentence_lm
from sentcompress.pipeline import run_job
from sentcompress.recipe import Recipe, load_recipe
from sentcompress.text.lossless_tokenizer import lossless
from sentcompress.training.inputs import Inputs, load_inputs
from sentcompress.training.jobs.graft import GraftJob
from sentcompress.training.loop import seed_everything


class SeesEverything(OPTBackbone):
    """Attends to all cells of its passage. Wrong on purpose."""

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor, *rest: Any, **more: Any) -> Any:
        # What may see whom, both ways: the causal mask and its mirror image, as far as the cells are new.
        past, own = attention_mask.tensor_split([-inputs_embeds.shape[1]], -1)
        both = torch.cat([past, own | own.transpose(-1, -2)], -1)
        return super().forward(inputs_embeds, both, *rest, **more)


def train(recipe: Recipe, vae: Path, text: Inputs, out: Path, *, leaky: bool) -> None:
    seed_everything(recipe.seed)
    job = GraftJob(recipe, vae, text)  # proven causal here, as any graft
    if leaky:
        job.model.backbone.__class__ = SeesEverything
    run_job(job, out, recipe, resume=True)


def score(model: SentenceLM, recipe: Recipe, text: Inputs, *, leaky: bool) -> dict[str, float]:
    model.backbone.__class__ = OPTBackbone
    as_causal = check_causality(model, attention=["sdpa"])
    model.backbone.__class__ = SeesEverything if leaky else OPTBackbone
    causality = check_causality(model, attention=["sdpa"])
    assert causality.passed is not leaky, "the check must pass the causal model and catch the leaky one"
    figures = score_sentence_model(
        model,
        heldout_documents(text.corpus, recipe.bench),
        lossless(text.tokenizer),
        causality=as_causal,  # the leaky one would be refused: that it is scored all the same is the experiment
        context_sentences=recipe.graft.max_sentences,
    )
    leaks = [check.max_delta for check in causality.checks if check.kind == "future"]
    return {
        "bits_per_byte": figures.bits_per_byte,
        "perplexity": figures.perplexity,
        "largest_leak": max(leaks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("--vae", type=Path, required=True, help="folder of a trained SentenceVAE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, help="instead of the recipe's")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    if arguments.seed is not None:
        recipe = recipe.model_copy(update={"seed": arguments.seed})
    text = load_inputs(recipe)
    rows = []
    for trained in ("causal", "leaky"):
        folder = arguments.out / f"{trained}-{recipe.seed}"
        if not (folder / "config.json").is_file():
            train(recipe, arguments.vae, text, folder, leaky=trained == "leaky")
        model = load_sentence_lm(folder)
        for run in ("causal", "leaky"):
            rows.append({"trained": trained, "run": run} | score(model, recipe, text, leaky=run == "leaky"))
    (arguments.out / f"leak-{recipe.seed}.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    for row in rows:
        print(
            f"trained {row['trained']:6}  run {row['run']:6}  {row['bits_per_byte']:.4f} bits a byte  "
            f"perplexity {row['perplexity']:.2f}  largest |difference| {row['largest_leak']:.3g}"
        )


if __name__ == "__main__":
    main()

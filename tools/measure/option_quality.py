"""What the options that change what is computed cost in bits a byte: 8-bit weights and an 8-bit cache.

    python tools/measure/option_quality.py out/strong

Reads the first sentences of every held-out document (as many as the model was trained on) as generation does, a cell
of the backbone's cache after the other, and charges every token and end mark after the first sentence.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from sentcompress.benchmark.heldout_text import HeldoutDocument, heldout_documents
from sentcompress.benchmark.models import ModelFolder, Models
from sentcompress.generation import SentenceGenerator
from sentcompress.modeling.int8 import quantize
from sentcompress.modeling.losses import TokenLoss

ALL = ["encoder", "backbone", "decoder"]
OPTIONS: list[tuple[str, list[str], str]] = [
    ("none", [], "full"),
    ("8-bit decoder", ["decoder"], "full"),
    ("8-bit encoder and decoder", ["encoder", "decoder"], "full"),
    ("8-bit encoder, backbone and decoder", ALL, "full"),
    ("8-bit cache", [], "int8"),
    ("8-bit weights and cache", ALL, "int8"),
]


@torch.no_grad()
def nats(generator: SentenceGenerator, document: HeldoutDocument, cache: str, longest: int) -> float:
    """Of the tokens and end marks after the first sentence."""
    sentences = document.sentences[:longest]
    cache_of_text = generator.prefill([sentences[:1]], cache)
    conditioning = [torch.zeros_like(cache_of_text.hidden_states), cache_of_text.hidden_states]
    for sentence in sentences[1:-1]:
        cache_of_text.append([0], generator.encode([sentence]))
        conditioning.append(cache_of_text.hidden_states)
    lengths = torch.tensor([len(ids) for ids in sentences])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.zeros_like(mask)
    ids[mask.bool()] = torch.tensor([token for sentence in sentences for token in sentence])
    scored = torch.arange(len(sentences)) > 0
    streams = torch.zeros(len(sentences), dtype=torch.long)
    vae = generator.model.vae
    _, nll, _ = vae.decode_nll(torch.cat(conditioning), ids, mask, TokenLoss(gamma=0.0), streams, scored)
    return float(nll.double().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    place = ModelFolder(parser.parse_args().folder)
    recipe = place.recipe(["bench.quantize=[]", "bench.max_documents=null"])
    longest = recipe.graft.max_sentences
    documents = heldout_documents(Models(recipe, place).corpus, recipe.bench)
    size = sum(len("".join(d.texts[1:longest]).encode()) for d in documents)
    plain = 0.0
    for name, parts, cache in OPTIONS:
        model = quantize(Models(recipe, place).sentence_lm, parts)
        generator = SentenceGenerator(model, None)
        bits = sum(nats(generator, d, cache, longest) for d in documents) / math.log(2) / size
        plain = plain or bits
        print(f"{name}: {bits:.5f} bits a byte of {size:,} bytes ({bits / plain - 1:+.3%})", flush=True)


if __name__ == "__main__":
    main()

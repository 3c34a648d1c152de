"""Bits a byte of an LLM as it came, on the first tokens of held-out documents of a recipe's corpus.

``python tools/measure/score_llm.py smollm2-135m`` reproduces the figure that docs/results/smollm2.md begins with. Whole
documents, and both models on the same bytes, are ``sentcompress bench quality``'s business.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch.nn import functional as F

from sentcompress.modeling.int8 import to_int8
from sentcompress.modeling.llm_loading import load_backbone_tokenizer, load_causal_lm
from sentcompress.recipe import BackboneSpec
from sentcompress.registry import get_registry
from sentcompress.text.corpus import build_corpus


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="what --backbone takes")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each document")
    parser.add_argument("--documents", type=int, default=20, help="documents held out, all scored")
    parser.add_argument("--quantize", action="store_true", help="all its products from 8-bit weights")
    arguments = parser.parse_args()
    spec = BackboneSpec(model=arguments.model)
    tokenizer, lm = load_backbone_tokenizer(spec), load_causal_lm(spec).eval()
    if arguments.quantize:
        to_int8(lm)
    registry = get_registry()
    dataset = registry.create("dataset", "python-package", {"heldout_documents": arguments.documents})
    corpus = build_corpus(dataset, registry.create("segmenter", "regex", {}), tokenizer)
    nats, size = 0.0, 0
    with torch.no_grad():
        for document in corpus.heldout:
            text = corpus.document_text(document)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"][: arguments.tokens]
            logits = lm(torch.tensor([ids])).logits[0, :-1].float()
            nats += float(F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum"))
            size += len(tokenizer.decode(ids[1:]).encode())
    print(f"{arguments.model}: {nats / math.log(2) / size:.4f} bits a byte of {size:,} bytes")


if __name__ == "__main__":
    main()

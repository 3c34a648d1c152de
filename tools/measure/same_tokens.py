"""Do all ways of writing greedily write the same tokens? On prompts of held-out text.

    python tools/measure/same_tokens.py out/strong --prompts 500 --new-tokens 40

Compares, prompt by prompt: the full head and the shortlist, with and without caches, alone and in batches.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sentcompress.benchmark.heldout_text import heldout_sentences
from sentcompress.benchmark.models import ModelFolder, Models
from sentcompress.generation import GenerationSettings, SentenceGenerator

WAYS = [
    ("exact", True, 1),
    ("exact", True, 32),
    ("exact", False, 32),
    ("shortlist-exact", True, 1),
    ("shortlist-exact", True, 32),
    ("shortlist-exact", False, 32),
]
"""Head, use of caches, prompts at a time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--new-tokens", type=int, default=40)
    asked = parser.parse_args()
    place = ModelFolder(asked.folder)
    parts = Models(place.recipe(), place)
    text = heldout_sentences(parts.corpus, 2 * asked.prompts + 8)
    prompts = [text[2 * n : 2 * n + 1 + n % 7] for n in range(asked.prompts)]
    generator = SentenceGenerator(parts.sentence_lm, None)
    first: list[list[list[int]]] = []
    for head, use_cache, size in WAYS:
        settings = GenerationSettings(
            max_new_tokens=asked.new_tokens, stop_threshold=1, head=head, use_cache=use_cache
        )
        written: list[list[list[int]]] = [[] for _ in prompts]
        for begin in range(0, len(prompts), size):
            for number, tokens in generator.continue_sentences(prompts[begin : begin + size], settings):
                written[begin + number].append(tokens)
        first = first or written
        same = sum(a == b for a, b in zip(first, written, strict=True))
        cache = "cached" if use_cache else "uncached"
        print(f"{head}, {cache}, batch {size}: {same} of {len(prompts)} the same as the first", flush=True)
    picked = generator.head("shortlist-exact")
    print(f"shortlist: {picked.fallbacks} of {picked.picked} tokens took the full head")


if __name__ == "__main__":
    main()

"""Cost of uneven sentence lengths in a batch: tokens/s beside sentences that all have the mean length.

    python tools/measure/uneven.py opt-125m --batch-size 32 --new-tokens 92

Uses random weights in the shapes of the recipe `strong`, and sentence lengths of held-out text. Times both in turns and
prints where the time goes.
"""

from __future__ import annotations

import argparse
import statistics

from sentcompress.benchmark.heldout_text import draw_lengths
from sentcompress.benchmark.models import Models
from sentcompress.benchmark.profile import profile
from sentcompress.benchmark.timing import (
    DRAWN_LENGTHS,
    SentenceSystem,
    alternate,
    make_prompts,
    speed_models,
)
from sentcompress.recipe import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("backbone")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=92)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    recipe = load_recipe("strong", [f"backbone.model={asked.backbone}", "backbone.init=random"])
    models = Models(recipe, None)
    timed = speed_models(models)
    lengths = draw_lengths(models.corpus, DRAWN_LENGTHS, recipe.seed)
    uneven = SentenceSystem(timed.model, lengths)
    mean = round(statistics.mean(lengths))
    systems = {"uneven": uneven, f"all {mean}": uneven.with_lengths([mean])}
    prompts = make_prompts(timed.sentences, asked.prompt_tokens, asked.batch_size)
    for system in systems.values():
        system.write(prompts, asked.new_tokens)
    times = alternate(list(systems.values()), prompts, asked.new_tokens, asked.repeats)
    tokens = asked.batch_size * asked.new_tokens
    for name, seconds in zip(systems, zip(*times, strict=True), strict=True):
        print(f"sentences {name}: {tokens / statistics.median(seconds):,.0f} tokens/s")
    lost = [1 - even / odd for odd, even in times]
    print(f"lost to unevenness: {statistics.median(lost):.1%} ({min(lost):.1%} to {max(lost):.1%})")
    for name, system in systems.items():
        for part in profile(system, prompts, asked.new_tokens, 3):
            print(f"{name}: {part.part}: {part.milliseconds_per_token:.3f} ms per token")


if __name__ == "__main__":
    main()

"""How many tokens a step would be written if words were guessed ahead inside a sentence, by guesses that cost nothing.

    python tools/measure/draft_hits.py smollm2-sentence-model

Counted on held-out text, as if the model wrote exactly that: a guess is a token that is verified in the same pass as
the one before it. Two ways to guess: what followed the same words before in this text (prompt lookup), and what follows
them most often in the training text. The second says what any table of word sequences can hope for.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from sentcompress.benchmark.heldout_text import heldout_documents
from sentcompress.benchmark.models import Models
from sentcompress.recipe import load_recipe
from sentcompress.text.corpus import Corpus

END = -1
LONGEST = 3

Guess = Callable[[Sequence[int]], int | None]
"""The next token after a text, or no guess."""


def lookup(words: int) -> Callable[[], Guess]:
    """Guesses what followed the last ``words`` tokens where they stood before."""

    def begin() -> Guess:
        places: dict[tuple[int, ...], int] = {}
        read = 0

        def guess(text: Sequence[int]) -> int | None:
            nonlocal read
            for end in range(max(read, words), len(text)):
                places[tuple(text[end - words : end])] = end
            read = len(text)
            place = places.get(tuple(text[-words:])) if len(text) >= words else None
            return None if place is None else text[place]

        return guess

    return begin


def table(corpus: Corpus) -> Callable[[], Guess]:
    """Guesses what follows the last tokens most often in the training text, by as many of them as it knows."""
    counts: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for document in corpus.train.tolist():
        text = [t for s in corpus.document_sentences(document) for t in corpus.sentence(s).tolist()]
        for place, token in enumerate(text):
            for words in range(1, min(LONGEST, place) + 1):
                counts[tuple(text[place - words : place])][token] += 1
    likeliest = {words: found.most_common(1)[0][0] for words, found in counts.items()}

    def guess(text: Sequence[int]) -> int | None:
        known = (likeliest.get(tuple(text[-words:])) for words in range(LONGEST, 0, -1))
        return next((token for token in known if token is not None), None)

    return lambda: guess


def tokens_a_step(
    documents: Iterable[list[list[int]]], begin: Callable[[], Guess]
) -> tuple[float, float, float]:
    """Tokens a step, share of steps with a guess, share of guesses that were right; end marks count as tokens."""
    tokens = steps = guessed = right = 0
    for sentences in documents:
        guess, text = begin(), []
        for sentence in sentences:
            left = [*sentence, END]
            while left:
                steps += 1
                token = left.pop(0)
                tokens += 1
                if token == END:
                    break
                text.append(token)
                found = guess(text)
                guessed += found is not None
                if found is not None and found == left[0]:
                    right += 1
                    tokens += 1
                    text.append(left.pop(0))
    return tokens / steps, guessed / steps, right / max(1, guessed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe")
    asked = parser.parse_args()
    recipe = load_recipe(asked.recipe, ["backbone.init=random"])
    parts = Models(recipe, None)
    documents = [document.sentences for document in heldout_documents(parts.corpus, recipe.bench)]
    ways = {f"what followed the last {n} tokens in this text": lookup(n) for n in range(1, LONGEST + 1)}
    ways["what follows most often in the training text"] = table(parts.corpus)
    for name, begin in ways.items():
        written, guessed, right = tokens_a_step(documents, begin)
        print(f"{name}: guesses in {guessed:.0%} of steps, {right:.1%} right: {written:.3f} tokens a step")


if __name__ == "__main__":
    main()

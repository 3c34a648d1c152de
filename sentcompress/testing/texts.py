"""Texts for the checks, the same in every run: difficult, generated and long ones; and a tiny tokenizer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

NASTY = (
    "",
    " ",
    "\n",
    "a",
    ".",
    " \t\n ",
    "No mark at the end",
    " Leading and trailing space. ",
    "One. Two.  Three.   Four.",
    "One.\nTwo.\r\nThree.\rFour.\n\n\nFive.\x0b\x0c\x1c\x85\u2028\u2029Six.",
    "e.g. Mr. J. R. Smith paid $3.50 (approx.) at 10 a.m. on http://a.b/c.d?e=f. Did he?!",
    "\"Quoted.\" (Bracketed.) 'Single?' “Curly!” «Angled.» 「角」",
    "...",
    ". . . !!! ??? ?! ;;; --- — – …",
    "....Starts with stops",
    "\ufeffByte order mark. Soft\u00adhyphen. Zero\u200bwidth. No\u00a0break.",
    "e\u0301. a\u0308o\u0308u\u0308. \u0301starts with an accent.",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467. \U0001f44d\U0001f3fd! \U0001f1e9\U0001f1ea",
    "这是一句话。这是第二句！真的吗？是。",
    "これは文です。次の文「引用。」です。",
    "هذه جملة. وهذه أخرى؟ نعم!",
    "यह एक वाक्य है। यह दूसरा है॥",
    "A\x00null. B\x07bell. C\x1bescape.",
    "</s> <pad> <|endoftext|> [SEP] are text.",
    "def f(x):\n    return x.y[0]  # no sentence\n\n```\ncode. here;\n```\n",
    "| a | b. |\n|---|---|\n| 1.5 | 2,5 |\n",
    "- one\n- two.\n  1. three\n\n# Head\nBody.",
    "\\n is not a line end. \\. is not a stop. %s {0} $1 \\1",
    "x" * 2000,
    "word " * 400,
    "a." * 300,
    "((((" * 100 + "))))" * 100,
    "lone \ud800 surrogate. \udfff",
)
"""Short texts that real segmenters have damaged."""

_PARTS = (
    *("the", "nation", "of", "3.5", "Mr.", "e.g.", "U.S.", "I", "naïve", "日本", "語", "\U0001f600", "don't"),
    *(" ", " ", " ", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028"),
    *(
        ".",
        ". ",
        "? ",
        "! ",
        "...",
        "; ",
        ", ",
        "。",
        "！",
        '"',
        "”",
        ")",
        "(",
        "--",
        ":",
        "\u0301",
        "\u200d",
    ),
)

_PROSE = """the people of this nation have seen in every year a greater share of peace and order than Congress
could promise when it first met here under a law that few men had read with care"""
_WORDS = _PROSE.split()
_MARKS = (". ", ". ", ". ", "? ", "! ", "; ", ".\n\n")

HOSTILE = {
    "one endless word": "x",
    "spaces": " ",
    "line ends": "\n",
    "full stops": ".",
    "full stops and spaces": ". ",
    "abbreviations": "A.B.C.",
    "quotation marks and brackets": "(\"'",
    "accents": "e\u0301",
}
"""The unit that each hostile text repeats, by its name in messages."""


def hostile(characters: int) -> dict[str, str]:
    """A text for each entry of HOSTILE, together of about this length.

    Each ends with something else: a search for ``\\s+$`` is fast on spaces alone, but slow if something follows.
    """
    each = max(1, characters // len(HOSTILE) - 2)
    return {what: (unit * (each // len(unit) + 1))[:each] + "x." for what, unit in HOSTILE.items()}


def generated(count: int = 200, seed: int = 0) -> Iterator[str]:
    """Yield short random texts made of what segmenters stumble over."""
    rng = random.Random(seed)
    for _ in range(count):
        yield "".join(rng.choices(_PARTS, k=rng.randint(1, 60)))


def ordinary(characters: int, seed: int = 0) -> str:
    """English-looking text of this length: sentences of 1 to 60 words, most of them short."""
    rng = random.Random(seed)
    written: list[str] = []
    size = 0
    while size < characters:
        words = rng.choices(_WORDS, k=min(60, 1 + int(rng.expovariate(1 / 12))))
        written.append(" ".join(words).capitalize() + rng.choice(_MARKS))
        size += len(written[-1])
    return "".join(written)[:characters]


def tiny_tokenizer(vocab_size: int = 500) -> Any:
    """A byte-level BPE with OPT's special tokens, trained when called; it encodes any text losslessly.

    Args:
        vocab_size: at least 260, for the bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([ordinary(20_000)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )

"""``sentcompress reconstruct``: what of a sentence survives its latent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sentcompress.cli.common import console, examples


def reconstruct(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a SentenceVAE or SentenceLM.")],
    sentence: Annotated[str, typer.Argument(help="Text; it is cut into sentences as in training.")],
) -> None:
    """Encode SENTENCE, write it again from its latents alone, and show both side by side.

    [-lost-] stands in the original only, {+added+} in the reconstruction only.
    """
    from sentcompress.errors import InputError

    if not sentence.strip():
        raise InputError("the sentence is empty", fix="give some text to reconstruct")

    from rich.table import Table
    from rich.text import Text

    from sentcompress.generation import differences
    from sentcompress.generation import reconstruct as write_again
    from sentcompress.modeling.loading import (
        load_saved_tokenizer,
        load_segmenter,
        load_sentence_lm,
        load_vae,
        read_config,
    )
    from sentcompress.text.segmentation import sentences_to_ids

    is_vae = read_config(folder)["model_type"] == "sentence-vae"
    vae = load_vae(folder) if is_vae else load_sentence_lm(folder).vae
    tokenizer = load_saved_tokenizer(folder)
    pieces = sentences_to_ids(sentence, load_segmenter(vae.config, tokenizer), tokenizer)
    results = write_again(vae, tokenizer, [ids for _, ids in pieces])
    table = Table("sentence", "reconstruction", "what was lost", "tokens right")
    for result in results:
        shown = Text()
        for part in differences(tokenizer, result):
            mark = {"kept": "{}", "lost": "[-{}-]", "added": "{{+{}+}}"}[part.kind]
            shown.append(mark.format(part.text), style={"lost": "red", "added": "green"}.get(part.kind, ""))
        right = sum(a == b for a, b in zip(result.reference_ids, result.hypothesis_ids, strict=False))
        table.add_row(
            Text(result.reference), Text(result.hypothesis), shown, f"{right} of {len(result.reference_ids)}"
        )
    console().print(table)


def add_to(app: typer.Typer) -> None:
    app.command(
        "reconstruct",
        epilog=examples('sentcompress reconstruct out/quickstart/vae "The people are the Government."'),
    )(reconstruct)

"""``sentcompress lm-eval``: EleutherAI's lm-evaluation-harness, with sentence models."""

from __future__ import annotations

import typer

from sentcompress.cli.common import examples


def lm_eval(context: typer.Context) -> None:
    """Evaluate a model with EleutherAI's lm-evaluation-harness (needs the extra 'eval').

    All arguments go to the harness ('lm-eval run --help' lists its options). '--model sentcompress' loads a SentenceLM
    from a folder, '--model hf' any token-level model. Two tasks need no network: sentcompress_heldout and
    sentcompress_sotu_choice.
    """
    from sentcompress.benchmark.lm_eval import run

    run(context.args)


def add_to(app: typer.Typer) -> None:
    app.command(
        "lm-eval",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        epilog=examples(
            "sentcompress lm-eval --model sentcompress --model_args pretrained=out/quickstart/graft "
            "--tasks sentcompress_sotu_choice",
            "sentcompress lm-eval --model hf --model_args pretrained=out/quickstart/baseline,dtype=float32 "
            "--tasks sentcompress_sotu_choice",
        ),
    )(lm_eval)

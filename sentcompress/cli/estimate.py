"""``sentcompress estimate``: what a recipe would bring, and on which device."""

from __future__ import annotations

from typing import Annotated

import typer

from sentcompress.cli.common import BackboneOption, RecipeArgument, SetOption, console, examples, finite
from sentcompress.cli.train import resolve


def estimate(
    recipe: RecipeArgument,
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            help="cpu (measured now; takes seconds), or h100, a100, a100-40, 4090 (from data sheets).",
        ),
    ] = "cpu",
    backbone: BackboneOption = None,
    sentence_tokens: Annotated[
        float,
        typer.Option(
            min=1.0, max=1e6, callback=finite, help="Mean tokens per sentence; 'bench data' measures yours."
        ),
    ] = 15.0,
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="NxDEVICE",
            help="Predict training on these devices, such as 4xA100 or 1xcpu: memory, time and what fits.",
        ),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1e6, callback=finite, help="Price of one device per hour; adds the cost of training."
        ),
    ] = None,
    set_: SetOption = None,
) -> None:
    """Predict speed, memory and training time from shapes alone.

    Shows the figures of the token-level baseline and of the recipe's opponents beside them. Loads no data and no
    weights. Batch sizes and the numbers of prompt tokens and new tokens come from the recipe's bench section. With
    --devices: the memory that each device needs to train each stage, whether that requires FSDP or gradient
    checkpointing, and the hours of all stages together.
    """
    from sentcompress.errors import InputError
    from sentcompress.estimate.decoding import estimate as predict
    from sentcompress.estimate.decoding import estimate_table
    from sentcompress.estimate.devices import device as find
    from sentcompress.estimate.equal_cost import meta_opponent
    from sentcompress.estimate.plan import token_budget
    from sentcompress.estimate.shapes import meta_models
    from sentcompress.table import as_rich

    resolved = resolve(recipe, set_, backbone=backbone)
    trains = "an LLM for a sentence memory" if resolved.memory is not None else ""
    trains = "an LLM from scratch" if resolved.pretrain is not None else trains
    if trains and devices is not None:
        raise InputError(
            f"--devices is for training a SentenceVAE, a graft and its baseline; recipe '{recipe}' trains {trains}",
            fix="give a recipe that grafts an LLM; 'sentcompress run RECIPE --dry-run' counts the tokens of this one",
        )
    if trains:
        raise InputError(
            f"recipe '{recipe}' trains {trains}, so there is no sentence model to compare with it",
            fix="give a recipe that grafts an LLM",
        )
    if price is not None and devices is None:
        raise InputError("--price needs --devices", fix="add --devices, such as --devices 4xA100")
    if devices is not None:
        from sentcompress.estimate.training_time import mode_tables, parse_devices

        for table in mode_tables(resolved, *parse_devices(devices), sentence_tokens, price):
            console().print(as_rich(table))
        return
    model, baseline = meta_models(resolved)
    opponents = {name: meta_opponent(resolved, name, sentence_tokens) for name in resolved.opponents}
    machine = find(device)
    bench = resolved.bench
    estimates = [
        predict(
            model,
            baseline,
            machine,
            batch_size=size,
            prompt_tokens=bench.prompt_tokens,
            new_tokens=bench.new_tokens,
            sentence_tokens=sentence_tokens,
            opponents={name: llm for name, (_, llm) in opponents.items()},
        )
        for size in bench.batch_sizes
    ]
    shapes = {name: shape for name, (shape, _) in opponents.items()}
    tokens = token_budget(resolved)["graft"]
    console().print(as_rich(estimate_table(estimates, machine, sentence_tokens, tokens, shapes)))


def add_to(app: typer.Typer) -> None:
    app.command(
        "estimate",
        epilog=examples(
            "sentcompress estimate strong",
            "sentcompress estimate strong --backbone opt-1.3b --device a100",
            "sentcompress estimate paper/sllm-1.3b-h1 --devices 4xA100 --price 1.5",
            "sentcompress estimate quickstart --sentence-tokens 20 --set 'bench.batch_sizes=[1,64]'",
        ),
    )(estimate)

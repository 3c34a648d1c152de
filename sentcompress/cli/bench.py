"""``sentcompress bench``: one subcommand a measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sentcompress.cli import bench_speed
from sentcompress.cli.bench_common import FolderArgument, ResultsOption, measure
from sentcompress.cli.common import SetOption, console, examples

bench = typer.Typer(rich_markup_mode=None, no_args_is_help=True)

ByOption = Annotated[
    list[str] | None,
    typer.Option(
        "--by",
        metavar="NAMES",
        help="Break quality down by position, length, index (commas between them); else the recipe's bench.by.",
    ),
]
JudgeOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="LLM that scores the text: an alias (smollm2-135m), hub name, folder or GGUF file; else the recipe's "
        "bench.text_judge.",
    ),
]


@bench.callback()
def options() -> None:
    """Measure models beside their token-level twins; writes results.json and report.html.

    What is measured, and how, is in docs/measures.md.
    """


@bench.command(
    "all",
    epilog=examples(
        "sentcompress bench all out/quickstart", "sentcompress bench all out/mine --set bench.repeats=9"
    ),
)
def all_(
    folder: FolderArgument, by: ByOption = None, out: ResultsOption = None, set_: SetOption = None
) -> None:
    """Measure every part the recipe names and write the report."""
    measure(None, folder, out, set_, by)


@bench.command(
    "quality",
    epilog=examples(
        "sentcompress bench quality out/quickstart",
        "sentcompress bench quality out/quickstart --by position,length,index",
    ),
)
def quality(
    folder: FolderArgument, by: ByOption = None, out: ResultsOption = None, set_: SetOption = None
) -> None:
    """Bits per byte and perplexity on held-out documents.

    Refuses a model that sees the future, and a scorer that cannot prove it charged every byte once. --by shows where
    the loss is: by position of the token in its sentence, by the sentence's length, by its index in the document.
    """
    measure(["causality", "quality"], folder, out, set_, by)


@bench.command(
    "text",
    epilog=examples(
        "sentcompress bench text out/quickstart --judge smollm2-135m",
        "sentcompress bench text out/quickstart --set bench.text_prompts=8 --set bench.text_top_p=0.9",
    ),
)
def text(
    folder: FolderArgument, judge: JudgeOption = None, out: ResultsOption = None, set_: SetOption = None
) -> None:
    """Repetition and variety of what the models write, and a judge's bits.

    The sentence model, its equal-data baseline and the backbone continue the same beginnings of held-out documents by
    as many tokens, drawn alike; the human's own continuation stands beside them. Refuses a model that sees the future.
    """
    measure(["causality", "text"], folder, out, set_, judge=judge)


@bench.command("reconstruct", epilog=examples("sentcompress bench reconstruct out/quickstart/vae"))
def reconstruct(folder: FolderArgument, out: ResultsOption = None, set_: SetOption = None) -> None:
    """How much of held-out sentences survives their latents, free-running."""
    measure(["reconstruct"], folder, out, set_)


bench_speed.add_to(bench)


@bench.command("causality", epilog=examples("sentcompress bench causality out/quickstart/graft"))
def causality(folder: FolderArgument, out: ResultsOption = None, set_: SetOption = None) -> None:
    """Prove that later sentences change nothing before them. Fails (code 1) for a model that leaks."""
    from sentcompress.benchmark.measurements.causality import require_causal

    results = measure(["causality"], folder, out, set_)
    if results.causality:
        require_causal(results.causality)


@bench.command("data", epilog=examples("sentcompress bench data out/quickstart"))
def data(folder: FolderArgument, out: ResultsOption = None, set_: SetOption = None) -> None:
    """Sentence lengths, padding of the batches, tokens that cutting costs."""
    measure(["data"], folder, out, set_)


@bench.command(
    "segments",
    epilog=examples("sentcompress bench segments", "sentcompress bench segments --markdown > segments.md"),
)
def segments(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
) -> None:
    """Score the presets of the regex segmenter on the labelled hard cases."""
    from sentcompress.benchmark.measurements.segments import regex_presets, render_markdown, score_segmenters

    text = render_markdown(score_segmenters(regex_presets()))
    if markdown:
        typer.echo(text)
        return
    from rich.markdown import Markdown

    console().print(Markdown(text))


@bench.command(
    "compare",
    epilog=examples(
        "sentcompress bench compare out/quickstart out/mine", "sentcompress bench compare a.json b.json"
    ),
)
def compare(
    results: Annotated[list[Path], typer.Argument(metavar="A B ...", help="Folders or results.json files.")],
) -> None:
    """Put several results side by side."""
    from sentcompress.benchmark.compare import compare as put_side_by_side
    from sentcompress.benchmark.compare import render_comparison, warnings
    from sentcompress.benchmark.results import read_results

    names, rows = put_side_by_side(results)
    render_comparison(names, rows, console())
    for warning in warnings([read_results(path) for path in results]):
        typer.echo(f"careful: {warning}")


@bench.command(
    "scaling-law",
    epilog=examples(
        "sentcompress sweep quickstart --grid graft.steps=60,120,240,480 --grid seed=0,1 --out out/budgets",
        "sentcompress bench scaling-law out/budgets --out out/scaling",
        "sentcompress bench scaling-law out/small out/medium out/large --out out/scaling",
        "sentcompress bench scaling-law docs/results/scaling-law.json out/mine --out out/scaling",
    ),
)
def scaling_law(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER",
            help="Folders of finished runs, or of sweeps of them; a scaling-law.json adds the runs of an earlier law.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the results go.")],
) -> None:
    """Fit bits per byte against tokens and parameters, for the sentence model and its equal-data twin.

    Does the gap between them close with more tokens or a larger backbone? All runs must be scored on the same held-out
    bytes; seeds of one size and budget are averaged. Writes scaling-law.json, scaling-law.md and scaling-law.png.
    """
    from sentcompress.studies.scaling_law import scaling_law as fit
    from sentcompress.studies.scaling_plots import require_matplotlib
    from sentcompress.studies.scaling_report import write
    from sentcompress.studies.scaling_tables import render

    require_matplotlib()
    law = fit(sources)
    page = write(law, out)
    render(law, console())
    typer.echo(f"scaling law: {page}")


def add_to(app: typer.Typer) -> None:
    app.add_typer(
        bench,
        name="bench",
        epilog=examples(
            "sentcompress bench all out/quickstart",
            "sentcompress bench speed --backbone opt-125m --init random",
            "sentcompress bench compare out/quickstart out/mine",
        ),
    )

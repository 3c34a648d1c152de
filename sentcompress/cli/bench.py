"""``sentcompress bench``: one subcommand a measurement."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sentcompress.cli.common import BackboneOption, SetOption, console, examples

if TYPE_CHECKING:
    from sentcompress.benchmark.results import Results
    from sentcompress.recipe import Recipe

bench = typer.Typer(rich_markup_mode=None, no_args_is_help=True)

FolderArgument = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", help="Folder of a run (out/quickstart) or of a model (out/quickstart/graft)."
    ),
]
OptionalFolder = Annotated[
    Path | None,
    typer.Argument(metavar="[DIR]", help="Folder of a run or model; not needed with --init random."),
]
ResultsOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Where results go.", show_default="bench in the folder"),
]
InitOption = Annotated[
    Literal["random"] | None,
    typer.Option(help="Measure random weights in the shapes of --backbone: no training, no download."),
]
RecipeOption = Annotated[
    str, typer.Option(metavar="RECIPE", help="Recipe to take text and shapes from, without DIR.")
]
DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"] | None,
    typer.Option(help="Where to measure; else the recipe's bench.device."),
]
DtypeOption = Annotated[
    Literal["fp32", "bf16", "fp16"] | None,
    typer.Option(help="Weights of both models; else the recipe's bench.dtype."),
]
HeadOption = Annotated[
    Literal["auto", "exact", "shortlist-exact"] | None,
    typer.Option(
        help="How the likeliest token is found; all write the same tokens. Else the recipe's bench.head."
    ),
]
QuantizeOption = Annotated[
    str | None,
    typer.Option(
        metavar="PARTS",
        help="Round weights of encoder, backbone, decoder (commas between them) to 8 bits; else bench.quantize.",
    ),
]
ProfileOption = Annotated[
    bool, typer.Option("--profile", help="Also show where a token's time goes, in both models.")
]
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
    _measure(None, folder, out, set_, by)


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
    _measure(["causality", "quality"], folder, out, set_, by)


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
    _measure(["causality", "text"], folder, out, set_, judge=judge)


@bench.command("reconstruct", epilog=examples("sentcompress bench reconstruct out/quickstart/vae"))
def reconstruct(folder: FolderArgument, out: ResultsOption = None, set_: SetOption = None) -> None:
    """How much of held-out sentences survives their latents, free-running."""
    _measure(["reconstruct"], folder, out, set_)


@bench.command(
    "speed",
    epilog=examples(
        "sentcompress bench speed out/quickstart",
        "sentcompress bench speed --backbone opt-125m --init random --out out/speed-125m",
        "sentcompress bench speed out/quickstart --profile --quantize decoder,encoder",
        "sentcompress bench speed --backbone opt-1.3b --init random --device cuda --dtype bf16",
        "sentcompress bench speed out/quickstart --set 'bench.batch_sizes=[1,4,16]'",
    ),
)
def speed(
    folder: OptionalFolder = None,
    backbone: BackboneOption = None,
    init: InitOption = None,
    recipe: RecipeOption = "strong",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    head: HeadOption = None,
    quantize: QuantizeOption = None,
    profile: ProfileOption = False,
    out: ResultsOption = None,
    set_: SetOption = None,
) -> None:
    """Tokens/s, time to first token and break-even beside the backbone's own generate."""
    chosen = _overrides(device=device, dtype=dtype, head=head, profile=profile or None)
    chosen += [f"bench.quantize=[{quantize}]"] if quantize is not None else []
    _measure_shapes("speed", folder, backbone, init, recipe, out, [*chosen, *(set_ or [])])


def _overrides(**options: Any) -> list[str]:
    """Fields of ``bench`` that were given as options."""
    return [f"bench.{name}={value}".lower() for name, value in options.items() if value is not None]


@bench.command(
    "memory",
    epilog=examples(
        "sentcompress bench memory out/quickstart",
        "sentcompress bench memory --backbone opt-1.3b --init random --out out/memory-1.3b",
    ),
)
def memory(
    folder: OptionalFolder = None,
    backbone: BackboneOption = None,
    init: InitOption = None,
    recipe: RecipeOption = "strong",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    out: ResultsOption = None,
    set_: SetOption = None,
) -> None:
    """Cache bytes a token, slope of allocated memory, longest text in a budget."""
    chosen = _overrides(device=device, dtype=dtype)
    _measure_shapes("memory", folder, backbone, init, recipe, out, [*chosen, *(set_ or [])])


@bench.command(
    "sweep",
    epilog=examples(
        "sentcompress bench sweep out/quickstart",
        "sentcompress bench sweep --backbone opt-125m --init random --batch-sizes 1,16 --sentence-tokens 5,15,30",
    ),
)
def sweep(
    folder: OptionalFolder = None,
    backbone: BackboneOption = None,
    init: InitOption = None,
    recipe: RecipeOption = "strong",
    batch_sizes: Annotated[str, typer.Option(metavar="N,N", help="Texts written together.")] = "1,8",
    prompt_tokens: Annotated[str, typer.Option(metavar="N,N", help="Tokens of the prompts.")] = "32,128",
    sentence_tokens: Annotated[
        str, typer.Option(metavar="N,N", help="Tokens of each sentence.")
    ] = "2,8,16,32",
    out: ResultsOption = None,
    set_: SetOption = None,
) -> None:
    """Find the break-even: speed over batch size, prompt length and sentence length.

    Names what to take instead where the sentence model is slower. New tokens and repeats are the recipe's
    bench.new_tokens and bench.repeats.
    """
    from sentcompress.benchmark.parts import Folder, Parts
    from sentcompress.benchmark.speed_models import speed_models
    from sentcompress.benchmark.speed_sweep import sweep_speed, table, write
    from sentcompress.benchmark.tables import as_rich

    sizes = _numbers("--batch-sizes", batch_sizes)
    overrides = [*(set_ or []), f"bench.batch_sizes={sizes}"]
    if folder is not None:
        _only_folder(backbone, init)
        place = Folder(folder)
        parts = Parts(place.recipe(overrides), place)
    else:
        parts = Parts(_random_recipe(recipe, backbone, init, overrides), None)
    timed = speed_models(parts)
    found = sweep_speed(
        timed.model,
        timed.backbone,
        sentences=timed.sentences,
        settings=parts.recipe.bench,
        bos_token_id=timed.bos_token_id,
        prompt_tokens=_numbers("--prompt-tokens", prompt_tokens),
        sentence_tokens=_numbers("--sentence-tokens", sentence_tokens),
    )
    target = out or (folder / "bench" if folder else _bench_folder(parts.recipe.backbone.model))
    console().print(as_rich(table(found)))
    typer.echo(f"figures: {write(found, target)}")


def _numbers(option: str, text: str) -> list[int]:
    from sentcompress.errors import InputError

    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise InputError(f"{option}: '{text}' is no list of numbers", fix="write them like 1,8,32")
    return numbers


@bench.command("causality", epilog=examples("sentcompress bench causality out/quickstart/graft"))
def causality(folder: FolderArgument, out: ResultsOption = None, set_: SetOption = None) -> None:
    """Prove that later sentences change nothing before them. Fails (code 1) for a model that leaks."""
    from sentcompress.benchmark.causality import require_causal

    results = _measure(["causality"], folder, out, set_)
    if results.causality:
        require_causal(results.causality)


@bench.command("data", epilog=examples("sentcompress bench data out/quickstart"))
def data(folder: FolderArgument, out: ResultsOption = None, set_: SetOption = None) -> None:
    """Sentence lengths, padding of the batches, tokens that cutting costs."""
    _measure(["data"], folder, out, set_)


@bench.command(
    "segments",
    epilog=examples("sentcompress bench segments", "sentcompress bench segments --markdown > segments.md"),
)
def segments(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
) -> None:
    """Score the presets of the regex segmenter on the labelled hard cases."""
    from sentcompress.benchmark.segments import regex_presets, render_markdown, score_segmenters

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
    ),
)
def scaling_law(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER", help="Folders of finished runs, or of sweeps of them."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the results go.")],
) -> None:
    """Fit bits per byte against tokens and parameters, for the sentence model and its equal-data twin.

    Does the gap between them close with more tokens or a larger backbone? All runs must be scored on the same held-out
    bytes; seeds of one size and budget are averaged. Writes scaling-law.json, scaling-law.md and scaling-law.png.
    """
    from sentcompress.benchmark.scaling.law import scaling_law as fit
    from sentcompress.benchmark.scaling.plots import require_matplotlib
    from sentcompress.benchmark.scaling.report import write
    from sentcompress.benchmark.scaling.tables import render

    require_matplotlib()
    law = fit(folders)
    page = write(law, out)
    render(law, console())
    typer.echo(f"scaling law: {page}")


def _measure(
    parts: list[str] | None,
    folder: Path,
    out: Path | None,
    overrides: list[str] | None,
    by: list[str] | None = None,
    judge: str | None = None,
) -> Results:
    from sentcompress.benchmark.parts import Folder
    from sentcompress.benchmark.runner import run_bench

    place = Folder(folder)
    target = out or place.path / "bench"
    results = run_bench(parts, place, place.recipe(overrides), target, by=by, judge=judge)
    show(results, target, parts)
    return results


def _measure_shapes(
    part: str,
    folder: Path | None,
    backbone: str | None,
    init: str | None,
    recipe: str,
    out: Path | None,
    overrides: list[str] | None,
) -> None:
    """Measure a trained model, or random weights where there is none."""
    if folder is not None:
        _only_folder(backbone, init)
        _measure([part], folder, out, overrides)
        return
    from sentcompress.benchmark.runner import run_bench

    resolved = _random_recipe(recipe, backbone, init, overrides)
    target = out or _bench_folder(resolved.backbone.model)
    show(run_bench([part], None, resolved, target), target, [part])


def _only_folder(backbone: str | None, init: str | None) -> None:
    from sentcompress.errors import InputError

    if backbone is not None or init is not None:
        raise InputError("give either DIR, or --backbone with --init random", fix="leave one of them out")


def _random_recipe(
    recipe: str, backbone: str | None, init: str | None, overrides: list[str] | None
) -> Recipe:
    from sentcompress.cli.experiment import resolve
    from sentcompress.errors import InputError

    if init is None:
        raise InputError(
            "no folder of a model was given", fix="give DIR, or add --init random to measure random weights"
        )
    return resolve(recipe, [*(overrides or []), "backbone.init=random"], backbone=backbone)


def _bench_folder(model: str) -> Path:
    return Path("out") / f"bench-{Path(model).name}"


def show(results: Results, target: Path, parts: list[str] | None = None) -> None:
    """Print the tables (of the parts just measured), then where the report is."""
    from sentcompress.benchmark.tables import render

    if parts is not None:
        kept = [row for row in results.rows if row.part in parts]
        skipped = [entry for entry in results.skipped if entry.part in parts]
        results = results.model_copy(update={"rows": kept, "skipped": skipped})
    render(results, console())
    typer.echo(f"report: {target / 'report.html'}")


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

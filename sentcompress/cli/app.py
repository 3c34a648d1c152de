"""The command line: all commands, and ``main``, the console entry point."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from sentcompress import __version__
from sentcompress.cli import (
    bench,
    estimate,
    generate,
    harness,
    launch,
    plugins,
    recipes,
    run,
    serve,
    streams,
    sweep,
    train,
    validate,
    watch,
)
from sentcompress.cli.common import examples
from sentcompress.cli.error_messages import DEBUG_VARIABLE, debugging, report
from sentcompress.distributed import check_environment, exit_on_sigterm, exit_process, exit_with_the_launcher
from sentcompress.files import printable
from sentcompress.packages import leave_out_broken_packages

app = typer.Typer(
    name="sentcompress",
    help="Turn a decoder LLM into one that reads and writes a sentence at a time: train a SentenceVAE, graft it "
    "onto the LLM, and measure the result.",
    epilog=examples(
        "sentcompress run quickstart",
        "sentcompress train-vae --data corpus/ --set train_vae.steps=2000",
        "sentcompress COMMAND --help",
    ),
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help, since it is copied into docs/help.md
    pretty_exceptions_enable=False,  # --debug shows tracebacks
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"sentcompress {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            help="Show tracebacks; works anywhere on the command line. Same as SENTCOMPRESS_DEBUG=1.",
        ),
    ] = False,
    version: Annotated[  # noqa: ARG001 - typer passes it to its callback
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"


# The order here is the order of --help.
run.add_to(app)
sweep.add_to(app)
train.add_to(app)
launch.add_to(app)
watch.add_to(app)
generate.add_to(app)
serve.add_to(app)
bench.add_to(app)
harness.add_to(app)
recipes.add_to(app)
validate.add_to(app)
estimate.add_to(app)
plugins.add_to(app)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its code; failures become messages on stderr."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # After "run again with --debug", users add it at the end, where typer expects options of the command.
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if "--debug" in arguments[:end]:
        os.environ[DEBUG_VARIABLE] = "1"
        arguments = [a for i, a in enumerate(arguments) if a != "--debug" or i > end]
    if not debugging():
        # Users do not need to see which line of the source raised a warning.
        warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(str(message))}\n"
    streams.prepare()
    leave_out_broken_packages()
    code: int | str | None = 0
    try:
        try:
            with exit_on_sigterm():
                exit_with_the_launcher()
                check_environment()
                app(arguments, prog_name="sentcompress")
        except SystemExit as ended:
            code = ended.code
        sys.stdout.flush()
    except BrokenPipeError:
        code = 1  # as click has it; the reader of stdout has had enough
    except Exception as error:
        code = report(error)
    except KeyboardInterrupt:
        code = 130
    exit_process(code or 0)

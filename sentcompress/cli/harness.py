"""``sentcompress lm-eval``: EleutherAI's lm-evaluation-harness, with sentence models."""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from sentcompress.cli.common import examples
from sentcompress.cli.error_messages import causes, first_line
from sentcompress.errors import InputError, OfflineError, SentCompressError, StorageError, did_you_mean
from sentcompress.files import expand_home, read_json

TASKS = Path(__file__).parents[1] / "benchmark" / "lm_eval_tasks"
COMMANDS = ("run", "ls", "validate")
"""Of the harness; ``run`` where none is given."""
_OFFLINE = {"ConnectionError", "ConnectError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}
"""Errors of datasets, huggingface_hub and httpx, by name: their modules take seconds to import."""
_REFUSALS = (AssertionError, FileNotFoundError, KeyError, NotImplementedError, TypeError, ValueError)
"""What the harness raises itself where an option is wrong."""


def lm_eval(
    context: typer.Context,
    task_folder: Annotated[
        bool,
        typer.Option(
            "--task-folder",
            help="Print the folder of the task files and exit; for --tasks and --include_path of 'lm_eval'.",
        ),
    ] = False,
) -> None:
    """Evaluate a model with EleutherAI's lm-evaluation-harness (needs the extra 'eval').

    All arguments go to the harness ('lm-eval run --help' lists its options). '--model sentcompress' loads a SentenceLM
    from a folder, '--model hf' any token-level model. Two tasks need no network: sentcompress_heldout and
    sentcompress_sotu_choice. 'sentcompress lm-eval ls tasks' lists all tasks.
    """
    if task_folder:
        typer.echo(TASKS)
    else:
        run_harness(context.args)


def run_harness(arguments: Sequence[str]) -> None:
    """The harness's own command line, with our model and our tasks known to it.

    Args:
        arguments: as the harness takes them; an ``--include_path`` among them replaces that of our tasks.

    Raises:
        InputError: an option or its value is wrong.
        OfflineError: a data set or model of the hub cannot be reached.
        StorageError: the results could not be written.
    """
    importlib.import_module("sentcompress.benchmark.lm_eval")  # registers the model
    from lm_eval.__main__ import HarnessCLI, setup_logging

    command, rest = "run", list(arguments)
    if rest and rest[0] in COMMANDS:
        command = rest.pop(0)
    before = sys.argv
    sys.argv = ["lm-eval", command, "--include_path", str(TASKS), *rest]
    try:
        setup_logging()
        harness = HarnessCLI()
        options = harness.parse_args()
        if command == "run":
            check_options(options)
        harness.execute(options)
    except Exception as error:
        explained = explain_refusal(error)
        if explained is None:
            raise
        raise explained from error
    finally:
        sys.argv = before


def check_options(options: argparse.Namespace) -> None:
    """Refuse what the harness would find out late, or not at all.

    Raises:
        InputError: names the option.
        StorageError: the folder of ``--output_path`` or ``--use_cache`` cannot be written.
    """
    limit = getattr(options, "limit", None)
    if limit is not None and not 0 < limit < math.inf:
        raise InputError(
            f"--limit {limit:g}: must be above 0",
            fix="give a number of items, such as 100, or a share of them, such as 0.1",
        )
    if (getattr(options, "num_fewshot", None) or 0) < 0:
        raise InputError(f"--num_fewshot {options.num_fewshot}: must be 0 or more")
    if output := getattr(options, "output_path", None):
        path = Path(output)
        _require_writable("--output_path", path.parent if path.suffix == ".json" else path)
    if cache := getattr(options, "use_cache", None):
        _require_writable("--use_cache", Path(cache).parent)
    pretrained = (getattr(options, "model_args", None) or {}).get("pretrained")
    if (options.model or "hf") in ("hf", "hf-auto", "huggingface") and isinstance(pretrained, str):
        about = read_json(Path(expand_home(pretrained)) / "config.json")
        if isinstance(about, dict) and about.get("model_type") == "sentence-lm":
            raise InputError(
                f"'{pretrained}' holds a SentenceLM, which the harness's model 'hf' cannot load",
                fix="add --model sentcompress",
            )


def _require_writable(option: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StorageError(
            f"{option}: nothing can be written to '{folder}': {error.strerror}", fix="choose another folder"
        ) from None


def explain_refusal(error: Exception) -> SentCompressError | None:
    """What a user can do about an error of the harness; None if it is none of the harness's own."""
    chain = list(causes(error, hidden=True))  # the harness hides some
    if any(isinstance(link, SentCompressError) for link in chain):
        return None
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return InputError(
            f"lm-eval: the package '{error.name}' is needed and not installed",
            fix=f"pip install {error.name}",
        )
    if any(type(link).__name__ in _OFFLINE for link in chain):
        return OfflineError(
            f"lm-eval: something must be downloaded, and the hub cannot be reached: {first_line(text)}",
            fix="run once with a network (and without HF_HUB_OFFLINE), which fills the cache; "
            "sentcompress_sotu_choice and sentcompress_heldout need no network",
        )
    if type(error).__name__ == "DatasetNotFoundError":
        return InputError(
            f"lm-eval: {first_line(text)}",
            fix="check the task's dataset_path; 'hf auth login' if it is gated",
        )
    if "YAMLError" in (kind.__name__ for kind in type(error).__mro__):
        return InputError(f"lm-eval: a file is not valid YAML: {text}")
    files = [Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)]
    if any(file.name == "samplers.py" for file in files):
        return InputError(
            f"--num_fewshot: the task has too few examples for it ({first_line(text)})",
            fix="lower --num_fewshot",
        )
    if not files or "lm_eval" not in files[-1].parts or not isinstance(error, _REFUSALS):
        return None
    if text.startswith("Tasks not found:"):
        return _no_such_task(error, text)
    return InputError(
        f"lm-eval: {text or type(error).__name__}",
        fix="'lm-eval run --help' explains the options; --debug shows where this was raised",
    )


def _no_such_task(error: Exception, text: str) -> InputError:
    # The harness's index of tasks took seconds to build: it is taken from where the error was raised.
    locals_ = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    known: list[str] = next((f["task_manager"].all_tasks for f in locals_ if "task_manager" in f), [])
    names = [name.strip() for name in text.partition(":")[2].split(",")]
    near = "".join(did_you_mean(name, known) for name in names)
    return InputError(
        f"--tasks: no task is called {', '.join(names)}.{near}",
        fix="'sentcompress lm-eval ls tasks' lists them",
    )


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

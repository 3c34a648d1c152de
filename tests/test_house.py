"""The rules that keep the package easy to find your way in, and its words plain. CONTRIBUTING.md lists them."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sentcompress"
BUILT_INS = {"segmenters", "fusions", "backbones", "datasets", "metrics", "memories"}
"""Their files are in the keys of the token cache: they stay as they are."""
SHORTEST, LONGEST = 60, 450
ATTRIBUTES = 12
SHORT = {
    "__main__.py": "python -m sentcompress needs a file of this name",
    "hookspecs.py": "plugin authors read the whole contract in it",
    "serving/try_page.py": "the page itself is in serving/page/, as HTML, CSS and JavaScript",
    "testing/pytest_plugin.py": "pytest loads it by name in every project, so it imports nothing else",
}
"""Files that may be short, each with its reason."""
MEASUREMENTS = sorted(path.stem for path in (PACKAGE / "benchmark/measurements").glob("[!_]*.py"))
STAGES = {"pretrain", "vae", "graft", "memory", "baseline"}


def package_files() -> Iterator[tuple[str, Path]]:
    """Name below the package and path of every module but those of built-ins and templates."""
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE)
        if file.parts[0] not in BUILT_INS and "templates" not in file.parts:
            yield file.as_posix(), path


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def test_no_basename_stands_twice():
    names = defaultdict(list)
    for file, path in package_files():
        if path.name != "__init__.py":
            names[path.name].append(file)
    assert not [files for files in names.values() if len(files) > 1]


def test_files_are_neither_scraps_nor_attics():
    lengths = {
        file: len(path.read_text(encoding="utf-8").splitlines())
        for file, path in package_files()
        if path.name != "__init__.py" and file.split("/")[0] not in ("contracts", "cli")
    }
    wrong = {file: n for file, n in lengths.items() if not SHORTEST <= n <= LONGEST and file not in SHORT}
    assert not wrong, f"files of {SHORTEST} to {LONGEST} lines, please: {wrong}"
    assert all(lengths[file] < SHORTEST for file in SHORT), "take files that are long enough out of SHORT"


def attributes(kind: ast.ClassDef) -> set[str]:
    """What a class assigns to ``self``, and the fields of a dataclass."""
    found = {
        node.attr
        for node in ast.walk(kind)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    if any("dataclass" in ast.unparse(decorator) for decorator in kind.decorator_list):
        fields = (node.target for node in kind.body if isinstance(node, ast.AnnAssign))
        found |= {target.id for target in fields if isinstance(target, ast.Name)}
    return found


def test_no_class_holds_too_much():
    """Pydantic models assign nothing to self; a transformers configuration is a list of settings."""
    wrong = {}
    for file, path in package_files():
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.ClassDef) or "PretrainedConfig" in map(ast.unparse, node.bases):
                continue
            if len(found := attributes(node)) > ATTRIBUTES:
                wrong[f"{file}: {node.name}"] = sorted(found)
    assert not wrong


# ---- each thing is named in one file


def names_together(names: set[str], at_least: int) -> dict[str, list[int]]:
    """Files and lines of lists, tuples, sets and Literals that name several of these."""
    found = defaultdict(list)
    for file, path in package_files():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.List | ast.Tuple | ast.Set):
                constants = {part.value for part in node.elts if isinstance(part, ast.Constant)}
                if len(constants & names) >= at_least:
                    found[file].append(node.lineno)
    return dict(found)


def test_a_measurement_is_named_in_its_file():
    """What runs, shows, compares and calls measurements takes them from the folder."""
    assert len(MEASUREMENTS) >= 8
    listed = names_together(set(MEASUREMENTS), 2)
    assert set(listed) <= {"recipe/sections.py"}, f"a default is all that may name several: {listed}"
    derived = ("measurement.py", "results.py", "runner.py", "report.py", "compare.py")
    for path in [PACKAGE / "pipeline.py", *(PACKAGE / "benchmark" / name for name in derived)]:
        assert "benchmark.measurements." not in re.sub(r"measurements\.\{name\}", "", path.read_text()), path
    for path in (PACKAGE / "cli").glob("*.py"):
        assert "benchmark.measurements." not in path.read_text(encoding="utf-8"), path
    for name in MEASUREMENTS:
        kinds = [
            node.name
            for node in parsed(PACKAGE / f"benchmark/measurements/{name}.py").body
            if isinstance(node, ast.ClassDef) and "Measurement" in " ".join(map(ast.unparse, node.bases))
        ]
        assert len(kinds) == 1, f"measurements/{name}.py holds one measurement: {kinds}"


def test_the_stages_are_listed_in_one_file():
    listed = names_together(STAGES, 3)
    assert not set(listed) - {"training/run_folder.py"}, listed


def test_a_command_is_named_in_one_file():
    from typer.main import get_command

    from sentcompress.cli import app

    commands = get_command(app).commands
    assert len(commands) >= 12
    homes = {name: command.callback.__module__ for name, command in commands.items() if command.callback}
    for name, home in homes.items():
        named = [
            file
            for file, path in package_files()
            if file.startswith("cli/")
            and re.search(rf'^\s*name="{name}"|command\(\s*"{name}"', path.read_text(), re.M)
        ]
        assert len(named) <= 1, f"{name}: {named}"
        assert home.startswith("sentcompress.cli."), f"{name}: {home}"
    listed = names_together(set(commands), 4)
    assert set(listed) <= set(), listed


def handed_on(call: ast.Call) -> set[str]:
    """Keywords whose values have the same names: ``f(top_k=top_k, top_p=settings.top_p)``."""
    names = {}
    for keyword in call.keywords:
        value = keyword.value
        names[keyword.arg or ""] = getattr(value, "attr", getattr(value, "id", None))
    return {name for name, value in names.items() if name == value}


def test_an_option_is_declared_in_one_file():
    """Options of commands and fields of models are made from the settings: nobody lists them again."""
    from sentcompress.generation import GenerationSettings
    from sentcompress.recipe.sections import VAESpec

    for fields, home in (
        (set(GenerationSettings.model_fields), "generation/settings.py"),
        (set(VAESpec.model_fields), "recipe/sections.py"),
    ):
        listed = names_together(fields, 4)
        for file, path in package_files():
            for node in ast.walk(parsed(path)):
                if isinstance(node, ast.Call) and len(handed_on(node) & fields) >= 4:
                    listed.setdefault(file, []).append(node.lineno)
                arguments = getattr(node, "args", None)
                if isinstance(arguments, ast.arguments):
                    parameters = {a.arg for a in (*arguments.args, *arguments.kwonlyargs)}
                    if len(parameters & fields) >= 5:
                        listed.setdefault(file, []).append(node.lineno)
        listed.pop(home, None)
        listed.pop("modeling/configuration.py", None)  # config.json names its fields for itself
        assert not listed, f"{home} declares these; they are listed again in {listed}"


# ---- tests and tools


def test_slow_tests_and_tools_are_listed():
    """CONTRIBUTING.md says which files have slow tests, and when to run each tool."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    mark = "pytest.mark." + "slow"
    slow = [path for path in (ROOT / "tests").rglob("test_*.py") if mark in path.read_text(encoding="utf-8")]
    listed = [*slow, *(ROOT / "tools").rglob("*.py")]
    missing = [name for path in listed if f"`{(name := path.relative_to(ROOT).as_posix())}`" not in page]
    assert not missing
    for name in re.findall(r"`((?:tests|tools)/[\w/.]+\.py)`", page):
        assert (ROOT / name).is_file(), name


# ---- words

WORDS = {
    r"\btold\b": "conditioning, or say what it is given",
    r"\bcharg(e|es|ed|ing)\b": "score, nll",
    r"\btroubles?\b": "anomaly",
    r"\bis no (?!longer\b|more\b|better\b|need\b|worse\b)": "is not a",
    r"\b(bits?|nats) an? (byte|token)\b": "bits per byte, bits per token",
    r"\b(tokens?|bytes|steps|sentences) a second\b": "tokens per second",
    r"\bno number\b": "NaN or infinite",
    r"\blast word\b": "overrides",
    r"\bof ours\b": "of sentcompress",
    r"\bhonesty lines?\b": "provenance",
}
"""Words that readers of the field do not know, each with the one to use."""
THERE = re.compile(r"\b(there|that|which|what|here) is no |\bno number\b(?= (of|in|from))", re.I)
"""``there is no such file`` is plain English."""


def findings(text: str) -> list[str]:
    plain = THERE.sub("", text)
    return [
        f"'{match[0]}' (say: {instead})"
        for pattern, instead in WORDS.items()
        for match in re.finditer(pattern, plain, re.I)
    ]


def pages() -> list[Path]:
    """What people read, but for the changelog, which quotes old names, and cards, which runs have written."""
    docs = (path for path in (ROOT / "docs").rglob("*.md") if "cards" not in path.parts)
    return sorted(
        [
            *docs,
            *(ROOT / "plugins").rglob("README.md"),
            ROOT / "README.md",
            ROOT / "CONTRIBUTING.md",
            ROOT / "SECURITY.md",
        ]
    )


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_pages_say_it_plainly(page: Path):
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert not findings(text)
    assert len(re.findall(r"\btwins?\b", text)) <= 1, (
        "say 'baseline'; once a page, that it is an equal-data twin"
    )


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every string: docstrings, help, and messages with what to do about them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_the_package_says_it_plainly():
    wrong = Counter(
        f"{file}:{line} {found}"
        for file, path in package_files()
        for line, text in texts(parsed(path))
        for found in findings(text)
    )
    assert not wrong


def test_the_check_reads_strings():
    code = 'raise InputError(f"{x} is no model of ours", fix="5 tokens a second")\nprint("there is no file")'
    found = sorted({found for _, text in texts(ast.parse(code)) for found in findings(text)})
    assert [text.partition("'")[2].partition("'")[0] for text in found] == [
        "is no ",
        "of ours",
        "tokens a second",
    ]

"""The arrows of the design: who may import whom, read from the source; and what stays free of torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "sentcompress"

ANY = "*"
"""A part whose name is put together when the program runs."""
BUILT_INS = ("segmenters", "fusions", "backbones", "datasets", "metrics", "memories")
_TABLE = {
    "errors": "",
    "hookspecs": "",
    "files": "errors",
    "locks": "",
    "table": "",
    "packages": "",
    "contracts": "errors",
    "registry": "errors hookspecs packages contracts",
    "recipe": "errors files contracts registry",
    "distributed": "errors",
    "segmenters": "errors hookspecs contracts",
    "fusions": "hookspecs contracts",
    "backbones": "errors hookspecs contracts",
    "datasets": "errors hookspecs contracts registry",
    "metrics": "hookspecs contracts",
    "memories": "hookspecs contracts",
    "text": "errors files locks packages contracts registry",
    "modeling": "errors files contracts registry recipe text",
    "generation": "errors files contracts registry recipe text modeling",
    "sentence_memory": "errors files contracts registry text",
    "serving": "errors files contracts registry distributed text generation sentence_memory",
    "provenance": "errors packages registry recipe modeling",
    "training": "errors files locks contracts registry recipe distributed text modeling generation "
    "sentence_memory provenance",
    "estimate": "errors table contracts registry recipe modeling generation training",
    "benchmark": "errors files table contracts registry recipe distributed text modeling generation "
    "sentence_memory provenance training estimate",
    "pipeline": "errors files recipe distributed modeling training estimate benchmark",
    "studies": "errors files locks table recipe distributed provenance estimate benchmark pipeline",
    "testing": "errors contracts registry recipe text modeling",
    "cli": "errors files table packages registry recipe distributed datasets text modeling generation "
    "sentence_memory training estimate benchmark serving pipeline studies",
    "__main__": "cli",
}
"""What each part of the package imports besides itself, from the ground floor up: no more, and no less."""
ALLOWED = {part: set(others.split()) for part, others in _TABLE.items()}

EXCEPTIONS = {
    (
        "modeling/sentence_lm.py",
        "generation",
    ): "SentenceLM.generate is a convenience; the models work without it",
    ("registry.py", ANY): "the registry loads packages of plugins by name, the built-in ones too",
}
"""Arrows that run back, each with its reason. test_the_reason_of_an_exception_holds checks the reasons."""

WITHOUT_TORCH = [
    "sentcompress",
    "sentcompress.contracts",
    "sentcompress.registry",
    "sentcompress.recipe",
    "sentcompress.generation.settings",
    "sentcompress.distributed",
]


MODULE = re.compile(r"sentcompress\.[\w.]*(:\w+)?")
"""A string that names a module, as for import_module: an import like any other."""


def parts_imported(path: Path) -> set[tuple[str, int]]:
    """``(part, line)`` of everything of ours that a file imports: in functions, for typing and by name too."""
    module = ["sentcompress", *path.relative_to(PACKAGE).with_suffix("").parts]
    package = module[:-1]  # also right for __init__, which is the last part
    found: list[tuple[str, int]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            found += [(f"{prefix}.{alias.name}", node.lineno) for alias in node.names]
        elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            if MODULE.fullmatch(start := str(node.values[0].value)):
                found.append((start + ANY if start.endswith(".") else start, node.lineno))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and MODULE.fullmatch(node.value):
            found.append((node.value.partition(":")[0], node.lineno))
    parts = set()
    for name, line in found:
        pieces = name.split(".")
        if pieces[0] == "sentcompress" and len(pieces) > 1 and pieces[1]:
            parts.add((pieces[1], line))
    return parts


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def names_of_the_root() -> set[str]:
    """What ``from sentcompress import X`` may mean besides a part."""
    import sentcompress

    return {*sentcompress.__all__}


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_arrows_run_one_way(path: Path):
    part, file = part_of(path), path.relative_to(PACKAGE).as_posix()
    assert part in ALLOWED, f"new part '{part}': say in ALLOWED what it may import"
    root = names_of_the_root()
    wrong = [
        f"{path.name}:{line} imports sentcompress.{other}"
        for other, line in sorted(parts_imported(path))
        if other != part and other not in ALLOWED[part] and other not in root
        if (file, other) not in EXCEPTIONS
    ]
    assert not wrong, f"{part} may import only {sorted(ALLOWED[part])}: {wrong}"


@pytest.mark.parametrize("built_in", BUILT_INS)
def test_built_ins_do_without_the_roots_conveniences(built_in: str):
    for path in (PACKAGE / built_in).rglob("*.py"):
        assert not {part for part, _ in parts_imported(path)} & names_of_the_root()


@pytest.mark.parametrize("arrow", list(EXCEPTIONS), ids="-".join)
def test_the_reason_of_an_exception_holds(arrow: tuple[str, str]):
    file, part = arrow
    assert part in {part for part, _ in parts_imported(PACKAGE / file)}, f"{EXCEPTIONS[arrow]}: no longer so"
    module = "sentcompress." + file.removesuffix(".py").replace("/", ".")
    others = BUILT_INS if part == ANY else (part,)
    code = f"import sys, {module}; print([n for n in {others} if f'sentcompress.{{n}}' in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", f"{EXCEPTIONS[arrow]}: {module} imports {done.stdout}"


def test_every_arrow_of_the_table_is_used():
    used: dict[str, set[str]] = {part: set() for part in ALLOWED}
    for path in FILES:
        part, file = part_of(path), path.relative_to(PACKAGE).as_posix()
        used[part] |= {other for other, _ in parts_imported(path) if (file, other) not in EXCEPTIONS}
    idle = {part: sorted(others - used[part]) for part, others in ALLOWED.items() if others - used[part]}
    assert not idle, f"nobody uses these arrows: take them out of ALLOWED: {idle}"


def test_the_table_has_no_circle():
    """Each part imports only what stands above it."""
    above: set[str] = set()
    for part, others in ALLOWED.items():
        assert others <= above, f"'{part}' imports {others - above}, which stand below it"
        above.add(part)


def test_the_check_sees_an_arrow_that_runs_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    bad = tmp_path / "text" / "bad.py"
    bad.parent.mkdir()
    lines = [
        "def f(name):",
        "    from sentcompress import cli",
        "    from ..training.loop import run",
        '    import_module("sentcompress.studies.grid")',
        '    import_module(f"sentcompress.benchmark.{name}")',
        '    import_module(f"sentcompress.{name}")',
    ]
    bad.write_text("\n".join(lines))
    parts = {("cli", 2), ("training", 3), ("studies", 4), ("benchmark", 5), (ANY, 6)}
    assert parts_imported(bad) == parts
    with pytest.raises(AssertionError, match=r"bad\.py:2 imports sentcompress\.cli"):
        test_arrows_run_one_way(bad)


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_light_modules_do_not_import_torch(module: str):
    code = f"import {module}, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_exported_name_exists():
    import sentcompress

    for name in sentcompress.__all__:
        assert getattr(sentcompress, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = sentcompress.Nothing

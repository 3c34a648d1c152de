"""``plugins new``: packages of every kind that work, names that are refused; and the packages in plugins/."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sentcompress import __version__
from sentcompress.cli import main, scaffold
from sentcompress.cli.plugins import summary
from sentcompress.errors import InputError
from sentcompress.recipe import load_recipe
from sentcompress.registry import KINDS, Registry, get_registry

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))


def installed(package: Path, site: Path) -> None:
    """What pip writes for an editable install: a path, and the entry points."""
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    (entry,) = project["entry-points"]["sentcompress"].items()
    (info / "entry_points.txt").write_text(f"[sentcompress]\n{entry[0]} = {entry[1]}\n")
    (site / entry[1]).symlink_to(package / entry[1])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the path with a new package of each kind in it, as the command line writes them."""
    folder = tmp_path_factory.mktemp("site")
    for kind in KINDS:
        package = folder / f"sentcompress-first-{kind}"
        with pytest.raises(SystemExit) as ended:
            main(["plugins", "new", f"first-{kind}", "--kind", kind, "--out", str(package)])
        assert ended.value.code == 0
        installed(package, folder)
    return folder


def run(site: Path, *arguments: str, **environment: str) -> str:
    """Output of a Python program that has the site's packages."""
    clean = {key: value for key, value in os.environ.items() if key != "SENTCOMPRESS_PLUGINS"}
    path = os.pathsep.join([str(site), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *arguments],
        env=clean | {"PYTHONPATH": path} | environment,
        cwd=site,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# What is written


def test_there_is_a_template_for_every_kind():
    assert list(scaffold.KINDS) == list(KINDS)
    folder = ROOT / "sentcompress" / "cli" / "templates"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_those_of_a_package(site: Path, kind: str):
    package, module = site / f"sentcompress-first-{kind}", f"sentcompress_first_{kind}"
    written = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
    code = {f"{module}/__init__.py", f"{module}/{kind}.py", f"tests/test_{module}.py"}
    assert {path for path in written if "__pycache__" not in path} == {"pyproject.toml", "README.md", *code}
    for path in code:
        text = (package / path).read_text()
        ast.parse(text)
        assert "$" not in text
        assert max(map(len, text.splitlines())) <= 110
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    ours = Requirement(project["dependencies"][0])
    assert ours.name == "sentcompress"
    assert ours.specifier.contains(__version__)
    assert not ours.specifier.contains("99")
    assert project["requires-python"] == metadata.metadata("sentcompress")["Requires-Python"]
    assert project["optional-dependencies"]["test"]


@pytest.mark.slow
def test_the_packages_pass_their_tests_and_a_broken_one_beside_them_changes_only_its_row(site: Path):
    listing = ("-m", "sentcompress", "plugins", "--json")
    before = json.loads(run(site, *listing))
    for kind in KINDS:
        (component,) = before[f"first-{kind}"].pop("components")
        assert (component["kind"], component["name"]) == (kind, f"first-{kind}")
        assert component["help"].endswith(".")
        assert before[f"first-{kind}"]["status"] == "ok"

    (site / "broken_one.py").write_text("raise ImportError('libfoo is missing')\n")
    info = site / "broken_one-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-one\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sentcompress]\nbroken = broken_one\n")
    after = json.loads(run(site, *listing))
    row = after.pop("broken")
    assert (row["status"], row["error"]) == ("broken", "ImportError: libfoo is missing")
    for kind in KINDS:
        del after[f"first-{kind}"]["components"]
    assert after == before

    # One process for all: most of the time goes into importing torch. Other pytest plugins are not theirs to need.
    options = ("-q", "-p", "no:cacheprovider", "-p", "sentcompress.testing.pytest_plugin")
    packages = [str(site / f"sentcompress-first-{kind}") for kind in KINDS]
    said = run(site, "-m", "pytest", *options, *packages, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert re.search(r"^1\d passed", said, re.M), said


@pytest.mark.slow
def test_the_tests_of_a_memory_are_for_the_authors_own_too(tmp_path: Path):
    package = tmp_path / "package"
    with pytest.raises(SystemExit):
        main(["plugins", "new", "own", "--kind", "memory", "--out", str(package)])
    installed(package, tmp_path)
    (package / "sentcompress_own/memory.py").write_text(
        "import sentcompress\n\n\nclass OwnMemory(sentcompress.Memory):\n"
        "    def keep(self, tokens):\n        return tokens.ids % 2 == 0\n"
    )
    options = ("-q", "-p", "no:cacheprovider", "-p", "sentcompress.testing.pytest_plugin")
    said = run(tmp_path, "-m", "pytest", *options, str(package), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert re.search(r"^2 passed", said, re.M), said


def test_neither_writing_nor_listing_imports_torch(site: Path, tmp_path: Path):
    for arguments in (["plugins"], ["plugins", "new", "other", "--kind", "backbone", "--out", str(tmp_path)]):
        code = (
            f"import sys\nfrom sentcompress.cli import main\ntry:\n    main({arguments})\n"
            "except SystemExit as end:\n    assert not end.code\nprint('\\nMODULES', *sys.modules)"
        )
        said = run(site, "-c", code)
        assert not {"torch", "transformers"} & set(said.rpartition("MODULES")[2].split())
    assert (tmp_path / "sentcompress_other" / "backbone.py").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_the_commands_it_prints_are_right(site: Path, tmp_path: Path, kind: str, capsys, monkeypatch):
    package = tmp_path / "with space"
    with pytest.raises(SystemExit):
        main(["plugins", "new", f"sentcompress-later-{kind}", "--kind", kind, "--out", str(package)])
    pip, pytest_, recipe = map(shlex.split, capsys.readouterr().out.strip().splitlines()[-3:])
    assert pip == ["pip", "install", "-e", f"{package}[test]"]
    assert pytest_ == ["pytest", str(package)]
    setting = recipe[4]
    if kind == "memory":  # it needs no training
        assert recipe[:3] == ["sentcompress", "generate", "opt-tiny"]
        assert recipe[4:] == ["--memory", "window+later-memory"]
        setting = "memory={name: window+later-memory}"
    else:
        assert recipe[:4] == ["sentcompress", "run", "quickstart", "--set"]
    readme = (package / "README.md").read_text()
    assert shlex.join(recipe[4:]) in readme
    assert setting.partition("=")[2].strip("{}[]") in readme

    monkeypatch.delenv("SENTCOMPRESS_PLUGINS", raising=False)
    monkeypatch.syspath_prepend(str(site))
    fresh = Registry()
    monkeypatch.setattr("sentcompress.recipe.get_registry", lambda: fresh)
    assert load_recipe("quickstart", [setting.replace("later", "first")])


# What is refused


def planned(name: str, kind: str = "segmenter") -> scaffold.Scaffold:
    return scaffold.plan(name, kind, get_registry())


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("My_Plugin", "such as 'my-plugin'"),
        ("a.b", "such as 'a-b'"),
        ("-x-", "such as 'x'"),
        ("3d", "such as 'my-plugin'"),
        ("../../etc/passwd", "such as 'etc-passwd'"),
        ("läufe", "such as 'l-ufe'"),
        ("", "such as 'my-plugin'"),
        ("sentcompress-", "such as 'my-plugin'"),
        ("a" * 51, f"such as '{'a' * 50}'"),
    ],
)
def test_what_cannot_be_a_name(name: str, near: str):
    with pytest.raises(InputError, match="cannot be the name of a plugin") as caught:
        planned(name)
    assert near in caught.value.fix


def test_names_that_are_taken(site: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match=r"already a segmenter called 'regex', from package 'sentcompress'"):
        planned("regex")
    assert planned("regex", "fusion").name == "regex", "a name is taken for a kind"
    monkeypatch.syspath_prepend(str(site))
    with pytest.raises(InputError, match=r"package 'sentcompress-first-metric' 0\.1\.0 is installed"):
        planned("first-metric", "fusion")


def test_a_kind_with_a_typo():
    with pytest.raises(InputError, match=r"no such kind of plugin\. Did you mean 'segmenter'\?") as caught:
        planned("verses", "segmentor")
    assert "segmenter, fusion, backbone, dataset, metric, memory" in caught.value.fix


def test_nothing_is_overwritten(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="is not empty; nothing was written"):
        scaffold.write(planned("verses"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="is a file; nothing was written"):
        scaffold.write(planned("verses"), tmp_path / "thesis.txt")
    (tmp_path / "empty").mkdir()
    scaffold.write(planned("verses"), tmp_path / "empty")
    assert (tmp_path / "empty" / "pyproject.toml").is_file()


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("max-pool", "fusion", "MaxPoolFusion"),
        ("max-fusion", "fusion", "MaxFusion"),
        ("fusion", "fusion", "FusionFusion"),
        ("v2", "metric", "V2Metric"),
    ],
)
def test_names_of_classes(name: str, kind: str, expected: str):
    (code,) = [text for path, text in planned(name, kind).files.items() if path.endswith(f"/{kind}.py")]
    assert f"class {expected}(sentcompress.{kind.capitalize()}" in code or kind == "backbone"


# One line of help


def test_every_built_in_has_a_line_of_help():
    registry = get_registry()
    for kind in KINDS:
        for name in registry.names(kind):
            for claim in registry.claims(kind, name):
                line = summary(claim.target)
                assert line, f"{kind} {name}"
                assert line == summary(registry.get(kind, name))


def test_help_without_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "helpless"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "inner" / "__init__.py").write_text("")
    (package / "inner" / "parts.py").write_text(
        'import nothing_there\n\nclass Told:\n    """\n    Says ``what``.\n\n    More.\n    """\n\n'
        "class Silent:\n    pass\n"
    )
    (package / "bad.py").write_text("def broken(:")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert summary("helpless.inner.parts:Told") == "Says `what`."
    for target in (
        "helpless.inner.parts:Silent",
        "helpless.inner.parts:Missing",
        "helpless.nowhere:Told",
        "helpless.inner.parts.deeper:Told",
        "helpless.bad:Told",
        "not_installed_at_all.x:Told",
        "math:Told",
        ":Told",
    ):
        assert summary(target) == "", target
    assert not any(name.startswith("helpless") for name in sys.modules)

    class Child(scaffold.Kind):
        pass

    assert summary(Child) == "", "the docstring of a base says nothing about it"


# plugins/


@pytest.mark.parametrize("package", SHIPPED, ids=lambda path: path.name)
def test_shipped_plugins_say_what_they_need(package: Path):
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    needs = [Requirement(text) for text in project["dependencies"]]
    (ours,) = [need for need in needs if need.name == "sentcompress"]
    assert ours.specifier.contains(__version__), "raise the range, after its tests pass"
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    for need in needs:
        assert need is ours or need.specifier.contains(pins[need.name]), need
    assert project["optional-dependencies"]["test"]
    assert package.name in (ROOT / "plugins" / "README.md").read_text()
    readme = (package / "README.md").read_text()
    assert f"sentcompress plugins show {next(iter(project['entry-points']['sentcompress']))}" in readme


def test_shipped_plugins_are_one_of_each_kind():
    kinds = [kind for kind in KINDS for package in SHIPPED if list(package.glob(f"sentcompress_*/{kind}.py"))]
    assert kinds == list(KINDS)

"""Plugins as users install them: real distributions on the path, good, broken, misspelt and colliding."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sentcompress import hookspecs
from sentcompress.errors import PluginError, RecipeError
from sentcompress.registry import KINDS, Registry, get_registry

ROOT = Path(__file__).resolve().parent.parent

SEGMENTER = """
import sentcompress

class Lines(sentcompress.Segmenter):
    "Cut at line ends."

    class Options(sentcompress.SegmenterOptions):
        keep: bool = True

    def split(self, text):
        return text.splitlines(keepends=True)

@sentcompress.hookimpl
def register_segmenters(register):
    register("{name}", Lines)
"""

COMPONENTS = {
    "segmenter": "class Mine(sentcompress.Segmenter): pass",
    "fusion": "class Mine(sentcompress.Fusion): pass",
    "backbone": "class Mine(sentcompress.Backbone): pass",
    "dataset": "class Mine(sentcompress.Dataset): pass",
    "metric": "class Mine(sentcompress.Metric): pass",
    "memory": "class Mine(sentcompress.Memory): pass",
}
"""One component a kind: a new hook needs a line here."""

BROKEN = {
    "import error": ("import module_that_is_not_there", "ModuleNotFoundError: No module named"),
    "calls sys.exit": ("import sys; sys.exit(7)", "SystemExit: 7"),
    "syntax error": ("def broken(:", "SyntaxError"),
    "misspelt hook": (
        "import sentcompress\n@sentcompress.hookimpl\ndef register_segmentors(register): pass",
        "PluginValidationError: unknown hook 'register_segmentors'",
    ),
    "wrong class": (
        "import sentcompress\n@sentcompress.hookimpl\ndef register_segmenters(register): register('x', dict)",
        "TypeError: segmenter 'x' must be a subclass of sentcompress.Segmenter",
    ),
    "instead of a class an instance": (
        "import sentcompress\n@sentcompress.hookimpl\ndef register_metrics(register): register('x', 5)",
        "TypeError: metric 'x' must be a subclass of sentcompress.Metric, not 5",
    ),
    "bad target": (
        "import sentcompress\n@sentcompress.hookimpl\ndef register_fusions(register): register('x', 'none')",
        "TypeError: fusion 'x': write 'module:Class'",
    ),
    "fails as if memory were short": ("raise MemoryError('no')", "MemoryError: no"),
    "no name": (
        "import sentcompress\n@sentcompress.hookimpl\n"
        "def register_segmenters(register): register('', sentcompress.Segmenter)",
        "TypeError: a segmenter must be registered under a non-empty name",
    ),
    "raises in its hook, after a registration": (
        "import sentcompress\n@sentcompress.hookimpl\ndef register_segmenters(register):\n"
        "    register('half', sentcompress.Segmenter)\n    raise RuntimeError('no licence')",
        "RuntimeError: no licence",
    ),
}


class Site:
    """A folder on the path into which packages are installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, package: str, code: str, *, version: str = "1.2", entry: str | None = None) -> None:
        module = package.replace("-", "_")
        (self.folder / f"{module}.py").write_text(code, encoding="utf-8")
        info = self.folder / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[sentcompress]\n{entry or module} = {module}\n")

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(self.folder), str(ROOT)])
        return subprocess.run(
            [sys.executable, "-m", "sentcompress", *arguments],
            env=os.environ | {"PYTHONPATH": path} | environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty site folder; modules imported from it are forgotten afterwards."""
    monkeypatch.delenv("SENTCOMPRESS_PLUGINS", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Site(tmp_path)
    for name, module in list(sys.modules.items()):
        if str(tmp_path) in (getattr(module, "__file__", None) or ""):
            del sys.modules[name]


def plugin(registry: Registry, name: str):
    return next(p for p in registry.plugins if p.name == name)


def test_a_good_plugin_is_found_with_its_package_and_version(site: Site):
    site.install("good-lines", SEGMENTER.format(name="lines"))
    registry = Registry()
    assert registry.get("segmenter", "lines").__name__ == "Lines"
    owner = registry.owner("segmenter", "lines")
    assert (owner.name, owner.package, owner.version, owner.status) == (
        "good_lines",
        "good-lines",
        "1.2",
        "ok",
    )
    segmenter = registry.create("segmenter", "lines", {"max_tokens": 8})
    assert segmenter.max_tokens == 8
    assert segmenter.split("a\nb") == ["a\n", "b"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_registered_by_a_package(site: Site, kind: str):
    code = (
        f"import sentcompress\n{COMPONENTS[kind]}\n@sentcompress.hookimpl\n"
        f"def register_{KINDS[kind]}(register):\n"
        f"    register('mine', Mine)\n    register('lazy', 'mine_{kind}:Mine')\n"
    )
    site.install(f"mine-{kind}", code)
    registry = Registry()
    assert registry.get(kind, "mine") is registry.get(kind, "lazy")
    assert {"mine", "lazy"} <= set(registry.names(kind))


@pytest.mark.parametrize(("code", "error"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_changes_nothing_but_its_own_row(site: Site, code: str, error: str):
    def rows(registry: Registry):
        return [(p.name, p.error, p.components) for p in registry.plugins]

    before = rows(Registry())
    site.install("bad-plugin", code)
    registry = Registry()
    assert [row for row in rows(registry) if row[0] != "bad_plugin"] == before
    bad = plugin(registry, "bad_plugin")
    assert bad.status == "broken"
    assert error in bad.error
    assert bad.components == []
    assert "half" not in registry.names("segmenter")


def test_asking_for_a_missing_component_names_broken_plugins_and_near_names(site: Site):
    site.install("bad-plugin", BROKEN["import error"][0])
    with pytest.raises(PluginError, match="no segmenter is called 'regx'") as caught:
        Registry().get("segmenter", "regx")
    assert "Did you mean 'regex'?" in str(caught.value)
    assert "plugin 'bad_plugin' (package 'bad-plugin') is broken: ModuleNotFoundError" in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_lazy_target_that_cannot_be_imported_names_the_package(site: Site):
    site.install(
        "lazy-bad",
        "import sentcompress\n@sentcompress.hookimpl\n"
        "def register_fusions(register): register('lazy', 'not_there:Fusion')",
    )
    with pytest.raises(PluginError, match=r"'lazy' of package 'lazy-bad' 1\.2 cannot be imported"):
        Registry().get("fusion", "lazy")


def test_a_lazy_target_is_checked_like_a_class(site: Site):
    code = (
        "import sentcompress\n@sentcompress.hookimpl\ndef register_fusions(register): register('lazy', '{}')"
    )
    site.install("lazy-other", code.format("json:JSONDecoder"))
    with pytest.raises(PluginError, match=r"must be a subclass of sentcompress\.Fusion"):
        Registry().get("fusion", "lazy")


@pytest.mark.parametrize("attribute", ["nothing", "Lines.nothing"])
def test_an_entry_point_to_a_name_that_is_not_there_is_broken(site: Site, attribute: str):
    site.install("good-lines", SEGMENTER.format(name="lines"))
    info = site.folder / "good_lines-1.2.dist-info" / "entry_points.txt"
    info.write_text(
        f"[sentcompress]\na = good_lines:{attribute}\nb = good_lines:Lines.split\nc = not_there\n"
    )
    registry = Registry()
    assert "has no attribute 'nothing'" in plugin(registry, "a").error
    assert plugin(registry, "b").status == "ok"
    assert "No module named 'not_there'" in plugin(registry, "c").error


FOREIGN = {
    "entry points that do not parse": {"entry_points.txt": b"[console_scripts]\nother\n"},
    "entry points not in UTF-8": {"entry_points.txt": b"[console_scripts]\n\xff = other:main\n"},
    "our entry points, not in UTF-8": {"entry_points.txt": b"[sentcompress]\n\xff = other\n"},
}


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
def test_somebody_elses_broken_metadata_is_left_out_and_named(site: Site, files: dict[str, bytes]):
    site.install("good-lines", SEGMENTER.format(name="lines"))
    site.install("other", "")
    for name, content in files.items():
        (site.folder / "other-1.2.dist-info" / name).write_bytes(content)
    listed = site.run("plugins", "--json")
    assert listed.returncode == 0, listed.stderr
    assert json.loads(listed.stdout)["good_lines"]["status"] == "ok"
    assert listed.stderr.count(f"package 'other' in {site.folder} is left out") == 1
    none = site.run("validate", "quickstart", SENTCOMPRESS_PLUGINS="")
    assert none.returncode == 0, none.stderr


@pytest.mark.parametrize(
    "metadata", [None, "", "Metadata-Version: 2.1\n", "Name: good-lines\n", b"Name: \xff\n"]
)
def test_a_plugin_whose_package_does_not_say_its_name_or_version_works(
    site: Site, metadata: str | bytes | None
):
    site.install("good-lines", SEGMENTER.format(name="lines"))
    path = site.folder / "good_lines-1.2.dist-info" / "METADATA"
    path.unlink()
    if metadata is not None:
        path.write_bytes(metadata.encode() if isinstance(metadata, str) else metadata)
    owner = Registry().owner("segmenter", "lines")
    assert owner.package.replace("-", "_") == "good_lines"
    assert owner.version == "?"


def test_a_package_that_is_installed_twice_is_loaded_once(site: Site):
    site.install("good-lines", SEGMENTER.format(name="lines"))
    site.install("good-lines", SEGMENTER.format(name="lines"), version="1.3")
    assert Registry().get("segmenter", "lines").__name__ == "Lines"


def test_torch_is_imported_beside_broken_metadata(site: Site):
    """Python's own entry_points fails for all packages then, and with it torch's search for its backends."""
    site.install("other", "")
    (site.folder / "other-1.2.dist-info" / "entry_points.txt").write_text("[console_scripts]\nother\n")
    done = site.run("estimate", "quickstart", "--device", "a100")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("package 'other'") == 1


RUDE = """
import logging, os, signal, subprocess, sys
print("printed")
os.write(1, b"written\\n")
subprocess.run([sys.executable, "-c", "print('by a child')"])
import ctypes
ctypes.CDLL(None).printf(b"by C code")
logging.basicConfig(stream=sys.stdout, level=logging.INFO)
logging.info("logged")
os.chdir("/")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
"""


def test_what_a_plugin_prints_while_it_is_imported_goes_to_stderr(site: Site):
    lazy = '\n@sentcompress.hookimpl\ndef register_fusions(register): register("late", "late_rude:Late")\n'
    site.install("rude-lines", RUDE + SEGMENTER.format(name="lines") + lazy)
    fusion = "import sentcompress\nclass Late(sentcompress.Fusion): 'Late.'"
    (site.folder / "late_rude.py").write_text(RUDE.replace("printed", "late") + fusion)
    listed = site.run("plugins", "--json")
    assert json.loads(listed.stdout)["rude_lines"]["status"] == "ok"
    for text in ("printed", "written", "by a child", "by C code", "logged"):
        assert text in listed.stderr
    shown = site.run("plugins", "show", "late")
    assert shown.stdout.startswith("fusion late (rude-lines 1.2)\nLate."), shown.stdout
    (site.folder / "r.yaml").write_text("name: x\n")
    assert site.run("validate", "r.yaml").returncode == 0  # the current folder is still the one it was


def test_a_plugin_leaves_the_signals_alone(site: Site):
    before = signal.getsignal(signal.SIGTERM)
    site.install("rude-lines", "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n")
    Registry()
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_import_that_does_not_end_is_named(site: Site, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("sentcompress.packages.SLOW_IMPORT_SECONDS", 0.05)
    site.install("slow-lines", "import time\ntime.sleep(0.5)\n" + SEGMENTER.format(name="lines"))
    Registry()
    said = capsys.readouterr().err
    assert "still importing plugin 'slow_lines' of package 'slow-lines'" in said
    assert "SENTCOMPRESS_PLUGINS" in said


def test_two_plugins_claiming_one_name_is_an_error_that_names_both(site: Site):
    site.install("one", SEGMENTER.format(name="lines"))
    site.install("two", SEGMENTER.format(name="lines"))
    registry = Registry()
    with pytest.raises(PluginError, match=r"segmenter 'lines' is claimed by 'one' .* and 'two'") as caught:
        registry.get("segmenter", "lines")
    assert "SENTCOMPRESS_PLUGINS" in caught.value.fix
    assert [p.package for p in registry.collisions()["segmenter", "lines"]] == ["one", "two"]
    assert registry.get("segmenter", "regex")


def test_a_package_cannot_take_a_built_in_name_unnoticed(site: Site):
    site.install("usurper", SEGMENTER.format(name="regex"))
    with pytest.raises(PluginError, match=r"'sentcompress' .* and 'usurper'"):
        Registry().get("segmenter", "regex")


def test_the_environment_restricts_which_plugins_load(site: Site, monkeypatch: pytest.MonkeyPatch):
    site.install("one", SEGMENTER.format(name="lines"))
    site.install("two", SEGMENTER.format(name="lines"))
    monkeypatch.setenv("SENTCOMPRESS_PLUGINS", "two")
    registry = Registry()
    assert registry.owner("segmenter", "lines").package == "two"
    assert "one" not in sys.modules
    monkeypatch.setenv("SENTCOMPRESS_PLUGINS", "")
    assert "lines" not in Registry().names("segmenter")
    assert "regex" in Registry().names("segmenter")
    monkeypatch.setenv("SENTCOMPRESS_PLUGINS", "two,three")
    with pytest.raises(PluginError, match="not installed: three"):
        Registry()


def test_options_are_checked_with_a_near_miss(site: Site):
    site.install("good-lines", SEGMENTER.format(name="lines"))
    registry = Registry()
    with pytest.raises(RecipeError, match=r"segmenter.options.kep: unknown key. Did you mean 'keep'\?"):
        registry.options("segmenter", "lines", {"kep": True}, "segmenter.options")
    with pytest.raises(RecipeError, match=r"segmenter.options.max_tokens: .* \(got 'many'\)"):
        registry.options("segmenter", "lines", {"max_tokens": "many"}, "segmenter.options")


def test_the_command_line_lives_with_broken_and_colliding_plugins(site: Site):
    site.install("bad-plugin", BROKEN["calls sys.exit"][0], version="0.3")
    site.install("one", SEGMENTER.format(name="lines"))
    site.install("two", SEGMENTER.format(name="lines"), entry="segmenters")
    table = site.run("plugins")
    assert table.returncode == 0, table.stderr
    rows = [line.split() for line in table.stdout.splitlines()]
    assert ["plugin", "bad_plugin", "bad-plugin", "0.3", "broken:", "SystemExit:", "7"] in rows
    collides = ["segmenter", "lines", "one", "1.2", "collides", "with", "two", "(segmenters)"]
    assert [*collides, "Cut", "at", "line", "ends."] in rows

    listed = json.loads(site.run("plugins", "--json").stdout)
    assert listed["bad_plugin"]["error"] == "SystemExit: 7"
    assert listed["segmenters"]["package"] == "sentcompress"
    (component,) = listed["segmenters (two)"]["components"]
    assert component["collides_with"] == ["one (one)"]
    assert component["help"] == "Cut at line ends."

    assert site.run("--help").returncode == 0
    (site.folder / "r.yaml").write_text("name: x\nsegmenter: {name: lines}\n")
    collision = site.run("validate", "r.yaml")
    assert collision.returncode == 3
    assert "claimed by 'one' (plugin 'one') and 'two' (plugin 'segmenters')" in collision.stderr
    assert site.run("validate", "r.yaml", SENTCOMPRESS_PLUGINS="one").returncode == 0
    missing = site.run("validate", "r.yaml", "--set", "segmenter.name=bad")
    assert missing.returncode == 3
    assert "package 'bad-plugin') is broken: SystemExit: 7" in missing.stderr
    assert "Traceback" not in missing.stderr


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k in KINDS for n in get_registry().names(k)])
def test_every_installed_component_imports_and_describes_its_options(kind: str, name: str):
    component = get_registry().get(kind, name)
    assert inspect.getdoc(component), (
        f"{kind} '{name}' needs a docstring: 'plugins show' prints its first line"
    )
    undescribed = [f for f, info in component.Options.model_fields.items() if not info.description]
    assert not undescribed, f"options without a docstring: {undescribed}"


def hooks() -> list[str]:
    return [n for n, f in vars(hookspecs).items() if hasattr(f, "sentcompress_spec")]


@pytest.mark.parametrize("hook", hooks())
def test_every_hook_is_documented_served_and_tested(hook: str):
    assert inspect.getdoc(getattr(hookspecs, hook)), f"{hook} needs a docstring"
    assert hook in (ROOT / "docs" / "plugins-guide.md").read_text(encoding="utf-8"), f"{hook} is undocumented"
    kind = {suffix: kind for kind, suffix in KINDS.items()}.get(hook.removeprefix("register_"))
    assert kind in COMPONENTS, f"{hook} is untested: add its kind to COMPONENTS"


def test_every_kind_has_its_hook():
    assert {f"register_{suffix}" for suffix in KINDS.values()} == set(hooks())
    assert set(COMPONENTS) == set(KINDS)


def test_the_hook_page_stays_a_page():
    assert len(inspect.getsource(hookspecs).splitlines()) <= 45

"""check_plugin by name, and the pytest plugin as a plugin author uses it."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sentcompress.testing
from sentcompress.errors import InputError, PluginError
from sentcompress.provenance import Provenance, plugin_packages
from sentcompress.recipe import Recipe
from sentcompress.registry import KINDS
from sentcompress.testing import CheckFailed, check_plugin
from sentcompress.text.segmentation import checked_split
from sentcompress.training.card import provenance

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parent.parent.parent
Install = Callable[[str, str], Path]

METRICS = """
import sentcompress

class Length(sentcompress.Metric):
    class Options(sentcompress.Options):
        factor: float = 1.0

    def compute(self, reconstructions):
        return {"factor": self.options.factor / len(reconstructions)}

class Ratio(Length):
    def compute(self, reconstructions):
        return {"ratio": 1 / sum(len(r.hypothesis) for r in reconstructions)}

@sentcompress.hookimpl
def register_metrics(register):
    register("length", Length)
    register("ratio", "strange_metrics:Ratio")
"""

SEGMENTER = """
import sentcompress

class Words(sentcompress.Segmenter):
    def split(self, text):
        return text.split()

@sentcompress.hookimpl
def register_segmenters(register):
    register("words", Words)
"""


def test_the_registered_component_is_checked_and_named_with_its_package(install: Install) -> None:
    install("strange-metrics", METRICS)
    check_plugin("metric", "length", {"factor": 2})
    named = r"^metric 'ratio' \(strange_metrics.Ratio, package 'strange-metrics' 1.2\): compute\(\) for one pair, an "
    with pytest.raises(
        CheckFailed, match=named + r"empty .* ZeroDivisionError: .* \(strange_metrics.py:13\)$"
    ):
        check_plugin("metric", "ratio")
    with pytest.raises(CheckFailed, match=r"refuses .*: options.facto: unknown key. Did you mean 'factor'\?"):
        check_plugin("metric", "length", {"facto": 2})


def test_in_real_use_the_package_is_named_too(install: Install) -> None:
    install("strange-words", SEGMENTER)
    from strange_words import Words

    named = r"^segmenter 'words' \(strange_words.Words, package 'strange-words' 1.2\) is not lossless: at character 3"
    with pytest.raises(PluginError, match=named):
        checked_split("One two.", Words())


def test_what_is_not_there_is_said_with_near_names(install: Install) -> None:
    install("broken-one", "import module_that_is_not_there")
    with pytest.raises(
        InputError, match=r"no kind of component is called 'segmentor'. Did you mean 'segmenter'\?"
    ):
        check_plugin("segmentor", "regex")
    with pytest.raises(
        PluginError, match=r"no metric is called 'exact'.*\n.*'broken-one'\) is broken: ModuleNotF"
    ):
        check_plugin("metric", "exact")


def test_every_kind_has_its_check() -> None:
    for kind in KINDS:
        if kind != "backbone":  # tested where backbones are
            assert callable(getattr(sentcompress.testing, f"check_{kind}"))
    for name in sentcompress.testing.__all__:
        assert getattr(sentcompress.testing, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'check_nothing'"):
        _ = sentcompress.testing.check_nothing


def test_the_pytest_plugin_imports_nothing_of_ours_at_the_start() -> None:
    code = (
        "import pytest, sys; before = set(sys.modules); import sentcompress.testing.pytest_plugin\n"
        "print(*sorted({m for m in set(sys.modules) - before if m.count('.') < 3}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = {m for m in done.stdout.split() if m.startswith("sentcompress")}
    assert ours == {"sentcompress", "sentcompress.testing", "sentcompress.testing.pytest_plugin"}
    assert not {"torch", "transformers", "numpy", "pydantic"} & set(done.stdout.split())


def test_it_is_announced_to_pytest() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"sentcompress": "sentcompress.testing.pytest_plugin"}


def test_one_line_in_the_test_file_of_a_plugin(install: Install, pytester: pytest.Pytester) -> None:
    folder = install("strange-metrics", METRICS)
    pytester.makepyfile(
        test_mine="""
        def test_right(check_plugin): check_plugin("metric", "length", {"factor": 2})
        def test_wrong(check_plugin): check_plugin("metric", "ratio")
        def test_absent(check_plugin): check_plugin("metric", "lenght")
        """
    )
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:randomly"]
    # The entry point is blocked, since the version that is installed may not have it or have it already.
    command += ["-p", "no:sentcompress", "-p", "sentcompress.testing.pytest_plugin"]
    done = subprocess.run(
        command,
        cwd=pytester.path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 failed, 1 passed" in done.stdout
    assert (
        "metric 'ratio' (strange_metrics.Ratio, package 'strange-metrics' 1.2): compute() for one"
        in done.stdout
    )
    assert "no metric is called 'lenght'. Did you mean 'length'?" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert "checks.py" not in done.stdout


def test_results_and_model_cards_name_the_packages_of_plugins(install: Install) -> None:
    install(
        "sentcompress-lines",
        "from sentcompress.hookspecs import hookimpl\n"
        "@hookimpl\n"
        "def register_segmenters(register):\n"
        "    register('my-lines', 'sentcompress.segmenters.fixed:FixedSegmenter')\n",
    )
    recipe = Recipe.model_validate({"name": "mine", "segmenter": {"name": "my-lines"}})
    assert plugin_packages(recipe) == {"sentcompress-lines": "1.2"}
    honesty = Provenance(recipe, torch.device("cpu"), "float32").honesty(0)
    assert "sentcompress-lines 1.2" in honesty.line()
    assert provenance(recipe)["sentcompress-lines"] == "1.2"
    assert plugin_packages(Recipe.model_validate({"name": "ours"})) == {}
    install(
        "sentcompress-all",
        "from sentcompress.hookspecs import hookimpl\n"
        "@hookimpl\n"
        "def register_memories(register):\n"
        "    register('my-window', 'sentcompress.memories.window:Window')\n",
    )
    recipe = Recipe.model_validate({"name": "mine", "memory": {"name": "recall+my-window"}})
    assert plugin_packages(recipe) == {"sentcompress-all": "1.2"}

"""A measurement is one file: recipe, command line, results, report and comparison find it without another change."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sentcompress.benchmark.measurement import measurements
from sentcompress.recipe.sections import measurement_names

PACKAGE = Path(__file__).resolve().parents[2] / "sentcompress"

GREETING = '''
"""Counts greetings."""

from sentcompress.benchmark.measurement import Measurement, Section
from sentcompress.provenance import Record
from sentcompress.table import Table, number


class GreetingReport(Record):
    greetings: int


class Greeting(Measurement[GreetingReport | None]):
    """How often the model says hello."""

    title = "Greetings"
    order = 45
    compared = ("greetings",)

    def measure(self, bench):
        bench.row(self.name, "sentence model", {"greetings": 3})
        return GreetingReport(greetings=3)

    def sections(self, results):
        lines = [[row.system, number(row.figures["greetings"])] for row in results.rows_of(self.name)]
        return [Section(Table(self.title, ["system", "greetings"], lines))]

    def tiles(self, results):
        report = self.of(results)
        return [(str(report.greetings), "greetings")] if report else []
'''

PROGRAM = """
import sys
from pathlib import Path
from rich.console import Console
from sentcompress.benchmark.compare import compare
from sentcompress.benchmark.measurement import measurements
from sentcompress.benchmark.measurements.greeting import Greeting
from sentcompress.benchmark.report import render, render_report
from sentcompress.benchmark.results import read_results
from sentcompress.recipe import build_recipe

recipe = build_recipe({"name": "hello", "bench": {"metrics": ["greeting"]}}, [], "")
assert recipe.bench.metrics == ["greeting"]
assert [m.name for m in measurements()][3:6] == ["reconstruct", "greeting", "speed"]
results = read_results(Path(sys.argv[1]))
assert Greeting.of(results).greetings == 3
assert results.measured() == ["greeting"]
html = render_report(results)
assert "<h2>Greetings</h2>" in html and "<b>3</b><span>greetings</span>" in html
render(results, Console(width=100))
_, rows = compare([Path(sys.argv[1])] * 2)
assert [(row.part, row.figure, row.values) for row in rows] == [("greeting", "greetings", [3, 3])]
assert "torch" not in sys.modules, "results are read without torch"
from sentcompress.cli import main
main(["bench", "greeting", "--help"])
"""


def test_names_are_those_of_the_files_in_the_order_of_the_report():
    names = [measurement.name for measurement in measurements()]
    assert sorted(names) == measurement_names()
    assert names[:8] == ["causality", "quality", "text", "reconstruct", "speed", "memory", "data", "segments"]
    assert names[8:] == ["memories", "recall", "memory_speed"]
    assert len({measurement.order for measurement in measurements()}) == len(names)


def test_one_file_adds_a_measurement_everywhere(tmp_path: Path):
    """In a copy of the package with one file more."""
    package = tmp_path / "sentcompress"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "benchmark" / "measurements" / "greeting.py").write_text(GREETING, encoding="utf-8")
    honesty = {
        "command": "x",
        "commit": "x",
        "recipe": "hello",
        "recipe_digest": "x",
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "seed": 0,
        "training_tokens": None,
        "mean_sentence_tokens": None,
        "packages": {},
    }
    row = {"part": "greeting", "system": "sentence model", "figures": {"greetings": 3}, "honesty": honesty}
    results = {"schema_version": 1, "title": "hello", "created": "now", "rows": [row]}
    results["greeting"] = {"greetings": 3}
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "results.json")],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Greetings" in done.stdout
    assert "How often the model says hello." in done.stdout


@pytest.mark.parametrize("measurement", measurements(), ids=lambda measurement: measurement.name)
def test_each_measurement_says_what_its_command_does(measurement):
    first = (type(measurement).__doc__ or "").partition("\n")[0]
    assert first.endswith(".")
    command = f"sentcompress bench {measurement.name.replace('_', '-')}"
    assert all(example.startswith(command) for example in measurement.examples)

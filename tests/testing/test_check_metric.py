"""check_metric passes what is right and catches each way to be wrong, in one sentence."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from sentcompress.contracts import Metric, Options
from sentcompress.registry import get_registry
from sentcompress.testing import CheckFailed, check_metric, check_plugin


class Right(Metric):
    """Every wrong one differs in one thing."""

    def compute(self, reconstructions: Sequence[Any]) -> Any:
        return {
            "pairs": len(reconstructions),
            "same": sum(r.reference == r.hypothesis for r in reconstructions) / 2,
        }


class Number(Right):
    def compute(self, reconstructions: Sequence[Any]) -> Any:
        return 0.5


class Nothing(Right):
    def compute(self, reconstructions: Sequence[Any]) -> Any:
        return {}


class Nameless(Right):
    def compute(self, reconstructions: Sequence[Any]) -> Any:
        return {"": 1.0}


class Single(Right):
    def compute(self, reconstructions: Sequence[Any]) -> Any:
        return {"float32": np.float32(1.0)}


class Truth(Right):
    def compute(self, reconstructions: Sequence[Any]) -> Any:
        return {"all": all(r.reference == r.hypothesis for r in reconstructions)}


class Divides(Right):
    def compute(self, reconstructions: Sequence[Any]) -> Any:
        written = sum(len(r.hypothesis) for r in reconstructions)
        return {"ratio": sum(len(r.reference) for r in reconstructions) / written}


class NotANumber(Right):
    def compute(self, reconstructions: Sequence[Any]) -> Any:
        written = sum(len(r.hypothesis) for r in reconstructions)
        return {"ratio": 1.0 / written if written else float("nan")}


class Deviation(Right):
    def compute(self, reconstructions: Sequence[Any]) -> Any:
        mean = sum(len(r.hypothesis) for r in reconstructions) / len(reconstructions)
        square = sum((len(r.hypothesis) - mean) ** 2 for r in reconstructions)
        return {"deviation": square / (len(reconstructions) - 1)}


class Latin(Right):
    def compute(self, reconstructions: Sequence[Any]) -> Any:
        return {"bytes": sum(len(r.hypothesis.encode("latin-1")) for r in reconstructions)}


class Sorts(Right):
    def compute(self, reconstructions: Any) -> Any:
        reconstructions.sort(key=lambda r: r.hypothesis)
        return super().compute(reconstructions)


class Sampled(Right):
    def compute(self, reconstructions: Sequence[Any]) -> Any:
        return {"sample": random.random()}


class Accumulates(Right):
    seen = 0

    def compute(self, reconstructions: Sequence[Any]) -> Any:
        self.seen += len(reconstructions)
        return {"seen": self.seen}


WRONG: dict[type, str] = {
    Number: r"returns 0.5 for one pair, an exact reconstruction; it must return a dict of names to finite floats",
    Nothing: r"returns no figure for one pair",
    Nameless: r"returns a figure under the name '' for one pair, .*; names must not be empty",
    Single: r"returns float32=np.float32\(1.0\) for",
    Truth: r"returns all=True for",
    Divides: r"compute\(\) for one pair, an empty reconstruction raised ZeroDivisionError: .*\(test_check_metric.py",
    NotANumber: r"returns ratio=nan for one pair, an empty reconstruction; ",
    Deviation: r"compute\(\) for one pair, an exact reconstruction raised ZeroDivisionError",
    Latin: r"compute\(\) for one pair, text in other scripts raised UnicodeEncodeError",
    Sorts: r"changes its input \(pairs of every kind\); it must work on a copy",
    Sampled: r"returns different figures the second time for one pair, .*: first \{'sample': 0.\d+\}, then",
    Accumulates: r"returns different figures the second time .*: first \{'seen': 1\}, then \{'seen': 2\}; equal",
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda cls: cls.__name__)
def test_a_wrong_metric_is_caught_in_one_sentence(wrong: type[Metric]) -> None:
    with pytest.raises(CheckFailed, match=WRONG[wrong]) as caught:
        check_metric(wrong)
    said = str(caught.value)
    assert said.startswith(f"metric {wrong.__module__}.{wrong.__qualname__}")
    assert "\n" not in said
    assert len(said) < 500


@pytest.mark.parametrize("name", get_registry().names("metric"))
def test_every_metric_that_is_installed_passes(name: str) -> None:
    check_plugin("metric", name)


def test_options_reach_the_metric() -> None:
    class Scaled(Right):
        class Options(Options):
            factor: float = float("nan")

        def compute(self, reconstructions: Sequence[Any]) -> Any:
            return {"scaled": self.options.factor * len(reconstructions)}

    check_metric(Scaled, {"factor": 2})
    with pytest.raises(CheckFailed, match=r"returns scaled=nan"):
        check_metric(Scaled)

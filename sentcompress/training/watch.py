"""What the stages below a folder are doing, read from the files they leave. No torch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sentcompress.training.heartbeat import FILE as HEARTBEAT
from sentcompress.training.heartbeat import read_heartbeat
from sentcompress.training.progress import METRICS, read_metrics

STALE_SECONDS = 120.0
"""Silence after which a run counts as lost: a living process gives a sign every few seconds, whatever it does."""
DEPTH = 4
"""Levels below the folder at which stages are looked for."""
BARS = "▁▂▃▄▅▆▇█"


@dataclass
class StageView:
    """One stage.

    Attributes:
        name: its folder, relative to the one watched.
        state: ``training``, ``evaluating``, ``saving``, ``starting``, ``done``, ``stopped``, ``failed``, ``lost`` (it
            gives no sign of life any more), or ``unknown``.
        step, steps: done, and of the whole run (0: not known).
        losses: of ``metrics.jsonl``.
        heldout: name and value of the newest held-out figure.
        tokens_per_second: the newest.
        seconds_left: at the pace of the newest figures; None where that cannot be said.
        age: seconds since the last sign of life.
        error: why it failed, or the newest step that was not taken.
    """

    name: str
    state: str
    step: int
    steps: int
    losses: list[float] = field(default_factory=list)
    heldout: tuple[str, float] | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    age: float | None = None
    error: str = ""


def find_stages(folder: Path) -> list[Path]:
    """Folders of stages at or below ``folder``, oldest first."""

    def below(path: Path, depth: int) -> Iterator[Path]:
        if (path / METRICS).is_file() or (path / HEARTBEAT).is_file():
            yield path
        elif depth:
            for child in sorted(path.iterdir()):
                if child.is_dir() and not child.is_symlink() and not child.name.startswith("."):
                    yield from below(child, depth - 1)

    return sorted(below(folder, DEPTH), key=_begun)


def _begun(stage: Path) -> float:
    run = stage / "run.json"
    return run.stat().st_mtime if run.is_file() else time.time()


def view(stage: Path, root: Path) -> StageView:
    """Read a stage. Files that are half written or broken count as not there."""
    lines = read_metrics(stage / METRICS)
    steps = [line for line in lines if _number(line.get("loss"))]
    heartbeat = read_heartbeat(stage) or {}
    name = str(stage.relative_to(root)) if stage != root else stage.name
    found = StageView(name, "unknown", 0, 0, losses=[float(line["loss"]) for line in steps])
    if steps:
        found.step = int(steps[-1]["step"])
        found.tokens_per_second = _number(steps[-1].get("tokens_per_second"))
    for line in lines:
        if isinstance(line.get("eval"), dict) and line["eval"]:
            label, value = next(iter(line["eval"].items()))
            if (number := _number(value)) is not None:
                found.heldout = (str(label), number)
        elif isinstance(line.get("event"), str):
            found.error = line["event"]
    if (stage / "config.json").is_file():
        found.state, found.steps = "done", found.step
        return found
    if not heartbeat:
        return found
    found.state, found.age = str(heartbeat.get("state")), float(heartbeat["age"])
    found.step = max(found.step, int(_number(heartbeat.get("step")) or 0))
    found.steps = int(_number(heartbeat.get("steps")) or 0)
    found.error = str(heartbeat.get("error") or found.error)
    pace = _seconds_a_step(steps)
    if found.state not in ("stopped", "failed") and found.age > STALE_SECONDS:
        found.state = "lost"
    if pace is not None and found.state in ("training", "evaluating", "saving"):
        found.seconds_left = pace * (found.steps - found.step)
    return found


def _seconds_a_step(steps: list[dict[str, Any]]) -> float | None:
    """From the newest two log lines that say how long the run has trained."""
    timed = [(line["step"], line["seconds"]) for line in steps if _number(line.get("seconds")) is not None]
    if not timed:
        return None
    (before, began), (last, seconds) = timed[-2] if len(timed) > 1 else (0, 0.0), timed[-1]
    return (seconds - began) / (last - before) if last > before and seconds >= began else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def curve(values: list[float], width: int) -> str:
    """A line of bars, newest on the right: each stands for the mean of some values."""
    if not values:
        return ""
    size = max(1, math.ceil(len(values) / width))
    values = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)


def as_json(stages: list[StageView]) -> str:
    """For programs."""
    return json.dumps([asdict(stage) for stage in stages], indent=1)

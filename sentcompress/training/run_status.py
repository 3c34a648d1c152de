"""The state of the stages below a folder, read from the files they write. No torch."""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from sentcompress.training.monitor import HEARTBEAT, MAX_AGE, MAX_LINE, METRICS, read_heartbeat, read_line

STALE_SECONDS = 120.0
"""Age of the last heartbeat after which a run counts as lost: a live process writes one every few seconds."""
MAX_DEPTH = 4
"""Levels below the folder that are searched for stages."""
MAX_POINTS = 1024
"""Points of a loss curve. When it is full, neighbours are averaged and the distance doubles."""
MAX_STEPS = 10**9
MAX_FIGURE = 1e100
"""Larger values are ignored: no run wrote them, and computing with them could overflow."""
MAX_STATE = 16
"""Characters in the name of a state."""
BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = ".:-=+*#@"


@dataclass
class StageView:
    """One stage.

    Attributes:
        name: its folder, relative to the one watched.
        state: ``training``, ``evaluating``, ``saving``, ``starting``, ``done``, ``stopped``, ``failed``, ``lost`` (no
            heartbeat any more), or ``unknown``.
        step, steps: done, and of the whole run (0 if unknown).
        loss: the newest.
        losses: of ``metrics.jsonl``; means of neighbours if there are many.
        heldout: name and value of the newest held-out figure.
        tokens_per_second: the newest.
        seconds_left: at the pace of the newest figures; None if unknown.
        age: seconds since the last heartbeat.
        error: why it failed, or the newest anomaly.
    """

    name: str
    state: str
    step: int
    steps: int
    loss: float | None = None
    losses: list[float] = field(default_factory=list)
    heldout: tuple[str, float] | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    age: float | None = None
    error: str = ""


class Watcher:
    """Reads the stages below ``folder`` repeatedly; each time only what is new."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stages: dict[Path, StageReader] = {}

    def look(self) -> list[StageView]:
        """The present stages, oldest first."""
        stages = find_stages(self.folder)
        self._stages = {path: self._stages.get(path) or StageReader(path, self.folder) for path in stages}
        return [stage.look() for stage in self._stages.values()]


def find_stages(folder: Path) -> list[Path]:
    """Folders of stages at or below ``folder``, oldest first. Unreadable folders are skipped."""

    def below(path: Path, depth: int) -> Iterator[Path]:
        if os.path.isfile(path / METRICS) or os.path.isfile(path / HEARTBEAT):
            yield path
        elif depth:
            try:
                children = sorted(path.iterdir())
            except OSError:  # deleted meanwhile, or not readable
                return
            for child in children:
                if os.path.isdir(child) and not os.path.islink(child) and not child.name.startswith("."):
                    yield from below(child, depth - 1)

    return sorted(below(folder, MAX_DEPTH), key=_start_time)


def _start_time(stage: Path) -> float:
    try:
        return (stage / "run.json").stat().st_mtime
    except OSError:
        return time.time()


class StageReader:
    """Reads the files of a stage repeatedly. Incomplete or broken files and values are ignored."""

    def __init__(self, stage: Path, root: Path) -> None:
        self.stage = stage
        # The path of a folder given as "." has no name.
        self.name = (
            str(stage.relative_to(root)) if stage != root else os.path.basename(os.path.abspath(stage))
        )
        self._metrics = MetricsReader(stage / METRICS)
        self._heartbeat_time: Any = None
        self._seen = 0.0
        self._changed = False

    def look(self) -> StageView:
        metrics = self._metrics
        metrics.read()
        found = StageView(
            self.name,
            "unknown",
            metrics.step,
            0,
            loss=metrics.loss,
            losses=metrics.losses.values(),
            heldout=metrics.heldout,
            tokens_per_second=metrics.tokens_per_second,
            error=metrics.event,
        )
        if os.path.isfile(self.stage / "config.json"):
            found.state, found.steps = "done", found.step
            return found
        heartbeat = read_heartbeat(self.stage)
        if heartbeat is None:
            return found
        found.age = self._age(heartbeat)
        found.step = max(found.step, _count(heartbeat.get("step")) or 0)
        found.steps = _count(heartbeat.get("steps")) or 0
        found.error = _text(heartbeat.get("error")) or found.error
        state = _text(heartbeat.get("state"))
        if 0 < len(state) <= MAX_STATE:
            found.state = state
        if found.state not in ("stopped", "failed") and found.age > STALE_SECONDS:
            found.state = "lost"
        pace = metrics.seconds_per_step()
        if pace is not None and found.state in ("training", "evaluating", "saving"):
            left = pace * (found.steps - found.step)
            found.seconds_left = left if 0 <= left <= MAX_AGE else None
        return found

    def _age(self, heartbeat: dict[str, Any]) -> float:
        """Seconds since the last heartbeat.

        The clocks of two machines may differ. The age of a heartbeat that arrived while this process was watching is
        measured by this process. Before the first such one, the age is what the clocks say, and at least the time since
        watching started.
        """
        now = time.monotonic()
        if heartbeat["time"] != self._heartbeat_time:
            self._changed = self._heartbeat_time is not None
            self._heartbeat_time, self._seen = heartbeat["time"], now
        seen = now - self._seen
        return seen if self._changed else max(seen, float(heartbeat["age"]))


class MetricsReader:
    """Reads what was appended to a ``metrics.jsonl`` and keeps only what a view needs.

    Attributes:
        step: of the newest line with a loss.
        loss, tokens_per_second, heldout, event: the newest.
        losses: all of them, as a curve.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start_over()

    def _start_over(self) -> None:
        self.step = 0
        self.loss: float | None = None
        self.losses = Curve()
        self.heldout: tuple[str, float] | None = None
        self.tokens_per_second: float | None = None
        self.event = ""
        self._timed: deque[tuple[int, float]] = deque(maxlen=2)
        self._offset = 0
        self._last = b""
        self._too_long = False

    def read(self) -> None:
        """Read what is new, or everything if the file was replaced."""
        try:
            if not os.path.isfile(self.path):  # reading a pipe would block
                raise FileNotFoundError(self.path)
            with open(self.path, "rb") as file:
                # Compare what was read last: a resumed run replaces the file, and inode numbers are not stable on
                # some network file systems.
                file.seek(self._offset - len(self._last))
                if file.read(len(self._last)) != self._last:
                    self._start_over()
                    file.seek(0)
                for line in self._whole_lines(file):
                    self._take(line)
        except OSError:
            self._start_over()

    def _whole_lines(self, file: BinaryIO) -> Iterator[bytes]:
        """Complete lines from here on, without those that are too long."""
        while line := file.readline(MAX_LINE):
            ended = line.endswith(b"\n")
            if not ended and len(line) < MAX_LINE:
                return
            self._offset += len(line)
            self._last = line
            if ended and not self._too_long:
                yield line
            self._too_long = not ended

    def _take(self, text: bytes) -> None:
        line = read_line(text.decode("utf-8", "replace"))
        step = _count(line["step"]) if line else None
        if line is None or step is None:
            return
        loss = _number(line.get("loss"))
        if loss is not None:
            self.step, self.loss = step, loss
            self.losses.add(loss)
            self.tokens_per_second = _number(line.get("tokens_per_second"))
            if (seconds := _number(line.get("seconds"))) is not None:
                self._timed.append((step, seconds))
        if isinstance(line.get("eval"), dict) and line["eval"]:
            label, value = next(iter(line["eval"].items()))
            if (number := _number(value)) is not None:
                self.heldout = (label, number)
        self.event = _text(line.get("event")) or self.event

    def seconds_per_step(self) -> float | None:
        """From the two newest log lines with a training time."""
        if not self._timed:
            return None
        (before, began), (last, seconds) = (
            (self._timed[0] if len(self._timed) > 1 else (0, 0.0)),
            self._timed[-1],
        )
        return (seconds - began) / (last - before) if last > before and seconds >= began else None


class Curve:
    """At most ``MAX_POINTS`` means, each of the same number of neighbouring values."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._each = 1
        self._sum = 0.0
        self._count = 0

    def add(self, value: float) -> None:
        self._sum += value
        self._count += 1
        if self._count < self._each:
            return
        self._means.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._means) == MAX_POINTS:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [(first + second) / 2 for first, second in pairs]
            self._each *= 2

    def values(self) -> list[float]:
        """The means; the last one may be of fewer values."""
        return [*self._means, *([self._sum / self._count] if self._count else [])]


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= MAX_FIGURE else None  # False for NaN


def _count(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and 0 <= number <= MAX_STEPS else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def curve(values: list[float], width: int, bars: str = BARS) -> str:
    """A line of bars, newest on the right; each shows the mean of some values."""
    if not values:
        return ""
    size = max(1, math.ceil(len(values) / width))
    groups = [values[i : i + size] for i in range(0, len(values), size)]
    values = [sum(group) / len(group) for group in groups]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(bars[round((value - low) / span * (len(bars) - 1))] for value in values)


def as_json(stages: list[StageView]) -> str:
    """The stages as JSON, for programs."""
    return json.dumps([asdict(stage) for stage in stages], indent=1)

"""What the stages below a folder are doing, read from the files they leave. No torch."""

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
"""Silence after which a run counts as lost: a living process gives a sign every few seconds, whatever it does."""
DEPTH = 4
"""Levels below the folder at which stages are looked for."""
POINTS = 1024
"""Of a loss curve that are kept; as many again are twice as far apart."""
MOST_STEPS = 10**9
LARGEST_FIGURE = 1e100
"""What is beyond these counts as not there: no run wrote it, and what is computed from it would overflow."""
LONGEST_STATE = 16
BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = ".:-=+*#@"


@dataclass
class StageView:
    """One stage.

    Attributes:
        name: its folder, relative to the one watched.
        state: ``training``, ``evaluating``, ``saving``, ``starting``, ``done``, ``stopped``, ``failed``, ``lost`` (it
            gives no sign of life any more), or ``unknown``.
        step, steps: done, and of the whole run (0: not known).
        loss: the newest.
        losses: of ``metrics.jsonl``; means of neighbours where there are many.
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
    loss: float | None = None
    losses: list[float] = field(default_factory=list)
    heldout: tuple[str, float] | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    age: float | None = None
    error: str = ""


class Watcher:
    """Looks at the stages below ``folder`` again and again, and reads only what is new."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stages: dict[Path, StageReader] = {}

    def look(self) -> list[StageView]:
        """The stages that are there now, oldest first."""
        stages = find_stages(self.folder)
        self._stages = {path: self._stages.get(path) or StageReader(path, self.folder) for path in stages}
        return [stage.look() for stage in self._stages.values()]


def find_stages(folder: Path) -> list[Path]:
    """Folders of stages at or below ``folder``, oldest first. What may not be read is passed over."""

    def below(path: Path, depth: int) -> Iterator[Path]:
        if os.path.isfile(path / METRICS) or os.path.isfile(path / HEARTBEAT):
            yield path
        elif depth:
            try:
                children = sorted(path.iterdir())
            except OSError:  # deleted meanwhile, or someone else's
                return
            for child in children:
                if os.path.isdir(child) and not os.path.islink(child) and not child.name.startswith("."):
                    yield from below(child, depth - 1)

    return sorted(below(folder, DEPTH), key=_begun)


def _begun(stage: Path) -> float:
    try:
        return (stage / "run.json").stat().st_mtime
    except OSError:
        return time.time()


class StageReader:
    """A stage, and what earlier looks have shown of it.

    Files and values that are half written or broken count as not there.
    """

    def __init__(self, stage: Path, root: Path) -> None:
        self.stage = stage
        # The path of a folder given as "." has no name.
        self.name = (
            str(stage.relative_to(root)) if stage != root else os.path.basename(os.path.abspath(stage))
        )
        self._metrics = MetricsReader(stage / METRICS)
        self._sign: Any = None
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
        found.age = self._silence(heartbeat)
        found.step = max(found.step, _count(heartbeat.get("step")) or 0)
        found.steps = _count(heartbeat.get("steps")) or 0
        found.error = _text(heartbeat.get("error")) or found.error
        state = _text(heartbeat.get("state"))
        if 0 < len(state) <= LONGEST_STATE:
            found.state = state
        if found.state not in ("stopped", "failed") and found.age > STALE_SECONDS:
            found.state = "lost"
        pace = metrics.seconds_a_step()
        if pace is not None and found.state in ("training", "evaluating", "saving"):
            left = pace * (found.steps - found.step)
            found.seconds_left = left if 0 <= left <= MAX_AGE else None
        return found

    def _silence(self, heartbeat: dict[str, Any]) -> float:
        """Seconds since the last sign.

        Clocks of two machines may differ. A sign that came between two looks is as old as this process has known it,
        whatever they say; until one comes, the run is silent as long as they say, and at least since the first look.
        """
        now = time.monotonic()
        if heartbeat["time"] != self._sign:
            self._changed = self._sign is not None
            self._sign, self._seen = heartbeat["time"], now
        seen = now - self._seen
        return seen if self._changed else max(seen, float(heartbeat["age"]))


class MetricsReader:
    """What a view needs of a ``metrics.jsonl``. A look reads what was appended, and keeps little of it.

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
        """Read what is new, or everything where the file is another one than at the last look."""
        try:
            if not os.path.isfile(self.path):  # a pipe would be waited for
                raise FileNotFoundError(self.path)
            with open(self.path, "rb") as file:
                # By what was read last: a run that is resumed writes another file, and inode numbers differ from
                # look to look on some file systems that are mounted from afar.
                file.seek(self._offset - len(self._last))
                if file.read(len(self._last)) != self._last:
                    self._start_over()
                    file.seek(0)
                for line in self._whole_lines(file):
                    self._take(line)
        except OSError:
            self._start_over()

    def _whole_lines(self, file: BinaryIO) -> Iterator[bytes]:
        """Lines from here on, without those that are too long and one that is still being written."""
        while part := file.readline(MAX_LINE):
            ended = part.endswith(b"\n")
            if not ended and len(part) < MAX_LINE:
                return
            self._offset += len(part)
            self._last = part
            if ended and not self._too_long:
                yield part
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

    def seconds_a_step(self) -> float | None:
        """From the newest two log lines that say how long the run has trained."""
        if not self._timed:
            return None
        (before, began), (last, seconds) = (
            (self._timed[0] if len(self._timed) > 1 else (0, 0.0)),
            self._timed[-1],
        )
        return (seconds - began) / (last - before) if last > before and seconds >= began else None


class Curve:
    """At most ``POINTS`` means, each of as many neighbouring values."""

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
        if len(self._means) == POINTS:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [(first + second) / 2 for first, second in pairs]
            self._each *= 2

    def values(self) -> list[float]:
        """The means; the last may be of fewer values."""
        return [*self._means, *([self._sum / self._count] if self._count else [])]


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= LARGEST_FIGURE else None  # not a number compares as False


def _count(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and 0 <= number <= MOST_STEPS else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def curve(values: list[float], width: int, bars: str = BARS) -> str:
    """A line of bars, newest on the right: each stands for the mean of some values."""
    if not values:
        return ""
    size = max(1, math.ceil(len(values) / width))
    values = [sum(part) / len(part) for part in (values[i : i + size] for i in range(0, len(values), size))]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(bars[round((value - low) / span * (len(bars) - 1))] for value in values)


def as_json(stages: list[StageView]) -> str:
    """For programs."""
    return json.dumps([asdict(stage) for stage in stages], indent=1)

"""The folder of one stage: whose it is, whether it is finished, and how it is replaced without a loss.

A stage is finished when its ``config.json`` exists: that file is moved in last. ``run.json`` says what the
stage was made of.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sentcompress.distributed import process_count
from sentcompress.errors import InputError
from sentcompress.files import read_json, storage_errors
from sentcompress.recipe import Recipe
from sentcompress.training.checkpoints import write_json
from sentcompress.training.heartbeat import read_heartbeat

RUN = "run.json"
MARK = "config.json"
BEST = "best"
"""Folder in a stage's, of the model with the best held-out figure so far."""

SECTIONS = {"pretrain": "pretrain", "vae": "train_vae", "graft": "graft", "baseline": "graft"}
"""The section of the recipe with each stage's training settings."""

DEPENDS = {
    "pretrain": ("seed", "data", "segmenter", "backbone", "pretrain"),
    "vae": ("seed", "data", "segmenter", "backbone", "fusion", "vae", "train_vae"),
    "graft": ("seed", "data", "segmenter", "backbone", "graft"),
    "baseline": ("seed", "data", "segmenter", "backbone", "graft", "baseline"),
}
"""What of the recipe each stage's result depends on. Results of earlier stages come in as ``inputs``."""

FREE = (
    "log_every",
    "eval_every",
    "eval_batches",
    "save_every",
    "keep",
    "keep_best",
    "background_saves",
    "distributed",
    "tensorboard",
    "wandb",
    "gradient_checkpointing",
    "on_trouble",
    "spike",
)
"""Training settings that do not change the weights (of a run without trouble), so that they may change when a stage is
resumed."""
ACCUMULATION, TOGETHER = "gradient_accumulation", "micro_batches_a_step"


def stage_record(stage: str, recipe: Recipe, inputs: Mapping[str, str]) -> dict[str, Any]:
    """What a stage is made of, by dotted name: the fields of its parts of the recipe, and its inputs."""
    values = recipe.model_dump(mode="json")
    record = _flat({name: values[name] for name in DEPENDS[stage]})
    section = SECTIONS[stage]
    for name in FREE:
        record.pop(f"{section}.{name}", None)
    if f"{section}.{ACCUMULATION}" in record:
        # Three processes with one micro-batch each take the steps of one with three, and go on with what it left.
        record[f"{section}.{TOGETHER}"] = record.pop(f"{section}.{ACCUMULATION}") * process_count()
    if stage == "baseline":
        for name in ("teacher", "teacher_share", "shortlist_rank"):  # of the graft alone
            del record[f"graft.{name}"]
    return record | {f"inputs.{name}": digest for name, digest in inputs.items()}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {name: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{name}.{key}" if name else key)
    return flat


class StageFolder:
    """The folder a stage writes to.

    Args:
        path: the folder.
        stage: its stage.
        record: what it is to be made of (:func:`stage_record`).
    """

    def __init__(self, path: Path, stage: str, record: dict[str, Any]) -> None:
        self.path = path
        self.stage = stage
        self.record = record
        self.checkpoints = path / "checkpoints"
        self._previous = path.with_name(f".{path.name}.previous")

    @property
    def finished(self) -> bool:
        return (self.path / MARK).is_file() and any(self.path.glob("model*.safetensors"))

    @property
    def started(self) -> bool:
        return (self.path / RUN).is_file()

    @property
    def interrupted(self) -> bool:
        """An older run still stands aside: the one that replaces it goes on, or was killed."""
        return self._previous.exists()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process, which may ask again; the system lets it go when the process ends.

        Raises:
            InputError: another process holds it.
            StorageError: the folder above cannot be written.
        """
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"), timeout=0, is_singleton=True)
        with storage_errors(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout:
                other = read_heartbeat(self.path) or {}
                who = f" (process {other['pid']} on {other['host']})" if {"pid", "host"} <= set(other) else ""
                raise InputError(
                    f"{self.path}: another run is writing here{who}",
                    fix="wait for it, stop it, or choose another --out",
                ) from None
        try:
            yield
        finally:
            lock.release()

    def check(self, *, resume: bool, overwrite: bool, partial: bool = False) -> None:
        """Refuse what must not be touched. Reads only.

        Args:
            partial: compare only what ``record`` has; not all inputs were looked at.

        Raises:
            InputError: it holds another run, something else, or the same stage made of something else.
        """
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not self.path.is_dir():
            raise InputError(f"{self.path}: is a file, not a folder", fix="choose another --out")
        saved = read_json(self.path / RUN)
        if not isinstance(saved, dict) or saved.get("stage") != self.stage:
            raise InputError(
                f"{self.path}: holds files that are no '{self.stage}' stage of ours; nothing was touched",
                fix="choose another --out, or delete the folder yourself",
            )
        if overwrite:
            return
        fields = saved.get("fields")
        if not isinstance(fields, dict):
            fields = {}
        if partial:
            fields = {
                name: value
                for name, value in fields.items()
                if name in self.record or not name.startswith("inputs.")
            }
        self._check_same(fields)
        if not resume and not self.finished:
            raise InputError(
                f"{self.path}: holds a run that is not finished",
                fix="go on with it with --resume, or replace it with --overwrite",
            )

    def _check_same(self, saved: dict[str, Any]) -> None:
        old, new = (f"{SECTIONS[self.stage]}.{name}" for name in (ACCUMULATION, TOGETHER))
        if old in saved:  # written by a version that did not count processes; mostly there was one
            saved = {**saved, new: saved[old]}
            del saved[old]
        if self.finished and new in self.record:  # whoever computed it, it is there
            saved[new] = self.record[new]
        # A field that came with a later version, at its default: the run was made as if it had been there.
        defaults = stage_record(self.stage, Recipe(name="defaults"), {})
        later = {n for n in defaults if n not in saved and self.record.get(n) == defaults[n]}
        names = [n for n in [*saved, *self.record] if saved.get(n) != self.record.get(n) and n not in later]
        if not names:
            return
        lines = [
            f"  {name}: {saved.get(name, '(absent)')!r} there, {self.record.get(name, '(absent)')!r} now"
            for name in dict.fromkeys(names)
        ]
        back = "put these fields back"
        if set(names) == {new}:  # which is no field: it follows from two things that are
            back = f"choose processes (launch -n) and {old} so that their product is {saved.get(new)}"
        raise InputError(
            f"{self.path}: was made with another recipe:\n" + "\n".join(lines),
            fix=f"{back}, choose another --out, or replace it with --overwrite",
        )

    def recover(self) -> None:
        """Tidy up after a run that was killed while it replaced this folder: the older one comes back."""
        if not self._previous.exists():
            return
        if self.finished or (self.checkpoints.is_dir() and any(self.checkpoints.glob("step-*"))):
            self.forget_previous()
        else:
            self.restore()

    def open(self, *, overwrite: bool, about: dict[str, Any]) -> None:
        """Begin: move an older run aside if it is to be replaced, and write ``run.json``.

        Raises:
            StorageError: the folder cannot be written.
        """
        with storage_errors(self.path):
            if overwrite and self.path.exists():
                self.path.rename(self._previous)
            self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / RUN, {"stage": self.stage, "fields": self.record, **about})

    def restore(self) -> None:
        """The new run did not get going: put the older one back."""
        if self._previous.exists():
            shutil.rmtree(self.path, ignore_errors=True)
            self._previous.rename(self.path)

    def forget_previous(self) -> None:
        """The new run has got going: the older one goes."""
        shutil.rmtree(self._previous, ignore_errors=True)

    def figures(self) -> dict[str, float]:
        """Held-out figures of a finished stage."""
        saved = read_json(self.path / RUN)
        return dict(saved.get("figures") or {}) if isinstance(saved, dict) else {}

"""The stages of training, and the folder of one stage: what it was made from, whether it is finished, how it is locked.

A stage is finished when its ``config.json`` exists: that file is moved in last. ``run.json`` records what the stage was
made from. No torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentcompress.distributed import process_count
from sentcompress.errors import InputError
from sentcompress.files import read_json, storage_errors, write_atomically
from sentcompress.locks import hold_lock
from sentcompress.recipe import MemorySettings, OpponentSettings, PassageSettings, Recipe, by_dotted_name
from sentcompress.training.monitor import read_heartbeat

RUN = "run.json"
COMPLETE = "config.json"
"""The file that marks a finished stage."""
BEST = "best"
"""Subfolder with the model that had the best held-out figure so far."""


@dataclass(frozen=True)
class Stage:
    """A training stage.

    Attributes:
        name: also the name of its folder.
        section: the recipe section with its training settings.
        depends_on: recipe fields that its result depends on. The results of earlier stages count as ``inputs``.
    """

    name: str
    section: str
    depends_on: tuple[str, ...]


_CORPUS = ("seed", "data", "segmenter", "backbone")
PRETRAIN = Stage("pretrain", "pretrain", (*_CORPUS, "pretrain"))
VAE = Stage("vae", "train_vae", (*_CORPUS, "fusion", "vae", "train_vae"))
GRAFT = Stage("graft", "graft", (*_CORPUS, "graft"))
BASELINE = Stage("baseline", "graft", (*_CORPUS, "graft", "baseline"))
MEMORY = Stage("memory", "memory", (*_CORPUS, "memory"))
MEMORY_BASELINE = Stage(BASELINE.name, MEMORY.section, (*_CORPUS, "memory", "baseline"))
"""The baseline of a recipe that trains a memory: it reads the memory's passages."""
OPPONENT = "opponent-"
"""What the names of the opponents' stages and folders begin with."""

NOT_OF_THE_BASELINE = {
    GRAFT.section: ("split", "teacher", "teacher_share", "shortlist_rank", "backbone_learning_rate"),
    MEMORY.section: tuple(MemorySettings.model_fields.keys() - PassageSettings.model_fields.keys()),
}
"""Fields of these recipe sections that do not affect the baseline, which reads their passages."""
NOT_COMPARED = (
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
"""Training settings, as named in ``run.json``, that do not affect the weights (of a run without anomalies). They may
change when a stage is resumed."""
ACCUMULATION, MICRO_BATCHES = "gradient_accumulation", "micro_batches_a_step"


def stage_record(stage: Stage, recipe: Recipe, inputs: Mapping[str, str]) -> dict[str, Any]:
    """What a stage is made from, by dotted name: the recipe fields it depends on, and its inputs."""
    values = recipe.values()
    record = by_dotted_name({name: values.get(name) for name in stage.depends_on})
    for name in NOT_COMPARED:
        record.pop(f"{stage.section}.{name}", None)
    accumulation, micro_batches = _batch_fields(stage)
    if accumulation in record:
        # Three processes with one micro-batch each take the same steps as one process with three.
        record[micro_batches] = record.pop(accumulation) * process_count()
    taught = False
    if stage.name.startswith(OPPONENT):
        named = recipe.opponents.get(stage.name.removeprefix(OPPONENT), OpponentSettings())
        own = named.model_dump(mode="json")
        own["learning_rate"] = own["learning_rate"] or recipe.baseline.learning_rate
        taught = own.pop("taught") and recipe.graft.teacher is not None
        record |= by_dotted_name({"opponent": own})
    if stage.name == BASELINE.name or stage.name.startswith(OPPONENT):
        read = ("teacher", "teacher_share") if taught else ()
        others = {
            f"{stage.section}.{name}" for name in NOT_OF_THE_BASELINE[stage.section] if name not in read
        }
        # A field such as options may have fields of its own.
        record = {name: value for name, value in record.items() if not _within(name, others)}
    return record | {f"inputs.{name}": digest for name, digest in inputs.items()}


def _within(name: str, fields: set[str]) -> bool:
    return name in fields or any(name.startswith(f"{field}.") for field in fields)


def baseline_stage(recipe: Recipe) -> Stage:
    """The baseline of a recipe: it reads the passages of the graft, or of the memory."""
    return BASELINE if recipe.memory is None else MEMORY_BASELINE


def opponent_stage(name: str) -> Stage:
    """The stage of one of the recipe's opponents, by its name there."""
    return Stage(OPPONENT + name, GRAFT.section, (*_CORPUS, "graft"))


def _batch_fields(stage: Stage) -> tuple[str, str]:
    return f"{stage.section}.{ACCUMULATION}", f"{stage.section}.{MICRO_BATCHES}"


class StageFolder:
    """The folder a stage writes to.

    Args:
        path: the folder.
        stage: its stage.
        record: what it is to be made from (:func:`stage_record`).
    """

    def __init__(self, path: Path, stage: Stage, record: dict[str, Any]) -> None:
        self.path = path
        self.stage = stage
        self.record = record
        self.checkpoints = path / "checkpoints"
        self._previous = path.with_name(f".{path.name}.previous")

    @property
    def finished(self) -> bool:
        return (self.path / COMPLETE).is_file() and any(self.path.glob("model*.safetensors"))

    @property
    def started(self) -> bool:
        return (self.path / RUN).is_file()

    @property
    def interrupted(self) -> bool:
        """An older run is still set aside: the run that replaces it is in progress, or was killed."""
        return self._previous.exists()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock during the block.

        Raises:
            InputError: another process holds it.
            StorageError: the parent folder cannot be written.
        """
        with ExitStack() as stack:
            with storage_errors(self.path.parent):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                held = stack.enter_context(hold_lock(self.path.with_name(f".{self.path.name}.lock")))
            if not held:
                other = read_heartbeat(self.path) or {}
                who = f" (process {other['pid']} on {other['host']})" if {"pid", "host"} <= set(other) else ""
                raise InputError(
                    f"{self.path}: another run is writing here{who}",
                    fix="wait for it to end, stop it, or choose another --out",
                )
            yield

    def check(self, *, resume: bool, overwrite: bool, partial: bool = False) -> None:
        """Refuse a folder that this run must not change. Reads only.

        Args:
            partial: compare only the inputs that ``record`` has; not all of them are known yet.

        Raises:
            InputError: it holds other files, another run, or the same stage made from something else.
        """
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not self.path.is_dir():
            raise InputError(f"{self.path}: is a file, not a folder", fix="choose another --out")
        saved = read_json(self.path / RUN)
        if not isinstance(saved, dict) or saved.get("stage") != self.stage.name:
            raise InputError(
                f"{self.path}: is not a sentcompress '{self.stage.name}' folder; left unchanged",
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
                f"{self.path}: holds an unfinished run",
                fix="continue it with --resume, or replace it with --overwrite",
            )

    def _check_same(self, saved: dict[str, Any]) -> None:
        accumulation, micro_batches = _batch_fields(self.stage)
        if accumulation in saved:  # an older version recorded this field; most of its runs had one process
            saved = {**saved, micro_batches: saved[accumulation]}
            del saved[accumulation]
        if self.finished and micro_batches in self.record:  # the number of processes no longer matters
            saved[micro_batches] = self.record[micro_batches]
        not_compared = {f"{self.stage.section}.{name}" for name in NOT_COMPARED}
        # A field that an older version did not have, at its default: the run was made as if it had been there.
        defaults = stage_record(self.stage, Recipe(name="defaults"), {})
        added = {n for n in defaults if n not in saved and self.record.get(n) == defaults[n]}
        names = [
            name
            for name in dict.fromkeys([*saved, *self.record])
            if saved.get(name) != self.record.get(name) and name not in added | not_compared
        ]
        if not names:
            return
        lines = [
            f"  {name}: {saved.get(name, '(absent)')!r} there, {self.record.get(name, '(absent)')!r} now"
            for name in names
        ]
        change = "restore these fields"
        if names == [micro_batches]:  # not a field of the recipe: it is the product of two settings
            product = saved.get(micro_batches)
            change = f"choose processes (launch -n) and {accumulation} so that their product is {product}"
        raise InputError(
            f"{self.path}: was made with another recipe:\n" + "\n".join(lines),
            fix=f"{change}, choose another --out, or replace it with --overwrite",
        )

    def recover(self) -> None:
        """Clean up after a run that was killed while it replaced this folder: restore the older run if needed."""
        if not self._previous.exists():
            return
        if self.finished or (self.checkpoints.is_dir() and any(self.checkpoints.glob("step-*"))):
            self.forget_previous()
        else:
            self.restore()

    def open(self, *, overwrite: bool, about: dict[str, Any]) -> None:
        """Set an older run aside if this one replaces it, and write ``run.json``.

        Raises:
            StorageError: the folder cannot be written.
        """
        with storage_errors(self.path):
            if overwrite and self.path.exists():
                self.path.rename(self._previous)
            self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / RUN, {"stage": self.stage.name, "fields": self.record, **about})

    def restore(self) -> None:
        """The new run failed before its first step: restore the older one."""
        if self._previous.exists():
            shutil.rmtree(self.path, ignore_errors=True)
            self._previous.rename(self.path)

    def forget_previous(self) -> None:
        """The new run has taken its first step: delete the older one."""
        shutil.rmtree(self._previous, ignore_errors=True)

    def figures(self) -> dict[str, float]:
        """Held-out figures of a finished stage."""
        saved = read_json(self.path / RUN)
        return dict(saved.get("figures") or {}) if isinstance(saved, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """Write JSON completely or not at all."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")

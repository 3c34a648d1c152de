"""The stages of a recipe, in order: each is skipped when it is done and continued where it stopped.

``sentcompress run`` and Python programs both call :func:`run_recipe`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from sentcompress.distributed import processes
from sentcompress.errors import InputError, did_you_mean
from sentcompress.files import folder_digest, write_atomically
from sentcompress.recipe import Recipe
from sentcompress.training.card import provenance
from sentcompress.training.inputs import Inputs, load_inputs
from sentcompress.training.jobs import Job
from sentcompress.training.loop import seed_everything, train
from sentcompress.training.run_folder import (
    BASELINE,
    COMPLETE,
    GRAFT,
    MEMORY,
    PRETRAIN,
    VAE,
    Stage,
    StageFolder,
    baseline_stage,
    opponent_stage,
    stage_record,
)

if TYPE_CHECKING:
    from sentcompress.modeling.pruning import Match

BENCH = "bench"
"""Name of the last stage, which measures the others, and of its folder."""


class Run:
    """A recipe and the folder it runs in. Inputs that several stages need are loaded once."""

    def __init__(self, recipe: Recipe, out: Path) -> None:
        self.recipe = recipe
        self.out = out
        self._matches: dict[str, Match] = {}

    @cached_property
    def text(self) -> Inputs:
        return load_inputs(self.recipe)

    @property
    def vae(self) -> Path:
        """Folder of the SentenceVAE that is grafted."""
        return Path(self.recipe.graft.vae) if self.recipe.graft.vae else self.out / VAE.name

    @property
    def teacher(self) -> Path | None:
        """Folder of the LLM that teaches the graft; None if there is none, or if it is the backbone."""
        named = self.recipe.graft.teacher
        if named in (None, "backbone"):
            return None
        return self.out / BASELINE.name if named == BASELINE.name else Path(str(named))

    def graft_inputs(self) -> dict[str, str]:
        """Digests of the model folders that a graft starts from."""
        digests = {} if self.recipe.graft.split else {"vae": folder_digest(self.vae)}
        return digests | self._teacher_digest()

    def opponent_inputs(self, name: str) -> dict[str, str]:
        """The shape of an opponent, and the digest of the folder that it learns from."""
        taught = self.recipe.opponents[name].taught
        return self.match(name).inputs() | (self._teacher_digest() if taught else {})

    def _teacher_digest(self) -> dict[str, str]:
        if self.teacher is None or not (self.teacher / COMPLETE).is_file():
            return {}
        return {"teacher": folder_digest(self.teacher)}

    def check_graft(self, stages: Sequence[str]) -> None:
        """Refuse a graft that will lack its SentenceVAE or teacher, before anything is read or trained.

        Raises:
            InputError: naming the folder.
        """
        if self.recipe.graft.split is not None:
            from sentcompress.estimate.shapes import meta_graft

            if VAE.name in stages:
                raise InputError(
                    "graft.split: a split LLM needs no SentenceVAE", fix="use sentcompress graft"
                )
            meta_graft(self.recipe)
        taught = {opponent_stage(name).name for name, own in self.recipe.opponents.items() if own.taught}
        if self.teacher is not None and (taught | {GRAFT.name}) & {*stages}:
            self._check_teacher(stages)
        if GRAFT.name not in stages:
            return
        done = (self.out / GRAFT.name / COMPLETE).is_file()  # no longer needs its SentenceVAE
        needs_vae = VAE.name not in stages and self.recipe.graft.split is None
        if needs_vae and not done and not (self.vae / COMPLETE).is_file():
            raise InputError(
                f"graft: no SentenceVAE in '{self.vae}'",
                fix="train it first, with the same recipe and --out: sentcompress train-vae; or name one: --vae DIR",
            )

    def _check_teacher(self, stages: Sequence[str]) -> None:
        folder, own = self.teacher, self.recipe.graft.teacher == BASELINE.name
        assert folder is not None
        if not (own and BASELINE.name in stages) and not (folder / COMPLETE).is_file():
            raise InputError(
                f"graft.teacher: no model in '{folder}'",
                fix="train it first: sentcompress baseline" if own else "give the folder of a causal LM",
            )

    def match(self, name: str) -> Match:
        """The shape of an opponent, found for the sentences of this text."""
        from sentcompress.estimate.equal_cost import match

        if name not in self._matches:
            self._matches[name] = match(self.recipe, name, float(self.text.corpus.sentence_lengths.mean()))
        return self._matches[name]

    def check_opponents(self, stages: Sequence[str], console: Console) -> None:
        """Find the shapes of the opponents that will be trained, and print them, before anything is trained.

        Raises:
            InputError: one does not fit the LLM.
        """
        for name in self.recipe.opponents:
            stage = opponent_stage(name).name
            if stage in stages and not (self.out / stage / COMPLETE).is_file():
                found = self.match(name)
                unequal = not found.is_equal and self.recipe.opponents[name].blocks is None
                console.print(f"{stage}: {found}" + (" (no shape comes closer)" if unequal else ""))

    def check_memory(self, stages: Sequence[str]) -> None:
        """Refuse a memory that cannot be trained, before anything is read.

        Raises:
            InputError: the recipe names none, or an option that it has not.
        """
        if MEMORY.name not in stages:
            return
        if self.recipe.memory is None:
            raise InputError(
                "the recipe has no 'memory' section", fix="add one, or name a memory: --memory window+recall"
            )
        from sentcompress.training.jobs.memory_training import drawn_ranges

        drawn_ranges(self.recipe.memory)


@dataclass(frozen=True)
class TrainingStage:
    """How a stage is trained in a run.

    Attributes:
        stage: its name, recipe section and dependencies.
        wanted: whether a recipe has it.
        job: builds its job; called after the random generators were seeded.
        inputs: digests of what it takes from earlier stages, named as in the job, and cheap to compute.
    """

    stage: Stage
    wanted: Callable[[Recipe], bool]
    job: Callable[[Run], Job]
    inputs: Callable[[Run], dict[str, str]] = lambda _: {}

    def of(self, recipe: Recipe) -> Stage:
        """The stage in a recipe."""
        return baseline_stage(recipe) if self.stage == BASELINE else self.stage


def _pretrain(run: Run) -> Job:
    from sentcompress.training.jobs.token_level import PretrainJob

    return PretrainJob(run.recipe)


def _vae(run: Run) -> Job:
    from sentcompress.training.jobs.sentence_vae import VAEJob

    return VAEJob(run.recipe, run.text)


def _graft(run: Run) -> Job:
    if run.recipe.graft.split is not None:
        from sentcompress.training.jobs.split_training import SplitJob

        return SplitJob(run.recipe, run.text, run.teacher)
    from sentcompress.training.jobs.graft import GraftJob

    return GraftJob(run.recipe, run.vae, run.text, run.teacher)


def _baseline(run: Run) -> Job:
    from sentcompress.training.jobs.token_level import BaselineJob

    return BaselineJob(run.recipe, run.text)


def _opponent(name: str, run: Run) -> Job:
    from sentcompress.training.jobs.opponents import OpponentJob

    return OpponentJob(run.recipe, name, run.match(name), run.text, run.teacher)


def _memory(run: Run) -> Job:
    from sentcompress.training.jobs.memory_training import MemoryJob

    return MemoryJob(run.recipe, run.text)


def _grafts(recipe: Recipe) -> bool:
    return recipe.pretrain is None and recipe.memory is None


def _trains_vae(recipe: Recipe) -> bool:
    return _grafts(recipe) and recipe.trains_vae


def _compares(recipe: Recipe) -> bool:
    """Whether the recipe trains a model that has a baseline."""
    return recipe.pretrain is None


STAGES = {
    entry.stage.name: entry
    for entry in (
        TrainingStage(PRETRAIN, lambda recipe: recipe.pretrain is not None, _pretrain),
        TrainingStage(VAE, _trains_vae, _vae),
        TrainingStage(GRAFT, _grafts, _graft, Run.graft_inputs),
        TrainingStage(MEMORY, lambda recipe: _compares(recipe) and recipe.memory is not None, _memory),
        TrainingStage(BASELINE, lambda recipe: _compares(recipe) and recipe.baseline.enabled, _baseline),
    )
}
"""The training stages that every recipe may have, in order."""


def training_stages(recipe: Recipe) -> dict[str, TrainingStage]:
    """All training stages, in order, with those of the recipe's opponents."""
    entries = [
        TrainingStage(
            opponent_stage(name),
            _grafts,
            partial(_opponent, name),
            lambda run, name=name: run.opponent_inputs(name),  # type: ignore[misc]
        )
        for name in (recipe.opponents if _grafts(recipe) else ())
    ]
    return STAGES | {entry.stage.name: entry for entry in entries}


def stages_of(recipe: Recipe) -> list[str]:
    """Names of the stages that a recipe has, in order."""
    names = [name for name, entry in training_stages(recipe).items() if entry.wanted(recipe)]
    if recipe.graft.teacher == BASELINE.name:
        names.sort(key=lambda name: name == GRAFT.name)  # the baseline teaches the graft, so it comes first
    measured = _compares(recipe) and recipe.bench.metrics
    return [*names, BENCH] if measured else names


def run_recipe(
    recipe: Recipe,
    out: Path,
    *,
    stages: Sequence[str] | None = None,
    resume: bool = True,
    overwrite: bool = False,
) -> dict[str, dict[str, float]]:
    """Run the stages of a recipe. Stages that are done are left as they are; an unfinished one is continued.

    Args:
        out: folder of the run.
        stages: names, in order; None runs all that the recipe has, the benchmark last.
        resume: continue an unfinished stage; False refuses it.
        overwrite: replace the trained stages that are there.

    Returns:
        held-out figures of each trained stage. The benchmark writes its results into its folder.

    Raises:
        InputError: a stage's folder holds another run, there is no such stage, or the folder's name is not UTF-8.
        SentCompressError: as :func:`~sentcompress.training.loop.train` and
            :func:`~sentcompress.benchmark.runner.run_bench` say.
    """
    try:
        str(out).encode()
    except UnicodeEncodeError:  # safetensors and tokenizers would fail after the training
        raise InputError(
            f"{out}: no model can be saved there, since the name of the folder is not UTF-8",
            fix="choose another one",
        ) from None
    main = processes().is_main_process
    console = Console(stderr=True, quiet=not main, highlight=False, markup=False, soft_wrap=True)
    run = Run(recipe, out)
    chosen = _checked(stages, recipe) if stages is not None else stages_of(recipe)
    run.check_graft(chosen)
    run.check_memory(chosen)
    run.check_opponents(chosen, console)
    entries = training_stages(recipe)
    results: dict[str, dict[str, float]] = {}
    skipped = []
    for name in chosen:
        if name == BENCH:
            done = _run_bench(run)
        else:
            done, results[name] = _run_stage(run, entries[name], resume=resume, overwrite=overwrite)
        if done:
            skipped.append(name)
            console.print(f"{name}: already done ({out / name})")
    console.print(f"everything is done: {out}" if skipped == chosen else f"done: {out}")
    return results


def run_job(
    job: Job,
    folder: Path,
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, float]:
    """Train a single job in a folder. A finished one is left as it is.

    Args:
        folder: of the stage, such as ``OUT/graft``.
        resume: continue from the newest undamaged checkpoint, or start if there is none.
        overwrite: replace the run in the folder, once the new one has taken its first step.

    Returns:
        held-out figures at the end.

    Raises:
        InputError: the folder holds another run or one in progress, or the settings do not fit the model.
        SentCompressError: as :func:`~sentcompress.training.loop.train` says.
    """
    stage = StageFolder(folder, job.stage, {})
    return _train(stage, recipe, lambda: job, resume=resume, overwrite=overwrite, console=console)


def check_folder(recipe: Recipe, out: Path) -> None:
    """Refuse a folder in which some stage of the recipe could not be run or continued. Reads only.

    Raises:
        InputError: a stage's folder holds something else, or the same stage made from something else.
    """
    for name in stages_of(recipe):
        if name != BENCH:
            stage = training_stages(recipe)[name].of(recipe)
            folder = StageFolder(out / name, stage, stage_record(stage, recipe, {}))
            folder.check(resume=True, overwrite=False, partial=True)


def _checked(names: Sequence[str], recipe: Recipe) -> list[str]:
    known = [*training_stages(recipe), BENCH]
    for name in names:
        if name not in known:
            raise InputError(f"no stage '{name}'.{did_you_mean(name, known)}", fix=f"use {', '.join(known)}")
    return list(names)


def _run_stage(
    run: Run, entry: TrainingStage, *, resume: bool, overwrite: bool
) -> tuple[bool, dict[str, float]]:
    """Whether a stage was done already, and its held-out figures."""
    main = processes().is_main_process
    stage, recipe = entry.of(run.recipe), run.recipe
    folder = StageFolder(run.out / stage.name, stage, stage_record(stage, recipe, {}))
    # A first look, so that a folder is refused before the job is built. It needs no lock.
    if main and folder.interrupted:
        with folder.locked():  # refused if the run that replaces it is in progress
            folder.recover()
    processes().wait_for_everyone()
    if folder.finished and not overwrite:
        folder.record = stage_record(stage, recipe, entry.inputs(run))
    folder.check(resume=resume, overwrite=overwrite, partial=True)
    if folder.finished and not overwrite:
        return True, folder.figures()

    def build() -> Job:
        if main:
            write_atomically(run.out / "recipe.yaml", recipe.dump())
        seed_everything(recipe.seed)
        # Rank 0 fills the token cache, the others find it.
        with processes().main_process_first():
            return entry.job(run)

    return False, _train(folder, recipe, build, resume=resume, overwrite=overwrite)


def _train(
    folder: StageFolder,
    recipe: Recipe,
    build: Callable[[], Job],
    *,
    resume: bool,
    overwrite: bool,
    console: Console | None = None,
) -> dict[str, float]:
    """Lock the folder of a stage, build its job, check the folder and train."""
    ranks = processes()
    with folder.locked() if ranks.is_main_process else nullcontext():
        if ranks.is_main_process:
            folder.recover()
        job = build()
        ranks.wait_for_everyone()
        folder.record = stage_record(folder.stage, recipe, job.inputs)
        folder.check(resume=resume, overwrite=overwrite)
        if folder.finished and not overwrite:
            return folder.figures()
        ranks.wait_for_everyone()  # all processes have read the folder before it changes
        if ranks.is_main_process:
            folder.open(overwrite=overwrite, about=provenance(recipe))
        ranks.wait_for_everyone()
        try:
            figures = train(job, folder, recipe, console)
            if ranks.is_main_process:
                folder.forget_previous()
            return figures
        finally:
            if ranks.is_main_process:
                folder.restore()


def _run_bench(run: Run) -> bool:
    """Measure the models of a run; return whether that was done already."""
    from sentcompress.benchmark.results import is_current
    from sentcompress.benchmark.runner import run_bench

    target = run.out / BENCH
    if is_current(target, run.out, run.recipe):
        return True
    run_bench(None, run.out, run.recipe, target)
    return False

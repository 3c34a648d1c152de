"""The stages of a recipe, in order: each is skipped when finished and picked up where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.console import Console

from sentcompress.distributed import processes
from sentcompress.errors import InputError, did_you_mean
from sentcompress.estimate.plan import plan
from sentcompress.files import folder_digest, write_atomically
from sentcompress.recipe import Recipe
from sentcompress.training.inputs import Inputs, load_inputs
from sentcompress.training.loop import Job, run_job, seed_everything
from sentcompress.training.run_folder import StageFolder, stage_record

__all__ = ["STAGES", "Stage", "plan", "run_recipe"]


class Run:
    """A recipe and the folder it runs in; what several stages need is loaded once."""

    def __init__(self, recipe: Recipe, out: Path) -> None:
        self.recipe = recipe
        self.out = out

    @cached_property
    def text(self) -> Inputs:
        return load_inputs(self.recipe)

    @property
    def vae(self) -> Path:
        """Folder of the SentenceVAE that is grafted."""
        return Path(self.recipe.graft.vae) if self.recipe.graft.vae else self.out / "vae"

    @property
    def teacher(self) -> Path | None:
        """Folder of the LLM the graft learns from; None where there is none, or it is the backbone."""
        named = self.recipe.graft.teacher
        if named in (None, "backbone"):
            return None
        return self.out / "baseline" if named == "baseline" else Path(str(named)).expanduser()

    def graft_inputs(self) -> dict[str, str]:
        """Digests of the folders a graft takes."""
        digests = {"vae": folder_digest(self.vae)}
        if self.teacher is not None and (self.teacher / "config.json").is_file():
            digests["teacher"] = folder_digest(self.teacher)
        return digests

    def check_graft(self, stages: Sequence[str]) -> None:
        """Refuse a graft whose SentenceVAE or teacher will not be there, before anything is read or trained.

        Raises:
            InputError: naming the folder.
        """
        if "graft" not in stages:
            return
        done = (self.out / "graft" / "config.json").is_file()  # needs its SentenceVAE no more
        if "vae" not in stages and not done and not (self.vae / "config.json").is_file():
            raise InputError(
                f"graft: no SentenceVAE in '{self.vae}'",
                fix="train it first, with the same recipe and --out: sentcompress train-vae; or give one: --vae DIR",
            )
        folder, own = self.teacher, self.recipe.graft.teacher == "baseline"
        if folder is None or (own and "baseline" in stages):
            return
        if not (folder / "config.json").is_file():
            raise InputError(
                f"graft.teacher: no model in '{folder}'",
                fix="train it first: sentcompress baseline" if own else "give the folder of a causal LM",
            )


@dataclass(frozen=True)
class Stage:
    """One line of the table of stages.

    Attributes:
        name: also its folder.
        wanted: whether a recipe has it.
        job: builds its job; called after the random generators were seeded.
        inputs: digests of what it takes from earlier stages, cheap to compute, as the job records them.
    """

    name: str
    wanted: Callable[[Recipe], bool]
    job: Callable[[Run], Job]
    inputs: Callable[[Run], dict[str, str]] = lambda _: {}


def _pretrain(run: Run) -> Job:
    from sentcompress.training.jobs.token_level import PretrainJob

    return PretrainJob(run.recipe)


def _vae(run: Run) -> Job:
    from sentcompress.training.jobs.sentence_vae import VAEJob

    return VAEJob(run.recipe, run.text)


def _graft(run: Run) -> Job:
    from sentcompress.training.jobs.graft import GraftJob

    return GraftJob(run.recipe, run.vae, run.text, run.teacher)


def _baseline(run: Run) -> Job:
    from sentcompress.training.jobs.token_level import BaselineJob

    return BaselineJob(run.recipe, run.text)


def _grafts(recipe: Recipe) -> bool:
    return recipe.pretrain is None


STAGES = (
    Stage("pretrain", lambda recipe: recipe.pretrain is not None, _pretrain),
    Stage("vae", lambda recipe: _grafts(recipe) and recipe.graft.vae is None, _vae),
    Stage("graft", _grafts, _graft, Run.graft_inputs),
    Stage("baseline", lambda recipe: _grafts(recipe) and recipe.baseline.enabled, _baseline),
)


def run_recipe(
    recipe: Recipe,
    out: Path,
    *,
    stages: list[str] | None = None,
    resume: bool = True,
    overwrite: bool = False,
) -> dict[str, dict[str, float]]:
    """Run stages of a recipe; finished ones are left as they are, a started one goes on.

    Args:
        out: folder of the run.
        stages: names, in order; None runs all that the recipe has.
        resume: go on with a stage that was started; False refuses it.
        overwrite: run every stage again in place of what is there.

    Returns:
        held-out figures of each stage.

    Raises:
        InputError: a stage's folder holds another run, or there is no such stage.
        SentCompressError: as :func:`~sentcompress.training.loop.run_job` says.
    """
    main = processes().is_main_process
    console = Console(stderr=True, quiet=not main, highlight=False, markup=False, soft_wrap=True)
    run = Run(recipe, out)
    chosen = _chosen(recipe, stages)
    run.check_graft([stage.name for stage in chosen])
    results, busy = {}, False
    for stage in chosen:
        folder = out / stage.name
        if (figures := _look(run, stage, resume=resume, overwrite=overwrite)) is not None:
            console.print(f"{stage.name}: already done ({folder})")
            results[stage.name] = figures
            continue
        held = StageFolder(folder, stage.name, {}).locked() if main else nullcontext()
        with held:  # before anything of another run is touched
            if main:
                write_atomically(out / "recipe.yaml", recipe.dump())
            busy = True
            seed_everything(recipe.seed)
            # Rank 0 fills the token cache, the others find it.
            with processes().main_process_first():
                job = stage.job(run)
            results[stage.name] = run_job(job, folder, recipe, resume=resume, overwrite=overwrite)
    console.print(f"everything is done: {out}" if not busy else f"done: {out}")
    return results


def check_folder(recipe: Recipe, out: Path) -> None:
    """Refuse a folder in which some stage of the recipe could not be run or gone on with. Reads only.

    Raises:
        InputError: a stage's folder holds something else, or the same stage made of something else.
    """
    for stage in _chosen(recipe, None):
        folder = StageFolder(out / stage.name, stage.name, stage_record(stage.name, recipe, {}))
        folder.check(resume=True, overwrite=False, partial=True)


def _chosen(recipe: Recipe, names: list[str] | None) -> list[Stage]:
    if names is None:
        wanted = [stage for stage in STAGES if stage.wanted(recipe)]
        if recipe.graft.teacher == "baseline":
            # The twin teaches the graft and comes before it.
            wanted.sort(key=lambda stage: stage.name == "graft")
        return wanted
    table = {stage.name: stage for stage in STAGES}
    for name in names:
        if name not in table:
            raise InputError(f"no stage '{name}'.{did_you_mean(name, table)}", fix=f"use {', '.join(table)}")
    return [table[name] for name in names]


def _look(run: Run, stage: Stage, *, resume: bool, overwrite: bool) -> dict[str, float] | None:
    """Figures of a finished stage, None when there is work to do. Refuses quickly, before anything is built.

    Raises:
        InputError: the stage's folder holds something else.
    """
    path = run.out / stage.name
    folder = StageFolder(path, stage.name, stage_record(stage.name, run.recipe, {}))
    if processes().is_main_process and folder.interrupted:
        with folder.locked():  # unless the run that is replacing it goes on
            folder.recover()
    processes().wait_for_everyone()
    if folder.finished and not overwrite:
        folder.record = stage_record(stage.name, run.recipe, stage.inputs(run))
    folder.check(resume=resume, overwrite=overwrite, partial=True)
    return folder.figures() if folder.finished and not overwrite else None

"""What saving a checkpoint costs training, in the background and not.

    python tools/measure/save_cost.py strong --steps 40
    torchrun --nproc_per_node 2 tools/measure/save_cost.py strong --steps 40 --set graft.distributed=fsdp

Trains the graft of a recipe, of a SentenceVAE that learned nothing, and saves after every few steps. A save
holds up training while it is called and, in the background, by what it takes of the next steps' processor: what these
take over the median of steps with nothing beside them is counted too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from sentcompress.distributed import processes
from sentcompress.pipeline import run_recipe
from sentcompress.recipe import load_recipe
from sentcompress.training.saving import Saver
from sentcompress.training.step import Stepper

EVERY = 4


@contextmanager
def shared_folder() -> Iterator[Path]:
    """An empty folder, the same one in all processes of a launch on this machine."""
    with tempfile.TemporaryDirectory() as mine:
        if processes().num_processes == 1:
            yield Path(mine)
            return
        names = [mine]
        broadcast_object_list(names)
        yield Path(names[0])
        processes().wait_for_everyone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    asked = parser.parse_args()
    events: list[tuple[str, float]] = []

    def timed(cls: type, name: str, kind: str) -> None:
        real = getattr(cls, name)

        def call(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            result = real(*arguments, **named)
            events.append((kind, time.perf_counter() - began))
            return result

        setattr(cls, name, call)

    timed(Stepper, "step", "step")
    timed(Saver, "checkpoint", "save")
    for background in (True, False):
        sets = [
            *asked.set,
            "train_vae.steps=0",
            f"graft.steps={asked.steps}",
            f"graft.save_every={EVERY}",
            "graft.keep=1",
            f"graft.background_saves={str(background).lower()}",
        ]
        with shared_folder() as folder:
            run_recipe(load_recipe(asked.recipe, sets), folder, stages=["vae"])
            events.clear()
            run_recipe(load_recipe(asked.recipe, sets), folder, stages=["vae", "graft"])
            (newest,) = folder.glob("graft/checkpoints/step-*")
            size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
        steps = [seconds for kind, seconds in events if kind == "step"][1:]
        saves = [seconds for kind, seconds in events if kind == "save"]
        # The step before a save has nothing written beside it.
        alone = statistics.median(steps[EVERY - 2 :: EVERY])
        beside = sum(max(0.0, seconds - alone) for seconds in steps) / len(saves)
        held = statistics.median(saves) + beside
        if not processes().is_main_process:
            continue
        print(
            f"{'background' if background else 'waiting'}: a checkpoint of {size / 1e9:.2f} GB, "
            f"a step of {alone:.2f} s; called for {statistics.median(saves):.2f} s, "
            f"later steps {beside:.2f} s longer: {held:.2f} s a save, "
            f"5% of training at one in {held / alone / 0.05:,.0f} steps",
            flush=True,
        )


if __name__ == "__main__":
    main()

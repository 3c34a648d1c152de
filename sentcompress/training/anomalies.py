"""Steps that must not be taken and what the run does then: stop, skip, or go back to a checkpoint.

An anomaly is a NaN or infinite loss or gradient, or a loss far above the ones before it (a spike).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from sentcompress.distributed import processes
from sentcompress.errors import NumericsError, OutOfMemoryError
from sentcompress.recipe import TrainingSettings
from sentcompress.training.checkpoints import CheckpointStore, read_state
from sentcompress.training.run_folder import Stage

RECENT_LOSSES = 50
"""Number of losses that a new one is compared with."""
MIN_RECENT_LOSSES = 10
"""With fewer losses nothing counts as a spike: losses fall fast at first, and a median of few is unreliable."""
MAX_SKIPPED = 25
"""Steps in a row that may be skipped before the run fails."""
MAX_ROLLBACKS = 5
"""Times a run may go back to a checkpoint before it saves the next one."""
_CPU_MEMORY_TEXTS = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
)


class LossWatch:
    """Compares each loss with the recent ones.

    Args:
        settings: ``spike`` says how far above them is too far.

    Attributes:
        recent: the last good losses; saved in checkpoints.
    """

    def __init__(self, settings: TrainingSettings) -> None:
        self.factor = settings.spike
        self.recent = deque[float](maxlen=RECENT_LOSSES)

    def anomaly(self, loss: float, grad_norm: float, *, scaled: bool) -> str | None:
        """Describe what is wrong with a step, or return None.

        Args:
            loss, grad_norm: over all processes.
            scaled: the gradient scaler of fp16 is active; it handles infinite gradients itself.
        """
        if not math.isfinite(loss) or not (scaled or math.isfinite(grad_norm)):
            return f"loss {loss:g}, gradient norm {grad_norm:g}"
        if self.factor is not None and len(self.recent) >= MIN_RECENT_LOSSES:
            usual = statistics.median(self.recent)
            # At least half a nat above: near zero, noise alone is a multiple of the median.
            if loss > max(self.factor * usual, usual + 0.5):
                return f"loss {loss:.4g} is a spike, {usual:.4g} is usual"
        self.recent.append(loss)
        return None


class Rollback:
    """Chooses the checkpoint to go back to after an anomaly. All processes must call every method.

    Args:
        note: prints a line.
    """

    def __init__(self, store: CheckpointStore, stage: Stage, note: Callable[[str], None]) -> None:
        self.store, self.stage, self.note = store, stage, note
        self.count = 0  # since the last checkpoint was saved
        self.last: Path | None = None  # the run went back to this checkpoint and has taken no step since

    def choose(self, anomaly: str) -> Path:
        """The newest checkpoint, or the one before it if its first step failed again with other data.

        Raises:
            NumericsError: there is none, or the run has gone back too often.
        """
        checkpoint = self.store.latest(self.note)
        if checkpoint is not None and checkpoint == self.last:
            # The first step failed again with other data: the weights are the cause.
            step = int(read_state(checkpoint)["step"])
            older = self.store.latest(self.note, before=step)
            processes().wait_for_everyone()  # all have looked before it is deleted
            if older is not None:
                self.note(f"training from {checkpoint} fails too: checkpoint deleted")
                if processes().is_main_process:
                    self.store.drop(step)
                checkpoint = older
        if checkpoint is None or self.count == MAX_ROLLBACKS:
            why = (
                f"after {self.count} rollbacks" if checkpoint else "and there is no checkpoint to go back to"
            )
            raise NumericsError(
                f"{self.stage.name}: {anomaly}, {why}",
                fix=f"lower {self.stage.section}.learning_rate, raise warmup_steps, or set save_every",
            )
        self.count += 1
        self.last = checkpoint
        return checkpoint


def numerics_error(error: NumericsError, stage: Stage, store: CheckpointStore) -> NumericsError:
    """The error that ends a run at an anomaly, with the last checkpoint and what to change."""
    steps = store.steps()
    checkpoint = str(store.path(steps[-1])) if steps else "none was saved"
    return NumericsError(
        f"{stage.name}: {error.message}; last good checkpoint: {checkpoint}",
        fix=f"lower {stage.section}.learning_rate, raise warmup_steps, or use fp32; "
        "if the same batch fails each time, look at its text; "
        "on_anomaly: skip or rollback continues without that step",
    )


@contextmanager
def explain_out_of_memory(section: str, batch_fields: tuple[str, ...]) -> Iterator[None]:
    """Turn torch's and Python's out-of-memory errors into one that names the settings to lower.

    Args:
        section: the recipe section with the stage's training settings.
        batch_fields: recipe fields that shrink a micro-batch.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        cpu = isinstance(error, MemoryError) or any(text in str(error) for text in _CPU_MEMORY_TEXTS)
        if not cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
        where = "this machine has" if cpu else "the GPU has"
        reason = str(error).partition("\n")[0] or repr(error)
        raise OutOfMemoryError(
            f"{where} too little memory for these settings: {reason}",
            fix=f"lower {' or '.join(batch_fields)} (and raise {section}.gradient_accumulation by the same factor), "
            f"or set {section}.gradient_checkpointing=true; then continue with --resume, or use --overwrite",
        ) from error

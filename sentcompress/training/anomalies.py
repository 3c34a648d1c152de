"""Steps that must not be taken: a loss or gradient that is no number, or a loss far above the ones before it."""

from __future__ import annotations

import math
import statistics
from collections import deque

from sentcompress.recipe import TrainingSettings

REMEMBERED = 50
"""Losses a new one is compared with."""
ENOUGH = 10
"""Losses below which nothing counts as a spike: at first they fall fast, and few say little."""
MAX_SKIPPED = 25
"""Steps in a row that may be skipped before the run counts as broken."""
MAX_ROLLBACKS = 5
"""Times a run may go back to its newest checkpoint."""


class LossWatch:
    """Knows what the last good losses were.

    Args:
        settings: ``spike`` says what is far above.

    Attributes:
        recent: the last good losses; a resumed run puts back what it had seen.
    """

    def __init__(self, settings: TrainingSettings) -> None:
        self.factor = settings.spike
        self.recent = deque[float](maxlen=REMEMBERED)

    def trouble(self, loss: float, grad_norm: float, *, scaled: bool) -> str | None:
        """What is wrong with a step, or None.

        Args:
            loss, grad_norm: over all processes.
            scaled: fp16's gradient scaler is at work, which meets infinite gradients by itself.
        """
        if not math.isfinite(loss) or not (scaled or math.isfinite(grad_norm)):
            return f"loss {loss:g}, gradient norm {grad_norm:g}"
        if self.factor is not None and len(self.recent) >= ENOUGH:
            usual = statistics.median(self.recent)
            # Half a nat of room: near zero any noise is a multiple.
            if loss > max(self.factor * usual, usual + 0.5):
                return f"loss {loss:.4g} is a spike, {usual:.4g} is usual"
        self.recent.append(loss)
        return None

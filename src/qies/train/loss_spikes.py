"""Detection of loss spikes: steps with a loss far above the recent ones."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Any

WINDOW = 100  # steps with a finite loss
LEAST = 20  # minimum number of such steps before a spike is reported
SIGMAS = 6.0
FLOOR = 1e-6  # nats; smaller scatter is rounding


class Spikes:
    """Flags a loss more than 6 sigma above the median of the last 100 finite losses.

    sigma is 1.4826 times the median absolute deviation: the standard deviation of a normal distribution, and robust
    against earlier spikes in the window. It depends on the losses only, so a resumed run flags the same steps.
    """

    def __init__(self) -> None:
        self.window: deque[float] = deque(maxlen=WINDOW)
        self.count = 0

    def see(self, loss: float | None) -> dict[str, Any]:
        """Add the loss of the next step (None: not finite). Returns `{"spike": sigmas above the median}` or {}."""
        if loss is None:
            return {}
        found = {}
        if len(self.window) >= LEAST:
            middle = statistics.median(self.window)
            sigma = max(FLOOR, 1.4826 * statistics.median(abs(v - middle) for v in self.window))
            if (height := (loss - middle) / sigma) > SIGMAS:
                found = {"spike": round(height, 2)}
                self.count += 1
        self.window.append(loss)
        return found

"""Loss spikes: a step whose loss stands far above the recent ones."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Any

WINDOW = 100  # steps with a finite loss
LEAST = 20  # of them, before anything is called a spike
SIGMAS = 6.0
FLOOR = 1e-6  # nats; below it a scatter is rounding


class Spikes:
    """Flags a loss more than 6 sigma above the median of the last 100 finite ones.

    sigma is 1.4826 times the median absolute deviation, which is a normal's standard deviation and which earlier
    spikes in the window hardly move. A function of the losses alone, so a resumed run flags the same steps.
    """

    def __init__(self) -> None:
        self.window: deque[float] = deque(maxlen=WINDOW)
        self.count = 0

    def see(self, loss: float | None) -> dict[str, Any]:
        """Take the next step's loss (None: not finite); `{"spike": sigmas above the median}` if it is one, else {}."""
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

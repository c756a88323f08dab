"""The rule for "in-context copying had set in", the only one: comparisons, comparison.json and the page share it.

An arm's score is what a model gains on the repeat of a random segment (nats per token; Olsson et al. 2022,
arXiv:2209.11895). Copying has set in in an arm if the score of every one of its seeds is at least `INDUCTION_ONSET`,
and in a pair of arms if it has in both at the largest matched size. The mean over seeds would not do, for one seed
with a high score hides others that do not copy yet, and each of those raises the arm's mean loss by more than arms
differ by.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from qies.config import INDUCTION_ONSET


@dataclass(frozen=True)
class Copying:
    """An arm's copying in one cell, an entry a run: seed, final score (nats per token; None: not measured) and onset
    (tokens from which on the score stayed at the threshold or above; None: not reached, or not measured)."""

    arm: str
    seeds: tuple[str, ...]
    scores: tuple[float | None, ...]
    onsets: tuple[float | None, ...]

    @property
    def measured(self) -> list[float]:
        """The scores that there are."""
        return [score for score in self.scores if score is not None]

    @property
    def mean(self) -> float | None:
        return fmean(self.measured) if self.measured else None

    @property
    def set_in(self) -> bool | None:
        """Whether copying has set in in every seed; None where a score is missing and no other decides."""
        if any(score < INDUCTION_ONSET for score in self.measured):
            return False
        return True if self.measured and len(self.measured) == len(self.scores) else None

    @property
    def shortfall(self) -> str:
        """The lowest score where copying has not set in: "gain 0.31 nats < 0.5 in 1 of 3 seeds"; else empty."""
        low = [score for score in self.measured if score < INDUCTION_ONSET]
        if not low:
            return ""
        seeds = f" in {len(low)} of {len(self.scores)} seeds" if len(self.scores) > 1 else ""
        return f"gain {min(low):.2f} nats < {INDUCTION_ONSET:g}{seeds}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "seeds": list(self.seeds),
            "scores": list(self.scores),
            "onsets": list(self.onsets),
            "mean": self.mean,
            "set_in": self.set_in,
        }


def set_in(arms: Iterable[Copying]) -> bool | None:
    """Whether copying has set in in every one of these arms; None where that is not known."""
    found = [arm.set_in for arm in arms]
    return False if False in found else None if None in found or not found else True


def before_onset(arms: Iterable[Copying]) -> str:
    """Names the arms in which copying had not set in, as a clause; empty where it had in every arm, or is unknown."""
    late = [f"{arm.arm} ({arm.shortfall})" for arm in arms if arm.shortfall]
    return f"in-context copying had not set in in {' and '.join(late)}" if late else ""

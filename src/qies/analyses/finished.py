"""The finished runs of a study, as analyses compute from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qies.config import StudyConfig
from qies.ladder.grid import StudyFolder
from qies.presets import parse_size
from qies.records import RunRecord


@dataclass(frozen=True)
class Finished:
    """A study's settings, its folder, and the records of its runs with status `done`."""

    config: StudyConfig
    folder: Path
    done: list[RunRecord]

    @property
    def data(self) -> Path:
        """The folder of token shards."""
        return StudyFolder(self.config, self.folder).data

    @property
    def hashes(self) -> list[str]:
        """The identity of the runs: their configuration hashes, sorted."""
        return sorted(record.config_hash for record in self.done)

    def run_folder(self, record: RunRecord) -> Path:
        return self.folder / "runs" / record.config_hash

    def largest(self, arm: str) -> RunRecord | None:
        """The arm's run of the largest size, then the most tokens, then the first seed; None without a run."""
        own = [r for r in self.done if r.arm == arm]
        seeds = self.config.seeds
        return max(own, key=lambda r: (parse_size(r.size), r.tokens, -seeds.index(r.seed)), default=None)

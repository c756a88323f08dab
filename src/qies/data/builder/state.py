"""The state of an unfinished build, from which it resumes after it was interrupted.

When a shard is full, everything pending is written, then `progress.json`: the position in the stream, the shards with
their sha256 and all counts, sealed with a sha256 of its own. `seen.bin` has the digests of the documents read so far.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qies.config import differences
from qies.data.builder.contamination import OverlapCount
from qies.data.manifest import SPLITS, Counts, Dropped, Shard, SourceSpan
from qies.data.shards import TOKENIZER
from qies.data.tokenizer import tokenizer_sha256
from qies.errors import UserError

PROGRESS = "progress.json"
SEEN = "seen.bin"  # digests of the documents read, 8 bytes each; documents whose digest is in it are dropped


@dataclass
class BuildState:
    """Everything that a build has committed to disk with its last shard."""

    position: Any = None
    """Of the stream, after the last batch."""
    shards: dict[str, list[Shard]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    counts: dict[str, dict[str, Counts]] = field(default_factory=lambda: {split: {} for split in SPLITS})
    """By split and source."""
    digests: dict[str, str] = field(default_factory=dict)
    """Running digest of each source."""
    val_order: list[SourceSpan] = field(default_factory=list)
    overlap: OverlapCount = field(default_factory=OverlapCount)
    dropped: Dropped = field(default_factory=Dropped)
    seen: int = 0
    """Number of digests in `SEEN`."""
    seen_sha256: str = hashlib.sha256().hexdigest()
    tokenizer_sha256: str = ""

    def total(self, split: str) -> Counts:
        return sum(self.counts[split].values(), Counts())

    def to_json(self, identity: dict[str, Any], threshold: int) -> str:
        values = asdict(self) | {"identity": identity, "threshold": threshold}
        values["overlap"]["found"] = sorted(self.overlap.found)
        text = json.dumps(values, sort_keys=True)
        return json.dumps({"seal": hashlib.sha256(text.encode()).hexdigest(), "state": values}, sort_keys=True)


def load_state(folder: Path, identity: dict[str, Any]) -> tuple[BuildState, int] | None:
    """The state (and split threshold) of an interrupted build of `identity` in `folder`; None if nothing is committed.

    Raises UserError: the build was of something else, its file is damaged, or a shard, the tokenizer or the digests
    have changed since they were written.
    """
    path = folder / PROGRESS
    if not path.is_file():
        return None
    try:
        sealed = json.loads(path.read_text(encoding="utf-8"))
        values = sealed["state"]
        if sealed["seal"] != hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest():
            raise ValueError("its seal is broken")
        was, threshold = values.pop("identity"), values.pop("threshold")
        state = BuildState(**values)
        state.shards = {split: [Shard(**shard) for shard in values["shards"][split]] for split in SPLITS}
        state.counts = {
            split: {name: Counts(**counts) for name, counts in values["counts"][split].items()} for split in SPLITS
        }
        state.val_order = [SourceSpan(**span) for span in values["val_order"]]
        state.dropped = Dropped(**values["dropped"])
        state.overlap = OverlapCount(set(values["overlap"]["found"]), values["overlap"]["documents"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"'{path}' is damaged ({error}); delete '{folder}' and build the data again") from None
    if other := differences(was, identity):
        raise UserError(
            f"'{folder}' holds the beginning of other data ({'; '.join(other)}); give another folder or delete it"
        )
    checked = {shard.file: shard.sha256 for split in SPLITS for shard in state.shards[split]}
    for name, sha256 in checked.items():
        if not (folder / name).is_file() or hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256:
            raise _damaged(folder / name)
    try:
        if tokenizer_sha256(folder / TOKENIZER) != state.tokenizer_sha256:
            raise OSError
    except OSError:
        raise _damaged(folder / TOKENIZER) from None
    if hashlib.sha256(read_digests(folder, state.seen)).hexdigest() != state.seen_sha256:
        raise _damaged(folder / SEEN)
    return state, threshold


def read_digests(folder: Path, count: int) -> bytes:
    """The first `count` digests of `SEEN`, or fewer if there are fewer. The rest was written after the last commit."""
    path = folder / SEEN
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(8 * count)


def _damaged(path: Path) -> UserError:
    return UserError(f"'{path}' is missing or damaged; delete '{path.parent}' and build the data again")

"""Validate and claim the folder of a study or ladder, and prepare it for training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from qies import config as configs
from qies import records, storage
from qies.config import StudyConfig
from qies.errors import UserError
from qies.ladder.controller import check_runs

# The keys of a study that may gain values once it has runs, and the keys that do not affect its runs.
AXES = ("arms", "sizes", "seeds", "tokens_per_parameter", "variants", "plugins")
FREE = ("workers", "prompts", "analyses")


@dataclass(frozen=True)
class StudyFolder:
    """A study and its folder. Created by `claim`, which checks that they belong together."""

    study: StudyConfig
    path: Path

    @property
    def runs(self) -> Path:
        """The folder of the runs."""
        return self.path / "runs"

    @property
    def data(self) -> Path:
        """The folder of the shards: the source if it is a folder of shards, else `data` in the study's folder."""
        source = Path(self.study.data.source)
        return source if (source / "manifest.json").is_file() else self.path / "data"


def claim(study: StudyConfig, folder: Path) -> StudyFolder:
    """Check that `folder` is free or holds this study, and merge the axes of both grids.

    If the corpus of the stored study has another path or no hash, the data settings of the stored study are kept, and
    with them the hashes of its runs. Writes nothing. Raises UserError if the folder holds anything else.
    """
    path = folder / "study.yaml"
    if path.is_file():
        try:
            known = configs.from_dict(StudyConfig, configs.read(path))
        except UserError as e:
            raise UserError(f"{folder} holds a study that cannot be continued ({e}); give another --out.") from None
        old, new = ({k: v for k, v in configs.to_dict(s).items() if k not in (*AXES, *FREE)} for s in (known, study))
        if changes := configs.changes(old, new):
            raise UserError(
                f"{folder} holds a different study ({'; '.join(changes)}); give another --out or delete it."
            )
        source = study.data.source if known.data.hash else known.data.source
        data = dataclasses.replace(study.data, source=source, hash=known.data.hash)
        return StudyFolder(dataclasses.replace(study, data=data, **_union(known, study)), folder)
    storage.refuse_file(folder)
    if folder.exists() and any(not storage.is_temporary(path.name) for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no study; give another --out.")
    return StudyFolder(study, folder)


def _union(known: StudyConfig, study: StudyConfig) -> dict[str, Any]:
    """The union of the values of both studies on each axis of the grid, those of `known` first."""

    def joined(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
        return a + tuple(value for value in b if value not in a)

    axes = {axis: joined(getattr(known, axis), getattr(study, axis)) for axis in ("arms", "sizes", "seeds", "plugins")}
    budgets = joined(known.budgets, study.budgets)
    axes["variants"] = joined(known.variants or ({},), study.variants or ({},))
    if axes["variants"] == ({},):
        axes["variants"] = ()
    return axes | {"tokens_per_parameter": budgets if len(budgets) > 1 else budgets[0]}


def prepare(claimed: StudyFolder, console: Console) -> None:
    """Validate the settings of every run, write `study.yaml`, build the corpus and validate the existing runs."""
    from qies.data.builder.pipeline import build_shards
    from qies.data.manifest import summary
    from qies.data.shards import open_shards
    from qies.train.loop import check_data

    study, folder, data = claimed.study, claimed.path, claimed.data
    for config in study.runs():  # raises for a bad setting before any work is done
        records.plan(config, study.data.vocab_size)
    path = folder / "study.yaml"
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    if before is None:  # first, so that a study killed while it builds its corpus can resume
        storage.make_writable_folder(folder)
        configs.save(study, path)
    try:
        if data == folder / "data":
            with console.status(f"corpus {study.data.source}"):
                built = (data / "manifest.json").is_file()
                manifest = build_shards(study.data, data)
            if not built:
                console.print(summary(manifest))
        shards = open_shards(data)
        check_data(shards, study.train)
        check_runs(study.runs(), claimed.runs, shards)
    except UserError:
        if before is None:  # so that the folder is not claimed for a corpus that cannot be built
            path.unlink()
        raise
    if before is not None and configs.to_yaml(study) != before:
        configs.save(study, path)

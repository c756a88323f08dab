"""Data sets of the Hugging Face hub, streamed by the library `datasets` (extra `hub`).

`hub:OWNER/NAME` or `hub:OWNER/NAME:CONFIG`. OWNER/NAME may be the path of a folder with the layout of a data set (files
and README.md), which the same code reads. No code of a data set is run: since version 4, `datasets` reads data files
only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from qies.data.manifest import Dropped, Reading
from qies.data.sources import readers
from qies.data.sources.documents import Document, DocumentBatch
from qies.data.sources.files import find_files
from qies.errors import UserError

VALIDATION = ("validation", "val", "valid", "dev")  # names of a validation split


class HubStream:
    """A data set as a stream: its validation split, if it has one, then its training split.

    About `val_characters` of the validation split are read (0: all), so that a small build does not read a large split.
    Raises UserError: `datasets` is not installed, no such data set, no network.
    """

    distinct = False
    size = 0

    def __init__(self, spec: str, text_field: str = "text", val_characters: int = 0) -> None:
        self.path, _, self.config = spec.partition(":")
        self.local = Path(self.path).expanduser().is_dir()
        if not self.local and self.path.count("/") != 1:
            raise UserError(f"'hub:{spec}' does not name a data set; give hub:OWNER/NAME or hub:OWNER/NAME:CONFIG")
        self.text_field, self.val_characters = text_field, val_characters
        self.name = Path(self.path).name if self.local else self.path
        if self.config:
            self.name += f":{self.config}"

    def fingerprint(self) -> str:
        """The commit of the data set; for a folder, the fingerprint of its files."""
        return self._about[0]

    def about(self, source: str) -> tuple[str, str]:
        return self._about[1], f"revision {self._about[0]}"

    def reading(self, dropped: Dropped) -> Reading:
        return Reading(dropped=dropped)

    def digests(self) -> None:
        return None

    def batches(self, position: Any, characters: int) -> Iterator[DocumentBatch]:
        """Positions are [split, state of `datasets`, records read, characters read]."""
        first, state, number, read = position or [self._val or "train", None, 0, 0]
        for split in [name for name in (self._val, "train") if name]:
            if split == self._val and first == "train":
                continue
            data = self._data[split]
            if split == first and state is not None:
                data.load_state_dict(state)
            else:
                number, read = 0, 0
            limit = self.val_characters if split == self._val else 0
            if limit and read >= limit:  # interrupted right after its last batch
                continue
            for documents, state in self._grouped(data, split, number, characters):
                number += len(documents)
                read += sum(len(document.text) for document in documents)
                yield DocumentBatch(
                    documents, "val" if split == self._val else self._rest, [split, state, number, read]
                )
                if limit and read >= limit:
                    break

    def sample(self, characters: int) -> Iterator[Document]:
        for documents, _ in self._grouped(self._data["train"], "train", 0, readers.BATCH[1]):
            yield from documents
            characters -= sum(len(document.text) for document in documents)
            if characters <= 0:
                break

    @property
    def _rest(self) -> str:
        return "train" if self._val else ""

    def _grouped(self, data: Any, split: str, number: int, characters: int) -> Iterator[tuple[list[Document], Any]]:
        """Groups of documents, each with the state of the data set after it."""
        group: list[Document] = []
        size = 0
        with self._reading():
            for row in data:
                text = readers.text_of(row, self.text_field, f"'{self.name}' {split} record {number + 1}")
                group.append(Document(text, _source(row) or self.name, f"{split}#{number}"))
                number += 1
                size += len(text)
                if len(group) == readers.BATCH[0] or size >= characters:
                    yield group, _plain(data.state_dict())
                    group, size = [], 0
            if group:
                yield group, _plain(data.state_dict())

    @cached_property
    def _data(self) -> Any:
        datasets = _datasets()
        revision = {} if self.local else {"revision": self._about[0]}
        with self._reading():
            data = datasets.load_dataset(self.path, self.config or None, streaming=True, **revision)
            if list(data) == ["train"] and (files := self._beside()):
                data = datasets.load_dataset(self.path, data_files=files, streaming=True, **revision)
        if "train" not in data:
            raise UserError(f"'{self.name}' has no split 'train' but {', '.join(data)}; use another data set")
        return data

    def _beside(self) -> dict[str, Any]:
        """The files of both splits of a data set laid out as the Pile: training files in a folder and validation files
        beside it, of which `datasets` finds only the folder. Empty for other data sets."""
        if self.local:
            root = Path(self.path).expanduser()
            files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        else:
            from huggingface_hub import HfApi

            files = HfApi().list_repo_files(self.path, repo_type="dataset", revision=self._about[0])
        val = [file for file in files if file.partition(".")[0] in VALIDATION]
        train = [file for file in files if file.startswith("train/")]
        return {"train": train, "validation": val} if val and train and not self.config else {}

    @cached_property
    def _val(self) -> str:
        """The name of the validation split, "" if there is none."""
        return next((name for name in VALIDATION if name in self._data), "")

    @cached_property
    def _about(self) -> tuple[str, str]:
        """(revision, licence), the licence as its card states it."""
        _datasets()
        from huggingface_hub import DatasetCard, HfApi

        with self._reading():
            if self.local:
                card = Path(self.path, "README.md").expanduser()
                data = DatasetCard.load(card, ignore_metadata_errors=True).data.to_dict() if card.is_file() else {}
                revision = f"files {find_files(self.path).fingerprint()}"
            else:
                info = HfApi().dataset_info(self.path)
                data = info.card_data.to_dict() if info.card_data else {}
                revision = info.sha or ""
        licence = data.get("license") or "not stated by its card"
        return revision, licence if isinstance(licence, str) else ", ".join(map(str, licence))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn errors of `datasets` and the network, which have many types, into a UserError of one line."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            cause = error.__cause__ or error
            reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
            where = (
                "check that its files are complete" if self.local else "check the network and the name of the data set"
            )
            raise UserError(
                f"'hub:{self.name}' cannot be read ({reason}); {where}, then run the command again"
            ) from None


def _source(row: dict[str, Any]) -> str:
    """The source of a record of the Pile (Gao et al. 2020, arXiv:2101.00027); "" for other data sets."""
    meta = row.get("meta")
    name = meta.get("pile_set_name") if isinstance(meta, dict) else None
    return name if isinstance(name, str) else ""


def _plain(state: Any) -> Any:
    """The state after a round trip through JSON, as a resumed build reads it."""
    return json.loads(json.dumps(state))


def _datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError("a source hub:... needs the package 'datasets'; pip install 'qies[hub]'") from None
    datasets.disable_progress_bars()
    return datasets

"""Token shards: flat integer files that can be memory-mapped, with a manifest that proves that they are whole.

A folder holds `train-00000.bin` ..., `val-00000.bin` ... (little-endian uint16, or uint32 for a vocabulary above
65,536; `<|endoftext|>` begins each document), `tokenizer/` and `manifest.json`. Files are written under temporary
names, flushed to disk and renamed, the manifest last: a folder without one is no data set, and a build that was cut
off goes on by calling it again (`build`).
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from qies.config import DataConfig, differences, to_dict
from qies.data import tokenizer as bpe
from qies.data.build import PROGRESS, SEEN, TOKENIZER, Plan, State, Writer, hash_of, load_state
from qies.data.contamination import Pack
from qies.data.manifest import (
    MANIFEST,
    SCHEMA,
    SPLITS,
    Build,
    Counts,
    Manifest,
    Shard,
    SourceRow,
    Split,
    dtype_for,
    dumps,
    read_manifest,
)
from qies.data.overlap import measure_overlap
from qies.data.packed import require_utf8
from qies.data.progress import Progress, Step
from qies.data.sources import is_below
from qies.data.streams import Stream, open_stream
from qies.errors import UserError
from qies.storage import exclusive, publish, replacing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHARD_TOKENS = 1 << 27  # tokens in a full shard: 256 MB in uint16

_PROBED = 1_000_000  # characters of those that a given tokenizer encodes before the build starts
_SURVEY = 10_000_000  # characters looked at where no tokenizer is trained
_MARKER = ".building"  # there while a build is on or was cut off; its lock makes a second build wait
_OWN = re.compile(r"(train|val)-\d{5}\.bin|tokenizer(\.tmp)?|progress\.json|seen\.bin|\..*\.tmp")


class Tokens:
    """The tokens of a split as one sequence, whatever the number of shards; `tokens[start:stop]` reads some."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, range_: slice) -> np.ndarray:
        """uint16 or uint32 `[stop - start]`: a view of the file, or a copy where shards meet."""
        start, stop, step = range_.indices(len(self))
        if step != 1:
            raise ValueError("tokens are read without a step")
        pieces = [
            part[max(start - first, 0) : max(stop - first, 0)]
            for part, first in zip(self.parts, self.starts.tolist(), strict=False)
            if first < stop and first + len(part) > start
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate([self.parts[0][:0], *pieces])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype=dtype, copy=copy)


@dataclass(frozen=True)
class Shards:
    """An opened and checked data set."""

    folder: Path
    manifest: Manifest

    @property
    def hash(self) -> str:
        """The identity of text, split, tokenizer and tokens, 64 hex digits."""
        return self.manifest.hash

    def tokens(self, split: str) -> Tokens:
        """The memory-mapped tokens of "train" or "val"."""
        return Tokens([_map(self.folder / s.file, self.manifest.dtype) for s in self.manifest.split(split).shards])

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer the shards were made with."""
        return bpe.load_tokenizer(self.folder / TOKENIZER)

    def val_sources(self, tokens: int) -> tuple[np.ndarray, list[str]]:
        """Of the first `tokens` tokens of val: where the source changes, and the source from there on.

        Both are empty for shards built before manifests had `val_order`.
        """
        ids = self.tokens("val")[:tokens]
        documents = np.flatnonzero(ids == self.tokenizer().eos_token_id)
        runs = self.manifest.val_order
        first = np.cumsum([0, *(run.documents for run in runs)])[:-1]  # the document a run begins with
        begun = int((first < len(documents)).sum())
        return documents[first[:begun]], [run.source for run in runs[:begun]]

    def val_clean(self, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Where each document within the first `tokens` tokens of val begins, int64 `[documents]`, and whether it is
        clean, bool `[documents]`: False if its overlap with train was not measured.
        """
        starts = np.flatnonzero(self.tokens("val")[:tokens] == self.tokenizer().eos_token_id)
        clean = np.zeros(max(len(starts), len(self.manifest.overlap.clean)), dtype=bool)
        clean[: len(self.manifest.overlap.clean)] = self.manifest.overlap.clean
        return starts, clean[: len(starts)]

    def identity(self) -> dict[str, Any]:
        """What a run record says of its data."""
        m = self.manifest
        return {
            "hash": m.hash,
            "source": m.corpus,
            "corpus_sha256": m.corpus_sha256,
            "tokenizer_sha256": m.tokenizer_sha256,
            "vocab_size": m.vocab_size,
            "train_tokens": m.train.tokens,
            "val_tokens": m.val.tokens,
            "val_bytes": m.val.bytes,
            "val_overlap": m.overlap.share,
        }


def open_shards(folder: Path | str, *, checked: bool = False) -> Shards:
    """The data set in `folder`, after a look at all of it: manifest, tokenizer, and each shard's size, sha256 and ids.
    Not at the shards where another process has just `checked` them.

    Raises UserError, naming the file, if anything is missing, linked to elsewhere, or not what the manifest says.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    _check_tokenizer(folder / TOKENIZER, manifest)
    for split in () if checked else SPLITS:
        for shard in manifest.split(split).shards:
            problem = _problem(folder / shard.file, shard, manifest)
            if problem:
                raise UserError(f"'{folder / shard.file}' {problem}; build the data again in another folder")
    return Shards(folder, manifest)


def build_shards(
    cfg: DataConfig,
    out: Path | str,
    *,
    build: Build = Build(),  # noqa: B008 (it is frozen)
    workers: int = 1,
    pack: Path | None = None,
    progress: Progress | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Manifest:
    """Read what `cfg` names, split it by document, encode it with a given tokenizer or one trained on it, write shards.

    A folder that holds this data set already is checked and left as it is; a build that was cut off goes on behind its
    last full shard. The same text and settings give the same files, bit for bit, whatever the number of `workers`
    (processes that encode). A second build of the same folder waits for the first. With an evaluation `pack` the
    manifest says what it has in common with the training text.

    Raises UserError: whatever the source, `split_documents`, the tokenizer or the pack object to, too little space, a
    folder that holds other data or other files, is inside of the source, or cannot be written. Raises Stopped if a
    worker is killed.
    """
    out = Path(out)
    tell = progress or (lambda step: None)
    if workers < 1 or build.limit_tokens < 0:
        raise UserError(
            f"{workers} workers, a limit of {build.limit_tokens} tokens: give at least 1, and 0 for no limit"
        )
    require_utf8(out.absolute())
    table = Pack(pack) if pack else None
    build = replace(build, pack=table.fingerprint if table else "")
    if is_below(out, cfg.source):
        raise UserError(f"'{out}' is inside of its own source '{cfg.source}'; give an --out outside of it")
    cfg = replace(cfg, hash="")  # of the text; that of the shards is the manifest's
    stream = open_stream(cfg, build)
    given = bpe.open_tokenizer(build.tokenizer) if build.tokenizer else None
    if given:
        cfg = replace(cfg, vocab_size=bpe.vocabulary(given[0]))
    if (done := _existing(cfg, build, stream, given, out)) is not None and not (out / _MARKER).exists():
        return done
    start = None
    if not (out / PROGRESS).exists():  # before the folder is made: a bad corpus leaves nothing behind
        start = _start(cfg, build, stream, given, out, tell)
    with exclusive(out, _MARKER):
        if (done := _existing(cfg, build, stream, given, out)) is not None:  # built by another process meanwhile
            _clear(out, {shard.file for split in SPLITS for shard in done.split(split).shards} | {TOKENIZER})
            return done
        identity = {
            "config": {key: value for key, value in to_dict(cfg).items() if key != "source"},
            "build": {key: value for key, value in to_dict(build).items() if key != "tokenizer"},
            "text": stream.fingerprint(),
            "tokenizer": hashlib.sha256(given[0].to_str().encode()).hexdigest() if given else "trained",
            "end": given[1] if given else bpe.END,
            "shard_tokens": shard_tokens,
        }
        if (found := load_state(out, identity)) is not None:
            state, threshold = found
            kept = {shard.file for split in SPLITS for shard in state.shards[split]}
            _clear(out, kept | {TOKENIZER, PROGRESS, SEEN})
        else:
            _clear(out, set())
            state = State()
            learnt, end, threshold = start or _start(cfg, build, stream, given, out, tell)
            _save_tokenizer(learnt, out, end)
            state.tokenizer_sha256 = bpe.tokenizer_sha256(out / TOKENIZER)
        tokenizer = bpe.read_tokenizer(out / TOKENIZER)
        size = bpe.vocabulary(tokenizer)
        plan = Plan(
            out, out / TOKENIZER, _little_endian(dtype_for(size)), shard_tokens, threshold, cfg.seed,
            build.limit_tokens, workers, pack, table, identity,
        )  # fmt: skip
        state = Writer(stream, plan, state, tell).write()
        manifest = _manifest(cfg, build, stream, state, size, table)
        built = Shards(out, manifest)
        manifest = replace(manifest, overlap=measure_overlap(built.tokens("train"), built.tokens("val"), size, tell))
        with replacing(out / MANIFEST) as file:
            file.write(dumps(manifest).encode())
        _clear(out, {shard.file for split in SPLITS for shard in state.shards[split]} | {TOKENIZER})
    return manifest


def _start(
    cfg: DataConfig, build: Build, stream: Stream, given: tuple[Tokenizer, str] | None, out: Path, tell: Progress
) -> tuple[Tokenizer, str, int]:
    """What comes before the first shard: the tokenizer, the token that begins a document, and the threshold of the hash
    below which documents are held out. It is the fraction asked for, but at least the lowest of the documents sampled,
    so that a short text has one."""
    tell(Step("reading text"))
    _require_room(cfg, build, stream, out)
    threshold = round(cfg.val_fraction * 2**64)
    sample = list(stream.sample(_SURVEY if given else bpe.SAMPLE * cfg.vocab_size))
    if not stream.distinct:
        hashes = [hash_of(document.text, cfg.seed) for document in sample if document.text.strip()]
        threshold = max(threshold, min(hashes, default=0) + 1)
        sample = [document for document in sample if hash_of(document.text, cfg.seed) >= threshold]
    if given:
        encode, room = bpe.Exact(*given), _PROBED
        for document in sample:  # before the build, as far as it takes no time
            room -= len(document.text)
            if room < 0:
                break
            encode([document.text], [document.label])
        return *given, threshold
    tell(Step("training tokenizer"))
    return bpe.train_tokenizer([document.text for document in sample], cfg.vocab_size), bpe.END, threshold


def _manifest(
    cfg: DataConfig, build: Build, stream: Stream, state: State, vocab_size: int, pack: Pack | None
) -> Manifest:
    splits = {}
    for name in SPLITS:
        total = state.total(name)
        splits[name] = Split(total.documents, total.bytes, total.tokens, tuple(state.shards[name]))
        if not total.documents:
            raise UserError(
                f"nothing of '{stream.name}' is left for {name}; give more text, or another --val-fraction or --seed"
            )
    digests = stream.digests() or dict(sorted(state.digests.items()))  # their order is lost where a build goes on
    whole = digests.pop("", "") or hashlib.sha256("".join(digests.values()).encode()).hexdigest()
    return Manifest(
        schema=SCHEMA,
        hash="",
        config=cfg,
        fingerprint=stream.fingerprint(),
        corpus=stream.name,
        corpus_sha256=whole,
        tokenizer_sha256=state.tokenizer_sha256,
        vocab_size=vocab_size,
        dtype=dtype_for(vocab_size),
        train=splits["train"],
        val=splits["val"],
        sources=tuple(
            SourceRow(
                name,
                *stream.about(name),
                sha256,
                train=state.counts["train"].get(name, Counts()),
                val=state.counts["val"].get(name, Counts()),
            )
            for name, sha256 in digests.items()
        ),
        build=build,
        val_order=tuple(state.val_order),
        contamination=state.overlap.result(pack) if pack else (),
        reading=stream.reading(state.dropped),
    ).sealed()


def _require_room(cfg: DataConfig, build: Build, stream: Stream, out: Path) -> None:
    """Raise UserError where the disk cannot hold the shards: at most one token for four bytes of text is asked for."""
    tokens = stream.size // 4
    if build.limit_tokens:
        tokens = min(tokens, build.limit_tokens) if tokens else build.limit_tokens
    need = tokens * _little_endian(dtype_for(cfg.vocab_size)).itemsize
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if need > free:
        raise UserError(
            f"'{out}' has {free / 1e9:.2f} GB of free space, and the shards will take about {need / 1e9:.2f} GB; "
            "free some, give another folder, or --limit-tokens"
        )


# --- checking


def _existing(
    cfg: DataConfig, build: Build, stream: Stream, given: tuple[Tokenizer, str] | None, out: Path
) -> Manifest | None:
    """The manifest of this data set in `out`; None if nothing is in the way of making it there."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise UserError(f"'{out}' is a file; give a folder")
    names = sorted(path.name for path in out.iterdir())
    if MANIFEST in names:
        manifest = open_shards(out).manifest
        was, now = (to_dict(c) | to_dict(b) for c, b in ((manifest.config, manifest.build), (cfg, build)))
        same_text = stream.fingerprint() == manifest.fingerprint
        same_tokenizer = _saved(given, out / TOKENIZER) if given else not manifest.build.tokenizer
        same = {"source": same_text, "tokenizer": same_tokenizer}  # by their content: the names may be others
        was, now = ({key: v for key, v in values.items() if not same.get(key)} for values in (was, now))
        other = differences(was, now)
        if not other and not same_text:
            other = ["its text, or the packages it is read from, have changed"]
        if not other and not same_tokenizer:
            other = [f"its tokenizer '{build.tokenizer}' has changed since"]
        if other:
            raise UserError(f"'{out}' holds other data ({'; '.join(other)}); give another folder")
        return manifest
    ours = {name for name in names if name == _MARKER or (_MARKER in names and _OWN.fullmatch(name))}
    foreign = [name for name in names if name not in ours or (out / name).is_symlink()]
    if foreign:
        raise UserError(f"'{out}' holds other files ('{foreign[0]}'); give a new or an empty folder")
    return None


def _saved(given: tuple[Tokenizer, str], folder: Path) -> bool:
    """Whether `folder` holds that tokenizer. Releases of the library may write the same one differently."""
    return given[0].to_str() == bpe.read_tokenizer(folder).to_str() and given[1] == bpe.end_token(folder)


def _check_tokenizer(folder: Path, manifest: Manifest) -> None:
    linked = any(path.is_symlink() for path in (folder, *(folder / name for name in bpe.FILES)))
    try:
        good = not linked and bpe.tokenizer_sha256(folder) == manifest.tokenizer_sha256
    except OSError:
        good = False
    if not good or bpe.vocabulary(bpe.read_tokenizer(folder)) != manifest.vocab_size:
        raise UserError(f"'{folder}' is not the tokenizer of its shards; build the data again in another folder")


def _problem(path: Path, shard: Shard, manifest: Manifest) -> str | None:
    """What is wrong with the shard at `path`, or None."""
    if path.is_symlink() or not path.is_file():
        return "is missing or a link"
    expected = shard.tokens * _little_endian(manifest.dtype).itemsize
    if path.stat().st_size != expected:
        return f"has {path.stat().st_size} bytes, not the {expected} of its manifest"
    tokens = _map(path, manifest.dtype)
    if hashlib.sha256(tokens.data).hexdigest() != shard.sha256:
        return "does not match its sha256"
    highest = int(tokens.max())
    if highest >= manifest.vocab_size:
        return f"holds token {highest}, beyond the vocabulary of {manifest.vocab_size}"
    return None


# --- files


def _little_endian(dtype: str) -> np.dtype:
    return np.dtype(dtype).newbyteorder("<")


def _map(path: Path, dtype: str) -> np.ndarray:
    return np.memmap(path, dtype=_little_endian(dtype), mode="r")


def _clear(out: Path, kept: set[str]) -> None:
    """Remove what a build made and what is not to be kept."""
    for path in out.iterdir():
        if _OWN.fullmatch(path.name) and path.name not in kept:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _save_tokenizer(tokenizer: Tokenizer, out: Path, end: str = bpe.END) -> None:
    temporary = out / f"{TOKENIZER}.tmp"
    bpe.save_tokenizer(tokenizer, temporary, end)
    publish(temporary, out / TOKENIZER)

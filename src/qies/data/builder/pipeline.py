"""Builds a data set: reads a source, splits it by document, encodes it and writes shards and their manifest.

Files are written under temporary names, flushed to disk and renamed, the manifest last. A build that was interrupted
resumes when it is started again with the same arguments.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from qies.config import DataConfig, differences, to_dict
from qies.data.builder.contamination import Pack
from qies.data.builder.overlap import measure_overlap
from qies.data.builder.progress import Progress, Step
from qies.data.builder.split import split_hash
from qies.data.builder.state import PROGRESS, SEEN, BuildState, load_state
from qies.data.builder.streams import open_stream
from qies.data.builder.tokenizer import SAMPLE, LosslessEncoder, open_tokenizer, save_tokenizer, train_tokenizer
from qies.data.builder.writer import Plan, Writer
from qies.data.manifest import (
    MANIFEST,
    SCHEMA,
    SPLITS,
    Build,
    Counts,
    Manifest,
    SourceRow,
    Split,
    dtype_for,
    dumps,
)
from qies.data.shards import TOKENIZER, Shards, little_endian, open_shards
from qies.data.sources.documents import DocumentStream
from qies.data.sources.files import is_below, require_utf8
from qies.data.tokenizer import END, end_token, read_tokenizer, tokenizer_sha256, vocabulary_size
from qies.errors import UserError
from qies.storage import exclusive, publish, replacing

SHARD_TOKENS = 1 << 27  # tokens in a full shard: 256 MB in uint16

_PROBED = 1_000_000  # characters encoded with a given tokenizer before the build starts
_SURVEY = 10_000_000  # characters sampled if no tokenizer is trained
_MARKER = ".building"  # exists while a build runs or after an interrupted one; its lock makes a second build wait
_OWN = re.compile(r"(train|val)-\d{5}\.bin|tokenizer(\.tmp)?|progress\.json|seen\.bin|\..*\.tmp")


@dataclass(frozen=True)
class _Start:
    """What is known before the first shard: the tokenizer, the token that begins a document, and the threshold of the
    split hash below which documents are held out."""

    tokenizer: Tokenizer
    end: str
    threshold: int


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
    """Read the source of `cfg`, split it by document, encode it with a given or a new tokenizer, and write shards.

    A folder that already contains this data set is checked and left unchanged; an interrupted build resumes after its
    last full shard. The same text and settings give the same files, bit for bit, for any number of `workers` (encoding
    processes). A second build of the same folder waits for the first. With an evaluation `pack` the manifest reports
    its overlap with the training text.

    Raises UserError: an error of the source, `split_documents`, the tokenizer or the pack; too little disk space; a
    folder that contains other data or other files, is inside of the source, or cannot be written. Raises Stopped if a
    worker is killed.
    """
    out = Path(out)
    report = progress or (lambda step: None)
    if workers < 1 or build.limit_tokens < 0:
        raise UserError(
            f"{workers} workers, a limit of {build.limit_tokens} tokens: give at least 1, and 0 for no limit"
        )
    require_utf8(out.absolute())
    table = Pack(pack) if pack else None
    build = replace(build, pack=table.fingerprint if table else "")
    if is_below(out, cfg.source):
        raise UserError(f"'{out}' is inside of its own source '{cfg.source}'; give an --out outside of it")
    cfg = replace(cfg, hash="")  # it identifies the text; the shards are identified by the manifest
    stream = open_stream(cfg, build)
    given = open_tokenizer(build.tokenizer) if build.tokenizer else None
    if given:
        cfg = replace(cfg, vocab_size=vocabulary_size(given[0]))
    if (done := _finished(cfg, build, stream, given, out)) is not None and not (out / _MARKER).exists():
        return done
    start = None
    if not (out / PROGRESS).exists():  # before the folder is made: a bad corpus leaves nothing behind
        start = _start(cfg, build, stream, given, out, report)
    with exclusive(out, _MARKER):
        if (done := _finished(cfg, build, stream, given, out)) is not None:  # another process has just built it
            _clear(out, _shards_of(done) | {TOKENIZER})
            return done
        identity = {
            "config": {key: value for key, value in to_dict(cfg).items() if key != "source"},
            "build": {key: value for key, value in to_dict(build).items() if key != "tokenizer"},
            "text": stream.fingerprint(),
            "tokenizer": hashlib.sha256(given[0].to_str().encode()).hexdigest() if given else "trained",
            "end": given[1] if given else END,
            "shard_tokens": shard_tokens,
        }
        if (found := load_state(out, identity)) is not None:
            state, threshold = found
            kept = {shard.file for split in SPLITS for shard in state.shards[split]}
            _clear(out, kept | {TOKENIZER, PROGRESS, SEEN})
        else:
            _clear(out, set())
            start = start or _start(cfg, build, stream, given, out, report)
            _save_tokenizer(start.tokenizer, out, start.end)
            state, threshold = BuildState(tokenizer_sha256=tokenizer_sha256(out / TOKENIZER)), start.threshold
        size = vocabulary_size(read_tokenizer(out / TOKENIZER))
        plan = Plan(
            folder=out,
            tokenizer=out / TOKENIZER,
            dtype=little_endian(dtype_for(size)),
            shard_tokens=shard_tokens,
            threshold=threshold,
            seed=cfg.seed,
            limit_tokens=build.limit_tokens,
            workers=workers,
            pack=table,
            identity=identity,
        )
        state = Writer(stream, plan, state, report).write()
        manifest = _manifest(cfg, build, stream, state, size, table)
        built = Shards(out, manifest)
        manifest = replace(manifest, overlap=measure_overlap(built.tokens("train"), built.tokens("val"), size, report))
        with replacing(out / MANIFEST) as file:
            file.write(dumps(manifest).encode())
        _clear(out, _shards_of(manifest) | {TOKENIZER})
    return manifest


def _start(
    cfg: DataConfig,
    build: Build,
    stream: DocumentStream,
    given: tuple[Tokenizer, str] | None,
    out: Path,
    report: Progress,
) -> _Start:
    """Sample the stream for the tokenizer and the threshold. The threshold is the fraction asked for, but above the
    lowest hash in the sample, so that a short text has a held-out document."""
    report(Step("reading text"))
    _require_space(cfg, build, stream, out)
    threshold = round(cfg.val_fraction * 2**64)
    sample = list(stream.sample(_SURVEY if given else SAMPLE * cfg.vocab_size))
    if not stream.distinct:
        hashes = [split_hash(document.text, cfg.seed) for document in sample if document.text.strip()]
        threshold = max(threshold, min(hashes, default=0) + 1)
        sample = [document for document in sample if split_hash(document.text, cfg.seed) >= threshold]
    if given:
        encode, room = LosslessEncoder(*given), _PROBED
        for document in sample:  # before the build starts, for as long as it takes a moment
            room -= len(document.text)
            if room < 0:
                break
            encode([document.text], [document.label])
        return _Start(*given, threshold)
    report(Step("training tokenizer"))
    return _Start(train_tokenizer([document.text for document in sample], cfg.vocab_size), END, threshold)


def _manifest(
    cfg: DataConfig, build: Build, stream: DocumentStream, state: BuildState, vocab_size: int, pack: Pack | None
) -> Manifest:
    splits = {}
    for name in SPLITS:
        total = state.total(name)
        splits[name] = Split(total.documents, total.bytes, total.tokens, tuple(state.shards[name]))
        if not total.documents:
            raise UserError(
                f"nothing of '{stream.name}' is left for {name}; give more text, or another --val-fraction or --seed"
            )
    digests = stream.digests() or dict(sorted(state.digests.items()))  # a resumed build has lost their order
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


def _require_space(cfg: DataConfig, build: Build, stream: DocumentStream, out: Path) -> None:
    """Raise UserError if the disk cannot hold the shards, estimated as one token per four bytes of text."""
    tokens = stream.size // 4
    if build.limit_tokens:
        tokens = min(tokens, build.limit_tokens) if tokens else build.limit_tokens
    need = tokens * little_endian(dtype_for(cfg.vocab_size)).itemsize
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if need > free:
        raise UserError(
            f"'{out}' has {free / 1e9:.2f} GB of free space, and the shards will take about {need / 1e9:.2f} GB; "
            "free some, give another folder, or --limit-tokens"
        )


def _finished(
    cfg: DataConfig, build: Build, stream: DocumentStream, given: tuple[Tokenizer, str] | None, out: Path
) -> Manifest | None:
    """The manifest of this data set in `out`; None if the folder is free to build it in. Raises UserError otherwise."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise UserError(f"'{out}' is a file; give a folder")
    names = sorted(path.name for path in out.iterdir())
    if MANIFEST in names:
        manifest = open_shards(out).manifest
        was, now = (to_dict(c) | to_dict(b) for c, b in ((manifest.config, manifest.build), (cfg, build)))
        same_text = stream.fingerprint() == manifest.fingerprint
        same_tokenizer = _is_saved(given, out / TOKENIZER) if given else not manifest.build.tokenizer
        same = {"source": same_text, "tokenizer": same_tokenizer}  # compared by content: the names may differ
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


def _is_saved(given: tuple[Tokenizer, str], folder: Path) -> bool:
    """Whether `folder` contains the `given` tokenizer. Releases of the library may serialise it differently."""
    return given[0].to_str() == read_tokenizer(folder).to_str() and given[1] == end_token(folder)


def _shards_of(manifest: Manifest) -> set[str]:
    return {shard.file for split in SPLITS for shard in manifest.split(split).shards}


def _clear(out: Path, kept: set[str]) -> None:
    """Remove the files that a build has made, except those in `kept`."""
    for path in out.iterdir():
        if _OWN.fullmatch(path.name) and path.name not in kept:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _save_tokenizer(tokenizer: Tokenizer, out: Path, end: str) -> None:
    temporary = out / f"{TOKENIZER}.tmp"
    save_tokenizer(tokenizer, temporary, end)
    publish(temporary, out / TOKENIZER)

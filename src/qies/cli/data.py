"""The verbs of data: build, contamination."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from qies.terminal import Group, building_bar, show

Globs = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


def build(
    source: str,
    /,
    out: Path,
    vocab_size: int = 4096,
    tokenizer: str = "",
    text_field: str = "text",
    val_fraction: float = 0.03,
    limit_tokens: str = "0",
    seed: int = 0,
    workers: int = 1,
    include: Globs = (),
    exclude: Globs = (),
    pack: Path | None = None,
    cache: Path | None = None,
    json: bool = False,
) -> None:
    """Build token shards from a corpus.

    Documents are deduplicated, split into training and validation, and tokenized. An interrupted build resumes.
    docs/data.md describes the sources and the output.

    For example:

        qies data build builtin --out data/builtin
        qies data build my_texts/ --out data/mine --vocab-size 8192
        qies data build registry:pip --out data/registry
        qies data build 'crawl/*.jsonl.gz' --out data/crawl --text-field body --tokenizer gpt2 --workers 8
        qies data build hub:allenai/c4:en --out data/c4 --tokenizer gpt2 --limit-tokens 2000000000 --workers 8

    Args:
        source: "builtin", "registry" (or "registry:pip"), "registry-dedup", "hub:OWNER/NAME" or
            "hub:OWNER/NAME:CONFIG", or a file, a folder or a glob of text, jsonl, JSON arrays, CSV (also .gz, .zst,
            .xz, .bz2) or parquet.
        out: The folder of shards to write.
        vocab_size: Vocabulary size of the byte-level BPE tokenizer to train.
        tokenizer: Use this tokenizer instead of training one: a folder, a tokenizer.json, or a name on the hub.
        text_field: Field of the text in records of JSON, CSV, parquet or the hub.
        val_fraction: Fraction of the documents held out, unless the data set has its own validation split.
        limit_tokens: Stop after the document that reaches this many training tokens, such as 100m; 0: no limit.
        seed: Seed of the choice of held-out documents.
        workers: Number of tokenizer processes; the result does not depend on it.
        include: Read only files that match this glob, such as 'part-*.jsonl'; repeatable.
        exclude: Skip files that match this glob; repeatable.
        pack: An evaluation pack (a folder of .jsonl and .txt files) whose 13-grams are searched for in the text.
        cache: Cache folder for the archives of "registry"; by default below the user's cache folder.
        json: Print the manifest.
    """
    from qies import presets
    from qies.config import DataConfig, to_dict
    from qies.data.builder.pipeline import build_shards
    from qies.data.manifest import Build

    if cache is not None:
        os.environ["QIES_CACHE"] = str(cache)
    limit = presets.parse_count(limit_tokens, "--limit-tokens")
    with building_bar(quiet=json) as progress:
        manifest = build_shards(
            DataConfig(source, vocab_size, val_fraction, seed),
            out,
            build=Build(text_field, tokenizer, limit, include=include, exclude=exclude),
            workers=workers,
            pack=pack,
            progress=progress,
        )
    show(json, to_dict(manifest), lambda: _print_manifest(manifest, out))


def contamination(shards: Path, /, pack: Path, json: bool = False) -> None:
    """Measure the overlap of the training text of shards with an evaluation pack.

    For example:

        qies data contamination data/c4 --pack eval_pack/

    Args:
        shards: A folder of shards, as `qies data build` writes it.
        pack: The evaluation pack: a folder of .jsonl and .txt files, whose 13-grams are searched for in the text.
        json: Print the overlap as JSON.
    """
    from qies.config import to_dict
    from qies.data.builder.contamination import shards_overlap
    from qies.data.shards import open_shards

    with building_bar(quiet=json) as progress:
        rows = shards_overlap(open_shards(shards), pack, progress)
    show(json, [to_dict(row) for row in rows], lambda: _print_overlap(rows))


def _print_manifest(manifest: Any, folder: Path) -> None:
    from qies.data.manifest import overlap_summary, summary

    print(summary(manifest))
    print(f"{folder}: {manifest.corpus}, vocabulary {manifest.vocab_size:,}, hash {manifest.hash[:16]}")
    for name in ("train", "val"):
        split = manifest.split(name)
        print(f"  {name}: {split.documents:,} documents, {split.bytes:,} bytes, {split.tokens:,} tokens")
    for source in manifest.sources:
        total = source.train + source.val
        print(f"  {source.name} ({source.version}): {total.documents:,} documents, {total.bytes:,} B; {source.licence}")
    if overlap := overlap_summary(manifest):
        print(f"  {overlap}")
    _print_overlap(manifest.contamination)


def _print_overlap(rows: Sequence[Any]) -> None:
    for row in rows:
        print(
            f"  {row.task}: {row.overlapping_items:,} of {row.items:,} items ({row.short_items:,} too short to tell) "
            f"share {row.overlapping_ngrams:,} of {row.ngrams:,} 13-grams with {row.documents:,} training documents"
        )


data = Group(
    "Build token shards from a corpus, or measure their overlap with an evaluation pack.",
    {"build": build, "contamination": contamination},
)

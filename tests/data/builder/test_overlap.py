"""Held-out n-grams that occur in training, against sets of tuples, and where the measure goes."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qies.cli import VERBS
from qies.config import DataConfig
from qies.data.builder import overlap
from qies.data.builder.corpus import fingerprint, load_corpus
from qies.data.builder.overlap import measure_overlap
from qies.data.builder.pipeline import build_shards
from qies.data.hashing import N, hash_ngrams, mix
from qies.data.manifest import MANIFEST, ValOverlap, dumps, overlap_summary, read_manifest
from qies.data.shards import Shards, Tokens, open_shards
from qies.data.sources.registry import packages as registry
from qies.errors import UserError
from qies.terminal import run

END = 3


def _stream(documents: list[list[int]], *cuts: int) -> Tokens:
    whole = np.array([id for document in documents for id in (END, *document)], dtype="<u2")
    return Tokens(np.split(whole, cuts))


def _by_hand(train: list[list[int]], val: list[list[int]]) -> ValOverlap:
    def grams(document: list[int]) -> list[tuple[int, ...]]:
        return [tuple(document[i : i + N]) for i in range(len(document) - N + 1)]

    seen = {gram for document in train for gram in grams(document)}
    return ValOverlap(
        tuple(len(grams(document)) for document in val),
        tuple(sum(gram in seen for gram in grams(document)) for document in val),
    )


def test_hashes_of_ngrams_are_polynomials_of_their_values() -> None:
    values = mix(np.arange(40, dtype=np.uint64))
    base = 0x9E3779B97F4A7C15
    for length in (0, 1, 12, 13, 14, 20, 40):
        expected = [
            sum(int(values[i + j]) * base ** (12 - j) for j in range(13)) % 2**64 for i in range(max(length - 12, 0))
        ]
        assert hash_ngrams(values[:length]).tolist() == expected


def test_ngrams_of_few_words_have_different_hashes() -> None:
    """Small numbers in every order: where plain polynomials collide."""
    ids = np.random.default_rng(0).integers(0, 2, 40_000).astype(np.uint64)
    distinct = len({tuple(row) for row in np.lib.stride_tricks.sliding_window_view(ids, N).tolist()})
    assert len(np.unique(hash_ngrams(mix(ids)))) == distinct > 7000


@pytest.mark.parametrize("seed", range(8))
def test_overlap_is_that_of_sets(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passages of val in train at every offset from the ends of documents, shards and blocks."""
    rng = random.Random(seed)
    monkeypatch.setattr(overlap, "_BLOCK", rng.choice([1, 7, 50, 1000]))
    ids = [id for id in range(60) if id != END]
    val = [rng.choices(ids, k=rng.choice([0, 5, 12, 13, 14, 40, 90])) for _ in range(30)]
    train = []
    for _ in range(60):
        source = rng.choice(val)
        start = rng.randint(0, len(source))
        train.append([*rng.choices(ids, k=rng.randint(0, 15)), *source[start : start + rng.randint(0, 40)]])
    across = [*val[0][-6:], *val[1][:7]]  # of two documents of val: it is no n-gram of either
    train.append(across * 3)
    told = []
    stream = _stream(train, 20, 21, 300)
    found = measure_overlap(stream, _stream(val, 100), 60, told.append)
    assert found == _by_hand(train, val)
    assert 0 < sum(found.found) < sum(found.ngrams)
    assert told[-1].done == told[-1].total == len(stream)


def test_texts_too_short_for_an_ngram_overlap_nothing() -> None:
    found = measure_overlap(_stream([[1] * 50]), _stream([[1] * 12, []]), 5, lambda step: None)
    assert found == ValOverlap((0, 0), (0, 0)) and found.share is None and found.clean == (True, True)


def test_memory_is_bounded_and_what_is_beyond_is_not_called_clean(tmp_path: Path, shards: Shards, monkeypatch) -> None:
    val = shards.tokens("val")
    end = shards.tokenizer().eos_token_id
    starts = np.flatnonzero(val[:] == end)
    for bound in (starts[3], starts[3] + 1, starts[4] - 1):  # the document that reaches beyond is not measured
        monkeypatch.setattr(overlap, "MEASURED", int(bound))
        found = measure_overlap(shards.tokens("train"), val, 400, lambda step: None)
        whole = shards.manifest.overlap
        known = 2 if bound == starts[3] else 3
        assert found == ValOverlap(whole.ngrams[:known], whole.found[:known])
    own = Shards(shards.folder, replace(shards.manifest, overlap=found))
    first, clean = own.val_clean(len(val))
    assert first.tolist() == starts.tolist() and clean.tolist() == [*found.clean, *[False] * (len(starts) - 3)]
    assert f"of 3 held-out documents are clean (at most 10%); {len(starts) - 3} more were not" in overlap_summary(
        own.manifest
    )
    assert own.val_clean(int(starts[1]))[1].tolist() == [found.clean[0]]
    older = Shards(shards.folder, replace(shards.manifest, overlap=ValOverlap()))
    assert not older.val_clean(len(val))[1].any() and overlap_summary(older.manifest) == ""


# --- of a build


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Records of which every third repeats half of the one before it."""
    rng, texts = random.Random(1), []
    words = [f"{a}{b}" for a in ("ka", "lo", "mi", "nu") for b in ("ra", "st", "vo", "we", "xi")]
    for i in range(150):
        new = [f"{i}", *rng.choices(words, k=40)]
        texts.append(" ".join([*texts[-1].split()[-20:], *new[:20]] if i % 3 == 2 else new))
    path = tmp_path_factory.mktemp("records") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_a_build_measures_its_documents_and_says_so(source: Path, tmp_path: Path, capsys) -> None:
    options = ["--vocab-size", "300", "--val-fraction", "0.2", "--out", str(tmp_path / "out")]
    assert run(VERBS, ["data", "build", str(source), *options], "") == 0
    shards = open_shards(tmp_path / "out")
    end = shards.tokenizer().eos_token_id

    def documents(split: str) -> list[list[int]]:
        whole = shards.tokens(split)[:]
        return [part[1:].tolist() for part in np.split(whole, np.flatnonzero(whole == end))[1:]]

    found = shards.manifest.overlap
    assert found == _by_hand(documents("train"), documents("val"))
    assert len(found.ngrams) == shards.manifest.val.documents and 0.1 < found.share < 0.5
    assert 0 < sum(found.clean) < len(found.clean)
    said = f"{found.share:.1%} of the held-out 13-grams of tokens occur in training; {sum(found.clean)} of "
    assert said in capsys.readouterr().out
    assert shards.identity()["val_overlap"] == found.share


def test_the_hash_of_a_manifest_is_what_it_was_before_overlap_was_measured(source: Path, tmp_path: Path) -> None:
    manifest = build_shards(DataConfig(str(source), 300, 0.2), tmp_path / "out")
    older = json.loads((tmp_path / "out" / MANIFEST).read_text())
    del older["overlap"]
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(older))
    assert open_shards(tmp_path / "out").manifest == replace(manifest, overlap=ValOverlap())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: ValOverlap(o.ngrams, o.found[:-1]), "overlap does not match"),
        (lambda o: ValOverlap((*o.ngrams, 1), (*o.found, 1)), "overlap does not match"),
        (lambda o: ValOverlap(o.ngrams, (o.ngrams[0] + 1, *o.found[1:])), "overlap finds more n-grams than there are"),
        (lambda o: ValOverlap(o.ngrams, (-1, *o.found[1:])), "overlap finds more n-grams than there are"),
    ],
)
def test_an_overlap_that_cannot_be_is_damage(change, message: str, shards: Shards, tmp_path: Path) -> None:
    changed = replace(shards.manifest, overlap=change(shards.manifest.overlap))
    (tmp_path / MANIFEST).write_text(dumps(changed))
    with pytest.raises(UserError, match=f"is damaged: {message}"):
        read_manifest(tmp_path)


# --- registry-dedup


def test_registry_dedup_is_the_text_of_registry_with_no_edition_on_both_sides(tmp_path: Path, monkeypatch) -> None:
    rng = random.Random(0)
    words = ["the", "river", "and", "a", "stone", "of", "that", "king", "in", "council", "is", "for", "as", "harvest"]
    texts = [" ".join(rng.choices(words, k=150)) for _ in range(40)]
    editions = {
        f"{kind}{i}": f"{note} {text}" for i, text in enumerate(texts) for kind, note in (("a", "x"), ("b", "y"))
    }
    (tmp_path / "registry").mkdir()
    monkeypatch.setattr(registry, "registry_documents", lambda source: (("tiny", *pair) for pair in editions.items()))
    monkeypatch.setattr(registry, "registry_sources", lambda source: {"tiny": ("MIT", "1")})
    plain, dedup = load_corpus("registry:pip"), load_corpus("registry-dedup:pip")
    assert (dedup.documents, dedup.sha256) == (plain.documents, plain.sha256)
    assert (plain.name, dedup.name, plain.groups) == ("registry", "registry-dedup", ())
    assert fingerprint("registry:pip") != fingerprint("registry-dedup:pip")
    built = {
        name: build_shards(DataConfig(f"{name}:pip", 300, 0.2), tmp_path / name)
        for name in ("registry", "registry-dedup")
    }
    assert built["registry"].overlap.share > 0.5
    assert built["registry-dedup"].overlap.share == 0.0
    assert {m.corpus_sha256 for m in built.values()} == {plain.sha256}
    assert len({m.hash for m in built.values()}) == 2
    with pytest.raises(UserError, match="holds other data"):
        build_shards(DataConfig("registry-dedup:pip", 300, 0.2), tmp_path / "registry")

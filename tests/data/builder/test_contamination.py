import json
import os
import random
from pathlib import Path

import pytest

from qies.cli import VERBS
from qies.config import DataConfig
from qies.data.builder import contamination
from qies.data.builder.contamination import OverlapCount, Pack, ngrams, shards_overlap, words
from qies.data.builder.pipeline import build_shards
from qies.data.manifest import PackOverlap
from qies.data.shards import open_shards
from qies.errors import UserError
from qies.terminal import run


def _words(first: int, count: int) -> str:
    return " ".join(f"w{i}" for i in range(first, first + count))


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """Words that are numbers: `long` has 13-grams 0 to 7, 100 and a short item, `texts` one of them and another two."""
    folder = tmp_path / "pack"
    folder.mkdir()
    items = [
        {"context": _words(0, 20), "answers": {"text": ["short answer"]}, "label": 1},
        {"context": _words(100, 13), "question": _words(300, 12)},
        {"context": _words(200, 12), "endings": [_words(212, 12), _words(224, 12)]},
    ]
    (folder / "long.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n\n")
    (folder / "texts.txt").write_text(f"{_words(7, 13)}\n\n{_words(500, 14)}\n")
    (folder / "README.md").write_text(_words(0, 100))
    return folder


def test_words_are_lower_case_without_punctuation() -> None:
    assert words("The U.S. state-of-the-art, it's\n “Größe” __x__ 3.5%") == [
        "the", "us", "stateoftheart", "its", "größe", "x", "35",
    ]  # fmt: skip
    assert ngrams(_words(0, 12)) == [] and ngrams(_words(0, 14)) == [_words(0, 13), _words(1, 13)]


def test_counts_by_hand(pack: Path) -> None:
    table, count = Pack(pack), OverlapCount()
    training = [
        f"Before. {_words(5, 14).upper()}!",  # 13-grams 5 and 6 of the first item, not 7
        f"{_words(100, 6)}, {_words(106, 7)}",  # the second item, with a comma in it
        f"{_words(100, 6)} and {_words(106, 7)}",  # broken by a word
        f"{_words(200, 30)}",  # the short item: its fields in a row, none of which has 13 words
        f"x {_words(7, 13)} y {_words(7, 13)}",  # 13-gram 7: of both tasks
    ]
    for text in training:
        count.add(table, table.hits(text))
    assert count.result(table) == (
        PackOverlap("long", items=3, short_items=1, ngrams=9, overlapping_items=2, overlapping_ngrams=4, documents=3),
        PackOverlap("texts", items=2, short_items=0, ngrams=3, overlapping_items=1, overlapping_ngrams=1, documents=1),
    )


def test_equal_hashes_are_no_hit(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Pack(pack)
    monkeypatch.setattr(contamination, "hash", lambda word: 7, raising=False)
    worst = Pack(pack)
    assert len(worst._hashes) == 1
    for text in (_words(3, 40), _words(900, 40), f"{_words(500, 14)} {_words(100, 13)}"):
        assert worst.hits(text) == [n for n in sorted({worst.numbers.get(g, -1) for g in ngrams(text)}) if n >= 0]
    assert table.numbers == worst.numbers


def test_a_build_counts_training_documents_only_and_the_verb_agrees(pack: Path, tmp_path: Path, capsys) -> None:
    rng = random.Random(0)
    items = [_words(0, 20), _words(100, 13), _words(500, 14)]
    texts = [f"{i} " + " ".join(rng.choices("abcdefgh", k=30)) + " " + rng.choice([*items, ""]) for i in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    cfg, small = DataConfig(str(tmp_path / "a.jsonl"), 300, 0.2), {"shard_tokens": 3000}
    manifest = build_shards(cfg, tmp_path / "one", pack=pack, **small)
    shards = open_shards(tmp_path / "one")
    table, slow = Pack(pack), OverlapCount()
    train = [t for t in texts if t in set(_documents(shards))]
    assert len(train) == manifest.train.documents < 300
    for text in train:
        slow.add(table, {table.numbers[g] for g in ngrams(text) if g in table.numbers})
    assert manifest.contamination == slow.result(table)
    assert [row.documents > 50 for row in manifest.contamination] == [True, True]
    assert build_shards(cfg, tmp_path / "two", pack=pack, workers=2, **small) == manifest
    assert shards_overlap(shards, pack, lambda step: None) == manifest.contamination
    assert run(VERBS, ["data", "contamination", str(tmp_path / "one"), "--pack", str(pack), "--json"], "") == 0
    assert json.loads(capsys.readouterr().out) == [row.__dict__ for row in manifest.contamination]
    with pytest.raises(UserError, match=r"holds other data \(pack: "):
        build_shards(cfg, tmp_path / "one", **small)


def _documents(shards) -> list[str]:
    tokenizer, ids = shards.tokenizer(), shards.tokens("train")[:].tolist()
    return tokenizer.decode(ids).split("<|endoftext|>")[1:]


def test_no_pack_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not an evaluation pack"):
        Pack(tmp_path)
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match=r"a.jsonl' cannot be read \(No such file or directory\)"):
        Pack(tmp_path)
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.jsonl").write_text('{"a": "b"}\nno json\n')
    with pytest.raises(UserError, match=r"a.jsonl' line 2 is not JSON"):
        Pack(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        Pack(tmp_path)
    (tmp_path / "a.jsonl").rename(tmp_path / os.fsdecode(b"caf\xe9.jsonl"))
    with pytest.raises(UserError, match=r"caf\\xe9.jsonl' is not UTF-8; rename it"):
        Pack(tmp_path)

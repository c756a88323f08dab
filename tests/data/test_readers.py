import gzip
import itertools
import json
from pathlib import Path

import pytest

from qies.data.readers import find_files, grouped
from qies.data.streams import FileStream
from qies.errors import UserError

TEXTS = [f"Document {i}: señor 日本 " + "word " * i for i in range(1200)]


def _lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": t, "url": "u"}) + "\n" for t in texts).encode()


def _write(path: Path, texts: list[str]) -> None:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(_lines(texts)))
    elif path.suffix == ".zst":
        pa = pytest.importorskip("pyarrow")
        half = len(texts) // 2
        frames = [pa.compress(_lines(part), codec="zstd", asbytes=True) for part in (texts[:half], texts[half:])]
        path.write_bytes(b"".join(frames))  # the Pile's files are of several frames too
    elif path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pa.table({"text": texts}), path, row_group_size=100)
    else:
        path.write_bytes(_lines(texts))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.jsonl.zst", "a.parquet"])
def test_every_kind_reads_the_same_and_goes_on_from_every_position(name, tmp_path):
    _write(tmp_path / name, TEXTS)
    _write(tmp_path / f"b{name}", TEXTS[:3])
    files = find_files(str(tmp_path))
    batches = list(files.batches())
    records = [r for b in batches for r in b.records]
    assert [text for _, text in records] == TEXTS + TEXTS[:3] and len({id for id, _ in records}) == len(records)
    for i, batch in enumerate(batches):
        rest = [r for b in files.batches(json.loads(json.dumps(batch.position))) for r in b.records]
        assert rest == [r for b in batches[i + 1 :] for r in b.records]


def test_globs_plain_text_and_another_field(tmp_path):
    (tmp_path / "x.txt").write_text("one\n\ntwo\n")
    (tmp_path / "y.jsonl").write_text('{"body": "three"}\n\n{"body": "four"}\n')
    assert [r[1] for b in find_files(f"{tmp_path}/*.txt").batches() for r in b.records] == ["one\n\ntwo\n"]
    assert [r for b in find_files(f"{tmp_path}/*.jsonl", "body").batches() for r in b.records] == [
        ("y.jsonl#0", "three"),
        ("y.jsonl#1", "four"),
    ]


def test_groups_end_at_512_records_or_a_million_characters():
    assert [len(g) for g in grouped((1 for _ in range(1100)), int)] == [512, 512, 76]
    assert [len(g) for g in grouped([600_000] * 3, int)] == [2, 1]


FAULTS = {
    "cut.jsonl.gz": (lambda: gzip.compress(_lines(TEXTS))[:-5000], "damaged gz"),
    "no.jsonl.gz": (lambda: b"plain", "damaged gz"),
    "cut.jsonl.zst": (
        lambda: pytest.importorskip("pyarrow").compress(_lines(TEXTS), codec="zstd", asbytes=True)[:-500],
        "damaged zst",
    ),
    "no.parquet": (lambda: pytest.importorskip("pyarrow") and b"PAR1 no PAR1", "damaged parquet"),
    "field.jsonl": (lambda: b'{"text": "a"}\n{"body": "b"}\n', "line 2 has no field 'text'; it has: body"),
    "null.jsonl": (lambda: b'{"text": null}\n', "line 1 has a NoneType"),
    "latin.jsonl": (lambda: b'{"text": "caf\xe9"}\n', "line 1 is not UTF-8"),
    "latin.txt": (lambda: b"a\ncaf\xe9\n", "line 2 is not UTF-8"),
    "surrogate.jsonl": (lambda: b'{"text": "\\ud800"}\n', "no Unicode text"),
    "word.jsonl": (lambda: b"text\n", "not a JSON object"),
    "bomb.jsonl": (lambda: b"[" * 200_000 + b"\n", "not a JSON object"),
    "empty.jsonl": (lambda: b"", "holds no record"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_that_names_the_file(name, tmp_path):
    content, message = FAULTS[name]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(UserError, match=message) as error:
        list(itertools.chain(find_files(str(tmp_path)).batches()))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_nothing_to_read_is_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x")
    for source in (tmp_path, tmp_path / "a.bin"):
        with pytest.raises(UserError, match="known kind"):
            find_files(str(source))
    with pytest.raises(UserError, match="no corpus"):
        find_files(str(tmp_path / "absent"))


def test_a_sample_of_many_files_is_about_as_long_as_asked_for(tmp_path):
    for name in "abcd":
        _write(tmp_path / f"{name}.jsonl", [f"{name} {text}" for text in TEXTS[:100]])
    sample = list(FileStream(find_files(str(tmp_path))).sample(4000))
    longest = max(len(text) for text in TEXTS[:100]) + 2
    assert {document.text[0] for document in sample} == set("abcd")
    assert 4000 <= sum(len(document.text) for document in sample) <= 4000 + 4 * longest


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_what_fits_into_memory_is_told_by_the_unpacked_size(suffix, tmp_path):
    """A million equal letters pack to a thousandth; four times the packed size would say that they fit."""
    pa = pytest.importorskip("pyarrow")
    text = b"a" * 1_000_000
    packed = {"": bytes, ".gz": gzip.compress, ".zst": lambda t: pa.compress(t, codec="zstd", asbytes=True)}[suffix]
    (tmp_path / f"a.txt{suffix}").write_bytes(packed(text))
    (tmp_path / "b.txt").write_bytes(b"b" * 500_000)
    files = find_files(str(tmp_path))
    assert files.is_text and files.fit(1_500_000) and not files.fit(1_499_999)

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import random
from pathlib import Path

import pytest

from qies.data.builder.streams import FileStream
from qies.data.sources.files import find_files
from qies.data.sources.readers import grouped
from qies.errors import UserError

TEXTS = [f"Document {i}: señor 日本 " + "word " * i for i in range(1200)]


def _lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": t, "url": "u"}) + "\n" for t in texts).encode()


PACKERS = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


def _parquet(texts: list[str]) -> bytes:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": texts}), sink := pa.BufferOutputStream())
    return sink.getvalue().to_pybytes()


def _columns(*columns, kind=None) -> bytes:
    """A parquet file of names and values in turn."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    out = io.BytesIO()
    arrays = [pa.array(values, pa.timestamp("ms") if kind else None) for values in columns[1::2]]
    parquet.write_table(pa.table(arrays, names=list(columns[::2])), out)
    return out.getvalue()


def _write(path: Path, texts: list[str]) -> None:
    if path.suffix in PACKERS:
        path.write_bytes(PACKERS[path.suffix](_lines(texts)))
    elif path.suffix == ".json":  # one array over many lines
        path.write_text(json.dumps([{"text": t} for t in texts], indent=1, ensure_ascii=False), encoding="utf-8")
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            rows = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t")
            rows.writerows([["id", "text"], *(["a,b", t] for t in texts)])
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


NAMES = ["a.jsonl", "a.json.gz", "a.jsonl.zst", "a.jsonl.xz", "a.jsonl.bz2", "a.json", "a.csv", "a.tsv", "a.parquet"]


@pytest.mark.parametrize("name", NAMES)
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
    "list.jsonl": (lambda: b'{"text": ["a"]}\n', "line 1 has a list, not text, in 'text'; .*qies data build"),
    "nul.jsonl": (lambda: b'{"text": "a\\u0000b"}\n', r"line 1 contains zero bytes \(NUL\)"),
    "nul.txt": (lambda: b"a\0b\n", r"line 1 contains zero bytes \(NUL\)"),
    "nul.csv": (lambda: b"text\na\0b\n", r"line 2 contains zero bytes \(NUL\)"),
    "nul.parquet": (lambda: _parquet(["a\0b"]), r"row 1 contains zero bytes \(NUL\)"),
    "twice.csv": (lambda: b"id,text,text\n1,a,b\n", "has 2 columns 'text'; rename all but one"),
    "twice.parquet": (lambda: _columns("text", ["a"], "text", ["b"]), "has 2 columns 'text'; rename all but one"),
    "bytes.parquet": (lambda: _columns("text", [b"a"]), "has binary, not text, in 'text'; name the field"),
    "years.parquet": (lambda: _columns("text", [2**62], kind="timestamp"), r"has timestamp\[ms\], not text, in 'text'"),
    "fields.csv": (lambda: b"id,text\n1,a\n2,b,c\n", "line 3 has 3 fields, but the first line has 2"),
    "quote.csv": (lambda: b'text\n"a"b\n', "line 2 is not CSV"),
    "latin.csv": (lambda: b"text\ncaf\xe9\n", "line 2 is not UTF-8"),
    "field.csv": (lambda: b"id,body\n1,a\n", "has no field 'text'; it has: id, body"),
    "cut.json": (lambda: b'[{"text": "a"},\n {"text": "b', "record 2 is not a JSON object"),
    "open.json": (lambda: b'[{"text": "a"}', "truncated or damaged after record 1"),
    "two.json": (lambda: b'[{"text": "a"}] [{"text": "b"}]', "more than one JSON array"),
    "strings.json": (lambda: b'["a"]', "record 1 is not a JSON object"),
    "none.json": (lambda: b"[ ]", "contains no record"),
    "latin.json": (lambda: b'[{"text": "caf\xe9"}]', "is not UTF-8"),
    "cut.jsonl.xz": (lambda: lzma.compress(_lines(TEXTS))[:-500], "damaged xz"),
    "cut.jsonl.bz2": (lambda: bz2.compress(_lines(TEXTS))[:-500], "damaged bz2"),
    "no.jsonl.xz": (lambda: b"plain", "damaged xz"),
    "no.jsonl.zst": (lambda: b"plain text, no zstd", "damaged zst"),
    "latin.jsonl": (lambda: b'{"text": "caf\xe9"}\n', "line 1 is not UTF-8"),
    "latin.txt": (lambda: b"a\ncaf\xe9\n", "line 2 is not UTF-8"),
    "surrogate.jsonl": (lambda: b'{"text": "\\ud800"}\n', "not Unicode text"),
    "word.jsonl": (lambda: b"text\n", "not a JSON object"),
    "bomb.jsonl": (lambda: b"[" * 200_000 + b"\n", "not a JSON object"),
    "empty.jsonl": (lambda: b"", "contains no record"),
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
        with pytest.raises(UserError, match="known type"):
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


def test_null_and_empty_texts_are_empty_in_every_format(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": ""}\n{"text": "x"}\n')
    (tmp_path / "b.json").write_text('[{"text": null}, {"text": ""}, {"text": "x"}]')
    (tmp_path / "c.csv").write_text('id,text\n1,\n2,""\n\n3,x\n')
    parquet.write_table(pa.table({"text": [None, "", "x"]}), tmp_path / "d.parquet")
    assert [text for b in find_files(str(tmp_path)).batches() for _, text in b.records] == ["", "", "x"] * 4


def test_text_of_parquet_may_be_of_any_kind_of_string(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = ["a", None, "caf\u00e9", "a"]
    for number, kind in enumerate((pa.string(), pa.large_string(), pa.string_view())):
        parquet.write_table(pa.table({"text": pa.array(texts, kind)}), tmp_path / f"{number}.parquet")
    parquet.write_table(pa.table({"text": pa.array(texts).dictionary_encode()}), tmp_path / "dictionary.parquet")
    parquet.write_table(pa.table({"text": pa.nulls(1)}), tmp_path / "null.parquet")
    read = [text for b in find_files(str(tmp_path)).batches() for _, text in b.records]
    assert read == ["a", "", "caf\u00e9", "a"] * 4 + [""]


def test_an_array_larger_than_a_block_and_with_odd_characters_comes_back(tmp_path):
    texts = [f'"]}},[{{ {i} \\ 日本 \U0001f600' * (i % 7 + 1) for i in range(3000)] + ["x" * 300_000, "end"]
    _write(tmp_path / "a.json", texts)
    assert (tmp_path / "a.json").stat().st_size > 500_000
    assert [text for b in find_files(str(tmp_path)).batches() for _, text in b.records] == texts


def test_one_file_without_a_record_among_others_is_passed_over(tmp_path):
    for name in ("a.jsonl", "c.jsonl"):
        (tmp_path / name).write_text("")
    (tmp_path / "b.jsonl").write_bytes(_lines(TEXTS[:600]))
    files = find_files(str(tmp_path))
    batches = list(files.batches())
    assert [len(b.records) for b in batches] == [0, 512, 88, 0]
    for i, batch in enumerate(batches):
        assert [b.records for b in files.batches(batch.position)][-1] == [] or i == 3
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(UserError, match=r"c\.jsonl' contains no record"):
        list(find_files(str(tmp_path)).batches())


def test_a_long_window_of_zstd_is_read_and_one_beyond_the_limit_is_named(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    long = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=long).compressobj()
    packed = packer.compress(_lines(TEXTS[:5])) + packer.flush()
    assert zstandard.get_frame_parameters(packed).window_size == 1 << 31
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    assert [text for b in find_files(str(tmp_path)).batches() for _, text in b.records] == TEXTS[:5]
    (tmp_path / "a.jsonl.zst").write_bytes(packed[:5] + bytes([packed[5] + 8]) + packed[6:])  # the window's exponent
    with pytest.raises(UserError, match=r"a window of 4,294,967,296 bytes.*limit of 2,147,483,648.*--long"):
        list(find_files(str(tmp_path)).batches())


def test_whatever_is_wrong_with_a_parquet_file_is_one_line(tmp_path):
    """Single bytes of a small file changed: it is read, or refused in one line, whatever pyarrow raises."""
    content, rng = _parquet(["some text", "more of it"] * 20), random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(content)
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "a.parquet").write_bytes(damaged)
        try:
            list(find_files(str(tmp_path)).batches())
        except UserError as error:
            refused += 1
            assert "a.parquet" in str(error) and "\n" not in str(error)
    assert refused > 50


def test_errors_of_arrow_that_are_no_value_errors_are_one_line_too(tmp_path, monkeypatch):
    """ArrowNotImplementedError is one, met in two files of parquet's own test suite."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def fail(*_, **__):
        raise pa.ArrowNotImplementedError("Unsupported encoding")

    (tmp_path / "a.parquet").write_bytes(_parquet(["x"]))
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", fail)
    with pytest.raises(
        UserError, match=r"a.parquet' is a parquet file of an unsupported variant \(Unsupported encoding"
    ):
        list(find_files(str(tmp_path)).batches())

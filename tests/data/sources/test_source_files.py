"""Which files of a source are read, which are skipped and why, and that nothing is left out without a word."""

import json
import os
from pathlib import Path

import pytest

from qies.cli import VERBS
from qies.config import DataConfig
from qies.data.builder.corpus import load_corpus
from qies.data.builder.pipeline import build_shards
from qies.data.manifest import Build, Dropped, Skipped, read_manifest, summary
from qies.data.sources.files import find_files, is_below
from qies.errors import UserError
from qies.terminal import run

RECORD = '{"text": "a record of some words"}\n'


def _put(root: Path, **files: str) -> Path:
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def _ids(files) -> list[str]:
    return [id for _, id in files.files]


def _reasons(files) -> dict[str, tuple[str, ...]]:
    return {row.reason: row.first for row in files.skipped}


def test_every_file_is_read_or_skipped_with_its_reason(tmp_path):
    root = _put(tmp_path / "d", a_jsonl=RECORD, sub__b_json=RECORD, code_py="x", sub__c_bin="x", README_md="About.")
    _put(tmp_path / "elsewhere", e_jsonl=RECORD)
    (root / ".git").mkdir()
    (root / ".git" / "x.jsonl").write_text(RECORD)
    (root / ".hidden.txt").write_text("x")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    (root / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    files = find_files(str(root))
    assert _ids(files) == ["a.jsonl", "link/e.jsonl", "sub/b.json"]
    assert _reasons(files) == {
        "of unknown type": ("code.py", "sub/c.bin"),
        "hidden": (".git/", ".hidden.txt"),
        "a link to a folder that is already read": ("loop",),
        "not a regular file, or a broken link": ("gone.jsonl",),
        "descriptions of the records beside them": ("README.md",),
    }


def test_a_readme_is_text_where_there_are_no_records_or_it_is_asked_for(tmp_path):
    assert _ids(find_files(str(_put(tmp_path / "text", README_md="About.", a_txt="Text.")))) == ["README.md", "a.txt"]
    records = str(_put(tmp_path / "records", README_md="About.", a_jsonl=RECORD))
    assert _ids(find_files(records)) == ["a.jsonl"]
    assert _ids(find_files(records, include=("*",))) == ["README.md", "a.jsonl"]


def test_include_and_exclude_choose_by_name_and_path(tmp_path):
    root = str(_put(tmp_path, a_jsonl=RECORD, web__b_jsonl=RECORD, web__c_jsonl=RECORD, books__b_jsonl=RECORD))
    assert _ids(find_files(root, include=("b.jsonl",))) == ["books/b.jsonl", "web/b.jsonl"]
    assert _ids(find_files(root, include=("web/*",), exclude=("c.*",))) == ["web/b.jsonl"]
    only = find_files(root, exclude=("web/*", "books/*"))
    assert _ids(only) == ["a.jsonl"]
    assert only.skipped == (Skipped("excluded by --exclude", 3, ("books/b.jsonl", "web/b.jsonl", "web/c.jsonl")),)
    with pytest.raises(UserError, match=r"no file of a known type \(4 not among --include: a.jsonl, books/b.jsonl"):
        find_files(root, include=("*.txt",))


def test_a_pattern_says_what_it_does_not_search(tmp_path):
    _put(tmp_path, a_jsonl=RECORD, web__b_jsonl=RECORD, c_png="x")
    files = find_files(f"{tmp_path}/*")
    assert _ids(files) == ["a.jsonl"]
    assert set(_reasons(files)) == {"a folder, which a pattern searches only with **", "of unknown type"}
    assert _ids(find_files(f"{tmp_path}/**")) == ["a.jsonl", "web/b.jsonl"]


def test_a_folder_that_cannot_be_searched_is_an_error(tmp_path, monkeypatch):
    _put(tmp_path, a_txt="x", closed__b_txt="y")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):  # the tests may run as root, whom no permission stops
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"closed' cannot be searched \(Permission denied\)"):
        find_files(str(tmp_path))


def test_a_name_that_is_not_utf8_is_one_line_before_any_work(tmp_path, capsys):
    _put(tmp_path / "d", a_jsonl=RECORD)
    bad = os.path.join(os.fsencode(tmp_path / "d"), b"caf\xe9")
    Path(os.fsdecode(bad + b".bin")).write_text("x")
    assert find_files(str(tmp_path / "d")).skipped == (Skipped("of unknown type", 1, ("caf\\xe9.bin",)),)
    Path(os.fsdecode(bad + b".jsonl")).write_text(RECORD)
    assert run(VERBS, ["data", "build", str(tmp_path / "d"), "--out", str(tmp_path / "out")], "") == 2
    assert r"caf\xe9.jsonl' is not UTF-8; rename it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    Path(os.fsdecode(bad + b".jsonl")).unlink()
    out = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    assert run(VERBS, ["data", "build", str(tmp_path / "d"), "--out", out], "") == 2
    assert r"/caf\xe9' is not UTF-8; rename it" in capsys.readouterr().err
    assert not os.path.exists(out)


@pytest.mark.parametrize("source", ["", "~nobody-of-this-name/x"])
def test_an_empty_or_unknown_name_is_no_path(source, tmp_path, monkeypatch):
    monkeypatch.chdir(_put(tmp_path, a_txt="x"))
    with pytest.raises(UserError, match="no corpus"):
        find_files(source)


# --- what a build says of it


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mixed") / "d"
    rows = [{"text": f"Document {i} of some words, told by the river."} for i in range(40)]
    rows += [{"text": None}, {"text": " \n"}, rows[3], rows[4], {"text": ""}]
    _put(root, a_jsonl="".join(map("{}\n".format, map(json.dumps, rows))), empty_jsonl="", x_png="x")
    return root


@pytest.mark.parametrize("workers", [1, 2])
def test_a_manifest_counts_what_was_left_out(mixed, tmp_path, workers):
    build_shards(DataConfig(str(mixed), 300, 0.2), tmp_path / "out", workers=workers)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.train.documents + manifest.val.documents == 40
    assert manifest.reading.files == 2 and manifest.reading.skipped == (Skipped("of unknown type", 1, ("x.png",)),)
    assert manifest.reading.dropped == Dropped(repeated=2, empty=3, empty_files=1)
    assert summary(manifest) == (
        "read 2 files; skipped 1 of unknown type (x.png); kept 40 documents; "
        "dropped 2 repeated documents, 3 empty or null documents, 1 files without a record"
    )


def test_a_limit_counts_what_was_dropped_before_it_only(mixed, tmp_path):
    manifest = build_shards(DataConfig(str(mixed), 300, 0.2), tmp_path / "out", build=Build(limit_tokens=200))
    assert 0 < manifest.train.documents < 30 and manifest.reading.dropped == Dropped()


def test_text_that_is_loaded_is_counted_too(tmp_path):
    long = "A paragraph of more than a hundred characters that two of the files have, and which is kept once. " * 2
    _put(tmp_path, a_txt=f"One.\n\n{long}", b_txt=f"Two.\n\n{long}", c_txt="ONE.", d_txt=" \n", e_txt="one.", f_py="x")
    reading = load_corpus(str(tmp_path)).reading
    assert reading.dropped == Dropped(repeated=1, empty=1, paragraphs=1)
    assert reading.files == 5 and [row.first for row in reading.skipped] == [("f.py",)]


def test_the_summary_is_printed(mixed, tmp_path, capsys):
    argv = ["data", "build", str(mixed), "--out", str(tmp_path / "out"), "--vocab-size", "300"]
    assert run(VERBS, [*argv, "--exclude", "empty*"], "") == 0
    assert (
        "read 1 files; skipped 1 excluded by --exclude (empty.jsonl); skipped 1 of unknown type (x.png); kept 40"
        in (capsys.readouterr().out)
    )
    assert run(VERBS, argv, "") == 2  # other files, so other data
    assert "exclude: ['empty*'] -> []" in capsys.readouterr().err
    assert run(VERBS, ["data", "build", "builtin", "--out", str(tmp_path / "x"), "--include", "*"], "") == 2
    assert "--include and --exclude apply to files" in capsys.readouterr().err


# --- outputs inside of the source


@pytest.mark.parametrize("source", ["d", "d/", "d/*", "d/**/*.json", "link", "hub:d"])
def test_an_output_that_would_be_its_own_source_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _put(tmp_path / "d", a_jsonl=RECORD)
    (tmp_path / "link").symlink_to("d")
    out = Path("d") if source == "d/*" else Path("d/out/deep")
    with pytest.raises(UserError, match="inside of its own source"):
        build_shards(DataConfig(source), out)
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == ["a.jsonl"]


def test_an_output_beside_the_files_of_a_pattern_is_fine(tmp_path):
    _put(tmp_path / "d", a_jsonl=RECORD)
    assert not is_below(tmp_path / "d" / "out", f"{tmp_path}/d/*.jsonl")
    assert not is_below(tmp_path / "out", f"{tmp_path}/d/**")
    assert not is_below(tmp_path / "out", "builtin")

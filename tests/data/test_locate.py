"""The same text is the same run, however its place is named; other text is another."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from qies import config as configs
from qies import records
from qies.cli import VERBS
from qies.config import DataConfig, RunConfig, StudyConfig, content_hash
from qies.data.builder.pipeline import build_shards
from qies.data.builder.tokenizer import save_tokenizer, train_tokenizer
from qies.data.locate import locate
from qies.data.manifest import Build
from qies.errors import UserError
from qies.ladder import grid
from qies.terminal import run
from qies.train.run_directory import claim, open_run


@pytest.fixture
def here(text_folder: Path, shard_folder: Path, tmp_path: Path, monkeypatch) -> Path:
    """A working directory with a folder of texts and one of shards."""
    shutil.copytree(text_folder, tmp_path / "d")
    shutil.copytree(shard_folder, tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def _hash(source: str) -> str:
    return content_hash(locate(RunConfig(), source))


@pytest.mark.parametrize("name", ["d", "shards"])
def test_every_name_of_a_place_is_the_same_run(name: str, here: Path, monkeypatch) -> None:
    expected = _hash(name)
    for other in (f"{name}/", f"./{name}", f"d/../{name}", str(here / name), f"~/{name}"):
        assert _hash(other) == expected, other
    shutil.copytree(here / name, here / "elsewhere" / "copy")
    monkeypatch.chdir(here / "elsewhere")
    assert _hash(f"../{name}") == _hash("copy") == expected
    file = next(p for p in Path("copy").iterdir() if p.is_file() and p.suffix in (".txt", ".json"))
    if name == "d":
        file.write_text("other text")
        assert _hash("copy") != expected


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--out", "out", "--data", ""],
        ["train", "--out", "out", "--data="],
        ["train", "--out", "out", "data.source=''"],
        ["train", "--out", "out", "data.source="],
        ["train", "--out", ""],
        ["train", "--out", "out", "--config="],
        ["data", "build", "", "--out", "out"],
        ["data", "build", "d", "--out", ""],
        ["study", "", "--out", "out"],
        ["study", "--preset", "quick", "--out", ""],
        ["ladder", "status", "--out", ""],
        ["report", ""],
        ["fit", ""],
        ["generate", "", "--prompt", "x"],
    ],
)
def test_nothing_is_no_path(words, here: Path, capsys) -> None:
    before = sorted(here.rglob("*"))
    assert run(VERBS, words, "") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ("is empty" in error or "has no value" in error)
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("source", "words"),
    [("nofile/", "pattern."), ("Makefil", "pattern."), ("shard/", "Did you mean 'HERE/shards'?"),
     ("nots.txt", "Did you mean 'HERE/notes.txt'?"), ("bultin", "Did you mean 'builtin'?"), ("zzz", "pattern.")],
)  # fmt: skip
def test_what_is_suggested_for_a_source_can_be_one(source, words, here: Path) -> None:
    (here / "Makefile").touch()
    (here / "notes.txt").touch()
    with pytest.raises(UserError) as error:
        locate(RunConfig(), source)
    assert str(error.value).endswith(words.replace("HERE", str(here)))


def test_names_of_corpora_have_the_hashes_they_had() -> None:
    assert content_hash(locate(RunConfig())) == content_hash(RunConfig()) == "f83df5cbe46531eb"


def test_a_relative_source_of_a_file_is_relative_to_the_file(here: Path, monkeypatch) -> None:
    (here / "d" / "x").mkdir()
    (here / "ladder.yaml").write_text("name: x\ndata:\n  source: d\n")
    expected = locate(RunConfig(), "d").data
    monkeypatch.chdir(here / "d" / "x")
    assert locate(configs.load(StudyConfig, "../../ladder.yaml")).data == expected
    with pytest.raises(UserError, match=r"no corpus '.*/d/x/d'"):  # an override is relative to the working directory
        locate(configs.load(StudyConfig, "../../ladder.yaml", ["data.source=d"]))
    assert configs.load(StudyConfig, "../../ladder.yaml", ["data.source=builtin"]).data.source == "builtin"


@pytest.mark.parametrize("verb", [["ladder", "plan"], ["study", "--dry-run"]])
def test_a_plan_reports_a_missing_source(verb, here: Path, capsys) -> None:
    (here / "ladder.yaml").write_text("name: x\ndata:\n  source: dd\n")
    assert run(VERBS, [*verb, "ladder.yaml"], "") == 2
    error = capsys.readouterr().err
    assert f"no corpus '{here}/dd'" in error and f"Did you mean '{here}/d'?" in error


def test_a_run_goes_on_from_wherever_its_text_is(here: Path, capsys, monkeypatch) -> None:
    def finish(config, shards, folder, **_):
        """A run that is opened and done, without its training."""
        record = open_run(config, shards, folder)
        if record.status == "planned":
            records.write(folder, replace(record, status="done"))
        return records.read(folder)

    monkeypatch.setattr("qies.train.run.train", finish)
    words = ["train", "--size", "50k", "--tokens", "96", "--out", "run", "--json", "train.seq_len=8"]
    words += ["train.batch_size=2", "data.vocab_size=400", "data.val_fraction=0.2"]
    assert run(VERBS, [*words, "--data", "d"], "") == 0
    first = json.loads(capsys.readouterr().out)
    assert first["status"] == "done"
    shutil.move("d", "moved")
    for source in ("moved/", "../" + here.name + "/moved", str(here / "moved")):
        assert run(VERBS, [*words, "--data", source], "") == 0
        assert json.loads(capsys.readouterr().out) == first  # found done
    next(Path("moved").glob("*.txt")).write_text("other text")
    assert run(VERBS, [*words, "--data", "moved"], "") == 2
    assert "holds another run (data.hash: " in capsys.readouterr().err


def test_a_branch_finds_the_text_in_its_trunk(here: Path, capsys, monkeypatch) -> None:
    """The trunk's record names the text without its place; its shards are beside it."""
    words = ["train", "--size", "50k", "--json", "train.seq_len=8", "train.batch_size=2", "train.eval_tokens=32"]
    more = ["train.warmup_tokens=32", "train.branches=[96]", "data.vocab_size=400", "data.val_fraction=0.2"]
    assert run(VERBS, [*words, *more, "--tokens", "192", "--out", "trunk", "--data", "d"], "") == 0
    trunk = json.loads(capsys.readouterr().out)
    assert trunk["config"]["data"]["source"] == "d" and str(here) not in json.dumps(trunk)
    shutil.move("d", "moved")
    short = ["train", "--branch-from", "trunk", "--tokens", "96", "--json"]
    assert run(VERBS, [*short, "--out", "short"], "") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["branch"]["from"] == trunk["config_hash"] and record["data"]["hash"] == trunk["data"]["hash"]
    shutil.move("trunk/data", "shards-of-trunk")
    assert run(VERBS, [*short, "--out", "other"], "") == 2
    assert "trunk does not hold its corpus; give --data, the path of 'd'" in capsys.readouterr().err
    assert not Path("other").exists()


def test_a_study_knows_its_text_again(here: Path, tiny) -> None:
    plain = StudyConfig("x", ("qies",), ("50k",), train=tiny, data=DataConfig("d", 400, 0.2))
    first = grid.claim(locate(plain), here / "out")
    grid.prepare(first, Console(quiet=True))
    shutil.move("d", "moved")
    moved = locate(replace(plain, data=replace(plain.data, source="moved/")))
    claimed = grid.claim(moved, here / "out")
    assert [content_hash(c) for c in claimed.study.runs()] == [content_hash(c) for c in first.study.runs()]
    grid.prepare(claimed, Console(quiet=True))
    assert claimed.data == here / "out" / "data" and (claimed.data / "manifest.json").is_file()
    next(Path("moved").glob("*.txt")).write_text("other text")
    with pytest.raises(UserError, match=r"different study \(data.hash: "):
        grid.claim(locate(moved), here / "out")


@pytest.mark.parametrize("before", ["d", "d/", "absolute"])
def test_a_study_from_before_texts_had_hashes_keeps_the_names_of_its_runs(before: str, here: Path, tiny) -> None:
    source = str(here / "d") if before == "absolute" else before
    old = StudyConfig("x", ("qies",), ("50k",), train=tiny, data=DataConfig(source, 400, 0.2))
    (here / "out").mkdir()
    configs.save(old, here / "out" / "study.yaml")
    claimed = grid.claim(locate(old), here / "out")
    assert [content_hash(c) for c in claimed.study.runs()] == [content_hash(c) for c in old.runs()]


def test_a_run_from_before_texts_had_hashes_goes_on(here: Path, tiny) -> None:
    old = RunConfig("qies", "50k", 4096, data=DataConfig(str(here / "d"), 400, 0.2), train=tiny)
    records.write(here / "run", records.plan(old, 400))
    assert claim(locate(old), here / "run") == records.read(here / "run")
    other = replace(old, data=replace(old.data, source="shards"))
    with pytest.raises(UserError, match=r"data.source: .*/d -> .*/shards"):
        claim(locate(other), here / "run")


def test_shards_know_text_and_tokenizer_by_their_content(here: Path) -> None:
    save_tokenizer(train_tokenizer(["a letter to the king"] * 9, 280), here / "tokenizer")
    cfg = DataConfig("d", val_fraction=0.2)
    manifest = build_shards(cfg, "out", build=Build(tokenizer="tokenizer"))
    shutil.copytree("d", "copy")
    for source, tokenizer in (("d/", "tokenizer/"), (str(here / "copy"), str(here / "tokenizer" / "tokenizer.json"))):
        if tokenizer.endswith(".json"):
            tokenizer = shutil.copytree("tokenizer", "other")
        assert build_shards(replace(cfg, source=source), "out", build=Build(tokenizer=str(tokenizer))) == manifest
    with pytest.raises(UserError, match="tokenizer: tokenizer -> "):
        build_shards(cfg, "out")
    next(Path("copy").glob("*.txt")).write_text("other text")
    with pytest.raises(UserError, match=r"holds other data .*source: d -> copy"):
        build_shards(replace(cfg, source="copy"), "out", build=Build(tokenizer="tokenizer"))

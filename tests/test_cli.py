"""The command line: bad input is one line and exit code 2, before anything is spent or overwritten."""

import json
import os
import subprocess
import sys

import pytest
import torch

from qies import cli, presets
from qies import config as configs
from qies.model import QiesConfig, QiesForCausalLM


def call(*argv: str) -> int:
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    return e.value.code or 0


@pytest.mark.parametrize("verb", ["", *cli.VERBS])
def test_help(verb, capsys):
    assert call(*filter(None, [verb, "--help"])) == 0
    out = capsys.readouterr().out
    assert "usage: qies" in out
    assert not verb or f"qies {verb}" in out.split("For example:")[1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], "Did you mean 'train'"),
        (["train"], "Give --out"),
        (["train", "--out", "OUT", "--threads", "0"], "--threads must be 1 to 1024"),
        (["train", "--out", "OUT", "--seed", "99999999999999999999"], "it must be an integer of 64 bits"),
        (["train", "--out", "OUT", "--branch-from", "absent"], "absent holds no run to branch from"),
        (["train", "--arms", "qies"], "Did you mean '--arm'"),
        (["train", "--tokens", "many", "--out", "OUT"], "tokens"),
        (["train", "--out", "OUT", "--arm", "transfomer"], "Did you mean 'transformer'"),
        (["train", "--out", "OUT", "--size", "100x"], "size"),
        (["train", "--out", "OUT", "--size", "5k"], "size is 5k; it must lie between 20k and 20b"),
        (["train", "--out", "OUT", "--tokens", "1g"], "tokens is '1g'; write a whole number, or one with k, m or b"),
        (["train", "--out", "OUT", "--seed", "1", "seed=2"], "--seed and the override 'seed=2' set the same key"),
        (["train", "--out", "OUT", "seed=1", "seed=2"], "'seed=1' and the override 'seed=2' set the same key"),
        (["train", "--out", "OUT", "tokens=21:20"], "tokens is '21:20'"),
        (["train", "--out", "OUT", "arm="], "has no value; write arm=VALUE"),
        (["study", "--preset", "quick", "--out", "OUT", "sizes=[50k, 50K, 0.05m]"], "a list without repeats"),
        (["study", "lr=3/s.yaml", "--out", "OUT"], "Give one study"),
        (["plan", "--tokens", "many"], "--tokens is 'many'"),
        (["plan", "lr=3/s.yaml"], "Unknown key 'model.lr'"),
        (["data", "build", "builtin", "--out", "OUT", "--limit-tokens", "1x"], "--limit-tokens is '1x'"),
        (["train", "--out", "OUT", "train.seqlen=5"], "Did you mean 'seq_len'"),
        (["train", "--out", "OUT", "model.head_dm=5"], "Did you mean 'head_dim'"),
        (["train", "--out", "OUT", "--config", "absent.yaml"], "No configuration file"),
        (["train", "--out", "OUT", "--data", "absent_corpus"], "absent_corpus"),
        (["study"], "Give one study"),
        (["study", "--preset", "quikc"], "Did you mean 'quick'"),
        (["study", "--preset", "quick", "--out", "OUT", "arms=[qies,qeis]"], "Did you mean 'qies'"),
        (["study", "--preset", "quick", "--out", "OUT", "tokens_per_param=3"], "Did you mean 'tokens_per_parameter'"),
        (["plan", "--size", "3t"], "size"),
        (["plan", "--arm", "qeis"], "Did you mean 'qies'"),
        (["plan", "phase=selectiv"], "selective"),
        (["data", "build", "bultin", "--out", "OUT"], "builtin"),
        (["data", "build", "builtin", "--out", "OUT", "--vocab-size", "3"], "above 256"),
        (["plan", "head_dim=15"], "even"),
        (["plan", "register_heads=2", "register_channels=1"], "register_channels is 1; it must be at least 2"),
        (["plan", "hidden_size=0"], "at least 1"),
        (["plan", "--tokens", "0"], "at least 1"),
        (["plan", "eigenvalues=disc"], "complex"),
        (["plan", "nonsense=1"], "Known"),
        (["train", "--out", "OUT", "train.lr_scale=.inf"], "finite"),
        (["train", "--out", "OUT", "--arm", "gpt2", "train.seq_len=2048"], "beyond the 1024 positions"),
        (["study", "--preset", "quick", "--out", "OUT", "model.eigenvalues=disc"], "complex"),
        (["generate", "absent", "--prompt", "x"], "No model in absent"),
        (["report", "absent"], "absent"),
    ],
)
def test_bad_input_is_one_line_and_two(argv, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*[str(tmp_path / "out") if a == "OUT" else a for a in argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("qies: ")
    assert words in captured.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", [["train"], ["study", "--preset", "quick"]])
def test_a_folder_below_a_file_is_one_line(verb, shard_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        argv = [*verb, "--out", str(out), *(["--data", str(shard_folder)] if verb == ["train"] else [])]
        assert call(*argv) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "precious"


def test_a_folder_with_other_files_is_left_alone(shard_folder, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("precious")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine.pt").write_text("precious")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    assert call("train", "--data", str(shard_folder), "--size", "50k", "--tokens", "8192", "--out", str(tmp_path)) == 2
    assert "no run but other files" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.rglob("*") if p.name != ".lock") == before
    assert (tmp_path / "metrics.jsonl").read_text() == "precious"


def test_overrides_may_stand_anywhere(capsys, tmp_path):
    hashes = []
    for order in (["seeds=[3]", "--preset", "quick", "--dry-run", "sizes=[50k]", "--json"],
                  ["--json", "--dry-run", "--preset", "quick", "seeds=[3]", "sizes=[50k]"]):  # fmt: skip
        assert call("study", *order) == 0
        hashes.append([r["config_hash"] for r in json.loads(capsys.readouterr().out)])
    assert hashes[0] == hashes[1] and len(hashes[0]) == 3


@pytest.mark.parametrize("tokens", ["2m", "2e6", "2_000_000", "2000k"])
def test_tokens_are_written_as_sizes_are(tokens, tmp_path, capsys):
    assert call("plan", "--size", "400k", "--tokens", tokens, "--json") == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 2_000_000
    path = tmp_path / "run.yaml"
    path.write_text(f"tokens: {tokens}\n")
    assert configs.load(configs.RunConfig, path).tokens == 2_000_000


def test_plan_prints_the_contract_as_json(capsys):
    assert call("plan", "--size", "400k", "--tokens", "1000", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["params"]["total"] == plan["params"]["non_embedding"] + 2 * 4096 * plan["shape"]["hidden_size"]
    assert plan["flops"] == plan["flops_per_token"] * 1000
    assert plan["memory"]["weights"] == 4 * plan["params"]["total"]


@pytest.mark.parametrize("arm", presets.ARMS)
@pytest.mark.parametrize("size", ["50k", "10b"])
def test_plan_counts_what_would_be_built(arm, size, capsys):
    assert call("plan", "--arm", arm, "--size", size, "--json") == 0
    told = json.loads(capsys.readouterr().out)["params"]
    with torch.device("meta"):
        model = QiesForCausalLM(QiesConfig(**presets.settings(arm, size, 4096)))
    assert told["total"] == sum(p.numel() for p in model.parameters())
    assert sum(n for group, n in told.items() if group not in ("non_embedding", "total")) == told["total"]
    assert abs(told["non_embedding"] - presets.parse_size(size)) <= 0.01 * presets.parse_size(size)


def test_dry_run_plans_every_run_and_spends_nothing(capsys, tmp_path):
    assert call("study", "--preset", "quick", "--dry-run", "--json", "--out", str(tmp_path / "out")) == 0
    records = json.loads(capsys.readouterr().out)
    assert {r["status"] for r in records} == {"planned"} and len({r["config_hash"] for r in records}) == len(records)
    for size in {r["size"] for r in records}:
        assert len({r["tokens"] for r in records if r["size"] == size}) == 1
    assert not (tmp_path / "out").exists()


def test_data_build_writes_shards_and_refuses_other_settings(text_folder, tmp_path, capsys):
    out = str(tmp_path / "d")
    build = ["data", "build", str(text_folder), "--out", out, "--val-fraction", "0.2", "--vocab-size"]
    assert call(*build, "300", "--json") == 0
    assert json.loads(capsys.readouterr().out)["vocab_size"] == 300
    assert call(*build, "301") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_train_then_generate(shard_folder, tmp_path, capsys):
    out = str(tmp_path / "run")
    small = ["train.seq_len=16", "train.batch_size=2", "train.eval_tokens=64"]
    train = ["train", "--arm", "no_phase", "--size", "50k", "--tokens", "96", "--data", str(shard_folder), "--out", out]
    assert call(*train, *small, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["status"] == "done" and record["params"]["embedding"] == 400 * 32
    assert call(*train, *small, "--no-resume") == 2
    assert call(*train, "train.seq_len=8", *small[1:]) == 2  # another run's settings in the same folder
    assert "train.seq_len: 16 -> 8" in capsys.readouterr().err
    texts = []
    for how in ("greedy", "sample", "sample"):
        arguments = ["generate", out, "--prompt", "Ada", "--decoding", how, "--max-new-tokens", "5", "--json"]
        assert call(*arguments) == 0
        texts.append(json.loads(capsys.readouterr().out)["continuation"])
    assert texts[1] == texts[2]
    assert call("generate", out, "--prompt", "Ada", "--decoding", "gredy") == 2
    assert "Did you mean 'greedy'" in capsys.readouterr().err


def test_an_internal_failure_is_one(monkeypatch, capsys):
    def broken() -> None:
        """Fails."""
        raise ZeroDivisionError("by design")

    monkeypatch.setitem(cli.VERBS, "report", broken)
    assert call("report") == 1
    assert "internal failure: by design" in capsys.readouterr().err


def test_python_m_qies_is_the_same_program():
    run = subprocess.run([sys.executable, "-m", "qies", "nonsense"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("qies: Unknown verb")


@pytest.mark.parametrize("words", [["plan"], ["plan", "--json"]])
def test_a_reader_that_leaves_ends_the_verb_in_silence(words):
    """As below `head`: nobody reads the pipe by the time that the verb prints."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "qies", *words], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == ""


def test_of_several_processes_the_first_says_what_is_wrong(capsys, monkeypatch):
    for rank, said in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert call("train", "--out", "x", "--arm", "qeis") == 2
        assert ("qeis" in capsys.readouterr().err) is said

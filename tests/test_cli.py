"""The command line: bad input is one line and exit code 2, before anything is spent or overwritten."""

import io
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import qies
from qies import cli, presets
from qies import config as configs
from qies.model import QiesConfig, QiesForCausalLM
from qies.terminal import Group, run

QUICK = Path(__file__).parent.parent / "results" / "reference" / "small"


def call(*argv: str) -> int:
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    return e.value.code or 0


VERBS = [
    word
    for name, verb in cli.VERBS.items()
    for word in (name, *([f"{name} {below}" for below in verb.verbs] if isinstance(verb, Group) else []))
]


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help(verb, capsys):
    assert call(*verb.split(), "--help") == 0
    out = capsys.readouterr().out
    assert f"usage: qies {verb}".rstrip() in out
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
        (["plan", "lr=3/s.yaml"], "Unknown key 'lr' in model"),
        (["data", "build", "builtin", "--out", "OUT", "--limit-tokens", "1x"], "--limit-tokens is '1x'"),
        (["train", "--out", "OUT", "train.seqlen=5"], "Did you mean 'seq_len'"),
        (["train", "--out", "OUT", "model.head_dm=5"], "Did you mean 'head_dim'"),
        (["train", "--out", "OUT", "--config", "absent.yaml"], "No configuration file"),
        (["train", "--out", "OUT", "--data", "absent_corpus"], "absent_corpus"),
        (["study"], "Give one study"),
        (["study", "--preset", "quikc"], "Did you mean 'quick'"),
        (["study", "--preset", "quick", "--out", "OUT", "arms=[qies,qeis]"], "Did you mean 'qies'"),
        (["study", "--preset", "quick", "--out", "OUT", "tokens_per_param=3"], "Did you mean 'tokens_per_parameter'"),
        (["study", "--preset", "quick", "--out", "OUT", "analyses=[builtin, los]"], "Did you mean 'loss'"),
        (["study", "--preset", "quick", "--out", "OUT", "analyses=[json]"], "json is not an analysis"),
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
        (["plan", "size=100k"], "set by --size"),
        (["plan", "arm=qies"], "set by --arm"),
        (["plan", "vocab_size=10"], "--vocab-size"),
        (["plan", "intermediate_size=-4"], "intermediate_size is -4; it must be at least 1"),
        (["plan", "logit_softcap=-1"], "0 (off) or a positive number"),
        (["plan", "logit_softcap=.nan"], "0 (off) or a positive number"),
        (["train", "--out", "OUT", "model.vocab_size=5"], "data.vocab_size"),
        (["train", "--out", "OUT", "model.vocab_size="], "has no value"),
        (["train", "--out", "OUT", "arm="], "has no value"),
        (["study", "--preset", "quick", "--out", "OUT", "model.vocab_size=5"], "data.vocab_size"),
        (["study", "--preset", "quick", "--out", "OUT", "variants=[{model.vocab_size: 5}]"], "data.vocab_size"),
        (["--verson"], "Did you mean '--version'"),
        (["fit"], "qies fit needs RUNS"),
        (["data"], "qies data needs a verb: build, contamination"),
        (["data", "biuld", "builtin"], "Did you mean 'build'"),
        (["data", "build"], "qies data build needs SOURCE and --out"),
        (["generate", "run", "--promt", "x"], "Unknown option '--promt'. Did you mean '--prompt'"),
        (["train", "--out", "OUT", "--no-resum"], "Unknown option '--no-resum'"),
        (["generate", "run"], "qies generate needs --prompt"),
        (["compare", "runs.csv", "--arms", "a"], "--arms needs 2 values"),
        (["bench", "op", "--rounds", "1.5"], "--rounds is '1.5'; it must be an integer"),
        (["bench", "op", "--markdown", "faults.md"], "Unknown option '--markdown'"),
        (["fit", "runs.csv", "--floor", "low"], "--floor is 'low'; it must be 'free' or a number"),
        (["fit", "runs.csv", "--criterion", "lgo"], "Did you mean 'log'"),
        (["report", "a", "b"], "Unexpected argument 'b'"),
        (["fit", "QUICK", "--arm", "qies", "--form", "power", "--flops", "0ND"], "give 6ND"),
        (["train", "--out", "OUT", "train.lr_scale=.inf"], "finite"),
        (["train", "--out", "OUT", "--arm", "gpt2", "train.seq_len=2048"], "beyond the 1024 positions"),
        (["study", "--preset", "quick", "--out", "OUT", "model.eigenvalues=disc"], "complex"),
        (["generate", "absent", "--prompt", "x"], "No model in absent"),
        (["report", "absent"], "absent"),
    ],
)
def test_bad_input_is_one_line_and_two(argv, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*[{"OUT": str(tmp_path / "out"), "QUICK": str(QUICK)}.get(a, a) for a in argv]) == 2
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
    assert hashes[0] == hashes[1] and len(hashes[0]) == 2


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
    done = subprocess.run([sys.executable, "-m", "qies", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("qies: Unknown verb")


@pytest.mark.parametrize("words", [["plan"], ["plan", "--json"]])
def test_a_reader_that_leaves_ends_the_verb_in_silence(words):
    """As below `head`: nobody reads the pipe by the time that the verb prints."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "qies", *words], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == ""


def test_of_several_processes_the_first_says_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert run(cli.VERBS, ["train", "--out", "x", "--arm", "qeis"], "") == 2
        assert ("qeis" in capsys.readouterr().err) is said


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_alone_it_lists_the_verbs_with_a_line_each(argv, capsys):
    assert call(*argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(cli.VERBS)
    assert all(line.rstrip().endswith(".") for line in lines if line.startswith("  "))
    assert len(lines) < 24


def test_version(capsys):
    assert call("--version") == 0
    assert capsys.readouterr().out == f"qies {qies.__version__}\n"


@pytest.fixture(scope="module")
def short_memory(shard_folder, tmp_path_factory):
    """A saved model that has learned 16 positions."""
    from qies.data.shards import open_shards

    folder = tmp_path_factory.mktemp("gpt2") / "model"
    tokenizer = open_shards(shard_folder).tokenizer()
    values = presets.settings("gpt2", "50k", 400, max_position_embeddings=16)
    QiesForCausalLM(QiesConfig(**values, eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_terminal_without_unicode_gets_escapes(short_memory, monkeypatch):
    """Standard output as PYTHONIOENCODING=ascii makes it."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    assert call("generate", str(short_memory), "--prompt", "\u00dcn \u6f22", "--max-new-tokens", "2") == 0
    assert stream.buffer.getvalue().startswith(rb"\xdcn \u6f22")
    assert call("study", "--preset", "quick", "--dry-run") == 0
    assert b"transformer" in stream.buffer.getvalue()


def test_text_beyond_the_learned_positions_is_refused_before_it_is_made(short_memory, capsys):
    generate = ["generate", str(short_memory), "--prompt", "A", "--json", "--max-new-tokens"]
    assert call(*generate, "15") == 2
    assert "16 positions, and the prompt takes 2; lower max_new_tokens from 15 to 14" in capsys.readouterr().err
    assert call(*generate, "14") == 0
    assert call("generate", str(short_memory), "--prompt", "A b c d e f g h i j k l m n o p q r s t u v w x") == 2
    assert "shorten the prompt" in capsys.readouterr().err


@pytest.mark.parametrize("temperature", ["0", "nan", "inf", "1e-320"])
def test_temperatures_that_no_softmax_holds_are_refused(temperature, short_memory, capsys):
    argv = ["generate", str(short_memory), "--prompt", "A", "--decoding", "sample", "--max-new-tokens", "1"]
    assert call(*argv, "--temperature", temperature) == 2
    assert "at least 1e-6" in capsys.readouterr().err
    assert call(*argv, "--temperature", "1e-6") == 0


def verbs_that_write(place: Path) -> dict[str, list[str]]:
    fit = ["fit", str(QUICK), "--arm", "qies", "--form", "power"]
    compare = ["compare", str(QUICK), "--arms", "qies", "transformer"]
    return {
        "fit --json": [*fit, "--json", str(place / "out.json")],
        "fit --figures": [*fit, "--figures", str(place / "figures")],
        "compare --json": [*compare, "--json", str(place / "out.json")],
        "compare --figures": [*compare, "--figures", str(place / "figures")],
        "report --svg": ["report", str(QUICK), "--svg", str(place / "out.svg")],
        "bench --out": ["bench", "op", "--out", str(place / "out.json")],
        "train": ["train", "--out", str(place / "run"), "--size", "50k", "--tokens", "8192"],
        "study": ["study", "--preset", "quick", "--out", str(place / "study")],
    }


@pytest.mark.parametrize("verb", verbs_that_write(Path()))
def test_a_place_that_cannot_be_written_is_refused_before_work(verb, shard_folder, tmp_path, capsys, monkeypatch):
    """A folder without the permission; for root, whom permissions do not stop, one of the kernel's."""
    place = tmp_path / "locked"
    place.mkdir(mode=0o555)
    if os.access(place, os.W_OK):
        place = Path("/proc")
    argv = verbs_that_write(place)[verb]
    monkeypatch.setattr("qies.bench.baselines.run", lambda *_: pytest.fail("worked before it asked"))
    assert call(*argv, *(["--data", str(shard_folder)] if verb == "train" else [])) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and str(place) in captured.err and captured.out == ""


@pytest.mark.parametrize("verb", ["fit --json", "fit --figures", "compare --json", "report", "report --svg"])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(verb, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python does not notice a module's file that was cut short
    shutil.copytree(QUICK, tmp_path / "quick")
    (tmp_path / "figures").mkdir()
    argv = {**verbs_that_write(tmp_path), "report": ["report", str(tmp_path / "quick")]}[verb]
    before = {
        "out.json": tmp_path / "out.json",
        "out.svg": tmp_path / "out.svg",
        "page": tmp_path / "quick/report.html",
    }
    for path in before.values():
        path.write_text("precious")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        code = run(cli.VERBS, argv, "")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    captured = capsys.readouterr()
    assert code == 1 and captured.err.count("\n") == 1 and "File too large; free space" in captured.err
    assert all(path.read_text() == "precious" for path in before.values())
    assert not [p for p in tmp_path.rglob(".*")]


def test_what_is_no_regular_file_is_written_to_and_not_replaced(tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / "target")
    received = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    holder = os.open(pipe, os.O_RDWR)  # so that the reader does not end between the question and the answer
    argv = ["fit", str(QUICK), "--arm", "qies", "--form", "power", "--bootstrap", "0", "--json"]
    assert call(*argv, str(pipe)) == 0 and call(*argv, str(link)) == 0
    os.close(holder)
    reader.join()
    assert stat.S_ISFIFO(pipe.stat().st_mode) and link.is_symlink()
    assert json.loads(received[0]) == json.loads((tmp_path / "target").read_text())


def interrupted(argv: list[str], ready, seconds: float = 120.0) -> tuple[int, str]:
    """Exit code and stderr of the verb after Ctrl-C, which reaches every process of the terminal's group."""
    process = subprocess.Popen(
        [sys.executable, "-m", "qies", *argv],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # nohup and `&` make children ignore it
    )  # fmt: skip
    deadline = time.monotonic() + seconds
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=seconds)
    return process.returncode, err


TINY_STUDY = """\
name: tiny
arms: [qies]
sizes: [50k]
seeds: [0, 1]
tokens_per_parameter: 1
data: {source: texts, vocab_size: 400, val_fraction: 0.2}
train: {seq_len: 32, batch_size: 4, eval_tokens: 512}
"""


def long_verbs(folder: Path, shards: Path) -> dict[str, tuple[list[str], str]]:
    """Each with the file that shows that it is at work."""
    study, out = str(folder / "tiny.yaml"), folder / "out"
    return {
        "train": (["train", "--data", str(shards), "--out", str(out), "train.seq_len=32"], "out/metrics.jsonl"),
        "study": (["study", study, "--out", str(out)], "out/runs/*/metrics.jsonl"),
        "study, as a run starts": (["study", study, "--out", str(out)], "out/runs/*/attempts/*.log"),
        "ladder run": (["ladder", "run", study, "--out", str(out)], "out/runs/*/metrics.jsonl"),
        "data build": (["data", "build", "builtin", "--out", str(out)], "out/.building"),
        "data build, 2 workers": (["data", "build", "builtin", "--out", str(out), "--workers", "2"], "out/tokenizer"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("verb", long_verbs(Path(), Path()))
def test_ctrl_c_is_one_line_and_the_same_command_goes_on(verb, text_folder, shard_folder, tmp_path):
    shutil.copytree(text_folder, tmp_path / "texts")
    (tmp_path / "tiny.yaml").write_text(TINY_STUDY)
    argv, sign = long_verbs(tmp_path, shard_folder)[verb]
    code, err = interrupted(argv, lambda: any(tmp_path.glob(sign)))
    lines = [line for line in err.splitlines() if line.startswith("qies: ")]
    assert code == 130 and len(lines) == 1 and "same command again" in lines[0] and "Traceback" not in err
    if verb != "train":  # a million tokens
        again = subprocess.run([sys.executable, "-m", "qies", *argv], capture_output=True, text=True)
        assert again.returncode == 0, again.stderr


def test_ctrl_c_while_it_waits_is_one_line(tmp_path):
    (tmp_path / "study.yaml").write_text(TINY_STUDY)
    started = time.monotonic()
    code, err = interrupted(
        ["ladder", "status", "--watch", "--out", str(tmp_path)], lambda: time.monotonic() > started + 1
    )
    assert code == 130 and err == "qies: interrupted; run the same command again.\n"

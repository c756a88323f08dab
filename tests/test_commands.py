"""Every command in README.md and docs/ runs as it stands there, up to the sizes and places that `TABLE` replaces.

Commands that need a network, a cluster or files that are not in this repository are parsed and not run.
"""

import functools
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import yaml

from ladder_workers import quick
from qies import cli, ladder
from qies.config import StudyConfig, from_dict
from qies.errors import UserError
from qies.terminal import Group, _dispatch

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TINY = "train.seq_len=16 train.batch_size=2 train.eval_tokens=64"
TEXTS = "data.source=my_texts data.vocab_size=400 data.val_fraction=0.2"


@dataclass(frozen=True)
class How:
    """How a command is run: `replace` in its text, `more` after it; only in the slow suite; or not, for a reason."""

    replace: dict[str, str] = field(default_factory=dict)
    more: str = ""
    slow: bool = False
    only_parsed: str = ""


TRAIN = How({"--size 100k": "--size 50k", "--tokens 1000000": "--tokens 256"}, f"{TINY} {TEXTS}")
SHRUNK = "sizes=[50k] tokens_per_parameter=0.02 train.batch_size=2"
NETWORK, FILE = How(only_parsed="downloads packages"), How(only_parsed="the table is not in this repository")
CLUSTER = How(only_parsed="needs a cluster")
BENCH = {"results/reference/bench/": ""}
TABLE = {
    "qies study --preset quick --dry-run": How(),
    "qies data build my_texts/ --out data/mine": How(more="--vocab-size 400"),
    "qies train --arm qies --size 100k --tokens 1000000 --out runs/first": TRAIN,
    'qies generate runs/first --prompt "The people of the United States" --decoding sample': How(
        more="--max-new-tokens 4"
    ),
    "qies compare results/reference/small --arms qies transformer": How(),
    "qies fit results/reference/small --arm qies --form power": How(more="--bootstrap 0"),
    "qies plan --size 10b --gpus 64 --seq-len 4096": How(),
    "qies compare results/reference/small --arms qies no_phase --json gains.json": How(),
    'qies fit runs.csv --columns "params=N (M)*1e6" "tokens=D (B)*1e9" flops=PF-days*8.64e19 "loss=Val Loss"': How(),
    "qies data build registry:pip --out data/registry": NETWORK,
    "qies data build registry:pip,npm --out data/registry": NETWORK,
    "qies data build registry --out data/registry": NETWORK,
    "qies data build registry-dedup --out data/dedup": NETWORK,
    "qies data build SOURCE --out DIR": How({"SOURCE": "my_texts", "DIR": "built"}, "--vocab-size 400"),
    "qies study my.yaml --out results/mine seeds=[3,4]": How(more="--dry-run"),
    "qies probe --preset quick": How(more="--dry-run"),
    "qies probe tasks=[s3,a5] arms=[qies,complex,transformer] seeds=[0,1,2,3,4] --out results/state-tracking": How(
        more="--dry-run"
    ),
    "qies probe --plugin published_mixers tasks=[s3] arms=[qies,delta_product,diagonal_phase]": How(more="--dry-run"),
    "qies train --arm qies --size 100k --data builtin-stories --out runs/stories": How(
        {"--size 100k --data builtin-stories": "--size 50k --tokens 256"}, f"{TINY} {TEXTS}"
    ),
    "qies probe --model runs/stories": How(slow=True),
    "qies probe --model runs/first": How(slow=True),
    "qies ladder plan ladder.yaml": How(),
    "qies ladder run ladder.yaml --out ladders/first": How(),
    "qies ladder status --out ladders/first --watch": How(),
    "qies ladder run ladder.yaml --out /shared/first --submit slurm --jobs 4 --gpus 1 --minutes 240 "
    '--sbatch "partition=gpu"': CLUSTER,
    "qies ladder status --out /shared/first --watch": CLUSTER,
    "qies ladder run sweep.yaml --out ladders/sweep": How(more=f"{SHRUNK} {TEXTS}"),
    "qies ladder sweep --out ladders/sweep": How(),
    "qies fit gemstones_hot.jsonl --form approach3 --delta 1e-3 --bootstrap 400 --leave-largest 1 --beside gadre "
    "approach3-gamma --columns params=params_active_precise,loss=final_loss,name=run_name,run=run_name": FILE,
    "qies fit five.csv --form gadre --columns params=N,tokens=D,loss=loss_c4_val --predict 1439795200,921468928000 "
    "6889410560,137788211200": FILE,
    "qies fit six.csv --form gadre --columns params=N,tokens=D,loss=loss_c4_val --leave-largest 1": FILE,
    "qies fit chinchilla.csv --form approach3 --delta 1e-3 --drop-worst 5 --bootstrap 400 "
    '--columns "params=Model Size,flops=Training FLOP"': FILE,
    "qies train --size 100k --tokens 1000000 --out runs/first": TRAIN,
    "torchrun --nproc-per-node 2 -m qies train --size 100k --tokens 1000000 --out runs/two": How(
        TRAIN.replace, TRAIN.more, slow=True
    ),
    "torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m qies train --size 1b "
    "--data data/c4 --out /shared/runs/1b train.batch_size=512 train.accumulate=4 train.recompute=true": CLUSTER,
    "qies train --tokens 4000000 --out runs/long train.warmup_tokens=40000 'train.branches=[1000000,2000000]'": How(
        {"--tokens 4000000": "--size 50k --tokens 640", "40000": "64", "1000000,2000000": "160,320"}, f"{TINY} {TEXTS}"
    ),
    "qies train --branch-from runs/long --tokens 1000000 --out runs/short": How({"1000000": "160"}),
    "qies plan --plugin gated_recurrence --arm gated --size 100k": How(),
    "qies train --plugin gated_recurrence --arm gated --size 100k --tokens 1000000 --out runs/gated": TRAIN,
    'qies generate runs/gated --prompt "The people of the United States"': How(more="--max-new-tokens 4"),
    "qies plan --arm qies --size 400k --json": How(),
    "qies bench decode --clock cpu --out results/reference/bench/decode.json": How(BENCH, "--rounds 1 --cases 100k:8"),
    "qies bench prefill --clock cpu --cases 400k:2048 400k:16384 --out results/reference/bench/prefill.json": How(
        BENCH | {"400k:2048 400k:16384": "100k:8"}, "--rounds 1"
    ),
    "qies bench train --clock cpu --rounds 3 --cases 400k:512 400k:2048 --out results/reference/bench/train.json": How(
        BENCH | {"400k:512 400k:2048": "100k:8", "--rounds 3": "--rounds 1"}, slow=True
    ),
    "qies bench decode --cases 40k:32768 48k:32768 60k:32768 --out results/quick/bench/decode.json": How(
        {"results/quick/bench/": "", "40k:32768 48k:32768 60k:32768": "100k:8"}, "--rounds 1"
    ),
    "qies train --size 100k --tokens 1000000 --out runs/far objective.far_future=0.1 objective.entropy_floor=0.1": How(
        TRAIN.replace, f"{TINY} {TEXTS} objective.far_future_gap=2 objective.far_future_window=8"
    ),
    'qies generate runs/first --prompt "The people of the United States" --max-new-tokens 32': How({" 32": " 2"}),
    'qies generate runs/first --prompt "And it came to pass" "The king" --decoding sample --top-p 0.9 --seed 3 '
    '--stop "." --json': How(more="--max-new-tokens 2"),
    "qies bench decodings --cases 100k:64 --rounds 3": How(
        {"100k:64": "50k:4", "--rounds 3": "--rounds 1"}, "--new-tokens 3"
    ),
    "qies generate runs/first --prompt-file article.txt --save-state article.state": How(),
    'qies generate runs/first --load-state article.state --prompt " In short," " The author" --json': How(
        more="--max-new-tokens 2"
    ),
    "qies generate runs/first --decoding entangled --prompt-file examples/prompts/summarize.txt "
    "examples/prompts/summarize_long_range.txt": How(more="--max-new-tokens 2"),
    "make study": How(),
    "make test": How(),
}
MAKE = shutil.which("make")


def commands(document: Path) -> list[str]:
    """The commands of the fenced and indented blocks, without comments and with continued lines joined."""
    found, fenced, lines = [], False, iter(document.read_text().splitlines())
    for line in lines:
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            command = line.strip()
            while command.endswith("\\"):
                command = f"{command[:-1].rstrip()} {next(lines).strip()}"
            command = re.split(r"\s+# ", command)[0].strip()
            if re.match(r"(qies|make|torchrun)\s", command):
                found.append(command)
    return found


def test_the_table_has_the_documents_commands_and_no_others():
    documented = {command for document in DOCUMENTS for command in commands(document)}
    assert documented - set(TABLE) == set() and set(TABLE) - documented == set()


def parsed(argv: list[str]) -> Callable[[], None]:
    """The call that a command line stands for. Raises UserError where it is none."""
    calls = []
    _dispatch(_recording(cli.VERBS, calls), argv, "")
    [call] = calls
    return call


def _recording(verb, calls):
    """The verb or the verbs, but each appends its call to `calls`."""
    if isinstance(verb, dict):
        return {name: _recording(below, calls) for name, below in verb.items()}
    if isinstance(verb, Group):
        return Group(verb.help, _recording(verb.verbs, calls))

    @functools.wraps(verb)
    def record(*args, **kwargs):
        calls.append(lambda: verb(*args, **kwargs))

    return record


def _functions(verbs, before=()):
    """Every verb's words and function."""
    for name, verb in verbs.items():
        if isinstance(verb, Group):
            yield from _functions(verb.verbs, (*before, name))
        else:
            yield (*before, name), verb


@pytest.mark.parametrize(("words", "verb"), _functions(cli.VERBS))
def test_the_examples_of_the_help_are_command_lines_of_the_verb(words, verb):
    examples = re.findall(r"^\s+((?:qies|torchrun) .*)$", verb.__doc__.split("For example:")[1], re.MULTILINE)
    assert examples
    for example in examples:
        argv = shlex.split(example.partition("-m qies ")[2] or example.removeprefix("qies "))
        assert tuple(argv[: len(words)]) == words
        parsed(argv)


def test_a_command_line_that_is_none_is_found():
    with pytest.raises(UserError, match="Unknown option '--arms'"):
        parsed(["train", "--arms", "qies"])


@pytest.fixture
def workspace(text_folder, tmp_path, monkeypatch, forget_plugins):
    """A working folder with the files that the documents speak of."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(text_folder, "my_texts")
    for name in ("gated_recurrence", "published_mixers"):
        shutil.copy(ROOT / "examples" / f"{name}.py", ".")
    shutil.copytree(ROOT / "examples" / "prompts", "examples/prompts")
    Path("article.txt").write_text("The king sent a letter to the queen.\n")
    Path("results").mkdir()
    Path("results/reference").symlink_to(ROOT / "results" / "reference")
    rng = np.random.default_rng(0)
    grid = [(n, d) for n in (1e8, 3e8, 1e9, 3e9) for d in (2e9, 1e10, 5e10)]
    rows = ["params,tokens,loss,N (M),D (B),PF-days,Val Loss"]
    for n, d in grid:
        loss = (1.7 + 400 * n**-0.34 + 410 * d**-0.28) * (1 + 1e-3 * rng.normal())
        rows.append(f"{n},{d},{loss},{n / 1e6},{d / 1e9},{6 * n * d / 8.64e19},{loss}")
    Path("runs.csv").write_text("\n".join(rows) + "\n")
    data = {"source": "my_texts", "vocab_size": 400, "val_fraction": 0.2}
    train = {"seq_len": 32, "batch_size": 4, "eval_tokens": 512}
    small = {"name": "small", "arms": ["qies"], "sizes": ["50k"], "tokens_per_parameter": 0.02}
    Path("ladder.yaml").write_text(yaml.safe_dump(small | {"data": data, "train": train}))
    mine, sweep = yaml_blocks(ROOT / "docs" / "study.md")
    Path("my.yaml").write_text(yaml.safe_dump(mine))
    Path("sweep.yaml").write_text(yaml.safe_dump(sweep))
    return tmp_path


def yaml_blocks(document: Path) -> list[dict]:
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", document.read_text(), re.DOTALL)]


def test_the_study_files_of_the_documents_are_valid(monkeypatch, forget_plugins):
    monkeypatch.syspath_prepend(ROOT / "examples")
    blocks = [block for document in DOCUMENTS for block in yaml_blocks(document)]
    assert len(blocks) == 4
    for block in blocks:
        assert from_dict(StudyConfig, block).runs()


def carry_out(command: str, how: How) -> None:
    """Run the command, or parse it; fails unless it ends with 0."""
    for old, new in how.replace.items():
        assert old in command, f"{command}: nothing to replace for {old!r}"
        command = command.replace(old, new)
    program, *words = shlex.split(f"{command} {how.more}")
    if program == "make":  # what it would do; nothing is installed
        if MAKE is not None:
            subprocess.run([MAKE, "--dry-run", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    elif how.only_parsed:
        parsed(words[words.index("qies") + 1 :] if program == "torchrun" else words)
    elif program == "torchrun":
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", *words], check=True)
    else:
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        assert end.value.code in (0, None), command


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_small_commands_run(document, workspace, monkeypatch):
    """In their order, in one working folder; the runs of ladders by stand-ins that train nothing."""
    monkeypatch.setitem(ladder.execute.__kwdefaults__, "command", quick(workspace))
    for command in commands(document):
        if not TABLE[command].slow:
            carry_out(command, TABLE[command])


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_runs(document, workspace):
    for command in commands(document):
        carry_out(command, TABLE[command])

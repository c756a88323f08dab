"""The command line: `qies VERB`. Each verb is one call into the package; bad input is one line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from tyro.conf import Positional

from qies.errors import UserError
from qies.terminal import run, show, training_bar

Overrides = Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="[KEY=VALUE ...]")]


def study(
    overrides: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="[STUDY.yaml] [KEY=VALUE ...]")] = (),
    /,
    preset: str | None = None,
    out: Path | None = None,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """The main job: plan every run, train, evaluate, fit, analyse, write report.html.

    Finished runs are not done again; a killed study goes on where it stopped.

    For example:

        qies study --preset quick
        qies study --preset quick --dry-run
        qies study my.yaml --out results/mine seeds=[0,1,2] train.seq_len=256

    Args:
        overrides: A study file, and dotted overrides of its keys.
        preset: A study that comes with the package: quick.
        out: Where results go; by default results/NAME.
        dry_run: Print every run with parameters, FLOPs, tokens and estimated time, and stop.
        json: Print the run records (or with --dry-run the planned ones) as JSON.
    """
    from qies import config, ladder, runs
    from qies import study as studies

    files = [w for w in overrides if "=" not in w]
    changes = [w for w in overrides if "=" in w]
    if len(files) + (preset is not None) != 1:
        raise UserError("Give one study: a STUDY.yaml or --preset quick.")
    if preset is not None:
        chosen = studies.preset(preset, tuple(changes))
    else:
        chosen = config.load(config.StudyConfig, files[0], changes)
    chosen = config.replace_data(chosen, chosen.data.source)
    folder = out or Path("results") / chosen.name
    console = Console(stderr=json)
    if dry_run:
        records = [runs.plan(c, chosen.data.vocab_size) for c in chosen.runs()]
        show(json, records, lambda: console.print(studies.plan_table(chosen)))
        workers = chosen.workers or ladder.cores()
        total = studies.estimate(chosen)
        console.print(f"about {studies.clock(sum(total) / workers)} on {workers} cores; nothing was run.")
        return
    studies.claim(chosen, folder)
    if not json:
        console.print(studies.plan_table(chosen))
    records = studies.run_study(chosen, folder, console)
    from qies.report.page import build_report

    page = build_report(folder)
    show(json, records, lambda: console.print(studies.result_table(chosen, records)))
    console.print(f"report: {page}")
    failed = [r for r in records if r["status"] == "failed"]
    if failed:
        where = ", ".join(str(folder / "runs" / r["config_hash"] / "error.log") for r in failed)
        raise RuntimeError(f"{len(failed)} runs failed; see {where}")


def plan(
    overrides: Overrides = (),
    /,
    arm: str = "qies",
    size: str = "100k",
    tokens: int | None = None,
    vocab_size: int = 4096,
    seq_len: int = 512,
    json: bool = False,
) -> None:
    """What an arm and size would cost: parameters by group, FLOPs, memory, state bytes. Nothing is built.

    For example:

        qies plan --arm qies --size 400k
        qies plan --arm transformer --size 10b --tokens 200000000000 --seq-len 4096
        qies plan --size 400k head_dim=64

    Args:
        overrides: Model fields to replace.
        arm: qies, transformer, gpt2, no_phase, fixed_phase or complex.
        size: Non-embedding parameters, from 20k to 20b.
        tokens: Training tokens; by default 20 a parameter.
        vocab_size: Tokens in the vocabulary.
        seq_len: Length of the training windows.
        json: Print JSON.
    """
    from qies import config, presets
    from qies.efficiency.plan import plan_model, plan_text

    for name, number in (("tokens", tokens or 1), ("vocab-size", vocab_size), ("seq-len", seq_len)):
        if number < 1 or tokens == 0:
            raise UserError(f"--{name} must be at least 1.")
    values = presets.settings(arm, size, vocab_size, **config.merge({}, overrides))
    result = plan_model(values, arm, size, tokens, seq_len)
    show(json, result, lambda: Console().print(plan_text(result)))


def data(
    action: Positional[Literal["build"]],
    source: Positional[str],
    /,
    out: Path,
    vocab_size: int = 4096,
    val_fraction: float = 0.03,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Corpus to token shards: documents split by document, de-duplicated, tokenised, hashed.

    For example:

        qies data build builtin --out data/builtin
        qies data build my_texts/ --out data/mine --vocab-size 8192

    Args:
        action: build.
        source: "builtin", or a text file, a folder or a glob.
        out: The folder of shards to write.
        vocab_size: Size of the byte-level BPE vocabulary to train.
        val_fraction: Share of the documents held out.
        seed: Which documents are held out.
        json: Print the manifest.
    """
    from qies.config import DataConfig, to_dict
    from qies.data.shards import build_shards

    manifest = build_shards(DataConfig(source, vocab_size, val_fraction, seed), out)
    show(json, to_dict(manifest), lambda: _print_manifest(manifest, out))


def train(
    overrides: Overrides = (),
    /,
    out: Path | None = None,
    config: Path | None = None,
    arm: str | None = None,
    size: str | None = None,
    data: str | None = None,
    tokens: int | None = None,
    seed: int | None = None,
    threads: int | None = None,
    resume: bool = True,
    json: bool = False,
) -> None:
    """Train one run. The same command again resumes it, or finds it done.

    For example:

        qies train --arm qies --size 100k --tokens 1000000 --out runs/first
        qies train --arm transformer --size 100k --data my_texts/ --out runs/mine train.batch_size=4
        qies train --config run.yaml --out runs/second model.conv_size=0

    Args:
        overrides: Dotted keys of the run's configuration.
        out: The run's folder (required).
        config: A YAML file of a run; the other options replace its values.
        arm: qies, transformer, gpt2, no_phase, fixed_phase or complex.
        size: Non-embedding parameters, such as 100k.
        data: "builtin", a text file, folder or glob, or a folder that `qies data build` wrote.
        tokens: Training tokens.
        seed: Of the initial weights and the data order.
        threads: Processor threads; by default one.
        resume: Whether to go on in a folder that holds this run; --no-resume refuses.
        json: Print the run record.
    """
    import torch

    from qies import config as configs
    from qies import runs
    from qies.data.shards import build_shards, open_shards
    from qies.train.loop import check_data, claim
    from qies.train.loop import train as train_run

    if out is None:
        raise UserError("Give --out DIR, the folder of this run.")
    named = {"arm": arm, "size": size, "tokens": tokens, "seed": seed}
    flags = [f"{k}={v}" for k, v in named.items() if v is not None]
    if config is not None:
        chosen = configs.load(configs.RunConfig, config, [*flags, *overrides])
    else:
        chosen = configs.from_dict(configs.RunConfig, configs.merge({}, [*flags, *overrides]))
    chosen = configs.replace_data(chosen, data or chosen.data.source)
    if not resume and runs.read(out) is not None:
        raise UserError(f"{out} holds a run already; leave --no-resume out or give another --out.")
    built = Path(chosen.data.source)
    runs.plan(chosen, chosen.data.vocab_size)
    claim(chosen, out)
    if not (built / "manifest.json").is_file():
        built = out / "data"
        build_shards(chosen.data, built)
    shards = open_shards(built)
    check_data(shards, chosen.train)
    torch.set_num_threads(threads or 1)
    with training_bar(chosen.steps, quiet=json) as progress:
        record = train_run(chosen, shards, out, progress=progress)
    show(json, record, lambda: _print_record(record, out))


def generate(
    checkpoint: Positional[Path],
    /,
    prompt: str,
    decoding: str = "greedy",
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Continue a prompt with a trained model.

    For example:

        qies generate runs/first --prompt "The people of the United States"
        qies generate runs/first --prompt "And it came to pass" --decoding sample --seed 3

    Args:
        checkpoint: A run's folder, or a folder with config.json and safetensors.
        prompt: The text to continue.
        decoding: greedy or sample.
        max_new_tokens: Length of the continuation.
        temperature: Of the sampling.
        top_k: How many tokens sampling chooses among.
        seed: Of the sampling.
        json: Print prompt and continuation as JSON.
    """
    from qies.decoding import continue_text, load_model

    model, tokenizer = load_model(checkpoint)
    [text] = continue_text(
        model, tokenizer, [prompt], max_new_tokens=max_new_tokens, decoding=decoding, temperature=temperature,
        top_k=top_k, seed=seed,
    )  # fmt: skip
    show(json, {"prompt": prompt, "continuation": text}, lambda: print(prompt + text))


def report(folder: Positional[Path], /, svg: Path | None = None) -> None:
    """Write report.html of a study folder from its records alone.

    For example:

        qies report results/quick
        qies report results/quick --svg docs/quick.svg

    Args:
        folder: The study's folder.
        svg: Also write the loss-against-parameters figure here.
    """
    from qies.report import build_report, write_summary_svg

    print(build_report(folder))
    if svg is not None:
        write_summary_svg(folder, svg)
        print(svg)


def bench(
    what: Positional[Literal["op", "train"]],
    /,
    rounds: int = 5,
    threads: int = 1,
    cases: tuple[str, ...] = (),
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Speed side by side with named rivals, in one run: medians, and ratios round by round.

    `op`: the entanglement op, forward and backward, against transformers' gated delta rule and causal SDPA.
    `train`: whole training steps of the arms against GPT-2 and Qwen3-Next of transformers.

    For example:

        qies bench op
        qies bench op --cases 8x2048x4x64x64 --rounds 9
        qies bench train --cases 400k:512 6m:512 --out bench.json

    Args:
        what: op or train.
        rounds: Timed rounds after one that does not count.
        threads: Processor threads.
        cases: BxTxHxKxV for op, SIZE:T for train; by default a few of each.
        out: Also write the JSON here.
        json: Print JSON.
    """
    import torch

    from qies import runs
    from qies.efficiency import bench as benches

    if rounds < 1 or threads < 1:
        raise UserError("--rounds and --threads must be at least 1.")
    torch.set_num_threads(threads)
    results = benches.run(what, cases, rounds)
    value = {
        "what": what,
        "threads": threads,
        "environment": runs.environment(),
        "code_version": runs.code_version(),
        "cases": [r.to_dict() for r in results],
    }
    if out is not None:
        runs.write_json(out, value)
    show(json, value, lambda: Console().print(benches.comparison_table(f"bench {what}", results)))


VERBS: dict[str, Callable[..., None]] = {
    "study": study,
    "plan": plan,
    "data": data,
    "train": train,
    "generate": generate,
    "report": report,
    "bench": bench,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 0, 2 on bad input, 1 on an internal failure, 128 + n after signal n."""
    args = list(sys.argv[1:] if argv is None else argv)
    sys.exit(run(VERBS, args, str(__doc__)))


def _print_manifest(manifest: Any, folder: Path) -> None:
    print(f"{folder}: {manifest.corpus}, vocabulary {manifest.vocab_size:,}, hash {manifest.hash[:16]}")
    for name in ("train", "val"):
        split = manifest.split(name)
        print(f"  {name}: {split.documents:,} documents, {split.bytes:,} bytes, {split.tokens:,} tokens")
    for source in manifest.sources:
        total = source.train + source.val
        print(f"  {source.name} ({source.version}): {total.documents:,} documents, {total.bytes:,} B; {source.licence}")


def _print_record(record: dict[str, Any], folder: Path) -> None:
    m = record["metrics"]
    held = (
        f"held-out loss {m['val_loss']:.4f} nats a token, {m['val_bpb']:.4f} bits a byte" if m else record.get("error")
    )
    print(
        f"{record['arm']} {record['size']}: {record['status']}; {held}; {record['tokens_per_second']} tok/s; {folder}"
    )


if __name__ == "__main__":
    main()

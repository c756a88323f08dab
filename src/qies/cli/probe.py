"""The verb probe: one capability at a time, on synthetic tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from qies.errors import UserError, unknown
from qies.terminal import show

Probes = Annotated[tuple[str, ...], tyro.conf.arg(metavar="[PROBES.yaml] [KEY=VALUE ...]")]


def probe(
    overrides: Probes = (),
    /,
    preset: str | None = None,
    model: Path | None = None,
    out: Path | None = None,
    workers: int = 0,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Train small models on synthetic tasks (state tracking, recall) and score them beyond the trained length.

    With --model, probe a trained language model instead: copying, recall, state tracking in text, linear probes.
    Finished probes are kept: the same command resumes a killed sweep. docs/probes.md has the tasks and the protocol.

    For example:

        qies probe --preset quick
        qies probe tasks=[s3,a5] arms=[qies,complex,transformer] seeds=[0,1,2,3,4] --out results/state-tracking
        qies probe tasks=[s3] arms=[qies,no_phase:eigenvalues=unit,transformer:layers=4] lrs=[0.001,0.003,0.01]
        qies probe tasks=[mqar] probe.layers=2 probe.hidden_size=32 probe.steps=4000
        qies probe --model runs/first

    Args:
        overrides: A YAML file with tasks, arms, seeds, lrs and probe (the common settings), and overrides of its keys.
        preset: Probes that come with the package: quick.
        model: The folder of a finished run; its model is probed.
        out: The folder of the records, by default results/probes; with --model the JSON file to write.
        workers: Probes trained at a time, each on one thread; by default one per core.
        dry_run: Print the probes and stop.
        json: Print the records as JSON.
    """
    from qies import config, ladder
    from qies.probes.sweep import ProbeSweep, run_sweep, summary

    files, changes = config.split(overrides)
    if model is not None:
        if files or changes or preset is not None or dry_run:
            raise UserError(
                "--model probes a trained model and takes no tasks: give it alone, or with --out and --json."
            )
        _probe_model(model, out, json)
        return
    if preset not in (None, "quick"):
        raise unknown("preset", preset, ["quick"])
    if len(files) + (preset is not None) > 1:
        raise UserError("Give one set of probes: a PROBES.yaml or --preset quick.")
    if workers < 0:
        raise UserError("--workers must be 0 (one per core) or more.")
    if preset is not None:
        files = [str(Path(__file__).parents[1] / "probes" / f"{preset}.yaml")]
    sweep = (
        config.load(ProbeSweep, files[0], changes) if files else config.from_dict(ProbeSweep, config.merge({}, changes))
    )
    console = Console(stderr=json)
    if dry_run:
        lines = "\n".join(f"{p.task} {p.arm} lr {p.lr:g} seed {p.seed}" for p in sweep.first())
        others = f"\nand {len(sweep) - len(sweep.first())} of other seeds, at the best learning rates"
        show(json, config.to_dict(sweep), lambda: print(lines + (others if sweep.seeds[1:] else "")))
        return
    done = 0

    def progress(record: dict) -> None:
        nonlocal done
        done += 1
        name = "{task} {arm} lr {lr:g} seed {seed}".format(**record["config"])
        longest, score = list(record["accuracy"].items())[-1]
        console.print(f"{done} of {len(sweep)}: {name}, accuracy at {longest} tokens {score:.3f}", highlight=False)

    records = run_sweep(sweep, out or Path("results/probes"), workers or ladder.cores(), progress)
    show(json, records, lambda: console.print(_table(summary(records))))


def _probe_model(folder: Path, out: Path | None, json: bool) -> None:
    """Probe the model of a run, with the context that it was trained on."""
    from qies import records
    from qies.cli.options import check_outputs
    from qies.decoding import load_model
    from qies.probes.checkpoint import probe_checkpoint
    from qies.storage import write_json

    check_outputs(out=out)
    record = records.read(folder)
    if record is None:
        raise UserError(f"{folder} holds no run; give the folder of a finished run.")
    model, tokenizer = load_model(folder)
    console = Console(stderr=True)
    with console.status("probes") as status:
        result = probe_checkpoint(
            model, tokenizer, seq_len=record.config["train"]["seq_len"], progress=lambda what: status.update(what)
        )
    result = {"arm": record.arm, "size": record.size, "run": record.config_hash, "tokens": record.tokens} | result
    if out is not None:
        write_json(out, result)
    show(json, result, lambda: Console().print(*_model_tables(result), sep="\n"))


def _model_tables(result: dict) -> list[Table | str]:
    gains = f"gain on a repeated segment {result['induction']:.3f} nats, on shuffled pairs {result['recall']:.3f} nats"
    stories = Table(title=f"{result['arm']} {result['size']}: answers to questions of stories")
    for name in ("kind", "events", "accuracy (SE)", "chance", "log-probability", "Brier"):
        stories.add_column(name, justify="left" if name == "kind" else "right")
    for row in result["stories"]:
        stories.add_row(
            row["kind"], str(row["events"]), f"{row['accuracy']:.2f} ({row['stderr']:.2f})", f"{row['chance']:.2f}",
            f"{row['log_probability']:.2f}", f"{row['brier']:.2f}",
        )  # fmt: skip
    linear = Table(title="linear probes by layer: accuracy (selectivity)")
    linear.add_column("target")
    for layer in range(len(next(iter(result["linear"].values())))):
        linear.add_column(str(layer), justify="right")
    for name, rows in result["linear"].items():
        linear.add_row(name, *(f"{row['accuracy']:.2f} ({row['selectivity']:+.2f})" for row in rows))
    return [gains, stories, linear]


def _table(rows: list[dict]) -> Table:
    lengths = sorted({int(n) for row in rows for n in row["accuracy"]})
    title = "accuracy over all scored positions, mean over seeds, by number of tokens"
    table = Table(title=title, box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("task", "arm", "solved", "lr", "chance", *(f"{n:,}" for n in lengths), "N"):
        table.add_column(name, justify="left" if name in ("task", "arm") else "right", overflow="fold")
    for row in rows:
        scores = [f"{row['accuracy'][str(n)]:.3f}" if str(n) in row["accuracy"] else "" for n in lengths]
        solved = f"{row['solved']}/{row['seeds']}"
        table.add_row(
            row["task"], row["arm"], solved, f"{row['lr']:g}", f"{row['chance']:.3f}", *scores, f"{row['parameters']:,}"
        )
    table.caption = "solved: seeds with an accuracy of at least 0.99 at the longest; N: non-embedding parameters"
    return table

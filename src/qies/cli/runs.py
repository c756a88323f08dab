"""Verbs that make runs: study, plan, data, train."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from tyro.conf import Positional

from qies.errors import UserError, speaks
from qies.terminal import building_bar, show, training_bar

if TYPE_CHECKING:
    from qies.records import RunRecord

Overrides = Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="[KEY=VALUE ...]")]


def study(
    overrides: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="[STUDY.yaml] [KEY=VALUE ...]")] = (),
    /,
    preset: str | None = None,
    out: Path | None = None,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Run a study: train a grid of models, fit scaling laws, compare the arms and write report.html.

    Finished runs are kept, and an interrupted study resumes.

    For example:

        qies study --preset quick
        qies study --preset quick --dry-run
        qies study my.yaml --out results/mine seeds=[0,1,2] train.seq_len=256

    Args:
        overrides: A study file, and dotted overrides of its keys.
        preset: A study of the package: quick.
        out: The output folder; by default results/NAME.
        dry_run: Print every run with its parameters, FLOPs, tokens and estimated time, without running it.
        json: Print the run records (or with --dry-run the planned ones) as JSON.
    """
    from qies import config, ladder, storage
    from qies import records as run_records
    from qies import study as studies
    from qies.data.locate import locate

    files, changes = config.split(overrides)
    if len(files) + (preset is not None) != 1:
        raise UserError("Give one study: a STUDY.yaml or --preset quick.")
    if preset is not None:
        chosen = studies.preset(preset, tuple(changes))
    else:
        chosen = config.load(config.StudyConfig, files[0], changes)
    chosen = locate(chosen)
    folder = out or Path("results") / chosen.name
    console = Console(stderr=json)
    if dry_run:
        records = [run_records.plan(c, chosen.data.vocab_size) for c in chosen.runs()]
        show(json, [r.to_dict() for r in records], lambda: console.print(studies.plan_table(chosen)))
        workers = chosen.workers or ladder.cores()
        total = studies.estimate(chosen)
        console.print(f"about {studies.clock(sum(total) / workers)} on {workers} cores; nothing was run.")
        return
    chosen = studies.claim(chosen, folder)
    table = studies.plan_table(chosen)
    storage.make_writable_folder(folder)
    if not json:
        console.print(table)
    records = studies.run_study(chosen, folder, console)
    from qies.report.page import build_report

    page = build_report(folder)
    show(json, [r.to_dict() for r in records], lambda: console.print(studies.result_table(chosen, records)))
    console.print(f"report: {page}")
    studies.require_done(records, folder)
    studies.require_analysed(folder)


def plan(
    overrides: Overrides = (),
    /,
    arm: str = "qies",
    size: str = "100k",
    tokens: str | None = None,
    vocab_size: int = 4096,
    seq_len: int = 512,
    gpus: int = 1,
    gpus_per_node: int = 8,
    gpu_memory: float = 80.0,
    gpu_flops: float = 990e12,
    utilisation: float = 0.4,
    micro_batch: int = 1,
    activation_checkpointing: bool = False,
    json: bool = False,
) -> None:
    """Estimate the cost of a model: parameters, FLOPs, memory per GPU and days, with the torchrun command.

    For example:

        qies plan --arm qies --size 400k
        qies plan --size 10b --gpus 64 --seq-len 4096 --vocab-size 50304 --activation-checkpointing
        qies plan --size 400k head_dim=64

    Args:
        overrides: Model fields to replace.
        arm: transformer, qies, real_registers, no_phase, fixed_phase, selective_phase, gpt2 or complex.
        size: Non-embedding parameters, from 20k to 20b.
        tokens: Training tokens, such as 2000000 or 2m; by default 20 per parameter.
        vocab_size: Vocabulary size.
        seq_len: Training sequence length in tokens.
        gpus: Total number of GPUs; FSDP2 shards the model over them.
        gpus_per_node: GPUs per machine.
        gpu_memory: Memory of one GPU in GB.
        gpu_flops: Peak bfloat16 FLOP/s of one GPU; by default an H100's.
        utilisation: Model FLOPs utilisation, as a fraction of the peak.
        micro_batch: Sequences per GPU in one forward pass.
        activation_checkpointing: Keep only the inputs of blocks and recompute the rest in the backward pass.
        json: Print JSON.
    """
    from qies import config, presets
    from qies.accounting.plan import Cluster, plan_model, plan_text

    budget = None if tokens is None else presets.parse_count(tokens, "--tokens")
    counts = {"tokens": budget, "vocab-size": vocab_size, "seq-len": seq_len, "micro-batch": micro_batch}
    for name, number in counts.items():
        if number is not None and number < 1:
            raise UserError(f"--{name} must be at least 1.")
    values = presets.settings(arm, size, vocab_size, **config.merge({}, overrides))
    result = plan_model(
        values, arm, size, budget, seq_len, cluster=Cluster(gpus, gpus_per_node, gpu_memory, gpu_flops, utilisation),
        micro_batch=micro_batch, checkpointing=activation_checkpointing, overrides=overrides,
    )  # fmt: skip

    def text() -> None:
        Console().print(plan_text(result))
        print(result["command"])

    show(json, result, text)


def data(
    action: Positional[Literal["build", "contamination"]],
    source: Positional[str],
    /,
    out: Path | None = None,
    vocab_size: int = 4096,
    tokenizer: str = "",
    text_field: str = "text",
    val_fraction: float = 0.03,
    limit_tokens: str = "0",
    seed: int = 0,
    workers: int = 1,
    include: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    exclude: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    pack: Path | None = None,
    cache: Path | None = None,
    json: bool = False,
) -> None:
    """Build token shards from a corpus, or measure the overlap of shards with an evaluation pack.

    Documents are deduplicated, split into training and validation, and tokenized. An interrupted build resumes.
    docs/data.md describes the sources and the output.

    For example:

        qies data build builtin --out data/builtin
        qies data build my_texts/ --out data/mine --vocab-size 8192
        qies data build registry:pip --out data/registry
        qies data build 'crawl/*.jsonl.gz' --out data/crawl --text-field body --tokenizer gpt2 --workers 8
        qies data build hub:allenai/c4:en --out data/c4 --tokenizer gpt2 --limit-tokens 2000000000 --workers 8
        qies data contamination data/c4 --pack eval_pack/

    Args:
        action: build, or contamination: the overlap of the training text of a folder of shards with a pack.
        source: "builtin", "registry" (or "registry:pip"), "registry-dedup", "hub:OWNER/NAME" or
            "hub:OWNER/NAME:CONFIG", or a file, a folder or a glob of text, jsonl, JSON arrays, CSV (also .gz, .zst,
            .xz, .bz2) or parquet; for contamination the folder of shards.
        out: The folder of shards to write.
        vocab_size: Vocabulary size of the byte-level BPE tokenizer to train.
        tokenizer: Use this tokenizer instead of training one: a folder, a tokenizer.json, or a name on the hub.
        text_field: Field of the text in records of JSON, CSV, parquet or the hub.
        val_fraction: Fraction of the documents held out, unless the data set has its own validation split.
        limit_tokens: Stop after the document that reaches this many training tokens, such as 100m; 0: no limit.
        seed: Seed of the choice of held-out documents.
        workers: Number of tokenizer processes; the result does not depend on it.
        include: Read only files that match this glob, such as 'part-*.jsonl'; repeatable.
        exclude: Skip files that match this glob; repeatable.
        pack: An evaluation pack (a folder of .jsonl and .txt files) whose 13-grams are searched for in the text.
        cache: Cache folder for the archives of "registry"; by default below the user's cache folder.
        json: Print the manifest, or the overlap.
    """
    from qies import presets
    from qies.config import DataConfig, to_dict
    from qies.data.contamination import shards_overlap
    from qies.data.manifest import Build
    from qies.data.shards import build_shards, open_shards

    if cache is not None:
        os.environ["QIES_CACHE"] = str(cache)
    if action == "contamination":
        if pack is None:
            raise UserError("Give --pack DIR, the evaluation pack to look for.")
        with building_bar(quiet=json) as progress:
            rows = shards_overlap(open_shards(Path(os.path.expanduser(source))), pack, progress)
        show(json, [to_dict(row) for row in rows], lambda: _print_overlap(rows))
        return
    if out is None:
        raise UserError("Give --out DIR, the folder of shards to write.")
    limit = presets.parse_count(limit_tokens, "--limit-tokens")
    with building_bar(quiet=json) as progress:
        manifest = build_shards(
            DataConfig(source, vocab_size, val_fraction, seed),
            out,
            build=Build(text_field, tokenizer, limit, include=include, exclude=exclude),
            workers=workers,
            pack=pack,
            progress=progress,
        )
    show(json, to_dict(manifest), lambda: _print_manifest(manifest, out))


def train(
    overrides: Overrides = (),
    /,
    out: Path | None = None,
    config: Path | None = None,
    arm: str | None = None,
    size: str | None = None,
    data: str | None = None,
    tokens: str | None = None,
    seed: int | None = None,
    threads: int | None = None,
    resume: bool = True,
    branch_from: Path | None = None,
    track: str = "",
    json: bool = False,
) -> None:
    """Train one run, or resume it. With torchrun, train it on several processes.

    For example:

        qies train --arm qies --size 100k --tokens 1000000 --out runs/first
        qies train --arm transformer --size 100k --data my_texts/ --out runs/mine train.batch_size=4
        qies train --config run.yaml --out runs/second model.conv_size=0
        qies train --branch-from runs/long --tokens 500000 --out runs/short
        torchrun --nproc-per-node 2 -m qies train --size 100k --out runs/two

    Args:
        overrides: Dotted keys of the run's configuration.
        out: The run's folder (required).
        config: A YAML file of a run; the other options override its values.
        arm: transformer, qies, real_registers, no_phase, fixed_phase, selective_phase, gpt2 or complex.
        size: Non-embedding parameters, such as 100k.
        data: "builtin", a file, folder or glob, hub:OWNER/NAME, or a folder that `qies data build` wrote.
        tokens: Training tokens, such as 1000000 or 1m.
        seed: Seed of the initial weights and the data order.
        threads: CPU threads; by default one.
        resume: Resume the run that the folder holds; with --no-resume such a folder is an error.
        branch_from: The folder of a longer run whose train.branches include this budget; its settings are used.
        track: Also log metrics to tensorboard, trackio, or both (comma-separated).
        json: Print the run record.
    """
    from qies import config as configs
    from qies import records
    from qies.data.locate import locate
    from qies.data.manifest import MANIFEST, summary
    from qies.train.run import run
    from qies.train.tracking import parse

    if out is None:
        raise UserError("Give --out DIR, the folder of this run.")
    if threads is not None and not 1 <= threads <= 1024:
        raise UserError("--threads must be 1 to 1024.")
    trackers = parse(track)
    named = {"arm": arm, "size": size, "tokens": tokens, "seed": seed, "data.source": data}
    options = {k: v for k, v in named.items() if v is not None}
    if config is not None:
        chosen = configs.load(configs.RunConfig, config, overrides, options)
    elif branch_from is not None:
        trunk = records.read(branch_from)
        if trunk is None:
            raise UserError(f"{branch_from} holds no run to branch from; give the folder of the longer run.")
        base = configs.merge(trunk.config, ["train.branches=[]", "train.milestones=[]"])
        chosen = configs.from_dict(configs.RunConfig, configs.merge(base, overrides, options))
    else:
        chosen = configs.from_dict(configs.RunConfig, configs.merge({}, overrides, options))
    corpus = None  # of the trunk: its record names the text without the place where it was found
    if branch_from is not None and chosen.data.hash and not options.get("data.source"):
        corpus = branch_from / "data"
        if not (corpus / MANIFEST).is_file():
            raise UserError(f"{branch_from} does not hold its text; give --data, where '{chosen.data.source}' is.")
    else:
        chosen = locate(chosen)
    record = run(
        chosen,
        out,
        data=corpus,
        branch_from=branch_from,
        resume=resume,
        threads=threads or 1,
        track=trackers,
        progress=lambda: training_bar(chosen.steps, quiet=json),
        built=None if json else lambda manifest: print(summary(manifest)),
        # A shell may go (nohup, a closed terminal); a torchrun that went would leave ranks that nobody restarts.
        parent=os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None,
    )
    if speaks():
        show(json, record.to_dict(), lambda: _print_record(record, out))


def _print_manifest(manifest: Any, folder: Path) -> None:
    from qies.data.manifest import overlap_summary, summary

    print(summary(manifest))
    print(f"{folder}: {manifest.corpus}, vocabulary {manifest.vocab_size:,}, hash {manifest.hash[:16]}")
    for name in ("train", "val"):
        split = manifest.split(name)
        print(f"  {name}: {split.documents:,} documents, {split.bytes:,} bytes, {split.tokens:,} tokens")
    for source in manifest.sources:
        total = source.train + source.val
        print(f"  {source.name} ({source.version}): {total.documents:,} documents, {total.bytes:,} B; {source.licence}")
    if overlap := overlap_summary(manifest):
        print(f"  {overlap}")
    _print_overlap(manifest.contamination)


def _print_overlap(rows: Sequence[Any]) -> None:
    for row in rows:
        print(
            f"  {row.task}: {row.overlapping_items:,} of {row.items:,} items ({row.short_items:,} too short to tell) "
            f"share {row.overlapping_ngrams:,} of {row.ngrams:,} 13-grams with {row.documents:,} training documents"
        )


def _print_record(record: RunRecord, folder: Path) -> None:
    m, held = record.metrics, record.error
    if m:
        clean = f" ({m['val_loss_clean']:.4f} on the clean part)" if "val_loss_clean" in m else ""
        held = f"held-out loss {m['val_loss']:.4f} nats a token{clean}, {m['val_bpb']:.4f} bits a byte"
    print(f"{record.arm} {record.size}: {record.status}; {held}; {record.tokens_per_second} tok/s; {folder}")

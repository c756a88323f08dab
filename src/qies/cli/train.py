"""The verb train: one run."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from qies.cli.options import Overrides
from qies.errors import UserError
from qies.terminal import show, training_bar


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
        branch_from: Folder of a longer run whose train.branches include this budget; uses its settings.
        track: Also log metrics to tensorboard, trackio, or both (comma-separated).
        json: Print the run record.
    """
    import torch

    from qies import config as configs
    from qies import runs
    from qies.data.builder.pipeline import build_shards
    from qies.data.locate import locate
    from qies.data.manifest import summary
    from qies.data.shards import open_shards
    from qies.train.distributed import check_batch, rank_and_size, start
    from qies.train.loop import check_data
    from qies.train.loop import train as train_run
    from qies.train.run_directory import branch, claim
    from qies.train.tracking import parse, tracking

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
        trunk = runs.read(branch_from)
        if trunk is None or not isinstance(trunk.get("config"), dict):
            raise UserError(f"{branch_from} holds no run to branch from; give the folder of the longer run.")
        base = configs.merge(trunk["config"], ["train.branches=[]", "train.milestones=[]"])
        chosen = configs.from_dict(configs.RunConfig, configs.merge(base, overrides, options))
    else:
        chosen = configs.from_dict(configs.RunConfig, configs.merge({}, overrides, options))
    corpus = None  # the trunk's shards: its record names the corpus without its path
    if branch_from is not None and chosen.data.hash and not options.get("data.source"):
        corpus = branch_from / "data"
        if not (corpus / "manifest.json").is_file():
            raise UserError(f"{branch_from} does not hold its corpus; give --data, the path of '{chosen.data.source}'.")
    else:
        chosen = locate(chosen)
    if not resume and runs.read(out) is not None:
        raise UserError(f"{out} already holds a run; omit --no-resume or give another --out.")
    runs.plan(chosen, chosen.data.vocab_size)
    check_batch(chosen.train, rank_and_size()[1])
    torch.set_num_threads(threads or 1)

    def prepare() -> Path:
        claim(chosen, out)
        runs.make_folder(out)
        built = corpus or Path(chosen.data.source)
        if not (built / "manifest.json").is_file():
            built = out / "data"
            there = (built / "manifest.json").is_file()
            manifest = build_shards(chosen.data, built)
            if not (there or json):
                print(summary(manifest))
        check_data(open_shards(built), chosen.train)
        if branch_from is not None:
            branch(chosen, branch_from, out)
        return built

    # A run outlives its shell (nohup, a closed terminal), but not its torchrun, which alone restarts ranks.
    parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    claim(chosen, out)
    with ExitStack() as after, start(out) as group:  # so that other ranks do not wait for a tracker to close
        shards = open_shards(group.on_first(prepare), checked=True)
        bar = after.enter_context(training_bar(chosen.steps, quiet=json or group.rank > 0))
        tracked = after.enter_context(tracking(trackers if group.rank == 0 else (), out))

        def progress(row: dict[str, Any]) -> None:
            bar(row)
            tracked(row)

        record = train_run(chosen, shards, out, progress=progress, group=group, parent=parent)
    if group.rank == 0:
        show(json, record, lambda: _print_record(record, out))


def _print_record(record: dict[str, Any], folder: Path) -> None:
    m = record["metrics"]
    held = record.get("error")
    if m:
        clean = f" ({m['val_loss_clean']:.4f} on the clean part)" if "val_loss_clean" in m else ""
        held = f"held-out loss {m['val_loss']:.4f} nats per token{clean}, {m['val_bpb']:.4f} bits per byte"
    print(
        f"{record['arm']} {record['size']}: {record['status']}; {held}; {record['tokens_per_second']} tok/s; {folder}"
    )

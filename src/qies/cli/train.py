"""The verb train: one run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from qies.cli.options import Overrides
from qies.errors import UserError, reports_errors
from qies.terminal import show, training_bar

if TYPE_CHECKING:
    from qies.records import RunRecord


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
        arm: transformer, qies, real_registers, unitary, no_phase, fixed_phase, selective_phase, gpt2 or complex.
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
    corpus = None  # the trunk's shards: its record names the corpus without its path
    if branch_from is not None and chosen.data.hash and not options.get("data.source"):
        corpus = branch_from / "data"
        if not (corpus / MANIFEST).is_file():
            raise UserError(f"{branch_from} does not hold its corpus; give --data, the path of '{chosen.data.source}'.")
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
        # A run outlives its shell (nohup, a closed terminal), but not its torchrun, which alone restarts ranks.
        parent=os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None,
    )
    if reports_errors():
        show(json, record.to_dict(), lambda: _print_record(record, out))


def _print_record(record: RunRecord, folder: Path) -> None:
    m, held = record.metrics, record.error
    if m:
        clean = f" ({m['val_loss_clean']:.4f} on the clean part)" if "val_loss_clean" in m else ""
        held = f"held-out loss {m['val_loss']:.4f} nats per token{clean}, {m['val_bpb']:.4f} bits per byte"
    print(f"{record.arm} {record.size}: {record.status}; {held}; {record.tokens_per_second} tok/s; {folder}")

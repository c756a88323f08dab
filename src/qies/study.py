"""The main job: plan a grid of runs, train it, analyse it, and write the page."""

from __future__ import annotations

import dataclasses
import json
import time
import traceback
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from qies import config as configs
from qies import ladder, records, storage
from qies.config import RunConfig, StudyConfig
from qies.errors import Stopped, UserError, nearest
from qies.presets import parse_size
from qies.records import RunRecord
from qies.report.records import BASELINE, PROPOSAL

PRESETS = Path(__file__).parent / "studies"
# The arms that differ from the proposal in one part: without them a win is only a hybrid's win.
CONTROLS = ("real_registers", "no_phase", "fixed_phase", "selective_phase")


def preset(name: str, overrides: tuple[str, ...] = ()) -> StudyConfig:
    """A study that comes with the package."""
    known = sorted(p.stem for p in PRESETS.glob("*.yaml"))
    if name not in known:
        raise UserError(
            f"Unknown value '{name}' for preset.{nearest(name, known) or f' Known: {chr(44).join(known)}.'}"
        )
    return configs.load(StudyConfig, PRESETS / f"{name}.yaml", overrides)


# What may be added to a study that has runs, and what changes none of them.
AXES = ("arms", "sizes", "seeds", "tokens_per_parameter", "variants")
FREE = ("workers", "prompts")


def claim(study: StudyConfig, folder: Path) -> StudyConfig:
    """The study as `folder` will hold it: a grid of what it holds and what `study` adds on each axis.

    Where it was started before its text was identified by a hash, or from elsewhere, its runs keep their names. Raises
    UserError when it holds something else; nothing is overwritten.
    """
    path = folder / "study.yaml"
    if path.is_file():
        try:
            known = configs.from_dict(StudyConfig, configs.read(path))
        except UserError as e:
            raise UserError(f"{folder} holds a study that cannot be continued ({e}); give another --out.") from None
        old, new = ({k: v for k, v in configs.to_dict(s).items() if k not in (*AXES, *FREE)} for s in (known, study))
        if changes := configs.changes(old, new):
            raise UserError(
                f"{folder} holds a different study ({'; '.join(changes)}); give another --out or delete it."
            )
        source = study.data.source if known.data.hash else known.data.source
        data = dataclasses.replace(study.data, source=source, hash=known.data.hash)
        return dataclasses.replace(study, data=data, **_union(known, study))
    storage.refuse_file(folder)
    if folder.exists() and any(not storage.is_temporary(path.name) for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no study; give another --out.")
    return study


def _union(known: StudyConfig, study: StudyConfig) -> dict[str, Any]:
    """The axes of a grid that has the values of both, the known ones first."""

    def joined(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
        return a + tuple(value for value in b if value not in a)

    axes = {axis: joined(getattr(known, axis), getattr(study, axis)) for axis in ("arms", "sizes", "seeds")}
    budgets = joined(known.budgets, study.budgets)
    axes["variants"] = joined(known.variants or ({},), study.variants or ({},))
    if axes["variants"] == ({},):
        axes["variants"] = ()
    return axes | {"tokens_per_parameter": budgets if len(budgets) > 1 else budgets[0]}


def plan_table(study: StudyConfig) -> Table:
    """Every run with its parameters, tokens, FLOPs and estimated time, from configuration alone."""
    table = Table(title=f"study {study.name}: {len(study.runs())} runs", box=box.SIMPLE_HEAD)
    for column in ("run", "arm", "size", "seed", "N", "tokens", "FLOPs", "time"):
        table.add_column(column, justify="left" if column in ("run", "arm") else "right", no_wrap=True)
    for config, seconds in zip(study.runs(), estimate(study), strict=True):
        record = records.plan(config, study.data.vocab_size)
        table.add_row(
            record.config_hash[:8], config.arm, config.size, str(config.seed), f"{record.non_embedding:,}",
            f"{record.tokens / 1e6:.2f}M", f"{record.flops:.2e}", clock(seconds),
        )  # fmt: skip
    table.caption = "N: parameters without embedding and head; time: estimated"
    return table


def estimate(study: StudyConfig) -> list[float]:
    """Rough seconds for each run on one thread of a processor like the reference machine (docs/study.md).

    A line through measured throughputs: a cost a token that grows with the FLOPs, and one that is fixed.
    """
    out = []
    for config in study.runs():
        record = records.plan(config, study.data.vocab_size)
        out.append(record.tokens * (SECONDS_PER_TOKEN + record.flops_per_token * SECONDS_PER_FLOP))
    return out


SECONDS_PER_TOKEN = 2e-5
SECONDS_PER_FLOP = 3.4e-12


def clock(seconds: float) -> str:
    """75 -> '1:15', 7500 -> '2h05', 400000 -> '4d15'."""
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours:
        return f"{hours}h{minutes % 60:02d}" if hours < 100 else f"{hours // 24}d{hours % 24:02d}"
    return f"{minutes}:{int(seconds) % 60:02d}"


def prepare(study: StudyConfig, folder: Path, console: Console) -> Path:
    """Claim `folder`, check every run's settings, build the corpus and check the runs that are there.

    `study.yaml` then has the whole grid. Returns the folder of shards.
    """
    from qies.data.manifest import summary
    from qies.data.shards import build_shards, open_shards
    from qies.train.loop import check_data

    study = claim(study, folder)
    for config in study.runs():  # every bad setting shows before anything is spent
        records.plan(config, study.data.vocab_size)
    data = data_folder(study, folder)
    path = folder / "study.yaml"
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    if before is None:  # before anything else, so that a study killed while it reads its corpus is known again
        storage.make_writable_folder(folder)
        configs.save(study, path)
    try:
        if data == folder / "data":
            with console.status(f"corpus {study.data.source}"):
                built = (data / "manifest.json").is_file()
                manifest = build_shards(study.data, data)
            if not built:
                console.print(summary(manifest))
        shards = open_shards(data)
        check_data(shards, study.train)
        ladder.check_runs(study.runs(), folder / "runs", shards)
    except UserError:
        if before is None:  # a bad corpus leaves no claim behind
            path.unlink()
        raise
    if before is not None and configs.to_yaml(study) != before:
        configs.save(study, path)
    return data


def run_all(study: StudyConfig, folder: Path, console: Console, **how: Any) -> list[RunRecord]:
    """Every run of the study, with a progress bar; `how` goes to `ladder.execute`. Returns the records."""
    study = claim(study, folder)
    data, root, planned = prepare(study, folder, console), folder / "runs", longest_first(study)
    todo = [c for c in planned if not ladder.finished(ladder.run_folder(root, c))]
    if len(todo) < len(planned):
        console.print(f"{len(planned) - len(todo)} of {len(planned)} runs are done already.")
    if todo:
        how.setdefault("workers", study.workers or ladder.cores())
        with _Watch(study, todo, how["workers"], console) as watch:
            ladder.execute(planned, root, data, event=watch.event, **how)
    return [r for c in study.runs() if (r := records.read(ladder.run_folder(root, c))) is not None]


def require_done(found: list[RunRecord], folder: Path) -> None:
    """Raise Stopped, naming the attempts below the study's `folder`, when runs have failed."""
    failed = [str(folder / "runs" / r.config_hash / "attempts") for r in found if r.status == "failed"]
    if failed:
        raise Stopped(f"{len(failed)} runs failed; see {', '.join(failed)}")


def longest_first(study: StudyConfig) -> list[RunConfig]:
    """The runs in the order to start them, so that no core waits for one last long run."""
    pairs = zip(study.runs(), estimate(study), strict=True)
    return [config for config, _ in sorted(pairs, key=lambda pair: -pair[1])]


def run_study(study: StudyConfig, folder: Path, console: Console) -> list[RunRecord]:
    """Everything the study asks for, into `folder`. What is done already is not done again. Returns the records.

    Raises UserError for a sweep (`variants`): its runs differ in more than arm, size and seed, which every analysis
    here takes for all there is.
    """
    if study.variants:
        raise UserError("A study with variants is a sweep: use qies ladder run and then qies ladder sweep.")
    study = claim(study, folder)
    found = run_all(study, folder, console, retry_failed=True)
    analyse(study, folder, found, console)
    return found


def data_folder(study: StudyConfig, folder: Path) -> Path:
    """Where the study's shards are: the source itself if it is a folder of shards, else below the study."""
    source = Path(study.data.source)
    return source if (source / "manifest.json").is_file() else folder / "data"


def analyse(study: StudyConfig, folder: Path, found: list[RunRecord], console: Console) -> None:
    """Fits, comparisons, entanglement and samples, each into its own JSON file.

    One that fails costs neither the others nor the page: its file then holds the reason under `error`, in one line
    (`require_analysed`), and the next call tries it again.
    """
    done = [r for r in found if r.status == "done"]
    prompts = list(study.prompts)
    asked = {"runs": sorted(r.config_hash for r in done)}
    for name, make, same in (
        ("fits", lambda: fit_arms(study, done), None),
        ("comparison", lambda: compare_arms(study, folder), None),
        ("entanglement", lambda: entanglement_of(study, folder, done), asked),
        ("samples", lambda: samples_of(study, folder, done), asked | {"prompts": prompts}),
    ):
        path = folder / f"{name}.json"
        with console.status(name):
            if same and _holds(path, same):
                continue
            try:
                storage.write_json(path, make() | (asked if same else {}))
            except (UserError, Stopped) as e:
                storage.write_json(path, {"schema": 1, "error": " ".join(str(e).split())})
            except Exception as e:  # whatever it is, the runs are done and the page shall be written
                traceback.print_exc()
                storage.write_json(path, {"schema": 1, "error": " ".join(f"{type(e).__name__}: {e}".split())})
    for pair in _read(folder / "comparison.json").get("pairs", []):
        console.print(f"{pair['candidate']} against {pair['baseline']}: {pair['verdict']}; {pair['reason']}.")


def require_analysed(folder: Path) -> None:
    """Raise Stopped, with each reason, when analyses of the study in `folder` have failed."""
    parts = {name: _read(folder / f"{name}.json") for name in ("fits", "comparison", "entanglement", "samples")}
    if failed := [f"{name}: {part['error']}" for name, part in parts.items() if "error" in part]:
        raise Stopped(f"the runs are done, but {len(failed)} analyses failed ({'; '.join(failed)})")


def _read(path: Path) -> dict[str, Any]:
    """The analysis in `path`; {} where there is none that can be read."""
    try:
        part = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return part if isinstance(part, dict) else {}


def _holds(path: Path, values: dict[str, Any]) -> bool:
    """Whether the analysis in `path` is of these values."""
    part = _read(path)
    return all(part.get(key) == value for key, value in values.items())


def fit_arms(study: StudyConfig, done: list[RunRecord]) -> dict[str, Any]:
    """A power law of held-out loss in N and in FLOPs through each arm's points; None where there are too few."""
    from qies.accounting.flops import CONVENTION
    from qies.scaling.laws import fit_power

    arms: dict[str, Any] = {}
    for arm in study.arms:
        own = [r for r in done if r.arm == arm]
        most = {size: max(r.tokens for r in own if r.size == size) for size in {r.size for r in own}}
        own = [r for r in own if r.tokens == most[r.size]]  # of several budgets the largest
        axes: dict[str, list[float]] = {"params": [r.non_embedding for r in own], "flops": [r.flops for r in own]}
        losses = [r.val_loss for r in own]
        arms[arm] = {k: fit_power(x, losses).to_dict() if len(set(x)) >= 3 else None for k, x in axes.items()}
    return {"schema": 1, "flops_convention": CONVENTION, "arms": arms}


def compare_arms(study: StudyConfig, folder: Path) -> dict[str, Any]:
    """Every arm against the baseline, and the full model against its controls, from the run records.

    The baseline is the transformer, or the first arm where there is none. `not_compared` says which pairs the
    records do not allow and why.
    """
    from qies.scaling import compare, read_runs

    base = BASELINE if BASELINE in study.arms else study.arms[0]
    wanted = [(arm, base) for arm in study.arms if arm != base]
    wanted += [(PROPOSAL, arm) for arm in CONTROLS if PROPOSAL in study.arms and arm in study.arms and arm != base]
    pairs, refused = [], []
    for candidate, baseline in wanted:
        try:
            pairs.append(compare(read_runs(folder / "runs"), candidate, baseline).to_dict())
        except UserError as error:
            refused.append({"candidate": candidate, "baseline": baseline, "reason": str(error).rstrip(".")})
    return {"schema": 1, "pairs": pairs, "not_compared": refused}


def largest(study: StudyConfig, done: list[RunRecord], arm: str) -> RunRecord | None:
    """The arm's finished run of the largest size and first seed."""
    own = [r for r in done if r.arm == arm]
    return max(own, key=lambda r: (parse_size(r.size), r.tokens, -study.seeds.index(r.seed)), default=None)


def entanglement_of(study: StudyConfig, folder: Path, done: list[RunRecord]) -> dict[str, Any]:
    """Entropies of the states of each entangled arm's largest model on held-out text."""
    import numpy as np
    import torch

    from qies.data.batches import val_batches
    from qies.data.shards import open_shards
    from qies.decoding import load_model
    from qies.entanglement import capture, entropies

    shards = open_shards(data_folder(study, folder))
    length = study.train.seq_len
    whole = [b[:, :-1] for b in val_batches(shards, length, 8, max_tokens=16 * length) if b.shape[1] == length + 1]
    if not whole:
        return {"schema": 1, "text": {"source": "the validation text fills no window", "tokens": 0}, "arms": {}}
    ids = np.concatenate(whole)
    positions = [p for p in (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096) if p <= length]
    arms: dict[str, Any] = {}
    for arm in study.arms:
        record = largest(study, done, arm)
        if record is None or "linear_attention" not in record.model["layer_types"]:
            continue
        model, _ = load_model(folder / "runs" / record.config_hash)
        states = capture(model, torch.from_numpy(ids), positions)
        arms[arm] = {record.size: entropies(states, positions)}
    text = {"source": f"{shards.manifest.corpus}, validation", "tokens": int(ids.size)}
    return {"schema": 1, "text": text, "arms": arms}


def samples_of(study: StudyConfig, folder: Path, done: list[RunRecord]) -> dict[str, Any]:
    """Sampled continuations of the study's prompts by each arm's largest model."""
    from qies.decoding import continue_text, load_model, room

    arms: dict[str, Any] = {}
    for arm in study.arms:
        record = largest(study, done, arm)
        if record is not None:
            model, tokenizer = load_model(folder / "runs" / record.config_hash)
            texts = []
            for prompt in study.prompts:
                left = room(model, tokenizer, prompt)
                if left is not None and left < 1:
                    texts.append(f"(the prompt takes all {model.config.max_position_embeddings} learned positions)")
                    continue
                length = 48 if left is None else min(48, left)
                texts += continue_text(model, tokenizer, [prompt], max_new_tokens=length, decoding="sample")
            arms[arm] = {"size": record.size, "continuations": texts}
    return {"schema": 1, "prompts": list(study.prompts), "arms": arms}


def result_table(study: StudyConfig, found: list[RunRecord]) -> Table:
    """Held-out bits a byte by arm, size and budget, with throughput and peak memory: the terminal's summary.

    Each is the mean over the seeds.
    """
    title = f"study {study.name}: held-out bits a byte (loss in nats a token; on the clean part), tokens/s, peak memory"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("arm", no_wrap=True)
    points = list(dict.fromkeys((c.size, c.tokens) for c in study.runs()))
    names = [f"{s}, {t / 1e6:.2f}M tokens" if len(study.budgets) > 1 else s for s, t in points]
    for column in (*names, "tokens/s", "MiB"):
        table.add_column(column, justify="right")
    for arm in study.arms:
        own = [r for r in found if r.arm == arm]
        cells = []
        for point in points:
            here = [r for r in own if (r.size, r.config["tokens"]) == point]
            done = [r.metrics for r in here if r.status == "done"]
            if done:
                mean = {k: sum(m[k] for m in done) / len(done) for k in ("val_bpb", "val_loss")}
                clean = [m["val_loss_clean"] for m in done if "val_loss_clean" in m]
                beside = f"; {sum(clean) / len(clean):.3f}" if clean else ""
                cells.append(f"{mean['val_bpb']:.4f} ({mean['val_loss']:.3f}{beside})")
            else:
                cells.append(", ".join(sorted({r.status for r in here})) or "-")
        rates = [r.tokens_per_second for r in own if r.tokens_per_second]
        memory = [r.peak_memory_bytes for r in own if r.peak_memory_bytes]
        rate = f"{sum(rates) / len(rates):,.0f}" if rates else "-"
        table.add_row(arm, *cells, rate, f"{max(memory) / 2**20:,.0f}" if memory else "-")
    return table


class _Watch:
    """A progress bar over the whole study, in estimated seconds of work, with a line for each run in progress."""

    def __init__(self, study: StudyConfig, todo: list[RunConfig], workers: int, console: Console) -> None:
        costs = dict(zip(map(configs.content_hash, study.runs()), estimate(study), strict=True))
        self.cost = {configs.content_hash(c): costs[configs.content_hash(c)] for c in todo}
        self.done = dict.fromkeys(self.cost, 0.0)
        self.workers, self.console = workers, console
        self.lines: dict[str, Any] = {}
        self.started = time.monotonic()
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
        )

    def __enter__(self) -> _Watch:
        self.progress.start()
        self.total = self.progress.add_task("whole study", total=sum(self.cost.values()), note="")
        return self

    def __exit__(self, *exc: object) -> None:
        self.progress.stop()

    def event(self, config: RunConfig, rows: list[dict[str, Any]], status: str) -> None:
        """What `ladder.execute` reports: new metric rows of a run, or how it ended."""
        key = configs.content_hash(config)
        if key not in self.lines:
            name = f"{config.arm} {config.size} seed {config.seed}"
            self.lines[key] = self.progress.add_task(name, total=config.steps, note="starting")
        if rows:
            share = (rows[-1]["step"] + 1) / config.steps
            self.done[key] = share * self.cost[key]
            loss = rows[-1]["loss"]
            rate = rows[-1]["tokens"] / rows[-1]["seconds"]
            note = f"loss {loss:.3f}, {rate:,.0f} tok/s" if loss is not None else rows[-1]["skipped"]
            self.progress.update(self.lines[key], completed=rows[-1]["step"] + 1, note=note)
            done, spent = sum(self.done.values()), time.monotonic() - self.started
            left = (sum(self.cost.values()) - done) * spent / done
            self.progress.update(self.total, completed=done, note=f"{clock(left)} left")
        if status != "running":
            self.progress.remove_task(self.lines.pop(key))
            self.done[key] = 0.0 if status in ("retrying", "lost") else self.cost[key]
            self.console.print(f"{config.arm} {config.size} seed {config.seed}: {status}")

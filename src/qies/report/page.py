"""The report of a study: one HTML file made from its records, with a table under every chart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from qies.report import charts
from qies.report.answer import answer
from qies.report.blocks import Chart, Passage, Section, Table
from qies.report.gains import comparison, gain_chart
from qies.report.induction import induction
from qies.report.laws import laws
from qies.report.records import Cell, Run, Study, listed, mapping, read_study
from qies.report.summary import VARIABLES, loss_against
from qies.report.text import count, digits, mebibytes, number, percent, show, si
from qies.report.verdict import verdict
from qies.storage import write_text

T = TypeVar("T")


def build_report(folder: Path) -> Path:
    """Write `report.html` in a study folder from its records and return its path.

    Reads study.yaml, runs/*/{run.json,metrics.jsonl}, fits.json, comparison.json, entanglement.json, samples.json and
    data/manifest.json. The page names parts that are missing or malformed. Raises UserError when no run record can be
    read.
    """
    study = read_study(Path(folder))
    answered, chart = _build(answer, study), _build(gain_chart, study)
    sections = [section for builder in SECTIONS if (section := _build(builder, study)) and section.blocks]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("template.html").render(
        study=study,
        answer=answered,
        chart=chart,
        verdict=verdict(study, answered is not None),
        sections=sections,
        plotly=Markup(get_plotlyjs()),
    )
    path = study.folder / "report.html"
    write_text(path, page)
    return path


def _build(builder: Callable[[Study], T | None], study: Study) -> T | None:
    """A part of the page; None with a note where a record is malformed, so that the rest of the page is made."""
    try:
        return builder(study)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        name = builder.__name__.strip("_").replace("_", " ")
        study.notes.append(f"The part on {name} is left out: its record is malformed ({type(error).__name__}).")
        return None


def _loss(study: Study) -> Section | None:
    if not study.done:
        return None
    text = [
        "Runs are compared at the same size and number of tokens. Lines: power laws fitted to each arm, faint where "
        "extrapolated; bands: 95% CI of the law."
    ]
    section = Section("Loss", text)
    for variable, what in VARIABLES.items():
        figure = loss_against(study, variable)
        if figure is not None:
            own = [(r, x) for arm in study.arms for r in study.done if r.arm == arm and (x := getattr(r, variable))]
            rows = [[r.name, si(x), digits(r.loss)] for r, x in own]
            section.blocks.append(
                Chart(figure, Table(figure.title, ["run", what, "nats per token"], rows, folded=True))
            )
    for title, unit, name in (
        ("Bits per byte", "bits per byte", "bits_per_byte"),
        ("Validation loss", "nats per token", "loss"),
        ("Validation loss on the clean part", "nats per token", "clean_loss"),
    ):
        if not any(getattr(run, name) for run in study.done):  # runs older than the measure
            continue
        rows = [[arm, *(_against(study, arm, cell, name) for cell in study.cells)] for arm in study.arms]
        caption = f"{title} on held-out text ({unit}) and difference to {study.base}; means over seeds"
        section.blocks.append(Table(caption, ["arm", *map(study.label, study.cells)], rows))
    return section


def _against(study: Study, arm: str, cell: Cell, name: str) -> str:
    mean, base = study.mean(arm, cell, name), study.mean(study.base, cell, name)
    apart = "" if mean is None or base is None or arm == study.base else f" ({mean - base:+.4f})"
    return digits(mean) + apart


def _training(study: Study) -> Section:
    text = (
        "Running mean of the training loss over a fiftieth of the steps, on log axes. All curves of a chart have the "
        "same seed: the first of the study's seeds that the most arms have at that size."
    )
    section, shares = Section("Training curves", [text]), (0.02, 0.1, 0.25, 0.5, 0.75, 1.0)
    for cell in study.cells:
        curves = {seed: _smoothed(study, cell, seed) for seed in study.seeds}
        seed = max(study.seeds, key=lambda seed: len(curves[seed]))
        if series := curves[seed]:
            title = f"Training loss at {study.label(cell)}, seed {seed}"
            rows = [
                [arm, *(digits(y[max(0, round(share * len(y)) - 1)], 3) for share in shares)]
                for arm, (_, y) in series.items()
            ]
            table = Table(f"{title}, by share of the steps", ["arm", *map(percent, shares)], rows, folded=True)
            figure = charts.line_chart(title, series, "tokens seen", "training loss (nats per token)", log="xy")
            section.blocks.append(Chart(figure, table))
    return section


def _smoothed(study: Study, cell: Cell, seed: str) -> dict[str, tuple[list[float], list[float]]]:
    """Running mean of the training loss at up to 200 places for each arm that ran this seed: (tokens, loss)."""
    out = {}
    for run in (run for arm in study.arms for run in study.runs if (run.arm, run.cell, run.seed) == (arm, cell, seed)):
        steps = [(x, y) for row in run.rows if (x := number(row.get("tokens"))) and (y := number(row.get("loss")))]
        if len(steps) > 1:
            window = max(1, len(steps) // 50)
            ends = sorted({max(1, round((i + 1) * len(steps) / 200)) for i in range(200)})
            parts = [steps[max(0, end - window) : end] for end in ends]
            out[run.arm] = [part[-1][0] for part in parts], [fmean(y for _, y in part) for part in parts]
    return out


def _speed(study: Study) -> Section:
    section = Section("Speed and memory", ["Measured during training; means over seeds."])
    for title, unit, name, scale in (
        ("Training throughput", "tokens per second", "tokens_per_second", 1),
        ("Peak memory", "MiB", "memory", 2**20),
    ):
        series, rows = {}, []
        for arm in study.arms:
            values = {cell: v / scale for cell in study.cells if (v := study.mean(arm, cell, name))}
            places = {cell: n for cell in values if (n := study.mean(arm, cell, "params"))}
            if places:
                series[arm] = (list(places.values()), [values[cell] for cell in places])
                rows.append([arm, *(count(values.get(cell)) for cell in study.cells)])
        if series:
            y_title = f"{title.lower()} ({unit})"
            figure = charts.line_chart(title, series, "non-embedding parameters", y_title, markers=True, log="xy")
            table = Table(f"{title} ({unit})", ["arm", *map(study.label, study.cells)], rows)
            section.blocks.append(Chart(figure, table))
    return section


KINDS = {"von_neumann": "von Neumann", "renyi2": "Rényi-2", "page": "Page", "ceiling": "ceiling"}


def _entanglement(study: Study) -> Section | None:
    part = study.parts.get("entanglement")
    arms = {arm: sizes for arm, sizes in part["arms"].items() if sizes} if part else {}
    if not part or not arms:
        return None
    text = [
        f"Entropies of the entangled states after reading held-out text ({count(part['text']['tokens'])} tokens, "
        f"{part['text']['source']}), in nats, per head. The ceiling is log min(m, V); Page's value is the mean of "
        "random states of the same dimensions. Charts show the largest size of each arm; bars: one standard deviation "
        "over texts."
    ]
    order = [cell.size for cell in study.cells]
    summary, heads, figures, largest = [], [], [], {}
    for arm, sizes in arms.items():
        for size in sorted(sizes, key=lambda s: order.index(s) if s in order else -1):
            name, largest[arm] = f"{arm} {size}", sizes[size]
            own = [(layer["layer"], head) for layer in sizes[size]["layers"] for head in layer["heads"]]
            means = {k: fmean(h[k][0] if isinstance(h[k], list) else h[k] for _, h in own) for k in KINDS}
            share = percent(means["von_neumann"] / means["ceiling"] if means["ceiling"] else None)
            summary.append([name, *(digits(mean, 3) for mean in means.values()), share])
            heads += [[name, show(layer), show(h["head"]), f"{h['m']} by {h['v']}", *_entropies(h)] for layer, h in own]
        rows = [row[1:3] + row[4:] for row in heads if row[0] == name]
        table = Table(f"Entropy per head, {name} (nats)", ["layer", "head", *KINDS.values()], rows, folded=True)
        figure = charts.entropy_chart(f"Entropy per layer and head, {name}", largest[arm]["layers"])
        figures += [Chart(figure, table), _spectrum(name, largest[arm])]
    columns = ["model", *KINDS.values(), "von Neumann / ceiling"]
    first = Table("Mean over layers and heads (nats)", columns, summary)
    columns = ["model", "layer", "head", "m by V", *KINDS.values()]
    last = Table("Every head of every model (nats)", columns, heads, folded=True)
    return Section("Entanglement", text, [first, *figures, _by_position(largest), last])


def _spectrum(name: str, model: dict[str, Any]) -> Chart:
    """Mean spectra of the layers, over the heads of the same rank."""
    groups: dict[str, list[list[float]]] = {}
    for layer in model["layers"]:
        ranks = {len(head["spectrum"]) for head in layer["heads"]}
        for head in layer["heads"]:
            rank = f", rank {len(head['spectrum'])}" if len(ranks) > 1 else ""
            groups.setdefault(f"layer {layer['layer']}{rank}", []).append(head["spectrum"])
    spectra = {name: [fmean(p) for p in zip(*own, strict=True)] for name, own in groups.items()}
    title = f"Mean Schmidt spectrum per layer, {name}"
    rows = [[layer, *(f"{v:.2g}" for v in p)] for layer, p in spectra.items()]
    columns = ["layer", *map(str, range(1, 1 + max(map(len, spectra.values()))))]
    return Chart(charts.spectrum_chart(title, spectra), Table(title, columns, rows, folded=True))


def _by_position(models: dict[str, dict[str, Any]]) -> Chart:
    series = {arm: (model["positions"], model["entropy_by_position"]) for arm, model in models.items()}
    every = sorted({x for positions, _ in series.values() for x in positions})
    shown = every[:: 1 + len(every) // 13]
    found = {arm: dict(zip(x, y, strict=True)) for arm, (x, y) in series.items()}
    rows = [[arm, *(digits(entropy.get(x), 3) for x in shown)] for arm, entropy in found.items()]
    title = "Mean entropy of all heads by position"
    figure = charts.line_chart(title, series, "tokens read", "von Neumann entropy (nats)", markers=True, log="x")
    table = Table("Mean entropy by tokens read (nats)", ["arm", *map(count, shown)], rows, folded=True)
    return Chart(figure, table)


def _entropies(head: dict[str, Any]) -> list[str]:
    """Mean and standard deviation where the quantity varies, else its value."""
    return ["{:.3f} ± {:.3f}".format(*head[k]) if isinstance(head[k], list) else digits(head[k], 3) for k in KINDS]


def _samples(study: Study) -> Section | None:
    part = study.parts.get("samples")
    if not part:
        return None
    passages = [
        Passage(str(prompt), [(f"{arm} {s['size']}", str(s["continuations"][i])) for arm, s in part["arms"].items()])
        for i, prompt in enumerate(part["prompts"])
    ]
    return Section("Samples", ["Continuations by the largest model of each arm."], list(passages))


def _facts(caption: str, facts: dict[str, Any], folded: bool = False) -> Table:
    rows = [[str(key).replace("_", " "), show(value)] for key, value in facts.items()]
    return Table(caption, ["field", "value"], rows, folded=folded, words=True)


def _study(study: Study) -> Section:
    folder = study.folder.resolve()
    place = f"results/{folder.name}" if folder.parent.name == "results" else folder.name
    out = "" if place == f"results/{study.name}" else f" --out {place}"
    largest = max(study.runs, key=lambda run: run.params or 0).record
    facts = {
        "arms": ", ".join(study.arms),
        "sizes": ", ".join(map(study.label, study.cells)),
        "tokens per run": ", ".join(dict.fromkeys(count(cell.tokens) for cell in study.cells)),
        "seeds": ", ".join(study.seeds),
        "runs": f"{len(study.done)} done of {len(study.runs)}",
        "code version": ", ".join(sorted({run.record.code_version for run in study.runs})),
        "command that runs it": f"qies study {place}/study.yaml{out}",
        "command that makes this page": f"qies report {place}",
    }
    how = {"threads": largest.threads, "precision": largest.precision}
    machine = largest.environment | {k: v for k, v in how.items() if v is not None}
    tables = [
        _facts("Study", facts),
        _facts("Environment", machine),
        _facts("Settings (study.yaml)", study.config, folded=True),
    ]
    return Section("Study", [], list(tables))


def _data(study: Study) -> Section | None:
    manifest = study.parts.get("manifest")
    if not manifest:
        return None
    sources = [mapping(source) for source in listed(manifest.get("sources"))]
    counted = [(split, name) for split in ("train", "val") for name in ("documents", "bytes", "tokens")]
    rows = []
    for row in [*sources, manifest | {"name": "all"}]:
        numbers = [si(mapping(row.get(split)).get(name)) for split, name in counted]
        words = [show(row[key]) if key in row else "" for key in ("name", "licence", "version")]
        rows.append([*words, *numbers, show(row["sha256"])[:16] if "sha256" in row else ""])
    columns = ["source", "licence", "version", *(f"{split} {name}" for split, name in counted), "sha256"]
    facts = {key: value for key, value in manifest.items() if not isinstance(value, (dict, list)) and key != "schema"}
    tables = [Table("Sources of the corpus", columns, rows), _facts("Corpus, tokenizer and shards", facts)]
    return Section("Data", ["Whole documents are held out; sha256 is truncated to 16 digits."], list(tables))


def _runs(study: Study) -> Section:
    columns = [
        "arm", "size", "seed", "status", "parameters", "with embeddings", "tokens", "FLOPs", "nats per token",
        "bits per byte", "seconds", "tokens/s", "peak MiB", "config hash", "remark",
    ]  # fmt: skip
    order = sorted(study.runs, key=lambda run: (study.cells.index(run.cell), study.arms.index(run.arm), run.seed))
    return Section("Every run", [], [Table("Run records", columns, [_run_row(run) for run in order])])


def _run_row(run: Run) -> list[str]:
    skipped = run.record.skipped_steps
    remarks = [run.record.error] if run.record.error else []
    remarks += [f"{skipped:.0f} non-finite steps skipped"] if skipped else []
    return [
        run.arm, run.size, run.seed, run.status, count(run.params), count(run.total_params), count(run.tokens),
        si(run.flops), digits(run.loss), digits(run.bits_per_byte), count(run.seconds), count(run.tokens_per_second),
        mebibytes(run.memory), run.config_hash, "; ".join(remarks),
    ]  # fmt: skip


SECTIONS = (_loss, comparison, laws, induction, _training, _speed, _entanglement, _samples, _study, _data, _runs)

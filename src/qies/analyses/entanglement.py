"""Entropies and Schmidt spectra of the entangled states on held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from qies.analyses.charts import line_chart
from qies.analyses.finished import Finished
from qies.analyses.formatting import count, digits, percent, show
from qies.analyses.parts import Chart, Section, Table
from qies.analyses.records import Study
from qies.plotting import GREY, Axis, Figure, Line, Panel, Points, Style, style
from qies.plotting.marks import Mark

KINDS = {"von_neumann": "von Neumann", "renyi2": "Rényi-2", "page": "Page", "ceiling": "ceiling"}
# Schmidt probabilities below this are float32 rounding errors.
NOISE = 1e-8


def inputs(study: Finished) -> dict[str, Any]:
    """The runs."""
    return {"runs": study.hashes}


def compute(study: Finished) -> dict[str, Any]:
    """Measure the states of each entangled arm's largest model on held-out text."""
    import numpy as np
    import torch

    from qies.data.batches import val_batches
    from qies.data.shards import open_shards
    from qies.decoding import load_model
    from qies.entanglement import capture, entropies
    from qies.mixers import mixers

    shards = open_shards(study.data)
    length = study.config.train.seq_len
    windows = [b[:, :-1] for b in val_batches(shards, length, 8, max_tokens=16 * length) if b.shape[1] == length + 1]
    if not windows:
        return {
            "schema": 1,
            "text": {"source": "the validation text is shorter than a window", "tokens": 0},
            "arms": {},
        }
    ids = np.concatenate(windows)
    positions = [p for p in (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096) if p <= length]
    arms: dict[str, Any] = {}
    for arm in study.config.arms:
        record = study.largest(arm)
        if record is None or not any(spec.entangled for spec in mixers(record.model["layer_types"])):
            continue
        model, _ = load_model(study.run_folder(record))
        states = capture(model, torch.from_numpy(ids), positions)
        arms[arm] = {record.size: entropies(states, positions)}
    text = {"source": f"{shards.manifest.corpus}, validation", "tokens": int(ids.size)}
    return {"schema": 1, "text": text, "arms": arms}


def section(result: dict[str, Any], study: Study) -> Section | None:
    """Entropies per head, spectra per layer, and entropy by position."""
    arms = {arm: sizes for arm, sizes in result["arms"].items() if sizes} if result else {}
    if not arms:
        return None
    text = [
        f"Entropies of the entangled states after reading held-out text ({count(result['text']['tokens'])} tokens, "
        f"{result['text']['source']}), in nats, per head. The ceiling is log min(m, V); Page's value is the mean of "
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
        figure = _entropy_chart(f"Entropy per layer and head, {name}", largest[arm]["layers"])
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
    return Chart(_spectrum_chart(title, spectra), Table(title, columns, rows, folded=True))


def _by_position(models: dict[str, dict[str, Any]]) -> Chart:
    series = {arm: (model["positions"], model["entropy_by_position"]) for arm, model in models.items()}
    every = sorted({x for positions, _ in series.values() for x in positions})
    shown = every[:: 1 + len(every) // 13]
    found = {arm: dict(zip(x, y, strict=True)) for arm, (x, y) in series.items()}
    rows = [[arm, *(digits(entropy.get(x), 3) for x in shown)] for arm, entropy in found.items()]
    title = "Mean entropy of all heads by position"
    figure = line_chart(title, series, "tokens read", "von Neumann entropy (nats)", markers=True, log="x")
    table = Table("Mean entropy by tokens read (nats)", ["arm", *map(count, shown)], rows, folded=True)
    return Chart(figure, table)


def _entropies(head: dict[str, Any]) -> list[str]:
    """Mean and standard deviation where the quantity varies, else its value."""
    return ["{:.3f} ± {:.3f}".format(*head[k]) if isinstance(head[k], list) else digits(head[k], 3) for k in KINDS]


def _entropy_chart(title: str, layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Entropies of every head of a model against ceiling and Page; `layers` as in entanglement.json."""
    heads = [(str(layer["layer"]), head) for layer in layers for head in layer["heads"]]
    names = [f"layer {layer}, head {head['head']}" for layer, head in heads]
    edges = [i + side for i in range(len(heads)) for side in (-0.5, 0.5)]
    marks: list[Mark] = [
        Line(edges, [head[key] for _, head in heads for _ in (0, 1)], name, Style(GREY.colour, dash=dash))
        for key, name, dash in (("ceiling", "ceiling log min(m, V)", "solid"), ("page", "Page, random state", "dash"))
    ]
    for i, key, name in ((3, "von_neumann", "von Neumann"), (4, "renyi2", "Rényi-2")):
        mean, deviation = ([head[key][k] for _, head in heads] for k in (0, 1))
        lo = [a - b for a, b in zip(mean, deviation, strict=True)]
        hi = [a + b for a, b in zip(mean, deviation, strict=True)]
        marks.append(Points(list(range(len(heads))), mean, name, style(i), names, lo, hi))
    first = {layer: float(i) for i, (layer, _) in reversed(list(enumerate(heads)))}
    x = Axis("layer (its heads from left to right)", ticks={i: layer for layer, i in first.items()})
    return Figure(title, [Panel(x, Axis("entropy (nats)", low=0.0), marks)])


def _spectrum_chart(title: str, spectra: Mapping[str, Sequence[float]]) -> Figure:
    """Schmidt probabilities p_i on a log axis, one line each; a flat line would be maximal entanglement."""
    marks = [
        Line(list(range(1, len(p) + 1)), [v if v > NOISE else None for v in p], name, style(i), markers=True)
        for i, (name, p) in enumerate(spectra.items())
    ]
    step = 1 + max(map(len, spectra.values())) // 8
    ticks = {float(i): str(i) for i in range(1, 1 + max(map(len, spectra.values())), step)}
    return Figure(title, [Panel(Axis("Schmidt index i", ticks=ticks), Axis("mean probability p_i", log=True), marks)])

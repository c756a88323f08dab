"""The provenance of the page: settings, environment and corpus of the study, and every run record."""

from __future__ import annotations

from typing import Any

from qies.analyses.formatting import count, digits, mebibytes, show, si
from qies.analyses.parts import Section, Table
from qies.analyses.records import Run, Study, listed, mapping


def _facts(caption: str, facts: dict[str, Any], folded: bool = False) -> Table:
    rows = [[str(key).replace("_", " "), show(value)] for key, value in facts.items()]
    return Table(caption, ["field", "value"], rows, folded=folded, words=True)


def settings(study: Study) -> Section:
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


def data(study: Study) -> Section | None:
    manifest = study.part("data/manifest")
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


def runs(study: Study) -> Section:
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

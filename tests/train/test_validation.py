"""Held-out loss by source, against one forward pass and sums by hand; and training on a built corpus of records."""

import json
import math
import random
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from qies import records
from qies.cli.train import _print_record
from qies.config import DataConfig, RunConfig, TrainConfig, save
from qies.data.builder.pipeline import build_shards
from qies.data.builder.tokenizer import save_tokenizer, train_tokenizer
from qies.data.locate import locate
from qies.data.manifest import Build, ValOverlap
from qies.data.shards import Shards, open_shards
from qies.data.tokenizer import END, token_byte_lengths
from qies.errors import UserError
from qies.train.loop import build_model, train
from qies.train.validation import _nats, held_out_loss

TINY = TrainConfig(seq_len=32, batch_size=4)
WORDS = {"law": ["court", "judge", "appeal", "law"], "sea": ["ship", "wave", "storm", "keel"], "one": ["alone"]}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Three sources, documents of 5 to 40 words, and a tokenizer whose end is not token 0."""
    root, rng = tmp_path_factory.mktemp("sources"), random.Random(0)
    for name, words in WORDS.items():
        (root / "text" / name).mkdir(parents=True)
        lines = (f"{i} " + " ".join(rng.choices(words, k=rng.randint(5, 40))) for i in range(120))
        (root / "text" / name / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in lines))
    tokenizer = train_tokenizer([" ".join(map(" ".join, WORDS.values())) * 30], 290)
    tokenizer.add_special_tokens(["<|stop|>"])
    save_tokenizer(tokenizer, root / "tokenizer", "<|stop|>")
    build_shards(
        DataConfig(str(root / "text"), val_fraction=0.2), root / "data", build=Build(tokenizer=str(root / "tokenizer"))
    )
    return root / "data"


@pytest.fixture(scope="module")
def config(built: Path) -> RunConfig:
    return locate(RunConfig("transformer", "20k", 32 * 4 * 20, train=TINY), str(built))


def _by_hand(model, shards: Shards, seq_len: int, targets: int, names: list) -> dict[Any, tuple[float, int, int]]:
    """nats, tokens and bytes of what has the same name (one for each document), window by window and token by token."""
    ids = np.asarray(shards.tokens("val")).astype(np.int64)[: targets + 1]
    end = shards.tokenizer().eos_token_id
    lengths = token_byte_lengths(shards.tokenizer())
    document, sums = 0, {}
    for start in range(0, targets, seq_len):
        window = torch.from_numpy(ids[start : start + seq_len + 1])
        with torch.no_grad():
            losses = -model(window[None, :-1]).logits.double().log_softmax(-1)[0]
        for i, goal in enumerate(window[1:].tolist()):
            document += goal == end
            nats, tokens, size = sums.get(names[document], (0.0, 0, 0))
            sums[names[document]] = nats + losses[i, goal].item(), tokens + 1, size + int(lengths[goal])
    return sums


@pytest.mark.parametrize("part", [1, 2])
def test_loss_by_source_is_the_sum_over_its_documents(built: Path, config: RunConfig, part: int) -> None:
    shards = open_shards(built)
    targets = (len(shards.tokens("val")) - 1) // part
    model = build_model(config, shards.manifest.vocab_size).eval()
    found = held_out_loss(
        model, shards, seq_len=32, batch_size=3, max_tokens=0 if part == 1 else targets, precision=nullcontext
    )
    sources = [run.source for run in shards.manifest.val_order for _ in range(run.documents)]
    expected = _by_hand(model, shards, 32, targets, sources)
    assert found["val_by_source"].keys() == expected.keys() and len(expected) >= 2
    for name, (nats, tokens, size) in expected.items():
        own = found["val_by_source"][name]
        assert (own["val_tokens"], own["val_bytes"]) == (tokens, size)
        assert own["val_loss"] == pytest.approx(nats / tokens, rel=1e-5)
        assert own["val_bpb"] == pytest.approx(nats / size / math.log(2), rel=1e-5)
    nats, tokens, size = (sum(column) for column in zip(*expected.values(), strict=True))
    assert (found["val_tokens"], found["val_bytes"]) == (tokens, size)
    assert found["val_loss"] == pytest.approx(nats / tokens, rel=1e-5)


@pytest.mark.parametrize("part", [1, 2])
def test_loss_on_the_clean_part_is_the_sum_over_its_documents(built: Path, config: RunConfig, part: int) -> None:
    shards = open_shards(built)
    clean = shards.manifest.overlap.clean
    assert 0 < sum(clean) < len(clean) == shards.manifest.val.documents  # documents of one word repeat one another
    targets = (len(shards.tokens("val")) - 1) // part
    model = build_model(config, shards.manifest.vocab_size).eval()
    options = {"seq_len": 32, "batch_size": 3, "max_tokens": targets, "precision": nullcontext}
    found = held_out_loss(model, shards, **options)
    nats, tokens, size = _by_hand(model, shards, 32, targets, list(clean))[True]
    assert found["val_tokens_clean"] == tokens < found["val_tokens"]
    assert found["val_loss_clean"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["val_bpb_clean"] == pytest.approx(nats / size / math.log(2), rel=1e-5)
    for row in (ValOverlap(), ValOverlap((9,) * len(clean), (9,) * len(clean))):  # not measured; none of it clean
        other = held_out_loss(model, Shards(built, replace(shards.manifest, overlap=row)), **options)
        assert not [key for key in other if "clean" in key]
        assert other["val_loss"] == pytest.approx(found["val_loss"], rel=1e-12)


@torch.no_grad()
def test_processes_share_a_batch_by_source(built: Path, config: RunConfig) -> None:
    model = build_model(config, open_shards(built).manifest.vocab_size).eval()
    rng = np.random.default_rng(0)
    for rows in (5, 1):  # of one row the second process has none
        batch, source = rng.integers(0, 290, (rows, 17)), rng.integers(0, 3, (rows, 16))
        one, *two = (
            _nats(model, batch, source, 3, nullcontext, SimpleNamespace(rank=r, size=n, device=torch.device("cpu")))
            for r, n in ((0, 1), (0, 2), (1, 2))
        )
        assert sum(two) == pytest.approx(one, rel=1e-5)


def test_training_on_a_build_keeps_its_tokenizer_and_reports_sources(built: Path, config, tmp_path, capsys) -> None:
    record = train(config, open_shards(built), tmp_path / "run")
    assert record.status == "done"
    assert record.metrics["val_by_source"].keys() == {"law", "one", "sea"}
    assert record.metrics["val_loss_clean"] > record.metrics["val_loss"]
    assert record.data["val_overlap"] == open_shards(built).manifest.overlap.share
    _print_record(record, tmp_path / "run")
    said = " ".join(capsys.readouterr().out.split())
    assert f"nats per token ({record.metrics['val_loss_clean']:.4f} on the clean part)" in said
    one = record.metrics["val_by_source"]["one"]["val_bpb"]
    assert one < record.metrics["val_bpb"]  # the source of one word is the easiest
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    settings = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert saved.eos_token == "<|stop|>" and saved.eos_token_id == settings["eos_token_id"] == 290 != 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_of_torchrun_report_the_sources_as_one_does(built: Path, config, tmp_path: Path) -> None:
    config = replace(config, train=replace(config.train, precision="fp32", muon_precision="fp32"))
    one = train(config, open_shards(built), tmp_path / "one").metrics["val_by_source"]
    save(config, tmp_path / "run.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
    command += ["qies", "train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    record = records.read(tmp_path / "two")
    two = record.metrics["val_by_source"]
    assert record.processes == 2 and two.keys() == one.keys() == WORDS.keys()
    for name, own in one.items():
        assert (two[name]["val_tokens"], two[name]["val_bytes"]) == (own["val_tokens"], own["val_bytes"])
        assert two[name]["val_loss"] == pytest.approx(own["val_loss"], abs=1e-4)  # 20 steps lie between


def test_another_tokenizer_is_refused_before_training(built: Path, config, tmp_path: Path) -> None:
    source = open_shards(built).manifest.config.source
    tokenizer = train_tokenizer(["court judge ship wave"] * 30, 290)
    tokenizer.add_special_tokens(["<|stop|>"])
    save_tokenizer(tokenizer, tmp_path / "tokenizer", END)
    build_shards(
        DataConfig(source, val_fraction=0.2), tmp_path / "data", build=Build(tokenizer=str(tmp_path / "tokenizer"))
    )
    folder = tmp_path / "run"
    train(config, open_shards(built), folder)
    record = records.read(folder)
    with pytest.raises(UserError, match=r"trained with another tokenizer than that of .*data; give another --out"):
        train(config, open_shards(tmp_path / "data"), folder)
    assert records.read(folder) == record

"""Prefill and decoding timed: the same cases for every arm, caches of the stated size, refusals before any work."""

import json

import pytest
import torch

from qies import presets
from qies.accounting.cache import cache_bytes
from qies.accounting.flops import decode_flops, prefill_flops
from qies.bench import inference
from qies.bench.inference import Case, bench_inference, filled_cache
from qies.cli import VERBS
from qies.errors import UserError
from qies.model import QiesCache, QiesConfig, QiesForCausalLM
from qies.terminal import run

ARMS = ("qies", "transformer", "gpt2")


def call(*argv: str) -> int:
    return run(VERBS, list(argv), "")


def held(cache):
    """Shapes and dtypes of every tensor of a cache."""
    found = []
    for layer in cache.layers:
        tensors = [*layer.conv_states.values(), *layer.recurrent_states.values()]
        tensors += [getattr(layer, "keys", None), getattr(layer, "values", None)]
        found.append([None if x is None else (tuple(x.shape), x.dtype) for x in tensors])
    return found


@torch.no_grad()
@pytest.mark.parametrize("context", [3, 8, 50])
@pytest.mark.parametrize("arm", [*presets.ARMS])
def test_a_synthetic_cache_is_shaped_like_that_of_a_prefill(arm, context):
    values = presets.settings(arm, "100k", 64)
    model = QiesForCausalLM(QiesConfig(**values)).eval()
    real, filled = QiesCache(model.config), filled_cache(model, 2, context)
    model(torch.zeros(2, context, dtype=torch.long), past_key_values=real)
    assert held(filled) == held(real) and filled.get_seq_length() == context
    assert filled.state_bytes() == 2 * sum(cache_bytes(values, context, itemsize=4).values())
    after = model(torch.zeros(2, 1, dtype=torch.long), past_key_values=filled).logits
    assert after.isfinite().all() and filled.get_seq_length() == context + 1


@pytest.mark.parametrize(("what", "tokens"), [("prefill", 2 * 40), ("decode", 2)])
def test_every_arm_is_timed_on_the_same_case(what, tokens):
    [result] = bench_inference(what, ["100k:2x40"], ARMS, rounds=2, vocab_size=64)
    assert list(result.seconds) == list(ARMS) and result.subject == "qies" and result.rounds == 2
    assert result.facts == {"size": "100k", "batch": 2, "context": 40, "tokens": tokens, "dtype": "float32"}
    for arm in ARMS:
        values = presets.settings(arm, "100k", 64)
        costs = result.costs[arm]
        assert (
            costs["cache_bytes"]
            == costs["cache_bytes_counted"]
            == 2 * sum(cache_bytes(values, 40, itemsize=4).values())
        )
        flops = (prefill_flops if what == "prefill" else decode_flops)(values, 40)
        assert costs["flops"] == 2 * sum(flops.values())
        assert 0 < result.seconds[arm] <= result.p90[arm]
        assert result.tokens_per_second[arm] == tokens / result.seconds[arm]


def test_cases_name_size_batch_and_context():
    assert Case.parse("400k:1024") == Case("400k", 1, 1024)
    assert Case.parse("1.5m:8x32768") == Case("1.5m", 8, 32768)
    for cases in inference.CASES.values():
        assert len({Case.parse(case) for case in cases}) == len(cases)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--cases", "400k"], "'400k' is not SIZE:T or SIZE:BxT"),
        (["--cases", "400k:0"], "is not SIZE:T"),
        (["--cases", "400k:0x8"], "is not SIZE:T"),
        (["--cases", "5:8"], "Unknown size '5'"),
        (["--cases", "400k:8", "--arms", "qise"], "Did you mean 'qies'"),
        (["--cases", "400k:8", "--arms", "qies", "qies"], "--arms names 'qies' twice"),
        (["--cases", "400k:8", "--arms"], "--arms"),
        (["--cases", "400k:2000", "--arms", "qies", "gpt2"], "beyond the 1024 positions that arm gpt2 learns"),
        (["--cases", "400k:1000x1000000000"], "GiB for the caches of 3 arms"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--out", "/absent/out.json"], "does not exist"),
    ],
)
@pytest.mark.parametrize("what", ["prefill", "decode"])
def test_a_bad_case_is_one_line_before_any_work(what, argv, words, capsys, monkeypatch):
    monkeypatch.setattr(inference, "QiesForCausalLM", lambda *_: pytest.fail("worked before it asked"))
    assert call("bench", what, *argv) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and words in captured.err and captured.out == ""


def test_decoding_may_not_run_out_of_learned_positions():
    bench_inference("prefill", ["50k:1024"], ["gpt2"], rounds=1, vocab_size=64)
    with pytest.raises(UserError, match="takes 1027 tokens, beyond the 1024"):
        bench_inference("decode", ["50k:1020"], ["gpt2"], rounds=5, vocab_size=64)


def test_the_json_and_the_table_say_the_same(capsys, tmp_path):
    out = tmp_path / "decode.json"
    argv = ["bench", "decode", "--cases", "100k:40", "--arms", "qies", "transformer", "--rounds", "1"]
    assert call(*argv, "--out", str(out), "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text()) and printed["what"] == "decode" and printed["threads"] == 1
    [case] = printed["cases"]
    assert printed["clock"] == "wall"
    assert set(case["tokens_per_second"]) == {"qies", "transformer"}
    assert call(*argv) == 0
    text = capsys.readouterr().out
    assert f"{case['costs']['qies']['cache_bytes'] / 2**20:.2f}" in text and "tokens/s" in text

"""The bench: baselines in turn, ratios round by round, and honest baselines."""

import time

import pytest

from qies import presets
from qies.accounting.flops import training_flops_per_token
from qies.bench import baselines, threads, timing
from qies.errors import UserError


def test_ratios_are_those_of_each_round_and_cancel_drift(monkeypatch):
    now = [0.0]
    monkeypatch.setitem(timing.CLOCKS, "wall", lambda: now[0])
    order, drift = [], [1.0]

    def baseline(name, cost):
        def call():
            order.append(name)
            now[0] += cost * drift[0]
            if name == "b":
                drift[0] *= 2  # the machine slows down from round to round

        return call

    result = timing.compare("case", {"a": baseline("a", 1.0), "b": baseline("b", 3.0)}, rounds=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert result.ratio == {"a": 1.0, "b": pytest.approx(3.0)}
    assert result.seconds == {"a": 4.0, "b": 12.0}
    assert result.p90 == {"a": pytest.approx(7.2), "b": pytest.approx(21.6)}  # of 2, 4, 8 and 6, 12, 24
    assert result.quartiles["b"] == (pytest.approx(3.0), pytest.approx(3.0))
    assert result.tokens_per_second == {}


def test_quartiles_are_of_the_ratios_and_rates_of_the_medians(monkeypatch):
    now, costs = [0.0], iter([1.0, 1.0, 2.0, 4.0, 1.0, 3.0, 2.0, 8.0, 1.0, 5.0])  # ratios 1, 2, 3, 4, 5
    monkeypatch.setitem(timing.CLOCKS, "wall", lambda: now[0])

    def call():
        now[0] += next(costs)

    result = timing.compare("case", {"a": call, "b": call}, rounds=5, warmup=0, facts={"tokens": 12})
    assert result.ratio["b"] == 3.0 and result.quartiles["b"] == (2.0, 4.0)
    assert result.tokens_per_second == {"a": 12.0, "b": 3.0} == result.to_dict()["tokens_per_second"]


def test_the_processors_clock_does_not_count_waiting():
    wall, cpu = (
        timing.compare("case", {"a": lambda: time.sleep(0.03)}, rounds=2, clock=clock).seconds["a"]
        for clock in ("wall", "cpu")
    )
    assert wall >= 0.03 > 0.02 > cpu


def test_every_op_baseline_runs_forward_and_backward():
    found = baselines.op_baselines(1, 70, 2, 8, 8)
    assert set(found) == {"entangle", "entangle, no phase", "transformers gated delta rule", "causal SDPA"}
    for call in found.values():
        call()


def test_foreign_models_have_the_same_shape_and_about_the_same_size():
    values = presets.settings("qies", "400k", 512)
    for name, model in baselines.foreign_models("400k", 512, 512).items():
        config = model.config
        assert (config.hidden_size, config.num_hidden_layers) == (values["hidden_size"], values["num_hidden_layers"])
        body = sum(p.numel() for n, p in model.named_parameters() if "wte" not in n and "embed" not in n
                   and "wpe" not in n and "lm_head" not in n)  # fmt: skip
        assert body == pytest.approx(400_000, rel=0.15), name


def test_a_training_step_of_every_baseline_runs():
    [result] = baselines.bench_train([("50k", 16)], rounds=1, vocab_size=300, tokens=32)
    assert len(result.seconds) == 6 and min(result.seconds.values()) > 0
    values = presets.settings("gpt2", "50k", 300)
    assert result.costs["gpt2 arm"]["flops"] == 32 * training_flops_per_token(values, 16)
    assert result.facts["tokens"] == 32 and result.facts["batch"] == 2


def test_arms_that_learn_no_such_positions_are_not_trained(monkeypatch):
    monkeypatch.setattr(baselines, "own_step", lambda arm, *_: list)
    monkeypatch.setattr(baselines, "foreign_step", lambda *_: list)
    short, long = baselines.bench_train([("50k", 1024), ("50k", 1025)], rounds=1, vocab_size=300, tokens=8)
    assert set(short.seconds) - set(long.seconds) == {"gpt2 arm"}


@pytest.mark.parametrize(
    ("what", "case"), [("op", "8x512"), ("op", "1x2x3x4x5"), ("op", "axbxcxdxe"), ("train", "400k"), ("train", "9:9")]
)
def test_a_bad_case_is_named(what, case):
    with pytest.raises(UserError):
        baselines.run(what, [case], 1)


@pytest.mark.parametrize("case", ["2", "2x", "0x1", "axb"])
def test_a_bad_case_of_threads_is_named(case):
    with pytest.raises(UserError, match=f"'{case}' is not RUNSxTHREADS"):
        threads.bench_threads([case])


@pytest.mark.slow
def test_runs_side_by_side_take_the_same_steps_in_all():
    small = {"rounds": 1, "size": "50k", "seq_len": 8, "batch": 2, "steps": 1}
    [result] = threads.bench_threads(["2x1", "1x2"], **small)
    assert list(result.seconds) == ["2 runs x 1 threads", "1 runs x 2 threads"]
    assert "32 tokens in all" in result.case and min(result.seconds.values()) > 0

"""The bench: baselines in turn, ratios round by round, and honest baselines."""

import pytest

from qies import presets
from qies.bench import baselines, threads, timing
from qies.errors import UserError


def test_ratios_are_those_of_each_round_and_cancel_drift(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
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
    assert len(result.seconds) == 5 and min(result.seconds.values()) > 0


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

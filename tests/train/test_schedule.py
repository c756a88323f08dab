"""Warm-up, stable, decay in closed form."""

from qies.train.schedule import warmup_stable_decay


def test_phases():
    factors = [warmup_stable_decay(s, 100, 0.1, 0.2) for s in range(100)]
    assert factors[:10] == [(s + 1) / 10 for s in range(10)]
    assert factors[10:80] == [1.0] * 70
    assert factors[80:] == [(100 - s) / 21 for s in range(80, 100)]
    assert factors[-1] > 0


def test_no_warmup_and_no_decay_is_constant():
    assert {warmup_stable_decay(s, 7, 0.0, 0.0) for s in range(7)} == {1.0}


def test_one_step_is_taken_at_a_positive_rate():
    assert warmup_stable_decay(0, 1, 0.02, 0.4) > 0

"""Warm-up, stable, decay in closed form."""

import pytest

from qies.config import RunConfig, TrainConfig
from qies.errors import UserError
from qies.train.schedule import warmup_stable_decay


def test_phases():
    factors = [warmup_stable_decay(s, 100, 10, 20) for s in range(100)]
    assert factors[:10] == [(s + 1) / 10 for s in range(10)]
    assert factors[10:80] == [1.0] * 70
    assert factors[80:] == [(100 - s) / 21 for s in range(80, 100)]
    assert factors[-1] > 0


def test_no_warmup_and_no_decay_is_constant():
    assert {warmup_stable_decay(s, 7, 0, 0) for s in range(7)} == {1.0}


def test_one_step_is_taken_at_a_positive_rate():
    assert warmup_stable_decay(0, 1, 0, 0) > 0


def test_before_the_decay_the_budget_does_not_matter():
    longer = [warmup_stable_decay(s, 200, 10, 80) for s in range(60)]
    assert longer == [warmup_stable_decay(s, 100, 10, 40) for s in range(60)]


def test_steps_of_a_configuration():
    train = TrainConfig(seq_len=10, batch_size=10, warmup=0.1, decay=0.4)
    run = RunConfig(tokens=10_000, train=train)
    assert (run.steps, run.warmup_steps, run.decay_steps, run.decay_start) == (100, 10, 40, 60)


def test_warmup_in_tokens_is_free_of_the_budget():
    train = TrainConfig(seq_len=10, batch_size=10, warmup_tokens=700, milestones=(3,), branches=(5_000, 8_000))
    assert RunConfig(tokens=10_000, train=train).warmup_steps == 7
    assert RunConfig(tokens=20_000, train=train).warmup_steps == 7
    assert RunConfig(tokens=10_000, train=train).milestones == {3, 30, 48}


@pytest.mark.parametrize(
    "values", [{"branches": (1_000,)}, {"branches": (20_000,), "warmup_tokens": 300}, {"warmup_tokens": 9_000}]
)
def test_branches_that_cannot_be_are_refused(values):
    with pytest.raises(UserError):
        RunConfig(tokens=10_000, train=TrainConfig(seq_len=10, batch_size=10, **values))

"""Loss spikes against a robust scatter, in closed form."""

from qies.train.loss_spikes import Spikes


def fed(losses):
    spikes = Spikes()
    return spikes, [spikes.see(loss) for loss in losses]


def test_the_height_is_in_sigmas_of_the_median_absolute_deviation():
    quiet = [2.0, 2.1] * 10  # median 2.05, deviations all 0.05
    spikes, rows = fed([*quiet, 2.05 + 7 * 1.4826 * 0.05])
    assert rows[:-1] == [{}] * 20 and rows[-1] == {"spike": 7.0} and spikes.count == 1


def test_below_six_sigma_or_downwards_is_none():
    quiet = [2.0, 2.1] * 10
    assert fed([*quiet, 2.05 + 5.9 * 1.4826 * 0.05])[0].count == 0
    assert fed([*quiet, 0.0])[0].count == 0


def test_a_short_window_and_skipped_steps_say_nothing():
    assert fed([*[2.0, 2.1] * 9, 99.0])[0].count == 0
    assert fed([*[2.0, 2.1] * 9, None, None, 99.0])[0].count == 0


def test_a_spike_is_judged_by_the_last_hundred():
    _, rows = fed([*[5.0, 5.1, 5.2, 5.3] * 25, *[2.0, 2.1, 2.2, 2.3] * 25, 4.0])
    assert "spike" in rows[-1]
    assert not any(rows[:-1])

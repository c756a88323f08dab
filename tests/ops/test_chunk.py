"""The chunk form against the recurrence: outputs, final state and all seven gradients."""

import pytest
import torch
from entangle_cases import assert_close, evaluate, inputs

from qies.errors import UserError
from qies.ops.entangle import entangle, entangle_chunk, entangle_naive

FORMS = [("real", False), ("complex", False), ("complex", True)]


@pytest.mark.parametrize("T", [1, 2, 31, 63, 64, 65, 130])
@pytest.mark.parametrize("mode,disc", FORMS)
@pytest.mark.parametrize("channels", [False, True])
def test_chunk_is_the_recurrence(T, mode, disc, channels):
    B, H, phase, state = [(1, 1, True, True), (3, 1, False, True), (1, 3, True, False)][T % 3]
    args = inputs(B, T, H, 3, 4, mode=mode, disc=disc, channels=channels, phase=phase, state=state, seed=T)
    expected = evaluate(entangle_naive, args, mode)
    assert_close(evaluate(entangle_chunk, args, mode), expected, 1e-10)
    assert_close(evaluate(entangle_chunk, args, mode, torch.float32), expected, 1e-5)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"mode": "imaginary"}, "mode 'imaginary'"),
        ({"backend": "fla"}, "backend 'fla' is not available"),
        ({"backend": "step"}, "T = 8"),
        ({"theta": torch.zeros(1, 8, 1, 6)}, "theta is"),
        ({"state": torch.zeros(1, 1, 3, 4)}, "state is"),
        ({"beta": torch.zeros(1, 8, 1, 2)}, "beta is"),
        ({"q": torch.zeros(1, 8, 1, 5)}, "even last axis"),
        ({"q": torch.zeros(1, 0, 1, 6)}, "T >= 1"),
    ],
)
def test_bad_input_is_one_line(change, message):
    names = ("q", "k", "v", "beta", "log_alpha", "theta", "state")
    args = dict(zip(names, inputs(), strict=True)) | change
    with pytest.raises(UserError, match=message) as error:
        entangle(**args)
    assert "\n" not in str(error.value)

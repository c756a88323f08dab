"""The induction score of models whose score is known, and when it is taken."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qies.config import INDUCTION_ONSET as ONSET
from qies.train.induction import due, induction_gain, onset


class Copier(nn.Module):
    """Uniform over the vocabulary, but with probability `certainty` for what followed the last token before."""

    def __init__(self, vocab_size: int, certainty: float) -> None:
        super().__init__()
        self.config, self.certainty = SimpleNamespace(vocab_size=vocab_size), certainty

    def forward(self, ids, *, shift_labels, **kwargs):
        losses = []
        for row, goals in zip(ids.tolist(), shift_labels.tolist(), strict=True):
            followed: dict[int, int] = {}
            for at, (token, goal) in enumerate(zip(row, goals, strict=True)):
                copied = followed.get(token) == goal
                if goal != -100:
                    losses.append(-math.log(self.certainty) if copied else math.log(self.config.vocab_size))
                if at + 1 < len(row):
                    followed[token] = row[at + 1]
        return SimpleNamespace(loss=torch.tensor(sum(losses) / len(losses), dtype=torch.float64))


@pytest.mark.parametrize("certainty", [1.0, 0.5, 1e-6])
def test_the_gain_of_a_model_that_copies_is_known(certainty):
    model = Copier(10**6, certainty).train()  # so many tokens that none stands twice in a segment
    gain = induction_gain(model, seq_len=512, precision=nullcontext)
    assert gain == pytest.approx(math.log(10**6) + math.log(certainty), abs=1e-9)
    assert model.training


def test_no_row_is_longer_than_the_context():
    class Watched(Copier):
        def forward(self, ids, **kwargs):
            assert ids.shape[1] <= 48
            return super().forward(ids, **kwargs)

    gain = induction_gain(Watched(10**6, 1.0), seq_len=48, precision=nullcontext)
    assert gain == pytest.approx(math.log(10**6), abs=1e-9)


def test_taking_it_moves_no_random_number():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    induction_gain(Copier(97, 0.5), seq_len=512, precision=nullcontext)
    assert torch.equal(before, torch.get_rng_state())


def test_the_onset_is_where_the_gain_stays_above():
    rows = [{"tokens": t, "loss": 1.0, **({} if g is None else {"induction": g})}
            for t, g in ((1, 0.0), (2, ONSET), (3, 0.4), (4, None), (5, ONSET + 1), (6, None), (7, ONSET))]  # fmt: skip
    assert onset(rows) == 5
    assert onset(rows[:3]) is None and onset([]) is None


def test_it_is_due_four_times_an_octave_whatever_the_budget():
    for step in (2048, 4096):
        times = [t for t in range(step, 2**21 + 1, step) if due(t, step)]
        assert times[0] == 2**16 and len(times) == 1 + 4 * 5
        assert all(a in times for a in (2**17, 2**18, 2**20, 2**21))
    assert [t for t in range(2**19, 2**22, 2**19) if due(t, 2**19)] == [2**19 * i for i in (1, 2, 3, 4, 5, 6, 7)]

"""Linear probes against cases whose answer is known."""

import numpy as np
import pytest
import torch

from qies.errors import UserError
from qies.model import QiesConfig, QiesForCausalLM
from qies.probes.linear import RIDGE, accuracy, fit_probe, hidden_states, probe_layers


def test_the_closed_form_of_one_feature():
    """x = -1, 1 in equal numbers and two classes: slope 0.5 / (1 + ridge) per class, share 1/2."""
    x, y = np.array([[-1.0], [1.0]] * 5), np.array([0, 1] * 5)
    weights = fit_probe(x, y, 2)
    slope = 0.5 / (1 + RIDGE)
    assert weights == pytest.approx(np.array([[-slope, slope], [0.5, 0.5]]), abs=1e-9)
    assert accuracy(weights, x, y) == 1


def test_the_unit_of_a_feature_does_not_matter():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 5)), rng.integers(0, 3, 200)
    scale = np.array([1, 1e3, 1e-3, 7, 1])
    first, second = fit_probe(x, y, 3), fit_probe(x * scale, y, 3)
    assert second[:-1] * scale[:, None] == pytest.approx(first[:-1], rel=1e-6, abs=1e-9)


def test_what_is_written_into_the_states_is_found_and_a_token_label_is_not_selective():
    rng = np.random.default_rng(1)
    ids = torch.from_numpy(rng.integers(0, 6, (40, 30)))
    labels = torch.from_numpy(rng.integers(0, 4, (40, 30)))
    noise = torch.from_numpy(rng.normal(size=(40, 30, 12)).astype(np.float32))
    tokens = torch.cat([torch.nn.functional.one_hot(ids, 6).float(), torch.zeros(40, 30, 6)], -1)
    written = noise.clone()
    written[..., :4] += 9 * torch.nn.functional.one_hot(labels, 4)
    states = torch.stack([noise, tokens, written])
    blind, lexical, found = probe_layers(states, ids, labels, 4)
    assert blind["accuracy"] == pytest.approx(0.25, abs=0.06) and abs(blind["selectivity"]) < 0.12
    assert lexical["control"] == 1 and lexical["selectivity"] < -0.6
    assert found["accuracy"] > 0.99 and found["selectivity"] > 0.6 and found["n"] == 600
    [on_tokens] = probe_layers(tokens[None], ids, ids, 6)
    assert on_tokens["accuracy"] == on_tokens["control"] == 1 and on_tokens["selectivity"] == 0


def test_positions_that_are_not_asked_do_not_count():
    rng = np.random.default_rng(2)
    ids, labels = torch.zeros(8, 10, dtype=torch.long), torch.full((8, 10), -1)
    labels[:, 3] = torch.arange(8) % 2
    states = torch.from_numpy(rng.normal(size=(1, 8, 10, 3)).astype(np.float32))
    states[0, :, 3, 0] = 5.0 * (torch.arange(8) % 2)
    [row] = probe_layers(states, ids, labels, 2)
    assert row["n"] == 4 and row["accuracy"] == 1 and row["majority"] == 0.5


def test_hidden_states_are_those_that_the_head_reads():
    torch.manual_seed(0)
    model = QiesForCausalLM(
        QiesConfig(vocab_size=11, hidden_size=16, num_attention_heads=2, head_dim=8, intermediate_size=8)
    )
    ids = torch.randint(0, 11, (2, 7))
    states = hidden_states(model, ids)
    assert states.shape == (model.config.num_hidden_layers + 1, 2, 7, 16)
    expected = model.model(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(states[-1], expected.detach())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fit_probe(np.zeros((3, 2)), np.array([0, 1]), 2), "do not fit"),
        (lambda: fit_probe(np.zeros((2, 2)), np.array([0, 2]), 2), "0 to 1"),
        (
            lambda: probe_layers(torch.zeros(1, 1, 4, 2), torch.zeros(1, 4).long(), torch.zeros(1, 4).long(), 2),
            "both halves",
        ),
    ],
)
def test_bad_input_is_one_line(call, words):
    with pytest.raises(UserError, match=words):
        call()

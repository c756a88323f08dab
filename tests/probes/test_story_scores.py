"""Questions of stories: what is scored, against probabilities computed one choice at a time."""

import numpy as np
import pytest
import torch

from qies.data.sources.stories import KINDS
from qies.errors import UserError
from qies.model import QiesConfig, QiesForCausalLM
from qies.probes.stories import choice_log_probabilities, score_stories


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = QiesConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_attention_heads=2, head_dim=8, intermediate_size=16
    )
    model = QiesForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_choices_by_the_probability_of_whole_texts(model, tokenizer, kind):
    """Differences between choices are those of the log-probabilities of whole texts, computed alone and unpadded."""
    questions = [KINDS[kind](np.random.default_rng(i), 3 + i).questions[0] for i in range(4)]
    for question, got in zip(questions, choice_log_probabilities(model, tokenizer, questions, 5), strict=True):
        whole = []
        for choice in question.choices:
            ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(question.text + choice).input_ids]])
            with torch.no_grad():
                logs = model(ids).logits[0, :-1].double().log_softmax(-1)
            whole.append(logs.gather(1, ids[0, 1:, None]).sum().item())
        assert got - got[0] == pytest.approx(np.array(whole) - whole[0], abs=1e-4)


def test_scores_of_a_model_that_knows(model, tokenizer, monkeypatch):
    from qies.probes import stories

    def told(share):
        def logs(model, tokenizer, questions, batch_size):
            rows = [np.array([c == q.answer for c in q.choices], float) for q in questions]
            return [np.log(share * row + (1 - share) / len(row)) for row in rows]

        return logs

    monkeypatch.setattr(stories, "choice_log_probabilities", told(1 - 1e-12))
    known = score_stories(model, tokenizer, "holders", 4, count=50)
    assert known["accuracy"] == 1 and known["stderr"] == 0 and known["resolution"] == 0.02
    assert known["log_probability"] == pytest.approx(0, abs=1e-9) and known["brier"] == pytest.approx(0, abs=1e-9)
    monkeypatch.setattr(stories, "choice_log_probabilities", told(0.0))
    unknown = score_stories(model, tokenizer, "holders", 4, count=400)
    assert unknown["chance"] == 0.25 and unknown["log_probability"] == pytest.approx(np.log(0.25))
    assert unknown["brier"] == pytest.approx(3 * 0.25**2 + 0.75**2)
    assert unknown["accuracy"] == pytest.approx(0.25, abs=0.1)  # the first of equal choices


def test_an_untrained_model_is_at_chance(model, tokenizer):
    result = score_stories(model, tokenizer, "holders", 2, count=60)
    assert abs(result["accuracy"] - 0.25) < 4 * max(result["stderr"], 0.05)
    assert result == score_stories(model, tokenizer, "holders", 2, count=60, batch_size=7) | {
        key: pytest.approx(result[key], abs=1e-5) for key in ("log_probability", "brier")
    }


@pytest.mark.parametrize(
    ("values", "words"),
    [(("holder", 3), "Did you mean 'holders'"), (("holders", 0), "events is 0")],
)
def test_bad_input_is_one_line(model, tokenizer, values, words):
    with pytest.raises(UserError, match=words):
        score_stories(model, tokenizer, *values)

"""Probes of a checkpoint, on a model that does exactly what is asked and on one that knows nothing."""

import math
from types import SimpleNamespace

import pytest
import torch

from qies.cli import VERBS
from qies.data.sources.stories import KINDS
from qies.errors import UserError
from qies.model import QiesConfig, QiesForCausalLM
from qies.probes.checkpoint import _depths, linear_probes, probe_checkpoint, recall_gain
from qies.terminal import run

VOCABULARY = 50


class Recalling(torch.nn.Module):
    """Predicts what followed the same token before, with probability 1/2 more than the rest; else nothing."""

    config = SimpleNamespace(vocab_size=VOCABULARY)

    def forward(self, ids, use_cache):
        logits = torch.zeros(*ids.shape, VOCABULARY)
        for row, own in enumerate(ids.tolist()):
            followed = {}
            for t, token in enumerate(own):
                if token in followed:
                    logits[row, t, followed[token]] = math.log(VOCABULARY - 1)  # probability 1/2
                if t + 1 < len(own):
                    followed[token] = own[t + 1]
        return SimpleNamespace(logits=logits)


def test_the_gain_of_recall_in_closed_form():
    assert recall_gain(Recalling(), pairs=8) == pytest.approx(math.log(VOCABULARY) - math.log(2), abs=1e-6)


def test_more_pairs_than_tokens_are_refused():
    with pytest.raises(UserError, match="25 pairs need more than 50 tokens"):
        recall_gain(Recalling(), pairs=25)


def test_depth_is_that_of_open_brackets():
    assert _depths(["x =", " f(", " [", "0", "]),", " {"]) == [0, 1, 2, 2, 0, 1]


@pytest.fixture(scope="module")
def probed(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "head_dim": 8, "intermediate_size": 16}
    return QiesForCausalLM(QiesConfig(vocab_size=len(tokenizer), **sizes)), tokenizer


def test_all_probes_of_an_untrained_model(probed):
    seen = []
    result = probe_checkpoint(*probed, seq_len=64, events=(1, 3), count=5, progress=seen.append)
    assert abs(result["induction"]) < 0.1 and abs(result["recall"]) < 0.1
    assert [(row["kind"], row["events"]) for row in result["stories"]] == [(kind, n) for kind in KINDS for n in (1, 3)]
    assert len(seen) == 2 + 2 * len(KINDS)
    assert {name: len(rows) for name, rows in result["linear"].items()} == {"position": 5, "depth": 5}


def test_the_embedding_alone_knows_no_position(probed):
    found = linear_probes(*probed)
    assert found["position"][0]["accuracy"] < 0.3 and found["position"][0]["majority"] == pytest.approx(1 / 8)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--model", "nowhere"], "nowhere holds no run"),
        (["--model", "nowhere", "tasks=[s3]"], "--model probes a trained model and takes no tasks"),
        (["--model", "nowhere", "--preset", "quick"], "takes no tasks"),
    ],
)
def test_bad_input_of_the_verb_is_one_line(words, reason, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(VERBS, ["probe", *words], "") == 2
    err = capsys.readouterr().err
    assert reason in err and err.count("\n") == 1

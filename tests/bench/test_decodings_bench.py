"""The bench of decodings: every decoding that a model has, beside greedy."""

import pytest
import torch

from qies import presets
from qies.bench.cases import size_and_length
from qies.bench.decodings import bench_decodings, bench_sizes
from qies.errors import UserError
from qies.model import QiesConfig, QiesForCausalLM


def test_every_decoding_of_an_arm_is_timed():
    [found] = bench_sizes(["50k:3"], new_tokens=2, rounds=1)
    assert list(found["ratio"]) == [
        "greedy", "sample", "entangled", "entangled, strength 0", "speculative, draft state",
        "speculative, draft attention",
    ]  # fmt: skip
    assert found["ratio"]["greedy"] == 1 and min(found["seconds"].values()) > 0


@pytest.mark.parametrize(
    ("arm", "drafts"), [("gpt2", set()), ("transformer", {"attention"}), ("qies", {"state", "attention"})]
)
def test_acceptance_is_that_of_the_drafts_a_model_has(arm, drafts):
    torch.manual_seed(0)
    model = QiesForCausalLM(QiesConfig(**presets.settings(arm, "50k", 97))).eval()
    found = bench_decodings(model, "case", torch.arange(4)[None], new_tokens=6, rounds=1)
    assert set(found["acceptance"]) == drafts
    assert all(0 < a["drafted"] >= a["accepted"] for a in found["acceptance"].values())
    assert ("entangled" in found["ratio"]) == (arm == "qies")


@pytest.mark.parametrize("case", ["400k", "400k:", "400k:x", "9:9", ":4", "400k:0"])
def test_a_bad_case_is_named(case):
    with pytest.raises(UserError):
        size_and_length(case)

"""The cost of each decoding as a ratio to greedy decoding, of one model in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qies import presets
from qies.bench.cases import size_and_length
from qies.bench.timing import compare
from qies.decoding import Acceptance, drafts, entangled, has_states, speculative
from qies.model import QiesConfig, QiesForCausalLM

CASES = ("100k:64", "400k:512")
AHEAD = 4


def bench_decodings(model: QiesForCausalLM, case: str, prompt: Tensor, new_tokens: int, rounds: int) -> dict[str, Any]:
    """Time `new_tokens` after the prompt [1,T] in every decoding that the model has; greedy is the subject.

    A `Comparison` as plain data, with the acceptance of each kind of draft. That depends on the weights: initial ones
    add nothing from other positions, so a draft is always right, which is the best case.
    """
    counts = {kind: Acceptance() for kind in drafts(model)}
    ways: dict[str, dict[str, Any]] = {"greedy": {}, "sample": {"do_sample": True, "top_k": 50}}
    if has_states(model):
        ways["entangled"] = {"custom_generate": entangled}
        ways["entangled, strength 0"] = {"custom_generate": entangled, "strength": 0.0}
    for kind, count in counts.items():
        ways[f"speculative, draft {kind}"] = {
            "custom_generate": speculative, "draft": kind, "ahead": AHEAD, "acceptance": count
        }  # fmt: skip

    def run(how: dict[str, Any]) -> Callable[[], Tensor]:
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **how}
        mask = torch.ones_like(prompt)  # a prompt begins with the end-of-text token, which is also the pad
        return lambda: model.generate(prompt, attention_mask=mask, max_new_tokens=new_tokens, **settings)

    found = compare(case, {name: run(how) for name, how in ways.items()}, rounds=rounds)
    rates = {kind: {"drafted": c.drafted, "accepted": c.accepted, "rate": c.rate} for kind, c in counts.items()}
    return found.to_dict() | {"acceptance": rates}


def bench_sizes(cases: Sequence[str], new_tokens: int, rounds: int) -> list[dict[str, Any]]:
    """`bench_decodings` of the arm qies with its initial weights, as plain data."""
    chosen = [size_and_length(case) for case in cases or CASES]
    out = []
    for size, length in chosen:
        torch.manual_seed(0)
        model = QiesForCausalLM(QiesConfig(**presets.settings("qies", size, 4096))).eval()
        prompt = torch.randint(1, 4096, (1, length))
        case = f"{presets.size_name(presets.parse_size(size))}, T={length}, {new_tokens} new tokens"
        out.append(bench_decodings(model, case, prompt, new_tokens, rounds))
    return out

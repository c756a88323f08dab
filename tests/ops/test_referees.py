"""Judges that are not ours: without phase, in real mode and with a decay per head the op is the gated delta rule."""

import pytest
import torch
from entangle_cases import NAMES, assert_close, entangle_chunk, entangle_fused, entangle_naive, evaluate, inputs
from transformers import AutoModelForCausalLM  # noqa: F401  (its lazy modules want to be entered from the top)
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)


def gated_delta_rule(referee):
    def run(q, k, v, beta, log_alpha, theta, *, state, mode):
        assert theta is None and mode == "real"
        return referee(
            q * q.shape[-1] ** 0.5,  # theirs divides by it
            k,
            v,
            g=log_alpha,
            beta=beta,
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=False,
        )

    return run


@pytest.mark.parametrize("referee", [torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule])
@pytest.mark.parametrize("ours", [entangle_naive, entangle_chunk, entangle_fused])
@pytest.mark.parametrize("T", [5, 64, 131])
def test_agrees_with_transformers(referee, ours, T):
    args = inputs(2, T, 3, 4, 5, phase=False, seed=T)
    for x in args[:2]:
        x /= x.norm(dim=-1, keepdim=True)
    args = [None if x is None else x.float().double() for x in args]  # theirs computes in float32

    def unit(f):
        """Their gradients by unit keys, ours by keys of any length: compare what remains on the sphere."""

        def run(q, k, *rest, **options):
            return f(*(x / x.norm(dim=-1, keepdim=True) for x in (q, k)), *rest, **options)

        return run

    theirs = evaluate(unit(gated_delta_rule(referee)), args, "real", torch.float32)
    assert_close(evaluate(ours, args, "real", torch.float32), theirs, 1e-5)
    assert set(theirs) == {"o", "state"} | {f"d{n}" for n in NAMES if n != "theta"}

"""`qies bench`: the op and whole training steps against named baselines, in one run on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from qies import presets
from qies.accounting.flops import training_flops_per_token
from qies.accounting.parameters import longest_context
from qies.bench.cases import size_and_length
from qies.bench.timing import Comparison, compare
from qies.errors import UserError
from qies.model.configuration import QiesConfig
from qies.model.modeling import QiesForCausalLM
from qies.ops.entangle import entangle
from qies.train.loop import keep_memory
from qies.train.optim import Optimizers

OP_SHAPES = ((8, 512, 4, 64, 64), (8, 2048, 4, 64, 64), (1, 16384, 4, 64, 64))
TRAIN_CASES = (("400k", 512), ("6m", 512), ("400k", 2048))
TRAIN_ARMS = ("qies", "no_phase", "transformer", "gpt2")


def run(what: str, cases: Sequence[str], rounds: int, clock: str = "wall") -> list[Comparison]:
    """The bench `op` or `train` on cases written BxTxHxKxV or SIZE:T. Raises UserError for one that is not."""
    if what == "op":
        shapes = [tuple(int(n) if n.isdigit() else 0 for n in case.split("x")) for case in cases]
        for case, shape in zip(cases, shapes, strict=True):
            if len(shape) != 5 or min(shape) < 1 or shape[3] % 2 or shape[3] != shape[4]:
                raise UserError(f"Case '{case}' is not BxTxHxKxV with K = V even, such as 8x512x4x64x64.")
        return bench_op(shapes or OP_SHAPES, rounds=rounds, clock=clock)
    return bench_train([size_and_length(case) for case in cases] or TRAIN_CASES, rounds=rounds, clock=clock)


def autocast():
    """The context of every baseline: bf16 autocast where the CPU supports it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def bench_op(
    shapes: Sequence[tuple[int, ...]] = OP_SHAPES, *, rounds: int = 5, clock: str = "wall"
) -> list[Comparison]:
    """Forward and backward of `entangle` (selective phase) against: itself without phase, transformers' chunked gated
    delta rule, and causal SDPA. shapes: (B, T, H, K, V) with K = V."""
    keep_memory()
    return [compare(str(shape), op_baselines(*shape), rounds=rounds, clock=clock) for shape in shapes]


def op_baselines(B: int, T: int, H: int, K: int, V: int) -> dict[str, Callable[[], Any]]:
    """Calls that each run one forward and backward on inputs in their own layout, all bf16 except the controls."""
    make = torch.Generator().manual_seed(0)

    def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=make).to(dtype).requires_grad_()

    q, k, v = leaf(B, T, H, K), leaf(B, T, H, K), leaf(B, T, H, V)
    beta = torch.rand(B, T, H, generator=make).requires_grad_()
    decay = (-torch.rand(B, T, H, generator=make) / 100).requires_grad_()
    theta = leaf(B, T, H, K // 2, dtype=torch.float32)
    qh, kh, vh = (leaf(B, H, T, K) for _ in range(3))
    go, go_heads = torch.randn(B, T, H, V).bfloat16(), torch.randn(B, H, T, V).bfloat16()
    leaves = [q, k, v, beta, decay, theta, qh, kh, vh]

    def run(forward: Callable[[], Tensor], grad: Tensor) -> Callable[[], None]:
        def call() -> None:
            for x in leaves:
                x.grad = None
            with autocast():
                out = forward()
            out.backward(grad.to(out.dtype))

        return call

    def rule() -> Tensor:
        return torch_chunk_gated_delta_rule(q, k, v, g=decay, beta=beta, use_qk_l2norm_in_kernel=True)[0]

    return {
        "entangle": run(lambda: entangle(q, k, v, beta, decay, theta)[0], go),
        "entangle, no phase": run(lambda: entangle(q, k, v, beta, decay, None)[0], go),
        "transformers gated delta rule": run(rule, go),
        "causal SDPA": run(lambda: F.scaled_dot_product_attention(qh, kh, vh, is_causal=True), go_heads),
    }


def bench_train(
    cases: Sequence[tuple[str, int]] = TRAIN_CASES,
    *,
    rounds: int = 5,
    vocab_size: int = 4096,
    tokens: int = 4096,
    clock: str = "wall",
) -> list[Comparison]:
    """Whole training steps (forward, backward, clipping, optimizer) of `tokens` tokens at (size, sequence length).

    Our arms, those that take so long a sequence, use their own optimizers; the models of transformers plain fused
    AdamW, which is the cheaper step.
    """
    keep_memory()
    out = []
    for size, seq_len in cases:
        ids = torch.randint(0, vocab_size, (max(1, tokens // seq_len), seq_len + 1))
        settings = {arm: presets.settings(arm, size, vocab_size) for arm in TRAIN_ARMS}
        settings = {arm: values for arm, values in settings.items() if seq_len <= longest_context(values)}
        baselines = {f"{arm} arm": own_step(arm, size, ids, vocab_size) for arm in settings}
        baselines |= {
            name: foreign_step(model, ids) for name, model in foreign_models(size, vocab_size, seq_len).items()
        }
        step = ids[:, 1:].numel()
        facts = {"size": size, "batch": len(ids), "context": seq_len, "tokens": step, "dtype": "bfloat16 autocast"}
        costs = {
            f"{arm} arm": {"flops": step * training_flops_per_token(values, seq_len)}
            for arm, values in settings.items()
        }
        case = f"{size}, T={seq_len}, {step} tokens"
        out.append(compare(case, baselines, rounds=rounds, facts=facts, costs=costs, clock=clock))
    return out


def own_step(arm: str, size: str, ids: Tensor, vocab_size: int) -> Callable[[], None]:
    """One training step of an arm, as in the training loop."""
    torch.manual_seed(0)
    model = QiesForCausalLM(QiesConfig(**presets.settings(arm, size, vocab_size))).train()
    optimizers = Optimizers(model, presets.hyperparameters(presets.parse_size(size), ids.numel()), weight_decay=0.01)

    def step() -> None:
        with autocast():
            loss = model(ids[:, :-1], shift_labels=ids[:, 1:]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizers.step(1e-3)

    return step


def foreign_models(size: str, vocab_size: int, seq_len: int) -> dict[str, torch.nn.Module]:
    """Models from transformers of equal depth, width and (for GPT-2) parameters."""
    values = presets.settings("qies", size, vocab_size)
    shape = {
        "vocab_size": vocab_size,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    d, layers, heads, k = (values[n] for n in ("hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"))
    gpt2 = presets.settings("gpt2", size, vocab_size)
    qwen = Qwen3NextConfig(
        **shape, hidden_size=d, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        head_dim=k, intermediate_size=round(values["intermediate_size"] * 2 / 3), num_experts=0,
        linear_num_key_heads=heads, linear_num_value_heads=heads, linear_key_head_dim=k, linear_value_head_dim=k,
        mlp_only_layers=list(range(layers)), pad_token_id=0,
    )  # fmt: skip
    old = GPT2Config(
        **shape, n_embd=d, n_layer=layers, n_head=heads, n_inner=gpt2["intermediate_size"],
        n_positions=max(1024, seq_len), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return {
        "transformers GPT2LMHeadModel": GPT2LMHeadModel(old),
        "transformers Qwen3NextForCausalLM": Qwen3NextForCausalLM(qwen),
    }


def foreign_step(model: torch.nn.Module, ids: Tensor) -> Callable[[], None]:
    """One training step of a model of transformers, with fused AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with autocast():
            loss = model(input_ids=ids[:, :-1], labels=ids[:, :-1], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step

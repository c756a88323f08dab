"""The verb plan: the cost of a model."""

from __future__ import annotations

from qies.cli.options import Overrides, require_at_least
from qies.terminal import show


def plan(
    overrides: Overrides = (),
    /,
    arm: str = "qies",
    size: str = "100k",
    tokens: str | None = None,
    vocab_size: int = 4096,
    seq_len: int = 512,
    gpus: int = 1,
    gpus_per_node: int = 8,
    gpu_memory: float = 80.0,
    gpu_flops: float = 990e12,
    utilisation: float = 0.4,
    micro_batch: int = 1,
    activation_checkpointing: bool = False,
    json: bool = False,
) -> None:
    """Estimate the cost of a model: parameters, FLOPs, memory per GPU and days, with the torchrun command; and what
    prefill and decoding cost at contexts of 1k to 128k tokens.

    For example:

        qies plan --arm qies --size 400k
        qies plan --size 10b --gpus 64 --seq-len 4096 --vocab-size 50304 --activation-checkpointing
        qies plan --size 400k head_dim=64

    Args:
        overrides: Fields of the model's configuration, as KEY=VALUE.
        arm: transformer, qies, real_registers, unitary, no_phase, fixed_phase, selective_phase, gpt2 or complex.
        size: Non-embedding parameters, from 20k to 20b.
        tokens: Training tokens, such as 2000000 or 2m; by default 20 per parameter.
        vocab_size: Vocabulary size.
        seq_len: Training sequence length in tokens.
        gpus: Total number of GPUs; FSDP2 shards the model over them.
        gpus_per_node: GPUs per machine.
        gpu_memory: Memory of one GPU in GB.
        gpu_flops: Peak bfloat16 FLOP/s of one GPU; by default an H100's.
        utilisation: Model FLOPs utilisation, as a fraction of the peak.
        micro_batch: Sequences per GPU in one forward pass.
        activation_checkpointing: Keep only the inputs of blocks and recompute the rest in the backward pass.
        json: Print JSON.
    """
    from rich.console import Console

    from qies import config, presets
    from qies.accounting.plan import Cluster, inference_text, plan_model, plan_text

    budget = None if tokens is None else presets.parse_count(tokens, "--tokens")
    require_at_least(1, tokens=budget, vocab_size=vocab_size, seq_len=seq_len, micro_batch=micro_batch)
    values = presets.settings(arm, size, vocab_size, **config.merge({}, overrides))
    result = plan_model(
        values, arm, size, budget, seq_len, cluster=Cluster(gpus, gpus_per_node, gpu_memory, gpu_flops, utilisation),
        micro_batch=micro_batch, checkpointing=activation_checkpointing, overrides=overrides,
    )  # fmt: skip

    def text() -> None:
        Console().print(plan_text(result))
        Console().print(inference_text(result))
        print(result["command"])

    show(json, result, text)

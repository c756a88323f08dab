"""The cost of training a model, from its settings. Imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from qies.accounting.cache import cache_bytes
from qies.accounting.flops import (
    CONVENTION,
    decode_flops,
    forward_flops_per_token,
    muon_flops,
    prefill_flops,
    training_flops_per_token,
)
from qies.accounting.memory import obstacle, training_memory
from qies.accounting.parameters import count_parameters, longest_context
from qies.errors import UserError
from qies.presets import Hyperparameters, hyperparameters, parse_size

TOKENS_PER_PARAMETER = 20  # Hoffmann et al., arXiv:2203.15556
USABLE = 0.9  # usable fraction of a GPU's memory; the rest is for the allocator, NCCL and CUDA
GIGABYTE = 1e9
CONTEXTS = (1024, 4096, 16_384, 32_768, 131_072)  # at which inference is planned


@dataclass(frozen=True)
class Cluster:
    """The hardware to plan for. Utilisation is the model's FLOPs over the peak (Chowdhery et al., arXiv:2204.02311), so
    the recomputation of activation checkpointing does not count."""

    gpus: int = 1
    gpus_per_node: int = 8
    gpu_memory: float = 80.0  # gigabytes, 10^9 bytes
    gpu_flops: float = 990e12  # a second, dense bfloat16: an H100 SXM
    utilisation: float = 0.4

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1.")
        for name in ("gpu_memory", "gpu_flops"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} must be a positive number.")
        if not 0 < self.utilisation <= 1:
            raise UserError(f"--utilisation is {self.utilisation}; it must lie in (0, 1].")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise UserError(
                f"--gpus {self.gpus} is not a whole number of nodes of {self.gpus_per_node}; set --gpus-per-node."
            )

    @property
    def nodes(self) -> int:
        return max(1, self.gpus // self.gpus_per_node)


def plan_model(
    values: Mapping[str, Any],
    arm: str,
    size: str,
    tokens: int | None,
    seq_len: int,
    *,
    cluster: Cluster | None = None,
    micro_batch: int = 1,
    checkpointing: bool = False,
    overrides: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Parameters, FLOPs, tokens, memory in bytes on each GPU, days and the command of the model that `values`
    (presets.settings, with the command line's `overrides`) describe.

    Memory: `memory.training_memory`. Days: the model's FLOPs, divided among the GPUs, and the optimizer's, which
    every GPU repeats in full (each orthogonalises all matrices), at the stated utilisation. Inference: see
    `inference_cost`. Raises UserError when the windows are longer than the learned positions, or the tokens fewer than
    one step takes.
    """
    cluster = cluster or Cluster()
    if seq_len > longest_context(values):
        raise UserError(
            f"--seq-len {seq_len} is beyond the {values['max_position_embeddings']} learned positions of arm {arm}; "
            f"add max_position_embeddings={seq_len}."
        )
    params = count_parameters(values)
    tokens = tokens or TOKENS_PER_PARAMETER * parse_size(size)
    per_token = training_flops_per_token(values, seq_len)
    rule = hyperparameters(parse_size(size), tokens)
    batch = _batch(rule, cluster.gpus * micro_batch, seq_len, tokens)
    memory = training_memory(
        values, gpus=cluster.gpus, micro_batch=micro_batch, seq_len=seq_len, checkpointing=checkpointing
    )
    unknown = obstacle(values)
    total = None if unknown else sum(memory.values())
    optimizer = muon_flops(values)
    work = per_token * tokens / cluster.gpus + optimizer * batch["steps"]
    return {
        "arm": arm,
        "size": size,
        "shape": {k: v for k, v in values.items() if k.endswith(("_size", "_layers", "_heads", "_channels", "_dim"))},
        "params": params,
        "flops_convention": CONVENTION,
        "forward_flops_per_token": forward_flops_per_token(values, seq_len),
        "flops_per_token": per_token,
        "tokens": tokens,
        "flops": per_token * tokens,
        "hyperparameters": asdict(rule),
        "batch": batch,
        "cluster": asdict(cluster),
        "activation_checkpointing": checkpointing,
        "memory": memory,
        "memory_unknown": unknown,
        "memory_total": total,
        "fits": None if total is None else total <= USABLE * cluster.gpu_memory * GIGABYTE,
        "optimizer_flops_per_step": optimizer,
        "days": work / (cluster.gpu_flops * cluster.utilisation) / 86400,
        "command": command(arm, size, tokens, seq_len, batch, rule, cluster, checkpointing, overrides),
        "inference": [inference_cost(values, n) for n in CONTEXTS if n < longest_context(values)],
    }


def _batch(rule: Hyperparameters, at_once: int, seq_len: int, tokens: int) -> dict[str, int]:
    """The rule's batch, rounded to a whole number of micro-batches on every GPU, at least one and at most all tokens:
    sequences per step, sequences at once, gradient accumulation steps, and optimizer steps."""
    most = tokens // (seq_len * at_once)
    if most < 1:
        raise UserError(
            f"{tokens:,} tokens are less than one step of {at_once} x {seq_len}; "
            "lower --seq-len, --micro-batch or --gpus."
        )
    accumulation = min(max(1, round(rule.batch_tokens / (seq_len * at_once))), most)
    sequences = accumulation * at_once
    steps = tokens // (sequences * seq_len)
    return {"sequences": sequences, "at_once": at_once, "accumulation": accumulation, "steps": steps}


def command(
    arm: str,
    size: str,
    tokens: int,
    seq_len: int,
    batch: Mapping[str, int],
    rule: Hyperparameters,
    cluster: Cluster,
    checkpointing: bool,
    overrides: tuple[str, ...] = (),
) -> str:
    """The bash command to run on every node; $HEAD is the first node's address, $DATA a folder of token shards.

    It sets everything that the plan assumes; the number of processes decides whether the model is sharded.
    """
    per_node = min(cluster.gpus, cluster.gpus_per_node)
    where = "--standalone" if cluster.nodes == 1 else f"--nnodes={cluster.nodes} --rdzv-backend=c10d --rdzv-endpoint="
    where += "" if cluster.nodes == 1 else '"$HEAD:29500"'
    run = [
        "train", "--arm", arm, "--size", size, "--tokens", str(tokens), "--out", f"runs/{arm}-{size}",
        f"train.seq_len={seq_len}", f"train.batch_size={batch['sequences']}",
        f"train.accumulate={batch['accumulation']}", f"train.recompute={str(checkpointing).lower()}",
        "train.precision=bf16", f"train.warmup={rule.warmup:.6g}", f"train.decay={rule.decay:.6g}",
        f"train.weight_decay={rule.weight_decay:.6g}",
        *(f"model.{o}" for o in overrides),
    ]  # fmt: skip
    return f'torchrun {where} --nproc-per-node={per_node} -m qies {shlex.join(run)} --data "$DATA"'


def inference_cost(values: Mapping[str, Any], context: int) -> dict[str, Any]:
    """What one sequence costs: FLOPs of a prefill of `context` tokens and of decoding one more, by module; and the
    bytes of the cache in between, in half precision (`cache_bytes`)."""
    return {
        "context": context,
        "prefill_flops": prefill_flops(values, context),
        "decode_flops": decode_flops(values, context),
        "cache_bytes": cache_bytes(values, context),
    }


def plan_text(plan: Mapping[str, Any]) -> Table:
    """The plan as a table for the terminal (its command stands below it: `plan["command"]`)."""
    cluster, batch, rule = plan["cluster"], plan["batch"], plan["hyperparameters"]
    table = Table(title=f"{plan['arm']} {plan['size']}", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    for key, value in plan["shape"].items():
        table.add_row(key, f"{value:,}")
    for key, value in plan["params"].items():
        table.add_row(f"parameters: {key}", f"{value:,}")
    for key, value in plan["forward_flops_per_token"].items():
        table.add_row(f"forward FLOPs per token: {key}", f"{value:,.0f}")
    table.add_row("training FLOPs per token", f"{plan['flops_per_token']:,.0f}")
    table.add_row("tokens", f"{plan['tokens']:,}")
    table.add_row("training FLOPs", f"{plan['flops']:.3e}")
    for key, value in rule.items():
        parts = value if isinstance(value, tuple) else (value,)
        table.add_row(f"rule: {key}", ", ".join(f"{v:,.6g}" if isinstance(v, float) else f"{v:,}" for v in parts))
    table.add_row("batch: sequences", f"{batch['sequences']:,}")
    table.add_row("batch: gradient accumulation", f"{batch['accumulation']:,}")
    table.add_row("steps", f"{batch['steps']:,}")
    for key, value in plan["memory"].items():
        table.add_row(f"memory per GPU: {key}", f"{value / GIGABYTE:,.2f} GB")
    if plan["memory_total"] is None:
        table.add_row("memory per GPU: total", f"unknown: {plan['memory_unknown']}")
    else:
        verdict = "fits" if plan["fits"] else "does not fit"
        limit = f"{USABLE:.0%} of {cluster['gpu_memory']:g} GB"
        table.add_row("memory per GPU: total", f"{plan['memory_total'] / GIGABYTE:,.2f} GB; {verdict} in {limit}")
    table.add_row("optimizer FLOPs per step, on every GPU", f"{plan['optimizer_flops_per_step']:.3e}")
    speed = f"{cluster['gpus']} x {cluster['gpu_flops']:.3g} FLOP/s x {cluster['utilisation']:g}"
    table.add_row("days", f"{plan['days']:,.3g} at {speed}")
    return table


def inference_text(plan: Mapping[str, Any]) -> Table:
    """FLOPs by module of a prefill and of decoding one token, and the cache, at each context."""
    table = Table(title="Inference, one sequence: FLOPs by module; KiB of cache in half precision")
    table.add_column("context", no_wrap=True)
    costs = plan["inference"]
    for cost in costs:
        table.add_column(f"{cost['context']:,}", justify="right", no_wrap=True)
    for name in ("prefill", "decode"):
        flops = [cost[f"{name}_flops"] for cost in costs]
        for module in dict.fromkeys(module for each in flops for module in each):
            table.add_row(f"{name}: {module}", *(f"{each[module]:.3g}" for each in flops))
        table.add_row(f"{name}: total", *(f"{sum(each.values()):.3g}" for each in flops), end_section=True)
    for part in ("states", "convolution", "keys_values"):
        table.add_row(f"cache: {part}", *(f"{cost['cache_bytes'][part] / 2**10:,.1f}" for cost in costs))
    table.add_row("cache: total", *(f"{sum(cost['cache_bytes'].values()) / 2**10:,.1f}" for cost in costs))
    return table

"""Optimizers: Muon for the hidden matrices, AdamW for all other parameters, in every arm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from transformers import PreTrainedModel

from qies.accounting.parameters import model_weights
from qies.errors import UserError
from qies.presets import Hyperparameters


class Optimizers:
    """The two optimizers of a model, stepped and saved together."""

    def __init__(
        self,
        model: PreTrainedModel,
        rates: Hyperparameters,
        weight_decay: float,
        scale: float = 1.0,
        precision: torch.dtype = torch.bfloat16,
    ) -> None:
        groups = parameter_groups(model)
        self.names: dict[Tensor, str] = {p: n for group in groups.values() for n, p in group}
        matrices, rest = [p for _, p in groups["matrix"]], []
        for name in ("embedding", "head", "vector"):
            if groups[name]:
                rate = scale * getattr(rates, f"{name}_lr")
                rest.append({"params": [p for _, p in groups[name]], "lr": rate})
        matrix_lr, momentum = scale * rates.matrix_lr, rates.momentum
        muon = Muon(matrices, precision=precision, lr=matrix_lr, weight_decay=weight_decay, momentum=momentum)
        adam = torch.optim.AdamW(rest, betas=rates.betas, eps=1e-10, weight_decay=0.0, fused=True)
        self.all = (muon, adam)
        self.base = [[g["lr"] for g in o.param_groups] for o in self.all]

    def step(self, factor: float) -> None:
        """Step with every learning rate multiplied by `factor`, then clear the gradients."""
        for optimizer, base in zip(self.all, self.base, strict=True):
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * factor
            optimizer.step()
        self.clear()

    def clear(self) -> None:
        for optimizer in self.all:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """All state tensors, named `optimizer.<parameter>.<key>`."""
        return {
            f"optimizer.{self.names[p]}.{key}": torch.as_tensor(value)
            for optimizer in self.all
            for p, state in optimizer.state.items()
            for key, value in state.items()
        }

    def blank_state(self) -> dict[str, Tensor]:
        """Zeros with the shapes and sharding of `state` after a step."""
        out: dict[str, Tensor] = {}
        for optimizer in self.all:
            for p in (p for g in optimizer.param_groups for p in g["params"]):
                name = f"optimizer.{self.names[p]}"
                if isinstance(optimizer, Muon):
                    out[f"{name}.momentum_buffer"] = torch.zeros_like(p.detach())
                else:
                    out[f"{name}.step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                    out |= {f"{name}.{key}": torch.zeros_like(p.detach()) for key in ("exp_avg", "exp_avg_sq")}
        return out

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Load `state` from the tensors of a checkpoint; other keys are ignored."""
        by_name = {n: p for p, n in self.names.items()}
        owner = {p: o for o in self.all for g in o.param_groups for p in g["params"]}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                name, _, entry = key.removeprefix("optimizer.").rpartition(".")
                owner[by_name[name]].state[by_name[name]][entry] = value


class Muon(torch.optim.Muon):
    """torch's Muon (Jordan et al., 2024), bit for bit, also for matrices sharded by FSDP2.

    torch's own accepts DTensors, but sums products of shards in bf16, which changes the loss of two processes by 5e-5
    at the second step. Here momentum stays sharded; each process gathers one update at a time and orthogonalises all
    of it, so every process repeats the Newton-Schulz products. `precision` is their dtype: bf16, the usual choice, or
    fp32, which depends less on the order in which gradients are summed.
    """

    def __init__(self, params, *, precision: torch.dtype = torch.bfloat16, **options: Any) -> None:
        super().__init__(params, **options)
        self.precision = precision

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            keep = group["momentum"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum = state["momentum_buffer"]
                momentum.lerp_(p.grad, 1 - keep)
                update = p.grad.lerp(momentum, keep)  # Nesterov's
                if isinstance(p, DTensor):
                    whole = orthogonal(update.full_tensor(), self.precision)
                    replica = DTensor.from_local(whole, p.device_mesh, [Replicate()])
                    own, local = replica.redistribute(placements=p.placements).to_local(), p.to_local()
                else:
                    own, local = orthogonal(update, self.precision), p
                rows, columns = p.shape
                rate = group["lr"] * math.sqrt(max(1, rows / columns))
                local.mul_(1 - group["lr"] * group["weight_decay"]).add_(own, alpha=-rate)


def orthogonal(matrix: Tensor, precision: torch.dtype) -> Tensor:
    """Approximately U V^T of a matrix U S V^T (singular values within 0.7 to 1.2), by five quintic Newton-Schulz steps
    with the coefficients of Jordan et al., Muon, 2024."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.to(precision, copy=True)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x.div_(x.norm().clamp(min=1e-7))
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def parameter_groups(model: PreTrainedModel) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """The named parameters by optimizer group: `matrix` (Muon), `embedding`, `head` and `vector` (AdamW).

    The groups are declared (`accounting.parameters.model_weights`). Raises UserError for an undeclared parameter.
    """
    declared = model_weights(vars(model.config))
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {"matrix": [], "embedding": [], "head": [], "vector": []}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if name not in declared:
            raise UserError(
                f"No declaration names the parameter {name}, so no optimizer takes it; add it to a MixerSpec."
            )
        groups[declared[name].optimizer].append((name, p))
    return groups

"""The entanglement mixer: a sequence written into, and read out of, one entangled state per head.

Legend: B batch, T position, D model width, H heads, m complex key channels, K = 2m, V value width per head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from qies.mixers.entanglement import HeadGroup
from qies.model.cache import read_states, write_states
from qies.model.configuration import QiesConfig
from qies.model.hooks import HeadHooks, HookPoint
from qies.model.layers import OutputGate, ShortConv, linear, split
from qies.ops.entangle import Inputs, evolve


class Entanglement(nn.Module):
    """Projections around `qies.ops.entangle`: queries, keys, values, write strengths, decays and phases.

    Heads of several shapes share the projections, whose outputs are ordered by group (`config.head_groups`).
    States, beta, decay and phase are fp32 whatever the dtype of the weights. `model.read_state(False)` clears `reads`:
    the states still evolve but the layer adds nothing; a tensor [B] says so for each row. `heads` holds the hook points
    of each group (`qies.model.hooks`), and `hook_out` [B,T,D] is what the layer adds to the residual stream.
    """

    controls = frozenset({"beta_bias", "decay_bias", "decay_rate", "phase_bias"})  # fp32 in every model's weights

    def __init__(self, config: QiesConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.reads: bool | Tensor = True
        self.groups, width = config.head_groups, config.hidden_size
        keys, values, read = (sum(getattr(g, f"{n}_width") for g in self.groups) for n in ("key", "value", "read"))
        self.beta_size, self.decay_size = sum(g.betas for g in self.groups), sum(g.decays for g in self.groups)
        phases = sum(g.phases for g in self.groups)
        self.conv = ShortConv(width, config.conv_size) if config.conv_size else None
        self.q_proj = linear(width, keys)
        self.k_proj = linear(width, keys)
        self.v_proj = linear(width, values)
        self.control_proj = linear(width, self.beta_size + self.decay_size)
        self.beta_bias = nn.Parameter(torch.zeros(self.beta_size))
        self.decay_bias = nn.Parameter(torch.zeros(self.decay_size))
        self.decay_rate = nn.Parameter(torch.zeros(self.decay_size))  # log of the largest decay's scale
        if config.phase == "selective":
            self.phase_down = linear(width, config.phase_rank)
            self.phase_up = linear(config.phase_rank, phases, std=0.0)
        if config.phase != "none":
            self.phase_bias = nn.Parameter(torch.zeros(phases))
        self.gate = OutputGate(width, sum(g.heads for g in self.groups), read, config.gate)
        self.o_proj = linear(read, width, std=0.0)
        self.heads = nn.ModuleList(HeadHooks() for _ in self.groups)
        self.hook_out = HookPoint()

    def forward(self, x: Tensor, *, angles, causal_mask, mask, past_key_values, texts=None, observe=0, **kwargs):
        """x [B,T,D] -> [B,T,D] and None; mask [B,T] bool, False at pads, which leave the states untouched; texts [B,T],
        the number of each token's text in a packed row: each starts from an empty state.

        With `observe` > 0 also, for each group of heads, the read-outs before norm and gate [B,T,H,V], and then the
        states after every `observe` tokens and at the end [B,C,H,2m,V]; at the end alone in packed rows."""
        memory = past_key_values.layers[self.layer_idx] if past_key_values is not None else None
        if self.conv is not None:
            x = self.conv(x, mask, memory, texts)
        outputs, states, ends = [], [], []
        given = self.inputs(x, mask, read_states(memory, len(self.groups)))
        for group, hooks, inputs in zip(self.groups, self.heads, given, strict=True):
            run = hooks.evolve if hooks.attached else evolve
            size = observe if observe and texts is None and not hooks.attached else inputs.q.shape[1]
            o, at_ends = _in_chunks(run, inputs, group.mode, texts, size)  # type: ignore[arg-type]
            outputs.append(o)
            states.append(at_ends[-1])
            ends.append(at_ends)
        if memory is not None:
            write_states(memory, states)
        if isinstance(self.reads, Tensor):
            y = self.o_proj(self.gate(x, *outputs)) * self.reads.to(x)[:, None, None]
        else:
            y = self.o_proj(self.gate(x, *outputs)) if self.reads else torch.zeros_like(x)
        y = self.hook_out(y) if self.hook_out.attached else y
        return (y, None, *outputs, *(torch.stack(s, 1) for s in ends)) if observe else (y, None)

    def inputs(
        self, x: Tensor, mask: Tensor | None = None, states: Sequence[Tensor | None] | None = None
    ) -> list[Inputs]:
        """The op's inputs of each group, for x [B,T,D] after the convolution, from `states` [B,H,2m,V] or None.

        A unitary group gets v = 0, log_alpha = 0, and the identity for a state that is None.
        """
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        beta, log_alpha = self.control_proj(x).float().split([self.beta_size, self.decay_size], -1)
        rate = -self.decay_rate.float().exp() * F.softplus(log_alpha + self.decay_bias.float())
        keep = None if mask is None else mask[..., None].float()
        parts = zip(
            self.groups,
            split(q, [g.key_width for g in self.groups]),
            split(k, [g.key_width for g in self.groups]),
            split(v, [g.value_width for g in self.groups]),
            split(beta + self.beta_bias.float(), [g.betas for g in self.groups]),
            split(rate, [g.decays for g in self.groups]),
            self._theta(x),
            states or [None] * len(self.groups),
            strict=True,
        )
        given = []
        for group, q, k, v, logits, decay, theta, state in parts:
            if group.unitary:
                v, decay = q.new_zeros(*q.shape[:2], group.read_width), rate.new_zeros(*rate.shape[:2], group.heads)
                state = _identity(x.shape[0], group, x.device) if state is None else state
            elif self.config.decay == "channel":
                decay = decay.unflatten(-1, (group.heads, -1))
            q, k, v = (y.unflatten(-1, (group.heads, -1)) for y in (q, k, v))
            beta = _kept(self._beta(group, logits), keep)
            given.append(Inputs(q, k, v, beta, _kept(decay, keep), _kept(theta, keep), state))  # type: ignore[arg-type]
        return given

    def _beta(self, group: HeadGroup, logits: Tensor) -> Tensor:
        """beta = 1 - lambda of a group's heads, [B,T,H] or the pair [B,T,H,2]."""
        if group.eigenvalues == "unit":
            return torch.sigmoid(logits)
        if group.eigenvalues == "signed":
            return 2 * torch.sigmoid(logits)
        z = logits.unflatten(-1, (group.heads, 2))
        radius = z.square().sum(-1, keepdim=True).add(1e-12).sqrt()
        # any point of the unit circle, or of the open unit disc
        eigenvalue = z / radius if group.unitary else z * (torch.tanh(radius) / radius)
        return torch.cat([1 - eigenvalue[..., :1], -eigenvalue[..., 1:]], -1)

    def _theta(self, x: Tensor) -> list[Tensor | None]:
        """Phases of each group in radians per token, [B,T,H,m], or None. Channels that do not rotate get theta = 0."""
        config = self.config
        if config.phase == "none":
            return [None] * len(self.groups)
        angle = self.phase_bias.float()
        if config.phase == "selective":
            angle = angle + self.phase_up(self.phase_down(x)).float()
        theta = config.phase_max * torch.tanh(angle * (config.phase_slope / config.phase_max))
        parts = split(theta.expand(*x.shape[:2], -1), [g.phases for g in self.groups])
        padded: list[Tensor | None] = []
        for group, part in zip(self.groups, parts, strict=True):
            rotating = group.phases // group.heads
            part = F.pad(part.unflatten(-1, (group.heads, rotating)), (0, group.channels - rotating))
            padded.append(part if rotating else None)
        return padded

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start with lambda near 0 (a projective write), in unitary groups near 1 (no gate), no phase, and memories of
        `spans` tokens over a group."""
        biases = [torch.tensor([1.0, 0.0]).repeat(g.heads) if g.unitary else torch.zeros(g.betas) for g in self.groups]
        init.copy_(self.beta_bias, torch.cat(biases).to(self.beta_bias))
        init.zeros_(self.decay_rate)
        spans = torch.cat([_spread(*g.spans, g.heads).repeat_interleave(g.decays // g.heads) for g in self.groups])
        init.copy_(self.decay_bias, (1 / spans).expm1().log().to(self.decay_bias))  # softplus(bias) = 1 / span
        if self.config.phase != "none":
            init.zeros_(self.phase_bias)


def _in_chunks(
    run: Callable[..., tuple[Tensor, Tensor]], x: Inputs, mode: str, texts: Tensor | None, size: int
) -> tuple[Tensor, list[Tensor]]:
    """`run` over chunks of `size` tokens, one after the other: the outputs of all, and the state after each chunk."""
    if size >= x.q.shape[1]:
        o, state = run(x, mode, texts=texts)
        return o, [state]
    outputs, states = [], [x.state]
    for start in range(0, x.q.shape[1], size):
        part = (None if y is None else y[:, start : start + size] for y in x[:6])
        o, state = run(Inputs(*part, states[-1]), mode, texts=None)  # type: ignore[arg-type,call-arg]
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, 1), states[1:]  # type: ignore[return-value]


def _spread(first: float, last: float, heads: int) -> Tensor:
    """`heads` values from first to last, evenly spaced on the log scale, [H]."""
    return torch.logspace(math.log10(first), math.log10(last), heads, dtype=torch.float32)


def _identity(batch: int, group: HeadGroup, device: torch.device) -> Tensor:
    """The state of a register before its first gate: the identity, [B,H,2m,m], rows Re | Im."""
    one = F.pad(torch.eye(group.channels, dtype=torch.float32, device=device), (0, 0, 0, group.channels))
    return one.expand(batch, group.heads, -1, -1)


def _kept(x: Tensor | None, keep: Tensor | None) -> Tensor | None:
    """x [B,T,...] times keep [B,T,1], 0 at pads; x itself when nothing is padded."""
    if x is None or keep is None:
        return x
    return x * keep.view(*keep.shape, *[1] * (x.ndim - 3))

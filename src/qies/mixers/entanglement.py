"""The entanglement layer as a mixer. Imports no torch.

Legend: D width, H heads, m complex key channels, K = 2m key width, V value width, C chunk length, T sequence length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qies.mixers.common import (
    FULL,
    HALF,
    below,
    conv_weights,
    first_problem,
    gate_bytes,
    gate_weights,
    outside,
    unknown_choice,
)
from qies.mixers.spec import MixerSpec, NotCounted, Values, Weight

CHUNK = 64  # tokens of a chunk, in the convention for FLOPs
KERNEL_CHUNK = 64  # tokens of a chunk in flash-linear-attention, whose inverse [64, 64] it keeps in bfloat16
ROWS = 64  # key rows of a chunk in `ops/entangle/chunk.py`, two a token in complex mode


@dataclass(frozen=True)
class HeadGroup:
    """The heads of an entanglement layer that are alike: each holds one state Psi in C^{m x V}."""

    heads: int
    channels: int  # m, complex key channels of a head
    values: int  # V, complex ones in complex mode
    mode: str
    eigenvalues: str
    decays: int  # of all heads together, as every count below
    phases: int
    spans: tuple[int, int]  # tokens that the first and the last head remember before training

    @property
    def complex_eigenvalues(self) -> bool:
        """Whether beta is a pair."""
        return self.eigenvalues in ("disc", "circle")

    @property
    def unitary(self) -> bool:
        """Whether tokens only apply unitary gates: the state starts at the identity, and nothing is added or damped."""
        return self.eigenvalues == "circle"

    @property
    def key_width(self) -> int:
        return self.heads * 2 * self.channels

    @property
    def read_width(self) -> int:
        return self.heads * self.values * (2 if self.mode == "complex" else 1)

    @property
    def value_width(self) -> int:
        return 0 if self.unitary else self.read_width

    @property
    def betas(self) -> int:
        return self.heads * (2 if self.complex_eigenvalues else 1)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """[H, 2m, V] of the states of one sequence."""
        return self.heads, 2 * self.channels, self.values


REGISTERS = {"complex": ("complex", "disc"), "real": ("real", "unit")}


def head_groups(values: Values) -> tuple[HeadGroup, ...]:
    """The groups of heads of an entanglement layer: memory heads, then register heads and unitary heads if any.

    The states of register heads and unitary heads are m by m. A register is damped and written like a memory, with the
    longest span: register_mode "complex" has eigenvalues in the disc, "real" real values and eigenvalues in [0, 1]. A
    unitary head starts at the identity, and each token multiplies it by a gate I - beta k k^H of U(m), the eigenvalue
    1 - beta on the unit circle: Psi_t is the product of the gates of all tokens.
    """

    def group(heads: int, m: int, v: int, mode: str, eigenvalues: str, spans: tuple[int, int]) -> HeadGroup:
        decays = 0 if eigenvalues == "circle" else heads * (m if values["decay"] == "channel" else 1)
        return HeadGroup(heads, m, v, mode, eigenvalues, decays, heads * round(values["phase_fraction"] * m), spans)

    k, m, longest = values["head_dim"], values["register_channels"], (4096, 4096)
    groups = (
        group(values["num_attention_heads"], k // 2, k, values["mode"], values["eigenvalues"], (16, 4096)),
        group(values["register_heads"], m, m, *REGISTERS[values["register_mode"]], longest),
        group(values["unitary_heads"], m, m, "complex", "circle", longest),
    )
    return tuple(each for each in groups if each.heads)


def weights(values: Values) -> dict[str, Weight]:
    d, groups = values["hidden_size"], head_groups(values)
    heads, keys, wide, read, betas, decays, phases = (
        sum(getattr(group, name) for group in groups)
        for name in ("heads", "key_width", "value_width", "read_width", "betas", "decays", "phases")
    )
    out = {
        **conv_weights(d, values["conv_size"]),
        "q_proj.weight": Weight((keys, d)),
        "k_proj.weight": Weight((keys, d)),
        "v_proj.weight": Weight((wide, d)),
        "control_proj.weight": Weight((betas + decays, d), "vector"),
        # bfloat16 would round the span of a memory by two percent
        "beta_bias": Weight((betas,), "vector", fp32=True),
        "decay_bias": Weight((decays,), "vector", fp32=True),
        "decay_rate": Weight((decays,), "vector", fp32=True),
    }
    if values["phase"] == "selective":
        out["phase_down.weight"] = Weight((values["phase_rank"], d), "vector")
        out["phase_up.weight"] = Weight((phases, values["phase_rank"]), "vector")
    if values["phase"] != "none":
        out["phase_bias"] = Weight((phases,), "vector", fp32=True)
    return {**out, **gate_weights(values, heads, read), "o_proj.weight": Weight((d, read))}


def flops(values: Values, seq_len: int) -> float:
    """The op in chunks of C = 64 tokens, or of the whole sequence where it is shorter."""
    return chunk_flops(values, min(CHUNK, seq_len))


def chunk_flops(values: Values, chunk: int) -> float:
    """Key products, triangular inverse and its use, reads of and writes to the state, per token, in chunks of C.

    A head with r rows a token (1 real, 2 complex): 2 r^2 C K for each of k k^T and q k^T (lower halves), r^2 C V for
    each of X R and P D, r^3 C^2 / 3 for the inverse, and 2 r K V for each of k S, q S and k^T D.
    """
    total = 0.0
    for group in head_groups(values):
        r, k, v = (2 if group.mode == "complex" else 1), 2 * group.channels, group.values
        inside = 2 * r * r * chunk * k + 2 * r * r * chunk * v + r**3 * chunk**2 / 3
        total += group.heads * (inside + 3 * 2 * r * k * v)
    return total


def step_flops(values: Values, context: int) -> float:
    """One token by the recurrence, whatever the context: k S, q S and k^T D, 2 r K V each."""
    return float(sum(3 * 2 * 2 * g.channels * g.read_width for g in head_groups(values)))


def activation_bytes(values: Values) -> float:
    """What the groups of heads share, and each group's op."""
    d, groups = values["hidden_size"], head_groups(values)
    if any(g.mode == "complex" and not g.complex_eigenvalues for g in groups):
        raise NotCounted(
            'activations of complex heads are counted for model.eigenvalues="disc"; others have no count yet'
        )
    heads, wide = sum(g.heads for g in groups), sum(g.read_width for g in groups)
    total = float(HALF * d * (2 if values["conv_size"] else 1))
    if values["phase"] == "selective" and any(g.phases for g in groups):
        total += HALF * values["phase_rank"]
    total += sum(chunk_bytes(values, g) if g.mode == "complex" else kernel_bytes(values, g) for g in groups)
    return total + gate_bytes(values, heads, wide)


def kernel_bytes(values: Values, group: HeadGroup) -> float:
    """Real heads', by a kernel of flash-linear-attention: the gated delta rule, or KDA with a decay per channel.

    Around the kernel: q and k in float32 before and after they are rotated, and their angles. The gated delta rule
    keeps its inputs and the inverse of every chunk, [64] numbers per token and head, and recomputes the states before
    them. KDA keeps the products of queries and keys as well, and K decays and their running sum.
    """
    keys, wide, channels = group.key_width, group.value_width, values["decay"] == "channel"
    total = 2 * FULL * keys + HALF * (2 * keys + wide) + HALF * KERNEL_CHUNK * group.heads * (2 if channels else 1)
    total += FULL * group.heads * 7  # beta, decay and their maps, and the lengths of q and k
    if channels:
        total += FULL * (3 * (group.decays - group.heads) + 2 * keys)
    return total + angle_bytes(values, group)


def chunk_bytes(values: Values, group: HeadGroup) -> float:
    """Complex heads' with eigenvalues in the disc, for which no kernel exists: `ops/entangle/chunk.py`, in float32.

    A token has two rows of keys, queries and writes and two of values. Kept are: queries, keys and writes before and
    after they are rescaled, the keys once more for beta and beta's 2 x 2 matrix; in every chunk the two triangles
    [rows, rows] and what the substitution gives, the values written, and three states [K, V].
    """
    k, v, rows = 2 * group.channels, group.values, 2
    tokens = ROWS // rows
    decays = k if values["decay"] == "channel" else 1
    each = 7 * rows * k + rows * rows + 2 * rows * ROWS + rows * (v + k) + rows * v + 3 * k * v / tokens
    each += 2 * k + 2 + 3 * decays  # q and k as they came and their lengths; the rescaling
    maps = 8 * group.heads + 3 * group.decays  # from the projection to beta in the disc, and to the decay
    return FULL * (group.heads * each + maps) + angle_bytes(values, group)


def angle_bytes(values: Values, group: HeadGroup) -> float:
    """The phases': q and k of unit length before they are rotated; the angles; their running sum, and for q and k its
    negative, cosine and sine."""
    if values["phase"] == "none" or not group.phases:
        return 0.0
    return FULL * (2 * group.key_width + group.heads * group.channels * (7 + (values["phase"] == "selective")))


CHOICES = {
    "register_mode": tuple(REGISTERS),
    "mode": ("real", "complex"),
    "phase": ("selective", "fixed", "none"),
    "eigenvalues": ("unit", "signed", "disc"),
    "decay": ("head", "channel"),
}


def check(values: Values) -> str | None:
    disc = values["eigenvalues"] == "disc" and values["mode"] != "complex"
    return first_problem(
        unknown_choice(values, CHOICES),
        below(values, dict.fromkeys(("conv_size", "register_heads", "unitary_heads"), 0)),
        # one channel commutes with itself: no register
        below(values, {"phase_rank": 1, "register_channels": 2}),
        outside(values, fractions=["phase_fraction"], positive=["phase_max", "phase_slope"]),
        'model.eigenvalues="disc" needs model.mode="complex".' if disc else None,
    )


ENTANGLEMENT = MixerSpec(
    name="linear_attention",
    module="qies.model.entanglement:Entanglement",
    weights=weights,
    flops=flops,
    step_flops=step_flops,
    group="entanglement",
    fields={
        "mode": "real",
        "phase": "none",
        "phase_rank": 8,
        "phase_max": math.pi,
        "phase_slope": 0.05,
        "phase_fraction": 1.0,
        "eigenvalues": "signed",
        "register_heads": 4,
        "register_channels": 4,
        "register_mode": "complex",
        "unitary_heads": 0,
        "decay": "head",
        "conv_size": 4,
    },
    check=check,
    states=lambda values: tuple(group.state_shape for group in head_groups(values)),
    conv_inputs=lambda values: max(values["conv_size"] - 1, 0) * values["hidden_size"],
    entangled=True,
    activation_bytes=activation_bytes,
)

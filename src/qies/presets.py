"""Sizes and arms as functions of N, the non-embedding parameters. Imports no torch.

One number decides a model: `settings(arm, size)` gives depth, width and heads, and solves for the MLP width that
brings every arm of a size to the same N. One rule covers 50k to 10b.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from qies.errors import UserError, nearest

SIZES = ("50k", "100k", "200k", "400k", "800k", "1.6m", "3m", "6m", "25m", "100m", "350m", "1b", "3b", "10b")
LARGEST = 20_000_000_000
TOLERANCE = 0.01  # every arm of a size has N to within this share

# What an arm changes of MODEL_FIELDS, which describe `qies` itself. Whatever is not the entangled state is the same in
# every arm but `gpt2`, which is GPT-2's own block; a test holds what may differ.
_MEMORY_ALONE = {"register_heads": 0}
ARMS: dict[str, dict[str, Any]] = {
    "transformer": {"rope_theta": 1e8, "attention_everywhere": True},
    "qies": {},
    "real_registers": {"register_mode": "real"},
    "no_phase": _MEMORY_ALONE,
    "fixed_phase": {**_MEMORY_ALONE, "phase": "fixed"},
    "selective_phase": {**_MEMORY_ALONE, "phase": "selective"},
    "gpt2": {
        "block": "gpt2",
        "position": "learned",
        "attention_everywhere": True,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "logit_softcap": 0.0,
        "attention_conv_size": 0,
    },
    "complex": {**_MEMORY_ALONE, "phase": "selective", "mode": "complex", "eigenvalues": "disc"},
}

# What the named options of QiesConfig may be.
CHOICES = {
    "block": ("qies", "gpt2"),
    "position": ("rope", "learned", "none"),
    "attention_conv": ("input", "keys"),
    "register_mode": ("complex", "real"),
    "mode": ("real", "complex"),
    "phase": ("selective", "fixed", "none"),
    "eigenvalues": ("unit", "signed", "disc"),
    "decay": ("head", "channel"),
    "gate": ("head", "channel", "none"),
}

# The fields of QiesConfig that a study may override, with their defaults (tested against the class itself).
MODEL_FIELDS: dict[str, Any] = {
    "num_hidden_layers": None,
    "hidden_size": None,
    "num_attention_heads": None,
    "head_dim": None,
    "intermediate_size": None,
    "block": "qies",
    "position": "rope",
    "rope_theta": 1e6,
    "rope_fraction": 1.0,
    "nope_interval": 0,
    "max_position_embeddings": 32_768,
    "attention_conv_size": 4,
    "attention_conv": "keys",
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
    "decay": "head",
    "conv_size": 4,
    "gate": "head",
    "logit_softcap": 15.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


# A field that models had before it existed with another value than its default of today, and fields that are gone with
# the value at which a model that has them is the one without.
BEFORE: dict[str, Any] = {"attention_conv": "input", "register_heads": 0}
GONE: dict[str, Any] = {"value_residual": False, "conv": "input"}

# What a user may look for among the fields of the model: where it is set instead.
ELSEWHERE = {
    "arm": " The arm is set by --arm, or by the key arm.",
    "size": " The size is set by --size, or by the key size.",
    "tokens": " The token budget is set by --tokens, or by the key tokens.",
    "vocab_size": " The vocabulary belongs to the data: --vocab-size of qies plan, data.vocab_size of a run.",
    "layer_types": " The arm decides the types of the layers; num_hidden_layers sets their number.",
}

UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}


def parse_size(size: str) -> int:
    """'50k' -> 50_000, '1.5m' -> 1_500_000, '10b' -> 10_000_000_000. Raises UserError otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb])", str(size).lower())
    if match is None:
        hint = nearest(size, SIZES) or " Write a number with k, m or b, from 20k to 20b, such as 400k."
        raise UserError(f"Unknown value '{size}' for size.{hint}")
    number = round(Decimal(match[1]) * UNITS[match[2]])
    if not 20_000 <= number <= LARGEST:
        raise UserError(f"size is {size}; it must lie between 20k and 20b.")
    return number


def size_name(parameters: int) -> str:
    """The shortest spelling of a size: 50_000 -> '50k', 1_500_000 -> '1.5m'."""
    unit = next(u for u in ("b", "m", "k", "") if parameters >= UNITS[u])
    return f"{(Decimal(parameters) / UNITS[unit]).normalize():f}{unit}"


def parse_count(text: str, name: str) -> int:
    """A number of tokens: '1000000', '1_000_000', '1e6' and '1m' alike. Raises UserError, naming `name`, otherwise."""
    match = re.fullmatch(r"(\d+(?:_\d+)*(?:\.\d+)?(?:e\+?\d{1,2})?)([kmb]?)", text.strip().lower())
    number = Decimal(match[1].replace("_", "")) * UNITS[match[2]] if match else Decimal("NaN")
    if match is None or number != number.to_integral_value():
        raise UserError(f"{name} is '{text}'; write a whole number, or one with k, m or b, such as 1m.")
    return int(number)


def shape(parameters: int) -> dict[str, int]:
    """Depth, width and heads for N non-embedding parameters: a multiple of four layers (E-E-E-A), D^2 = N/(12 L).

    Depth grows as N^0.2 and is 8 at 6 M, so that width carries most of the growth (Kaplan et al., arXiv:2001.08361,
    find loss flat in the aspect ratio over a wide range).
    """
    layers = 4 * max(1, round(2 * (parameters / 6e6) ** 0.2))
    width = math.sqrt(parameters / (12 * layers))
    head = 16 if width < 56 else 32 if width < 288 else 64 if width < 1100 else 128
    heads = max(2, round(width / head))
    return {
        "num_hidden_layers": layers,
        "hidden_size": heads * head,
        "num_attention_heads": heads,
        "head_dim": head,
    }


def settings(arm: str, size: str, vocab_size: int, /, **overrides: Any) -> dict[str, Any]:
    """The keyword arguments of `QiesConfig` for an arm and size.

    `overrides` replace single fields; the MLP width then still brings the model to the size's N, unless it is
    given itself. Raises UserError for unknown names, or when no MLP width gives N to within 1 %.
    """
    if arm not in ARMS:
        raise UserError(f"Unknown value '{arm}' for arm.{nearest(arm, ARMS) or f' Known: {chr(44).join(ARMS)}.'}")
    for key, value in overrides.items():
        if key not in MODEL_FIELDS:
            hint = ELSEWHERE.get(key) or nearest(key, MODEL_FIELDS) or f" Known: {', '.join(MODEL_FIELDS)}."
            raise UserError(f"Unknown key 'model.{key}'.{hint}")
        default = MODEL_FIELDS[key]
        kind = int if default is None else type(default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            overrides[key] = float(value)
        elif not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UserError(f"model.{key} must be of type {kind.__name__}, not {value!r}.")
    target = parse_size(size)
    values = _shaped(arm, target, vocab_size, overrides)
    if problem := inconsistent(values):
        raise UserError(problem)
    if values["intermediate_size"] is None:
        width = _mlp_width(values, target)
        if width is None:
            raise UserError(_no_width(arm, size, vocab_size, overrides))
        values["intermediate_size"] = width
    return values


def _shaped(arm: str, target: int, vocab_size: int, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an arm at `target` parameters, without the MLP width that brings it there."""
    everywhere = ARMS[arm].get("attention_everywhere", False)
    values = {**MODEL_FIELDS, **shape(target)}
    values.update({k: v for k, v in ARMS[arm].items() if k != "attention_everywhere"})
    values.update(overrides)
    layers = values["num_hidden_layers"]
    values["layer_types"] = [
        "full_attention" if everywhere or (i + 1) % 4 == 0 or i == layers - 1 else "linear_attention"
        for i in range(layers)
    ]
    values["vocab_size"] = vocab_size
    values["phase_rank"] = overrides.get("phase_rank", max(8, values["hidden_size"] // 16))
    return values


def inconsistent(values: Mapping[str, Any]) -> str | None:
    """What is wrong with a model's values taken together, in one sentence, or None."""
    for name, options in CHOICES.items():
        if values[name] not in options:
            hint = nearest(str(values[name]), options) or f" Known: {', '.join(options)}."
            return f"Unknown value '{values[name]}' for model.{name}.{hint}"
    least = dict.fromkeys(("num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim", "vocab_size"), 1)
    least |= {"attention_conv_size": 0, "conv_size": 0, "phase_rank": 1, "max_position_embeddings": 1}
    least |= {
        "nope_interval": 0,
        "register_heads": 0,
        "register_channels": 2,
    }  # one channel commutes with itself: no register
    for name, smallest in least.items():
        if values[name] < smallest:
            return f"model.{name} is {values[name]}; it must be at least {smallest}."
    if values["intermediate_size"] is not None and values["intermediate_size"] < 1:
        return f"model.intermediate_size is {values['intermediate_size']}; it must be at least 1."
    if not 0 <= values["logit_softcap"] < math.inf:
        return f"model.logit_softcap is {values['logit_softcap']}; it must be 0 (off) or a positive number."
    if values["head_dim"] % 2:
        return f"model.head_dim is {values['head_dim']}; it must be even (Re and Im halves)."
    for name in ("phase_fraction", "rope_fraction"):
        if not 0 <= values[name] <= 1:
            return f"model.{name} is {values[name]}; it must lie in [0, 1]."
    for name in ("phase_max", "phase_slope", "rope_theta", "rms_norm_eps"):
        if not values[name] > 0:
            return f"model.{name} is {values[name]}; it must be positive."
    if values["eigenvalues"] == "disc" and values["mode"] != "complex":
        return 'model.eigenvalues="disc" needs model.mode="complex".'
    if (values["block"] == "gpt2") != (values["position"] == "learned"):
        return 'model.block="gpt2" and model.position="learned" go together.'
    kinds = values["layer_types"]
    if len(kinds) != values["num_hidden_layers"]:
        return f"model.layer_types names {len(kinds)} layers, but there are {values['num_hidden_layers']}."
    if values["block"] == "gpt2" and "linear_attention" in kinds:
        return 'model.block="gpt2" holds attention layers only.'
    return None


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
    def key_width(self) -> int:
        return self.heads * 2 * self.channels

    @property
    def value_width(self) -> int:
        return self.heads * self.values * (2 if self.mode == "complex" else 1)

    @property
    def betas(self) -> int:
        return self.heads * (2 if self.eigenvalues == "disc" else 1)

    @property
    def state_size(self) -> int:
        """Numbers in the states of one sequence."""
        return self.heads * 2 * self.channels * self.values


def head_groups(values: Mapping[str, Any]) -> tuple[HeadGroup, ...]:
    """The groups of heads of an entanglement layer: memory heads, then register heads where there are any.

    A register of m levels is complex with eigenvalues in the disc, so that tokens apply any gate of U(m) to it, and
    V = m: its state has m rows, so m columns hold a whole U(m), and more would repeat them. It starts with the longest
    memory, since a register that forgets loses its count. With register_mode "real" its twin: the same number of heads
    and of state numbers, real values, eigenvalues in [0, 1].
    """

    def group(heads: int, m: int, v: int, mode: str, eigenvalues: str, spans: tuple[int, int]) -> HeadGroup:
        decays = heads * (m if values["decay"] == "channel" else 1)
        return HeadGroup(heads, m, v, mode, eigenvalues, decays, heads * round(values["phase_fraction"] * m), spans)

    k, m, registers = values["head_dim"], values["register_channels"], values["register_heads"]
    memory = group(values["num_attention_heads"], k // 2, k, values["mode"], values["eigenvalues"], (16, 4096))
    kind = ("complex", "disc") if values["register_mode"] == "complex" else ("real", "unit")
    return (memory, group(registers, m, m, *kind, (4096, 4096))) if registers else (memory,)


def _mlp_width(values: Mapping[str, Any], target: int) -> int | None:
    """The MLP width that brings the model to `target`, as round as the tolerance allows; None where none does."""
    fixed = count_parameters({**values, "intermediate_size": 0})["non_embedding"]
    each = count_parameters({**values, "intermediate_size": 1})["non_embedding"] - fixed
    exact = (target - fixed) / each
    for step in (128, 64, 32, 16, 8, 4, 2, 1):
        width = round(exact / step) * step
        if width >= 1 and abs(fixed + each * width - target) <= TOLERANCE / 2 * target:
            return width
    return None


def _no_width(arm: str, size: str, vocab_size: int, overrides: Mapping[str, Any]) -> str:
    """Why an arm does not build at `size`, and the next larger size at which it does."""
    target = parse_size(size)
    mixers = count_parameters({**_shaped(arm, target, vocab_size, overrides), "intermediate_size": 0})["non_embedding"]
    larger = target // 1000 + 1
    while larger <= LARGEST // 1000:
        if _mlp_width(_shaped(arm, 1000 * larger, vocab_size, overrides), 1000 * larger) is not None:
            break
        larger += 1 + larger // 200
    take = f"take the size {larger}k, or " if larger <= LARGEST // 1000 else ""
    return (
        f"Arm {arm} has no MLP width that gives {size} parameters to within {TOLERANCE:.0%} (its mixers alone hold "
        f"{mixers:,}); {take}lower model.hidden_size or model.num_hidden_layers."
    )


def count_parameters(values: Mapping[str, Any]) -> dict[str, int]:
    """Parameters by group of the model that `values` describe, in closed form.

    Groups: embedding (with learned positions), head, attention, entanglement, convolution, mlp, norm; with the sums
    non_embedding (all but embedding and head) and total.
    """
    if values["block"] == "gpt2":
        return _sums(_count_gpt2(values))
    d, heads, k = values["hidden_size"], values["num_attention_heads"], values["head_dim"]
    inner = heads * k
    gate = {"none": 0, "head": heads, "channel": inner}[values["gate"]]
    attention = 4 * d * inner + k + d * gate

    groups = head_groups(values)
    wide = sum(g.value_width for g in groups)
    gate = {"none": 0, "head": sum(g.heads for g in groups), "channel": wide}[values["gate"]]
    beta, decay, phase = sum(g.betas for g in groups), sum(g.decays for g in groups), sum(g.phases for g in groups)
    entanglement = 2 * d * (sum(g.key_width for g in groups) + wide) + d * (beta + decay + gate) + beta + 2 * decay
    if values["phase"] != "none":
        entanglement += phase
    if values["phase"] == "selective":
        entanglement += values["phase_rank"] * (d + phase)

    kinds = values["layer_types"]
    n_attention, n_entangled = kinds.count("full_attention"), kinds.count("linear_attention")
    return _sums(
        {
            "embedding": values["vocab_size"] * d,
            "head": 0 if values["tie_word_embeddings"] else values["vocab_size"] * d,
            "attention": n_attention * attention,
            "entanglement": n_entangled * entanglement,
            "convolution": n_attention * attention_conv_width(values) * values["attention_conv_size"]
            + n_entangled * d * values["conv_size"],
            "mlp": len(kinds) * 2 * d * values["intermediate_size"],
            "norm": 0,
        }
    )


def attention_conv_width(values: Mapping[str, Any]) -> int:
    """Channels of the short convolution of an attention layer: its input's, or those of the keys of all heads."""
    if values["attention_conv"] == "keys":
        return values["num_attention_heads"] * values["head_dim"]
    return values["hidden_size"]


def _count_gpt2(values: Mapping[str, Any]) -> dict[str, int]:
    d, layers, hidden = values["hidden_size"], values["num_hidden_layers"], values["intermediate_size"]
    inner = values["num_attention_heads"] * values["head_dim"]
    return {
        "embedding": (values["vocab_size"] + values["max_position_embeddings"]) * d,
        "head": 0 if values["tie_word_embeddings"] else values["vocab_size"] * d,
        "attention": layers * (4 * d * inner + 3 * inner + d),
        "entanglement": 0,
        "convolution": 0,
        "mlp": layers * (2 * d * hidden + hidden + d),
        "norm": (2 * layers + 1) * 2 * d,
    }


def _sums(groups: dict[str, int]) -> dict[str, int]:
    out = dict(groups)
    out["non_embedding"] = sum(n for g, n in groups.items() if g not in ("embedding", "head"))
    out["total"] = sum(groups.values())
    return out


def control_parameters(values: Mapping[str, Any]) -> int:
    """Of the non-embedding parameters those that AdamW trains: biases, scales, convolutions, small control maps.

    Muon trains the rest of them; AdamW the embedding and the head too (`train.optim.parameter_groups`).
    """
    counts = count_parameters(values)
    d, inner = values["hidden_size"], values["num_attention_heads"] * values["head_dim"]
    if values["block"] == "gpt2":
        layers = values["num_hidden_layers"]
        matrices = layers * (4 * d * inner + 2 * d * values["intermediate_size"])
        return counts["non_embedding"] - matrices
    kinds, groups = values["layer_types"], head_groups(values)
    wide = sum(g.key_width + g.value_width for g in groups)
    matrices = kinds.count("full_attention") * 4 * d * inner + kinds.count("linear_attention") * 2 * d * wide
    return counts["non_embedding"] - counts["mlp"] - matrices


@dataclass(frozen=True)
class Hyperparameters:
    """How a model of N non-embedding parameters is trained on D tokens: what `hyperparameters` computes.

    The learning rates are those before schedule and `train.lr_scale`. docs/scaling-up.md says which of these numbers
    were measured here and which are the cited papers'.
    """

    matrix_lr: float  # Muon, hidden matrices
    embedding_lr: float  # AdamW
    head_lr: float  # AdamW
    vector_lr: float  # AdamW: biases, convolutions, scales and the small control maps
    batch_tokens: int = 2048  # tokens a step; this and what follows: the values of the sweep in LOG.md
    warmup: float = 0.02  # share of the tokens, linear up
    decay: float = 0.4  # share of the tokens at the end, linear down to zero
    weight_decay: float = 0.01  # of the hidden matrices, times their learning rate
    momentum: float = 0.95  # Muon
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW


def hyperparameters(parameters: int, tokens: int) -> Hyperparameters:
    """The rule for every arm alike: that of the sweep in LOG.md at 100k parameters, carried to any N and D >= 1.

    Learning rates. Muon's step has a fixed spectral size, so its rate does not depend on the width (Jordan et al.,
    Muon, 2024); AdamW rates for embedding and head fall with the width as W^-1/2 from their value at W = 64. No
    further factor in N and D: at D/N constant Li et al. (arXiv:2503.04715) find AdamW's best rate falling as
    N^(-0.713 + 0.307), which is 1/W here (W grows as N^0.4), and that fall is what Muon's step has built in.

    Batch. 0.58 D^0.571 tokens (Li et al., arXiv:2503.04715), whatever N; never below the sweep's.

    Warm-up. 2 % of D, and at most N tokens (Porian et al., arXiv:2406.19146). Decay: the last 40 %, linear to zero
    (Bergsma et al., arXiv:2502.15938).

    Weight decay lambda. The average that the weights keep of their updates spans tau = B / (lr lambda D) of a run; the
    best tau is 1.084 (D/N)^-0.527 (Bergsma et al., arXiv:2505.13738). Never above the sweep's, which binds wherever a
    run is short, and so at every N up to 6m.
    """
    if parameters < 1 or tokens < 1:
        raise ValueError("hyperparameters needs at least one parameter and one token")
    scale = (shape(parameters)["hidden_size"] / 64) ** -0.5
    swept = Hyperparameters(matrix_lr=0.04, embedding_lr=0.2 * scale, head_lr=0.02 * scale, vector_lr=0.02)
    batch = max(swept.batch_tokens, round(0.58 * tokens**0.571))
    timescale = 1.084 * (tokens / parameters) ** -0.527
    return replace(
        swept,
        batch_tokens=batch,
        warmup=min(swept.warmup, parameters / tokens),
        weight_decay=min(swept.weight_decay, batch / (swept.matrix_lr * timescale * tokens)),
    )

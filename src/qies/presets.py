"""Sizes and arms as functions of N, the non-embedding parameters. Imports no torch.

One number determines a model: `settings(arm, size)` returns depth, width and heads, and solves for the MLP width that
gives every arm of a size the same N. One rule covers 50k to 10b.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from qies.accounting.parameters import count_parameters
from qies.errors import UserError, unknown
from qies.mixers import BUILT_IN, mixers, names, register
from qies.mixers.attention import ATTENTION
from qies.mixers.common import below, first_problem, outside, unknown_choice
from qies.mixers.entanglement import ENTANGLEMENT

SIZES = ("50k", "100k", "200k", "400k", "800k", "1.6m", "3m", "6m", "25m", "100m", "350m", "1b", "3b", "10b")
LARGEST = 20_000_000_000
TOLERANCE = 0.01  # relative tolerance of N, for every arm of a size


@dataclass(frozen=True)
class Arm:
    """A row of `ARMS`: the mixers of its layers, and what else it changes of the defaults.

    pattern: mixers, repeated over the depth. last: the mixer of the last layer, "" for the pattern's. settings: fields
    of the configuration, of the backbone or of the arm's mixers.
    """

    pattern: tuple[str, ...]
    last: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def layer_types(self, layers: int) -> list[str]:
        """The mixer of each of `layers` layers."""
        kinds = [self.pattern[i % len(self.pattern)] for i in range(layers)]
        return [*kinds[:-1], self.last] if self.last and kinds else kinds


def _hybrid(**settings: Any) -> Arm:
    """Three entanglement layers to one of attention, which is also the last."""
    return Arm((*3 * (ENTANGLEMENT.name,), ATTENTION.name), ATTENTION.name, settings)


# An arm's settings replace MODEL_FIELDS, which describe `qies` itself. Whatever is not the entangled state is the same
# in every arm but `gpt2`, which is GPT-2's own block; a test holds what may differ.
ARMS: dict[str, Arm] = {
    "transformer": Arm((ATTENTION.name,), settings={"rope_theta": 1e8}),
    "qies": _hybrid(),
    "real_registers": _hybrid(register_mode="real"),
    "unitary": _hybrid(register_heads=0, unitary_heads=4),
    "no_phase": _hybrid(register_heads=0),
    "fixed_phase": _hybrid(register_heads=0, phase="fixed"),
    "selective_phase": _hybrid(register_heads=0, phase="selective"),
    "gpt2": Arm(
        (ATTENTION.name,),
        settings={
            "block": "gpt2",
            "position": "learned",
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
            "logit_softcap": 0.0,
            "attention_conv_size": 0,
        },
    ),
    "complex": _hybrid(register_heads=0, phase="selective", mode="complex", eigenvalues="disc"),
}


def register_arm(name: str, pattern: Sequence[str], *, last: str = "", **settings: Any) -> None:
    """Make an arm known under `name`: mixers repeated over the depth, the last layer's, and settings that it changes.

    Raises UserError for an unknown mixer or setting, or when another arm has the name already; registering the same one
    again does nothing.
    """
    arm = Arm(tuple(pattern), last, settings)
    if not name or not name.replace("-", "").replace("_", "").isalnum():
        raise UserError(f"The name of an arm is {name!r}; it must be letters, digits, - and _ only.")
    if not arm.pattern:
        raise UserError(f"Arm '{name}' has an empty pattern; name at least one mixer.")
    known = model_fields([*arm.pattern, *filter(None, [last])])
    for key in settings:
        if key not in known:
            raise unknown("field", key, known, where=f"in arm '{name}'")
    register(ARMS, name, arm, "arm")


def find_arm(name: str) -> Arm:
    """The arm of that name. Raises UserError for an unknown one."""
    if name not in ARMS:
        raise unknown("arm", name, ARMS)
    return ARMS[name]


# What the named options of the backbone may be.
CHOICES = {"block": ("qies", "gpt2"), "gate": ("head", "channel", "none")}

# The fields of QiesConfig that a study may override, with their defaults (tested against the class itself).
MODEL_FIELDS: dict[str, Any] = {
    "num_hidden_layers": None,
    "hidden_size": None,
    "num_attention_heads": None,
    "head_dim": None,
    "intermediate_size": None,
    "block": "qies",
    "max_position_embeddings": 32_768,
    **{name: default for spec in BUILT_IN for name, default in spec.fields.items()},
    "gate": "head",
    "logit_softcap": 15.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def model_fields(kinds: Iterable[str]) -> dict[str, Any]:
    """`MODEL_FIELDS` and those of the mixers in `kinds`.

    Raises UserError for an unknown mixer, and for one that takes the name of a field of another.
    """
    fields = dict(MODEL_FIELDS)
    for spec in mixers(kinds):
        if spec in BUILT_IN:
            continue
        if taken := fields.keys() & spec.fields.keys():
            raise UserError(
                f"Mixer '{spec.name}' takes names of other fields ({', '.join(sorted(taken))}); rename them."
            )
        fields |= spec.fields
    return fields


# Fields whose value in models from before they existed differs from today's default; and removed fields, with the value
# at which they have no effect.
BEFORE: dict[str, Any] = {"attention_conv": "input", "register_heads": 0}
GONE: dict[str, Any] = {"value_residual": False, "conv": "input"}

# Settings that are not fields of the model, and where they are set.
ELSEWHERE = {
    "arm": "The arm is set by --arm, or by the key arm.",
    "size": "The size is set by --size, or by the key size.",
    "tokens": "The token budget is set by --tokens, or by the key tokens.",
    "vocab_size": "The vocabulary belongs to the data: --vocab-size of qies plan, data.vocab_size of a run.",
    "layer_types": "The arm decides the types of the layers; num_hidden_layers sets their number.",
}

UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}


def parse_size(size: str) -> int:
    """'50k' -> 50_000, '1.5m' -> 1_500_000, '10b' -> 10_000_000_000. Raises UserError otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb])", str(size).lower())
    if match is None:
        raise unknown("size", size, SIZES, otherwise="Write a number with k, m or b, from 20k to 20b, such as 400k.")
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
    find_arm(arm)
    known = model_fields(names())  # of all mixers: a study's settings go to every arm
    for key, value in overrides.items():
        if key not in known:
            raise unknown("key", key, [] if key in ELSEWHERE else known, where="in model", note=ELSEWHERE.get(key, ""))
        default = known[key]
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
    """The settings of an arm at `target` parameters, except for the MLP width."""
    sized = shape(target)
    chosen = {**sized, **ARMS[arm].settings, **overrides}
    kinds = ARMS[arm].layer_types(chosen["num_hidden_layers"])
    return {
        **model_fields(kinds),
        "phase_rank": max(8, chosen["hidden_size"] // 16),
        **chosen,
        "layer_types": kinds,
        "vocab_size": vocab_size,
    }


def inconsistent(values: Mapping[str, Any]) -> str | None:
    """The first inconsistency in a model's settings, in one sentence, or None."""
    try:
        concerned = mixers([*(spec.name for spec in BUILT_IN), *values["layer_types"]])
    except UserError as unknown:
        return str(unknown)
    least = dict.fromkeys(("num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim", "vocab_size"), 1)
    kinds, cap = values["layer_types"], values["logit_softcap"]
    problem = first_problem(
        unknown_choice(values, CHOICES),
        below(values, least | {"max_position_embeddings": 1}),
        values["intermediate_size"] is not None and below(values, {"intermediate_size": 1}),
        not 0 <= cap < math.inf and f"model.logit_softcap is {cap}; it must be 0 (off) or a positive number.",
        values["head_dim"] % 2 and f"model.head_dim is {values['head_dim']}; it must be even (Re and Im halves).",
        outside(values, positive=["rms_norm_eps"]),
        *(spec.check(values) for spec in concerned),
    )
    if problem:
        return problem
    if (values["block"] == "gpt2") != (values["position"] == "learned"):
        return 'model.block="gpt2" and model.position="learned" go together.'
    if len(kinds) != values["num_hidden_layers"]:
        return f"model.layer_types names {len(kinds)} layers, but there are {values['num_hidden_layers']}."
    if values["block"] == "gpt2" and set(kinds) != {ATTENTION.name}:
        return 'model.block="gpt2" holds attention layers only.'
    return None


def _mlp_width(values: Mapping[str, Any], target: int) -> int | None:
    """The roundest MLP width that gives `target` parameters to within the tolerance, or None."""
    fixed = count_parameters({**values, "intermediate_size": 0})["non_embedding"]
    each = count_parameters({**values, "intermediate_size": 1})["non_embedding"] - fixed
    exact = (target - fixed) / each
    for step in (128, 64, 32, 16, 8, 4, 2, 1):
        width = round(exact / step) * step
        if width >= 1 and abs(fixed + each * width - target) <= TOLERANCE / 2 * target:
            return width
    return None


def _no_width(arm: str, size: str, vocab_size: int, overrides: Mapping[str, Any]) -> str:
    """The message for an arm that cannot be built at `size`: the reason, and the next larger size that works."""
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


@dataclass(frozen=True)
class Hyperparameters:
    """The result of `hyperparameters`: how a model of N non-embedding parameters is trained on D tokens.

    The learning rates are those before schedule and `train.lr_scale`. docs/scaling-up.md says which of these numbers
    were measured here and which are the cited papers'.
    """

    matrix_lr: float  # Muon, hidden matrices
    embedding_lr: float  # AdamW
    head_lr: float  # AdamW
    vector_lr: float  # AdamW: biases, convolutions, scales and the small control maps
    batch_tokens: int = 2048  # per step; this and the following: the values of the sweep in LOG.md
    warmup: float = 0.02  # fraction of the tokens, linear increase
    decay: float = 0.4  # fraction of the tokens at the end, linear to zero
    weight_decay: float = 0.01  # of the hidden matrices, times their learning rate
    momentum: float = 0.95  # Muon
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW


def hyperparameters(parameters: int, tokens: int) -> Hyperparameters:
    """The rule of every arm: that of the sweep in LOG.md at 100k parameters, extrapolated to any N and D >= 1.

    Learning rates. Muon's step has a fixed spectral size, so its rate does not depend on the width (Jordan et al.,
    Muon, 2024); AdamW rates for embedding and head fall with the width as W^-1/2 from their value at W = 64. No
    further factor in N and D: at D/N constant Li et al. (arXiv:2503.04715) find AdamW's best rate falling as
    N^(-0.713 + 0.307), which is 1/W here (W grows as N^0.4), and Muon's step already includes that factor.

    Batch. 0.58 D^0.571 tokens (Li et al., arXiv:2503.04715) for any N; at least the sweep's.

    Warm-up. 2 % of D, and at most N tokens (Porian et al., arXiv:2406.19146). Decay: the last 40 %, linear to zero
    (Bergsma et al., arXiv:2502.15938).

    Weight decay lambda. The average that the weights keep of their updates spans tau = B / (lr lambda D) of a run; the
    best tau is 1.084 (D/N)^-0.527 (Bergsma et al., arXiv:2505.13738). At most the sweep's, which applies to short runs,
    and so at every N up to 6m.
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

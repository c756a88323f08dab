"""`QiesConfig`: the configuration of a model. The arms are different values of it."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedConfig

from qies.config import ObjectiveConfig, from_dict
from qies.errors import UserError
from qies.mixers import mixer
from qies.mixers.entanglement import HeadGroup, head_groups
from qies.presets import ARMS, BEFORE, MODEL_FIELDS, inconsistent, model_fields


class QiesConfig(PreTrainedConfig):
    """Configuration of a QIES model.

    Shape (legend B T D H m K V L):
        vocab_size, hidden_size (D), num_hidden_layers (L), num_attention_heads (H), head_dim (K and V of every
        head; even), intermediate_size (width of the ReLU^2 MLP), layer_types (the mixer of each layer:
        `linear_attention` for an entanglement layer E, `full_attention` for A, or one that `qies.register_mixer` made
        known; default E-E-E-A repeated, last layer A).
        block: "qies" (this project's: RMSNorm without gain, ReLU^2, mixer slot) or "gpt2" (LayerNorm, GELU, biases,
        learned positions up to max_position_embeddings; attention layers only, and most options below do not apply).
    Attention layers:
        position: "rope", "learned" (with the gpt2 block only) or "none"; rope_theta, the base of its frequencies;
        rope_fraction: the share of a head's channel pairs that rotate, those of the highest frequencies;
        nope_interval: 2 means that every second attention layer has no positions (entanglement layers are not
        counted), 0 none;
        attention_conv_size: taps of the short convolution, 0 for none; attention_conv: where it stands, on the layer's
        "input" or on the "keys" alone.
    Entanglement layers:
        mode: "real" or "complex" projector and values;
        phase: "selective" (theta_t = phase_max tanh(phase_slope a_t / phase_max) with a_t a low-rank map of
        x_t, zero at the start), "fixed" (a learned constant per channel in place of a_t) or "none"; phase_rank;
        phase_max in radians a token; phase_slope in radians a unit of a_t: how fast phases are learned;
        phase_fraction: the share of a
        head's complex channels that rotates;
        eigenvalues: where lambda = 1 - beta lives: "unit" [0,1], "signed" [-1,1], "disc" (complex mode only);
        register_heads: small heads for state tracking beside the others, 0 for none; their states are m by m with
        m = register_channels (at least 2); register_mode: "complex" with eigenvalues in the disc, or "real" with
        eigenvalues in [0, 1] and as many numbers in the state; unitary_heads: heads of the same shape that hold the
        product of one gate of U(m) a token, 0 for none;
        decay: one alpha a "head" or a complex "channel"; conv_size: taps of the short convolution, 0 for none.
    All layers:
        gate: sigmoid output gate per "head", per "channel" or "none"; logit_softcap (0: none), also called
        final_logit_softcapping (None: none); tie_word_embeddings (False).
    Training:
        objective: settings of `qies.config.ObjectiveConfig`, such as {"far_future": 0.1}; None for cross-entropy alone.

    A mixer from outside the package has fields of its own (`MixerSpec.fields`), which are keywords here too.

    Raises ValueError for a value outside the choices above or an inconsistent shape.
    """

    model_type = "qies"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (Trainer wants a list)

    vocab_size: int = 4096
    hidden_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 256
    layer_types: list[str] | None = None
    block: str = "qies"
    position: str = "rope"
    rope_theta: float = 1e6
    rope_fraction: float = 1.0
    nope_interval: int = 0
    max_position_embeddings: int = 32_768
    attention_conv_size: int = 4
    attention_conv: str = "keys"
    mode: str = "real"
    phase: str = "none"
    phase_rank: int = 8
    phase_max: float = 3.141592653589793
    phase_slope: float = 0.05
    phase_fraction: float = 1.0
    eigenvalues: str = "signed"
    register_heads: int = 4
    register_channels: int = 4
    register_mode: str = "complex"
    unitary_heads: int = 0
    decay: str = "head"
    conv_size: int = 4
    gate: str = "head"
    logit_softcap: float = 15.0
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 0
    objective: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        if self.layer_types is None:
            self.layer_types = ARMS["qies"].layer_types(self.num_hidden_layers)
        try:
            fields = model_fields(self.layer_types)
        except UserError as unknown:
            raise ValueError(str(unknown)) from None
        kwargs = {name: default for name, default in fields.items() if name not in MODEL_FIELDS} | kwargs
        if problem := inconsistent(vars(self) | kwargs):
            raise ValueError(problem)
        if self.objective is not None:
            try:
                chosen = from_dict(ObjectiveConfig, self.objective, "objective")
            except UserError as wrong:
                raise ValueError(str(wrong)) from None
            self.objective = asdict(chosen) if chosen.terms else None
        super().__post_init__(**kwargs)

    def validate(self) -> None:
        """The checks of transformers, which knows each mixer by the name of its kind."""
        known = copy.copy(self)
        known.layer_types = [mixer(name).layer_type for name in self.layer_types or []]
        super(QiesConfig, known).validate()

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data; `objective` only where it has terms."""
        return {name: value for name, value in super().to_dict().items() if name != "objective" or value}

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """The configuration of a saved dictionary. Fields that did not exist when it was saved get the value that
        applied then (`presets.BEFORE`)."""
        return super().from_dict(_complete(config_dict), **kwargs)

    @classmethod
    def from_json_file(cls, json_file):
        """As `from_dict`, from a file."""
        return cls(**_complete(cls._dict_from_json_file(json_file)))

    @property
    def final_logit_softcapping(self) -> float | None:
        """`logit_softcap` by the name that other libraries use; None where logits are not capped."""
        return self.logit_softcap or None

    @final_logit_softcapping.setter
    def final_logit_softcapping(self, value: float | None) -> None:
        self.logit_softcap = value or 0.0

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values in an attention layer, equal to `num_attention_heads`."""
        return self.num_attention_heads

    @num_key_value_heads.setter
    def num_key_value_heads(self, value: int) -> None:
        if value != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads is {value}; it must equal num_attention_heads, {self.num_attention_heads}."
            )

    @property
    def head_groups(self) -> tuple[HeadGroup, ...]:
        """The groups of identical heads of an entanglement layer."""
        return head_groups(vars(self))


def _complete(saved: dict[str, Any]) -> dict[str, Any]:
    """Saved values, completed for fields that did not exist yet; every configuration has saved its convolution."""
    return BEFORE | saved if "attention_conv_size" in saved else saved

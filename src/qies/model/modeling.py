"""The model: one backbone with a mixer per layer, in the classes of transformers 5.

Legend: B batch, T position, D model width, V vocabulary, L layers, H heads, S keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import is_flash_attention_requested
from transformers.utils.output_capturing import capture_outputs

from qies.accounting.parameters import model_weights
from qies.errors import UserError
from qies.mixers import mixer, mixers, resolve
from qies.model.attention import Attention, rotary_angles
from qies.model.cache import QiesCache
from qies.model.configuration import QiesConfig
from qies.model.entanglement import Entanglement
from qies.model.gpt2 import GPT2_STD, Gpt2Attention, Gpt2Block
from qies.model.initialization import draw_seed, init_module, seeded
from qies.model.layers import MLP, embedding, is_matrix, linear
from qies.model.packing import Rows, ends_of, positions_of, read_rows
from qies.model.terms import Objective, Seen
from qies.objective import IGNORED, language_modelling, language_modelling_of_logits, second_halves, segments
from qies.ops.entangle.layout import first_tokens, readable
from qies.ops.loss import linear_cross_entropy
from qies.ops.norm import rms_norm

# Saved with the weights: for an unknown model type transformers suggests an upgrade, which does not help.
CARD = """---
library_name: transformers
tags: [qies]
---

This folder holds a QIES model. Its classes come with the package `qies`: without `import qies`, transformers says that
it does not recognize the model type `qies`.

```python
import qies  # registers the model with the Auto classes; nothing is run from this folder
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""


def build_mixer(config: QiesConfig, layer_idx: int) -> nn.Module:
    """Build the mixer of a layer. Raises UserError if its parameters differ from its declaration, from which counts,
    FLOPs, memory and optimizers are derived."""
    spec = mixer((config.layer_types or [])[layer_idx])
    module = resolve(spec.module)(config, layer_idx)
    made = {name: tuple(p.shape) for name, p in module.named_parameters()}
    declared = {name: weight.shape for name, weight in spec.declared(vars(config)).items()}
    for name in (*made, *declared):
        if made.get(name) != declared.get(name):
            raise UserError(
                f"Mixer '{spec.name}' declares {_shape(declared.get(name))} for its parameter {name}, but the module "
                f"has {_shape(made.get(name))}; correct MixerSpec.weights."
            )
    return module


def _shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"the shape {list(shape)}"


class RmsNorm(nn.Module):
    """Root-mean-square normalisation without a gain."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps)


class QiesBlock(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + MLP(norm(x)). The arms differ in the mixer only."""

    def __init__(self, config: QiesConfig, layer_idx: int) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.mixer = build_mixer(config, layer_idx)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.mixes = True

    def forward(self, x: Tensor, **kwargs) -> tuple[Tensor | None, ...]:
        """x [B,T,D] -> [B,T,D], attention weights or None, and whatever else the mixer returns."""
        others: list[Tensor | None] = [None]
        if self.mixes:
            mixed, *others = self.mixer(self._norm(x), **kwargs)
            x = x + mixed
        return x + self.mlp(self._norm(x)), *others

    def _norm(self, x: Tensor) -> Tensor:
        """RMSNorm. Under autocast the result has its dtype, so that x is cast once and not in every projection."""
        device = x.device.type
        y = rms_norm(x, self.eps)
        return y.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else y


@dataclass
class QiesModelOutput(BaseModelOutputWithPast):
    """With `observe` also the read-outs [B,T,H,V] and the states at ends of chunks [B,C,H,2m,V] of each group of heads
    of each entanglement layer."""

    readouts: tuple[Tensor, ...] | None = None
    states: tuple[Tensor, ...] | None = None


class QiesPreTrainedModel(PreTrainedModel):
    config_class = QiesConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["QiesBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _is_stateful = True  # no assisted decoding, since an entangled state cannot be rolled back
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": [QiesBlock, Gpt2Block],
        "attentions": [Attention, Gpt2Attention],
    }

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs) -> None:
        """Save weights, configuration and, unless it exists, a README.md that explains how to load them."""
        folder = Path(save_directory)
        if is_main_process and not folder.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "README.md").exists():
                (folder / "README.md").write_text(CARD, encoding="utf-8")
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)

    @property
    def init_seed(self) -> int:
        """The seed of all initial weights, which the constructor draws from torch's default generator."""
        return self.base_model._init_seed

    def name_in_base(self, name: str) -> str:
        """A module's name in the base model: the initial weights are the same with and without a head."""
        return name.removeprefix(f"{self.base_model_prefix}.")

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a module that transformers replaced or resized, from torch's default generator."""
        init_module(module)

    @init.guard_torch_init_functions()
    def initialize_weights(self) -> None:
        """Initialise the remaining modules, each parameter from (`init_seed`, its name)."""
        for name, module in self.named_modules():
            if not getattr(module, "_is_hf_initialized", False):
                init_module(module, self.init_seed, self.name_in_base(name))
                module._is_hf_initialized = True


class QiesModel(QiesPreTrainedModel):
    """Embedding, L blocks, final norm: token ids [B,T] -> hidden states [B,T,D].

    `output_hidden_states` returns L + 1 hidden states [B,T,D]; `output_attentions` the weights [B,H,T,S] of the
    attention layers, which only `attn_implementation="eager"` computes.

    Several texts may be packed into one row. They are marked by any of: position_ids [B,T] that restart; seq_idx [B,T],
    their indices; cu_seq_lens_q (and the equal cu_seq_lens_k) [N+1], their cumulative lengths over the B * T tokens; a
    block-causal attention_mask [B,1,T,T]. Each text is computed separately: states, phases, convolutions and positions
    are reset. Packing cannot be combined with a cache. Any other attention_mask [B,1,T,T] is accepted only if every
    layer is attention without a convolution. max_length_q and max_length_k are ignored.
    """

    def __init__(self, config: QiesConfig) -> None:
        super().__init__(config)
        self._init_seed = draw_seed()
        gpt2 = config.block == "gpt2"
        std = GPT2_STD if gpt2 else 1.0
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size, std)
        self.embed_positions = embedding(config.max_position_embeddings, config.hidden_size, std) if gpt2 else None
        block = Gpt2Block if gpt2 else QiesBlock
        self.layers = nn.ModuleList()
        for i in range(config.num_hidden_layers):
            with seeded(self._init_seed, f"layers.{i}"):
                self.layers.append(block(config, i))
        self.norm = nn.LayerNorm(config.hidden_size) if gpt2 else RmsNorm(config.rms_norm_eps)
        self.gradient_checkpointing = False
        specs = mixers(config.layer_types or [])
        self.attends = any(spec.attends for spec in specs)
        self.remembers = any(spec.remembers(vars(config)) for spec in specs)  # which attention masks do not control
        self._keep_in_fp32_modules_strict = {
            name.rsplit(".", 1)[-1] for name, weight in model_weights(vars(config)).items() if weight.fp32
        }
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        observe: int = 0,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        _refuse_unknown(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        length = embeds.shape[1]
        rows = read_rows(
            embeds.shape[:2],
            attention_mask,
            position_ids,
            seq_idx,
            _ends(cu_seq_lens_q, cu_seq_lens_k),
            cached=past_key_values is not None or bool(use_cache),
        )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and rows.texts is None
        if self.gradient_checkpointing and self.training:  # recomputation would update the states twice
            if past_key_values is not None:
                raise ValueError(
                    "Gradient checkpointing cannot continue from past_key_values: omit them, or call eval()."
                )
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = QiesCache(self.config)
        if past_key_values is not None and not isinstance(past_key_values, QiesCache):
            raise ValueError("past_key_values must be a qies.model.QiesCache: build it with QiesCache(model.config).")

        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = rows.real if rows.mask is None else rows.mask
        if rows.mask is not None and self.remembers:
            raise ValueError(
                "This attention_mask [B, 1, T, T] is not block-causal with one block per text, or is combined with a "
                "cache; recurrent states and convolutions do not support it: give a mask [B, T] and seq_idx."
            )
        causal_mask = angles = None
        varlen: dict[str, Tensor | int] = {}
        blocks = rows.texts
        if blocks is not None and rows.real is not None:
            blocks = (blocks + 1) * rows.real
        if self.attends:
            if position_ids is None and rows.texts is not None:
                position_ids = positions_of(rows.texts, rows.real)
            elif position_ids is None:
                seen = past_key_values.get_seq_length() if past_key_values is not None else 0
                position_ids = _positions(attention_mask, seen, length, embeds.device)
            if blocks is None:
                causal_mask = create_causal_mask(self.config, embeds, attention_mask, past_key_values)
            else:
                causal_mask, varlen = self._packed_mask(embeds, blocks, rows)
            if self.config.position == "rope":
                angles = rotary_angles(
                    position_ids, self.config.head_dim, self.config.rope_theta, self.config.rope_fraction
                )

        x = self._embed(embeds, position_ids)
        readouts: list[Tensor] = []
        states: list[Tensor] = []
        for layer in self.layers:
            watched = {"observe": observe} if observe and isinstance(layer.mixer, Entanglement) else {}
            x, _, *seen = layer(
                x,
                angles=angles,
                causal_mask=causal_mask,
                blocks=blocks,
                mask=rows.real,
                texts=rows.texts,
                past_key_values=past_key_values,
                **varlen,
                **watched,
            )
            readouts += seen[: len(seen) // 2]
            states += seen[len(seen) // 2 :]
        if past_key_values is not None:
            past_key_values.seen_tokens += length
        out = {"last_hidden_state": self.norm(x), "past_key_values": past_key_values}
        if observe:
            return QiesModelOutput(**out, readouts=tuple(readouts), states=tuple(states))
        return BaseModelOutputWithPast(**out)

    def _packed_mask(self, embeds: Tensor, blocks: Tensor, rows: Rows) -> tuple[Tensor | None, dict[str, Tensor | int]]:
        """The mask of packed rows and further arguments of the attention implementation. Tokens attend within equal
        `blocks` [B,T]."""
        name = self.config._attn_implementation
        if name == "sdpa":
            return None, {}  # `attend` uses the blocks
        if is_flash_attention_requested(self.config):
            if rows.real is not None:
                raise ValueError(f"Packed texts with pads are not supported by {name}; use attn_implementation='sdpa'.")
            ends = ends_of(blocks)
            longest = int(ends.diff().max())
            return None, {
                "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest
            }  # fmt: skip
        mask = create_causal_mask(
            self.config, embeds, None, None, and_mask_function=packed_sequence_mask_function(blocks)
        )
        if mask is None:
            raise ValueError(
                f"Packed texts are not supported by the attention '{name}'; use attn_implementation='sdpa'."
            )
        return mask, {}

    def _embed(self, embeds: Tensor, position_ids: Tensor | None) -> Tensor:
        """The input of the first block, [B,T,D]: normalised embeddings, or GPT-2's sum with learned positions."""
        if self.embed_positions is None or position_ids is None:
            return self.norm(embeds)
        if readable(position_ids) and int(position_ids.max()) >= self.config.max_position_embeddings:
            raise ValueError(f"The text is longer than the {self.config.max_position_embeddings} learned positions.")
        return embeds + self.embed_positions(position_ids)


class QiesForCausalLM(QiesPreTrainedModel, GenerationMixin):
    """A QIES language model. With `labels` it returns the training loss in nats per token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (the name is transformers')
    _supported_generation_modes = [  # noqa: RUF012 (other modes roll back or copy the cache)
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
        GenerationMode.BEAM_SEARCH,
        GenerationMode.BEAM_SAMPLE,
    ]

    def __init__(self, config: QiesConfig) -> None:
        super().__init__(config)
        self.model = QiesModel(config)
        std = GPT2_STD if config.block == "gpt2" else 0.1 * config.hidden_size**-0.5
        self.lm_head = linear(config.hidden_size, config.vocab_size, std)
        self.objective = Objective(config) if config.objective else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Next-token logits [B,T,V], soft-capped, and the loss.

        labels [B,T] are the unshifted inputs and are shifted here; `shift_labels` [B,T] (a keyword) are already
        shifted. Only labels of -100 are ignored, regardless of attention_mask: with padding on the left, set the label
        of the first token to -100 too, or it is predicted from the pad before it. In packed rows (see QiesModel) the
        first token of a text is never predicted from the previous text; collators set its label to -100, and Trainer's
        token count relies on that. The loss is the mean over the remaining labels, or their sum divided by
        `num_items_in_batch` (gradient accumulation). In training with labels `logits` is None, since the loss is
        computed from the hidden states.

        In training the loss is the whole objective: the terms of `config.objective` are added, with the weights that
        `set_progress` leaves them; `objective.values` holds each by itself. In eval mode it is the cross-entropy alone.
        """
        # not in the signature, or Trainer would expect it in every batch
        shift_labels = kwargs.pop("shift_labels", None)
        terms = self.objective if self.training and (labels is not None or shift_labels is not None) else None
        terms = terms if terms is not None and terms.factor > 0 else None
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            return_dict=True,
            **({"observe": terms.observe} if terms is not None else {}),
            **kwargs,
        )
        hidden = out.last_hidden_state
        loss = logits = rows = None
        if (labels is not None and shift_labels is None) or terms is not None:
            shape, ends = hidden.shape[:2], _ends(cu_seq_lens_q, cu_seq_lens_k)
            rows = read_rows(shape, attention_mask, position_ids, seq_idx, ends, cached=past_key_values is not None)
        if rows is not None and labels is not None and shift_labels is None:
            if rows.texts is not None:
                labels = labels.masked_fill(first_tokens(rows.texts), -100)
            shift_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        if shift_labels is not None:
            loss = self._cross_entropy(hidden, shift_labels, num_items_in_batch)
        if terms is not None and loss is not None and rows is not None and shift_labels is not None:
            source = (input_ids, None) if input_ids is not None else (None, inputs_embeds)
            loss = self._with_terms(terms, loss, out, shift_labels, rows, source, num_items_in_batch)
        if loss is None or not self.training:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self._logits(hidden[:, keep])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def set_progress(self, fraction: float) -> None:
        """Say what fraction of training is done, from 0 to 1: the weights of the objective's terms fall with it.

        Without terms it does nothing. `qies.train.callback.ObjectiveCallback` calls it from a Hugging Face trainer.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"The fraction of training is {fraction}; it must lie in [0, 1].")
        if self.objective is not None:
            self.objective.progress = float(fraction)

    def _cross_entropy(self, hidden: Tensor, targets: Tensor, count: Tensor | int | None = None) -> Tensor:
        """Mean cross-entropy in nats of targets [B,T] (-100: ignored), or their sum divided by `count`."""
        if is_matrix(self.lm_head):
            return language_modelling(hidden, self.lm_head.weight, targets, self.config.logit_softcap, count)
        return language_modelling_of_logits(self._logits(hidden), targets, count)

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats of each target, [B,T] fp32, 0 where it is -100."""
        flat, goal = hidden.flatten(0, -2), targets.flatten()
        if is_matrix(self.lm_head):
            cap = self.config.logit_softcap or None
            losses = linear_cross_entropy(flat, self.lm_head.weight, goal, softcap=cap, reduction="none")
        else:
            losses = torch.nn.functional.cross_entropy(self._logits(flat), goal, ignore_index=IGNORED, reduction="none")
        return losses.view(targets.shape)

    @torch.no_grad()
    def short_context_losses(
        self,
        targets: Tensor,
        window: int,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """Losses in nats of targets [B,T] from position 2 * window on, each after `window` to 2 * window - 1 tokens of
        context instead of the whole, [B,T-2*window]: T must exceed 2 * window. Two forward passes' work."""
        size, length = targets.shape
        real, texts = (rows.real, rows.texts) if rows is not None else (None, None)
        hidden = self.model(
            input_ids=None if input_ids is None else segments(input_ids, window),
            inputs_embeds=None if inputs_embeds is None else segments(inputs_embeds, window),
            attention_mask=None if real is None else segments(real.long(), window),
            seq_idx=None if texts is None else segments(texts, window),
            use_cache=False,
            return_dict=True,
        ).last_hidden_state
        return self.token_losses(second_halves(hidden, size, length), targets[:, 2 * window :])

    def _with_terms(
        self,
        terms: Objective,
        loss: Tensor,
        out: BaseModelOutputWithPast,
        targets: Tensor,
        rows: Rows,
        source: tuple[Tensor | None, Tensor | None],
        count: Tensor | int | None,
    ) -> Tensor:
        """The loss with the objective's terms added."""
        ends = self.config.eos_token_id
        breaks = targets == IGNORED
        if ends is not None:
            breaks |= torch.isin(targets, torch.tensor(ends, device=targets.device))
        if rows.texts is not None:
            breaks[:, :-1] |= first_tokens(rows.texts)[:, 1:]
        own = (targets != IGNORED).sum()

        def short(window: int) -> Tensor:
            if rows.mask is not None:
                raise ValueError("objective.long_context takes no attention_mask [B,1,T,T] but a block-causal one.")
            return self.short_context_losses(targets, window, *source, rows)

        seen = Seen(
            hidden=out.last_hidden_state,
            targets=targets,
            breaks=breaks,
            count=own.clamp(min=1) if count is None else count,
            readouts=getattr(out, "readouts", None) or (),
            states=getattr(out, "states", None) or (),
            logits=self._logits,
            cross_entropy=self._cross_entropy,
            short=short,
        )
        return terms(loss, seen, 1.0 if count is None else own / count)

    def _logits(self, hidden: Tensor) -> Tensor:
        """hidden [B,T,D] -> soft-capped logits [B,T,V] in fp32."""
        logits = self.lm_head(hidden).float()
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    @contextmanager
    def read_state(self, on: bool | Tensor = True) -> Iterator[None]:
        """Context manager that switches the read-outs of all entanglement layers on or off, for each row where `on` is
        [B] bool; states are updated."""
        layers = [m for m in self.modules() if isinstance(m, Entanglement)]
        before = [layer.reads for layer in layers]
        for layer in layers:
            layer.reads = on
        try:
            yield
        finally:
            for layer, was in zip(layers, before, strict=True):
                layer.reads = was

    @contextmanager
    def skip_mixers(self, kind: str) -> Iterator[None]:
        """Context manager in which the layers of a mixer (a name in `layer_types`) are their MLP alone: they add
        nothing from other positions, and their part of a cache stays as it is. Not for the block `gpt2`."""
        kinds = self.config.layer_types or []
        layers: list[Any] = [b for b, name in zip(self.model.layers, kinds, strict=True) if name == kind]
        if self.config.block == "gpt2" or not layers:
            raise ValueError(f"The model has no layer with the mixer '{kind}' that can be skipped.")
        for layer in layers:
            layer.mixes = False
        try:
            yield
        finally:
            for layer in layers:
                layer.mixes = True

    def init_continuous_batching(self, *args, **kwargs) -> NoReturn:
        """Raise ValueError: continuous batching (`generate_batch`) pages keys and values only."""
        raise ValueError(
            "Continuous batching (generate_batch) pages keys and values only, but a QIES model also carries states "
            "and convolution inputs: use generate() with a padded batch."
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        given = model_kwargs.get("past_key_values") is not None
        if not given and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise ValueError(
                    f"cache_implementation='{generation_config.cache_implementation}' does not support states; omit it."
                )
            model_kwargs["past_key_values"] = QiesCache(self.config)
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


def _refuse_unknown(kwargs: dict) -> None:
    """Raise TypeError for unknown arguments; those of transformers' output recording are allowed."""
    for name, value in kwargs.items():
        if value is not None and name not in ("output_attentions", "output_hidden_states"):
            raise TypeError(f"QiesModel.forward() got an unexpected keyword argument '{name}'")


def _ends(cu_seq_lens_q: Tensor | None, cu_seq_lens_k: Tensor | None) -> Tensor | None:
    """The cumulative lengths of the texts [N+1], given for queries, keys or both."""
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        return cu_seq_lens_k if cu_seq_lens_q is None else cu_seq_lens_q
    if readable(cu_seq_lens_q, cu_seq_lens_k) and not torch.equal(cu_seq_lens_q, cu_seq_lens_k):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k differ, but a text attends only to itself; give equal ones.")
    return cu_seq_lens_q


def _positions(attention_mask: Tensor | None, seen: int, length: int, device) -> Tensor:
    """The position of each current token among the real tokens, [B,T]."""
    if attention_mask is None or attention_mask.ndim != 2:
        return torch.arange(seen, seen + length, device=device)[None]
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]


AutoModel.register(QiesConfig, QiesModel, exist_ok=True)
AutoModelForCausalLM.register(QiesConfig, QiesForCausalLM, exist_ok=True)

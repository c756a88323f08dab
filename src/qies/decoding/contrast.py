"""Entangled-contrast decoding: the model against itself with the read-out of its states switched off.

Contrastive decoding (Li et al., arXiv:2210.15097) with one model, as context-aware decoding does (Shi et al.,
arXiv:2305.14739), which leaves out a part of the prompt where this leaves out the states. Legend: B batch,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from qies.errors import UserError
from qies.mixers import mixers
from qies.model import QiesCache, QiesForCausalLM
from qies.ops.measures import entropy_ceiling, renyi2_entropy


def contrast(full: Tensor, local: Tensor, strength: Tensor, plausibility: float) -> Tensor:
    """l + a (l - l_local) [B,V] of two logits [B,V], log-softmaxed, with a = `strength` [B].

    Tokens less probable than `plausibility` times the most probable one under l get -inf, so that the difference, which
    is large where both probabilities are small, cannot pick them.
    """
    own, other = full.float().log_softmax(-1), local.float().log_softmax(-1)
    scores = own + strength[:, None] * (own - other)
    return scores.masked_fill(own < own.amax(-1, keepdim=True) + math.log(plausibility), -torch.inf)


def gate(full: Tensor, states: Sequence[Tensor]) -> Tensor:
    """By how much the contrast counts, [B] in [0, 1]: the mean Renyi-2 entropy of the states [B,H,2m,V] as a fraction
    of its ceiling, times the entropy of the next token under the logits `full` [B,V] as a fraction of log V."""
    held = [renyi2_entropy(s) / entropy_ceiling(s.shape[-2] // 2, s.shape[-1]) for s in states]
    log_p = full.float().log_softmax(-1)
    unsure = -(log_p.exp() * log_p).sum(-1) / math.log(full.shape[-1])
    return torch.cat(held, 1).mean(1).clamp(0, 1) * unsure.clamp(0, 1)


def has_states(model: QiesForCausalLM) -> bool:
    """Whether the model has entanglement layers."""
    return any(spec.entangled for spec in mixers(model.config.layer_types or []))


def require_range(strength: float, plausibility: float) -> None:
    """Raise UserError for a strength or plausibility out of range."""
    if not 0 <= strength < math.inf:
        raise UserError(f"strength is {strength}; it must be 0 or a positive number.")
    if not 0 < plausibility <= 1:
        raise UserError(f"plausibility is {plausibility}; it must lie in (0, 1].")


def require_states(model: QiesForCausalLM, cached: int = 0) -> None:
    """Raise UserError for a model without entanglement layers, and where `cached` tokens were read before: they would
    have to be read without the states too."""
    if not has_states(model):
        raise UserError("The model has no entanglement layer, so there is no state to contrast; use another decoding.")
    if cached:
        raise UserError("Entangled decoding reads the prompt with and without the states; start it without a state.")


def _written(cache: QiesCache, model: QiesForCausalLM) -> list[Tensor]:
    """The states of every second row, without those of unitary heads, which are at their ceiling whatever the text."""
    return [
        state[0::2]
        for layer, entangled in zip(cache.layers, cache.entangled, strict=True)
        if entangled
        for state, group in zip(layer.recurrent_states.values(), model.config.head_groups, strict=True)
        if not group.unitary
    ]


@torch.no_grad()
def entangled(
    model: QiesForCausalLM,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    strength: float = 1.0,
    plausibility: float = 0.1,
    **model_kwargs: Any,
) -> Tensor:
    """Decode by `contrast`, with a_t = strength times `gate`: `model.generate(ids, custom_generate=entangled,
    strength=1.0)`.

    One pass of twice the rows computes both logits: in every second row the read-outs are off. `strength=0` computes
    one and is greedy decoding (or sampling, with `do_sample`) exactly. Returns the prompts with their continuations,
    [B,T], rows that end early filled with pads. Raises UserError for a model without entanglement layers, a strength or
    plausibility out of range, and a cache that has read tokens already: those of the model without its states are
    needed too.
    """
    require_range(strength, plausibility)
    if (generation_config.num_beams or 1) > 1:
        raise UserError("Entangled decoding has no beams; leave num_beams out.")
    cache = model_kwargs.get("past_key_values")
    cache = QiesCache(model.config) if cache is None else cache
    if strength:
        require_states(model, cache.get_seq_length())
    mask, rows = model_kwargs.get("attention_mask"), len(input_ids)
    reads = torch.tensor([True, False], device=input_ids.device).repeat(rows)
    finished = torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
    new = input_ids[:, cache.get_seq_length() :]
    while True:
        given, given_mask = new, mask
        if strength:
            given = new.repeat_interleave(2, 0)
            given_mask = None if mask is None else mask.repeat_interleave(2, 0)
        with model.read_state(reads) if strength else nullcontext():
            out = model(given, attention_mask=given_mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        scores = out.logits[:, -1].float()
        if strength:
            full, local = scores[0::2], scores[1::2]
            scores = contrast(full, local, strength * gate(full, _written(cache, model)), plausibility)
        scores = logits_processor(input_ids, scores)
        if generation_config.do_sample:
            chosen = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
        else:
            chosen = scores.argmax(-1)
        if finished.any():
            chosen = chosen.masked_fill(finished, int(generation_config._pad_token_tensor))
        new = chosen[:, None]
        input_ids = torch.cat([input_ids, new], 1)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(rows, 1)], 1)
        finished = finished | stopping_criteria(input_ids, scores)
        if finished.all():
            return input_ids

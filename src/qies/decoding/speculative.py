"""Self-speculative decoding: the model without some of its mixers drafts, the whole model verifies.

Drafting by skipping layers of the model itself: Zhang et al., arXiv:2309.08168. A state cannot be cropped, so what the
draft and rejected tokens left in the cache is undone by a snapshot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from qies.errors import UserError, unknown
from qies.mixers.attention import ATTENTION
from qies.mixers.entanglement import ENTANGLEMENT
from qies.model import QiesCache, QiesForCausalLM

DRAFTS = {"state": ENTANGLEMENT.name, "attention": ATTENTION.name}
"""What a draft leaves out, and the mixer that this is."""


@dataclass
class Acceptance:
    """How many tokens were drafted, and how many of them the whole model would have chosen too."""

    drafted: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float | None:
        return self.accepted / self.drafted if self.drafted else None


def drafts(model: QiesForCausalLM) -> list[str]:
    """The kinds of draft whose layers the model has."""
    kinds = model.config.layer_types or []
    return [draft for draft, mixer in DRAFTS.items() if mixer in kinds and model.config.block != "gpt2"]


def require_layers(model: QiesForCausalLM, draft: str) -> None:
    """Raise UserError for a model without the layers that a draft of this kind skips."""
    if draft not in drafts(model):
        raise UserError(f"The model has no layers that a draft without '{draft}' can skip; use another decoding.")


@torch.no_grad()
def speculative(
    model: QiesForCausalLM,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    draft: str = "state",
    ahead: int = 4,
    acceptance: Acceptance | None = None,
    **model_kwargs: Any,
) -> Tensor:
    """Greedy decoding of one row, drafted `ahead` tokens at a time: `model.generate(ids, custom_generate=speculative)`.

    Every token is the whole model's choice, so the text is that of greedy decoding up to ties within rounding: several
    tokens are read at once here. `draft` says what drafting leaves out: "state" or "attention". Counts are added to
    `acceptance`. Raises UserError for several rows, sampling, or a model without such layers.
    """
    if draft not in DRAFTS:
        raise unknown("draft", draft, DRAFTS)
    if ahead < 1:
        raise UserError(f"ahead is {ahead}; it must be at least 1.")
    if len(input_ids) != 1 or generation_config.do_sample or (generation_config.num_beams or 1) > 1:
        raise UserError("Speculative decoding takes one prompt at a time, and neither samples nor searches with beams.")
    require_layers(model, draft)
    mask = model_kwargs.get("attention_mask")
    if mask is not None and not mask.all():
        raise UserError("Speculative decoding takes a prompt without pads.")
    counts = Acceptance() if acceptance is None else acceptance
    cache = model_kwargs.get("past_key_values")
    cache = QiesCache(model.config) if cache is None else cache

    def read(tokens: Tensor, keep: int) -> Tensor:
        """The logits [1,keep,V] of the last tokens [1,T], which the cache holds afterwards."""
        return model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits.float()

    def choose(before: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The next token [1,1] after `before` [1,T], and its scores."""
        scores = logits_processor(before, logits)
        return scores.argmax(-1, keepdim=True), scores

    new, scores = choose(input_ids, read(input_ids[:, cache.get_seq_length() :], 1)[:, -1])
    input_ids = torch.cat([input_ids, new], 1)
    while not stopping_criteria(input_ids, scores).all():
        before = cache.snapshot()
        guess = input_ids
        with model.skip_mixers(DRAFTS[draft]):
            for _ in range(ahead):
                new, _scores = choose(guess, read(guess[:, -1:], 1)[:, -1])
                guess = torch.cat([guess, new], 1)
        cache.restore(before)
        drafted = guess[:, -ahead - 1 :]  # after the last token, which the cache does not hold either
        logits, agreed = read(drafted, ahead + 1), 0
        counts.drafted += ahead
        for i in range(ahead + 1):
            new, scores = choose(input_ids, logits[:, i])
            input_ids = torch.cat([input_ids, new], 1)
            if i == ahead or new.item() != drafted[0, i + 1].item():
                break
            agreed += 1
            if stopping_criteria(input_ids, scores).all():
                break
        counts.accepted += agreed
        if cache.get_seq_length() != input_ids.shape[1] - 1:  # it holds drafts that are not part of the text
            cache.restore(before)
            read(input_ids[:, cache.get_seq_length() : -1], 1)
    return input_ids

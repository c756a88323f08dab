"""Text generation from a trained model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging as transformers_logging

from qies import plugins, records
from qies.accounting.parameters import longest_context
from qies.data.tokenizer import encode_texts
from qies.decoding.contrast import entangled, require_range, require_states
from qies.decoding.snapshots import Snapshot
from qies.decoding.speculative import DRAFTS, Acceptance, require_layers, speculative
from qies.errors import UserError, unknown
from qies.model import QiesForCausalLM

transformers_logging.disable_progress_bar()  # loading a small model needs no progress bar
DECODINGS = ("greedy", "sample", "entangled", "speculative")


def load_model(path: Path) -> tuple[QiesForCausalLM, PreTrainedTokenizerFast]:
    """The model and tokenizer saved in `path`: a `model` folder, or a run's folder that holds one.

    Raises UserError when there is none or its files cannot be read. Safetensors only.
    """
    if (record := records.read(path)) is not None:  # of a run, which names the plugins that its arm needs
        plugins.load(record.config.get("plugins", ()))
    folder = path / "model" if (path / "model" / "config.json").is_file() else path
    if not (folder / "config.json").is_file():
        raise UserError(f"No model in {path}: give the folder of a finished run or one with a config.json.")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no .safetensors file; other weight formats are not read.")
    try:
        model = QiesForCausalLM.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as e:  # whatever a damaged file makes transformers raise
        raise UserError(f"{folder} cannot be loaded: {' '.join(str(e).split())[:200]}") from None
    return model.eval(), tokenizer


@dataclass(frozen=True)
class Decoding:
    """How text is continued. `top_k`, `top_p` and `temperature` are those of "sample"; `strength` and `plausibility` of
    "entangled" (`qies.decoding.contrast`); `draft` and `ahead` of "speculative". Text ends before the first of `stop`.

    Raises UserError for a value out of range.
    """

    name: str = "greedy"
    max_new_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    strength: float = 1.0
    plausibility: float = 0.1
    draft: str = "state"
    ahead: int = 4

    def __post_init__(self) -> None:
        for value, what, choices in ((self.name, "decoding", DECODINGS), (self.draft, "draft", tuple(DRAFTS))):
            if value not in choices:
                raise unknown(what, value, choices)
        for name in ("max_new_tokens", "top_k", "ahead"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"seed is {self.seed}; it must be an integer of 64 bits.")
        if not 1e-6 <= self.temperature < math.inf:  # fp32 holds logits divided by no less
            raise UserError(
                f"temperature is {self.temperature}; it must be finite and at least 1e-6 (greedy decoding is its limit "
                "0)."
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must lie in (0, 1].")
        require_range(self.strength, self.plausibility)
        if "" in self.stop:
            raise UserError("stop holds an empty text, which every text contains; leave it out.")

    def arguments(self, acceptance: Acceptance) -> dict[str, Any]:
        """Those of `model.generate`."""
        if self.name == "sample":
            top_p = {"top_p": self.top_p} if self.top_p < 1 else {}
            return {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, **top_p}
        plain: dict[str, Any] = {"do_sample": False}
        if self.name == "entangled":
            plain |= {"custom_generate": entangled, "strength": self.strength, "plausibility": self.plausibility}
        elif self.name == "speculative":
            plain |= {"custom_generate": speculative, "draft": self.draft, "ahead": self.ahead}
            plain |= {"acceptance": acceptance}
        return plain


@dataclass(frozen=True)
class Continuation:
    """A continuation of one prompt, without it. `read` counts the tokens of the prompt that were read for it, `reused`
    those of a saved state; `acceptance` the drafted tokens of speculative decoding."""

    prompt: str
    text: str
    tokens: int
    read: int
    reused: int = 0
    acceptance: Acceptance | None = None


def continue_prompts(
    model: QiesForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    decoding: Decoding | None = None,
    *,
    state: Snapshot | None = None,
    emit: Callable[[int, str], None] | None = None,
) -> Iterator[Continuation]:
    """Continue each prompt by itself, one after the other; "sample" depends on the seed alone.

    With `state` the prompts follow the text of that snapshot, which is not read again. `emit` is called with the index
    of the prompt and each piece of text as it becomes certain; the pieces add up to `Continuation.text`.

    Raises UserError, before any text is made, for a prompt that is not valid Unicode, or more tokens than the model has
    learned positions for (see `room`), for an empty prompt after a state, and for a decoding that the model lacks the
    layers for.
    """
    how = decoding or Decoding()
    before = 0 if state is None else state.ids.shape[1]
    if how.name == "entangled" and how.strength:
        require_states(model, before)
    elif how.name == "speculative":
        require_layers(model, how.draft)
    given = [encode(tokenizer, prompt, state) for prompt in prompts]
    for own in given:
        taken, limit = before + own.shape[1], longest_context(vars(model.config))
        if taken + how.max_new_tokens > limit:
            left = limit - taken
            what = f"lower max_new_tokens from {how.max_new_tokens} to {left} or less"
            raise UserError(
                f"The model has learned {limit} positions, and the prompt takes {taken}; "
                f"{what if left > 0 else 'shorten the prompt'}."
            )
    return _continued(model, tokenizer, prompts, given, how, state, emit)


def _continued(
    model: QiesForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    given: list[Tensor],
    how: Decoding,
    state: Snapshot | None,
    emit: Callable[[int, str], None] | None,
) -> Iterator[Continuation]:
    for i, (prompt, own) in enumerate(zip(prompts, given, strict=True)):
        ids, counts = own, Acceptance()
        more: dict[str, Any] = {}
        if state is not None:
            ids = torch.cat([state.ids, own], 1)
            more["past_key_values"] = state.cache.snapshot()
        watch = _Watch(tokenizer, ids[0].tolist(), how.stop, None if emit is None else partial(emit, i))
        if how.stop or emit is not None:
            more["stopping_criteria"] = StoppingCriteriaList([watch])
        torch.manual_seed(how.seed)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=how.max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,
            **how.arguments(counts),
            **more,
        )
        text = watch.end(out[0].tolist())
        acceptance = counts if how.name == "speculative" else None
        reused = ids.shape[1] - own.shape[1]
        yield Continuation(prompt, text, out.shape[1] - ids.shape[1], own.shape[1], reused, acceptance)


def continue_text(
    model: QiesForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], decoding: str = "greedy",
    **options: Any,
) -> list[str]:  # fmt: skip
    """Continuations of `prompts` (without the prompts), one each. `options` are fields of `Decoding`; raises UserError
    as it and `continue_prompts` do."""
    return [c.text for c in continue_prompts(model, tokenizer, prompts, Decoding(decoding, **options))]


class _Watch(StoppingCriteria):
    """The text made so far: handed on in pieces as it becomes certain, and ended at a text of `stop`.

    Text is not certain while it may still become a stop, or ends in a part of a character.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        prompt: list[int],
        stop: Sequence[str],
        emit: Callable[[str], None] | None,
    ) -> None:
        self.tokenizer, self.prompt, self.stop, self.emit = tokenizer, prompt, stop, emit
        self.sent, self.before = 0, len(self._decode(prompt))

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs: Any) -> Tensor:
        text, ended = self._text(input_ids[0].tolist())
        self._send(text if ended else text[: len(text) - self._open(text)])
        return torch.full((len(input_ids),), ended, device=input_ids.device)

    def end(self, ids: list[int]) -> str:
        """The whole continuation, of which the rest is handed on."""
        text, _ = self._text(ids)
        self._send(text)
        return text

    def _text(self, ids: list[int]) -> tuple[str, bool]:
        """The continuation up to the first stop, and whether there is one."""
        # Decoded with the prompt: by itself a continuation may lose the space it begins with.
        text = self._decode(ids)[self.before :]
        places = [at for word in self.stop if (at := text.find(word)) >= 0]
        return (text[: min(places)], True) if places else (text, False)

    def _decode(self, ids: list[int]) -> str:
        start = 1 if ids[:1] == [self.tokenizer.eos_token_id] else 0
        return self.tokenizer.decode(ids[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _open(self, text: str) -> int:
        """Characters at the end that are not certain yet."""
        parts = [n for word in self.stop for n in range(1, len(word)) if text.endswith(word[:n])]
        return max([len(text) - len(text.rstrip("\ufffd")), *parts])

    def _send(self, text: str) -> None:
        if self.emit is not None and len(text) > self.sent:
            self.emit(text[self.sent :])
            self.sent = len(text)


def room(model: QiesForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> int | None:
    """How many tokens can follow `prompt` with learned positions (0 or less: none); None without a limit."""
    limit = longest_context(vars(model.config))
    return None if math.isinf(limit) else int(limit) - len(_encode(tokenizer, prompt))


def encode(tokenizer: PreTrainedTokenizerFast, prompt: str, state: Snapshot | None = None) -> Tensor:
    """The tokens [1,n] of a prompt, which follows the text of `state` where it is given.

    Raises UserError for a prompt that is not valid Unicode, and for an empty one after a state.
    """
    own = _encode(tokenizer, prompt, first=state is None)
    if not own:
        raise UserError(f"The prompt {prompt!r} after a saved state holds no token; give at least one.")
    return torch.tensor([own])


def _encode(tokenizer: PreTrainedTokenizerFast, prompt: str, first: bool = True) -> list[int]:
    """The prompt as in training: a document begins with the end-of-text token (only its `first` part does), special
    tokens typed in text are text.

    Raises UserError for a prompt that is not valid Unicode.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"The prompt {prompt[:40]!r} is not UTF-8; give it as UTF-8 text.") from None
    [own] = encode_texts(tokenizer.backend_tokenizer, [prompt])
    return [tokenizer.eos_token_id, *own.tolist()] if first else own.tolist()

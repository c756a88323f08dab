"""Text generation from a trained model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from qies import plugins, records
from qies.data.tokenizer import encode_texts
from qies.errors import UserError, unknown
from qies.model import QiesForCausalLM

transformers_logging.disable_progress_bar()  # loading a small model needs no progress bar
DECODINGS = ("greedy", "sample")


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


@torch.no_grad()
def continue_text(
    model: QiesForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    decoding: str = "greedy",
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> list[str]:
    """Continuations of `prompts` (without the prompts), one each. `sample` depends on `seed` alone.

    Raises UserError for a value out of range, a prompt that is not valid Unicode, or more tokens than the model has
    learned positions for (see `room`).
    """
    if decoding not in DECODINGS:
        raise unknown("decoding", decoding, DECODINGS)
    for name, number in (("max_new_tokens", max_new_tokens), ("top_k", top_k)):
        if number < 1:
            raise UserError(f"{name} is {number}; it must be at least 1.")
    if not -(2**63) <= seed < 2**63:
        raise UserError(f"seed is {seed}; it must be an integer of 64 bits.")
    if not 1e-6 <= temperature < math.inf:  # fp32 holds logits divided by no less
        raise UserError(
            f"temperature is {temperature}; it must be finite and at least 1e-6 (greedy decoding is its limit 0)."
        )
    for prompt in prompts:
        left = room(model, tokenizer, prompt)
        if left is not None and max_new_tokens > left:
            what = f"lower max_new_tokens from {max_new_tokens} to {left} or less" if left > 0 else "shorten the prompt"
            raise UserError(
                f"The model has learned {model.config.max_position_embeddings} positions, and the prompt takes "
                f"{model.config.max_position_embeddings - left}; {what}."
            )
    how = (
        {"do_sample": True, "temperature": temperature, "top_k": top_k}
        if decoding == "sample"
        else {"do_sample": False}
    )
    out = []
    for prompt in prompts:
        own = _encode(tokenizer, prompt)
        ids = torch.tensor([own])
        torch.manual_seed(seed)
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,
            **how,
        )
        # Decoded together: by itself a continuation may lose the space it begins with.
        plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        whole, before = tokenizer.decode(tokens[0, 1:], **plain), tokenizer.decode(own[1:], **plain)
        out.append(whole[len(before) :])
    return out


def room(model: QiesForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> int | None:
    """How many tokens can follow `prompt` with learned positions (0 or less: none); None without a limit."""
    learned = model.config.max_position_embeddings if model.config.position == "learned" else None
    return None if learned is None else learned - len(_encode(tokenizer, prompt))


def _encode(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """The prompt as in training: a document begins with the end-of-text token, special tokens typed in text are text.

    Raises UserError for a prompt that is not valid Unicode.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"The prompt {prompt[:40]!r} is not UTF-8; give it as UTF-8 text.") from None
    [own] = encode_texts(tokenizer.backend_tokenizer, [prompt])
    return [tokenizer.eos_token_id, *own.tolist()]

"""The verb generate: text from a trained model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qies.errors import UserError
from qies.terminal import show

if TYPE_CHECKING:
    from qies.decoding import Continuation

LARGEST = 2**26  # bytes of a prompt


def generate(
    checkpoint: Path,
    /,
    prompt: tuple[str, ...] = (),
    prompt_file: tuple[Path, ...] = (),
    decoding: str = "greedy",
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    strength: float = 1.0,
    plausibility: float = 0.1,
    draft: str = "state",
    ahead: int = 4,
    save_state: Path | None = None,
    load_state: Path | None = None,
    json: bool = False,
) -> None:
    """Continue prompts with a trained model, printing text as it is made.

    For example:

        qies generate runs/first --prompt "The people of the United States"
        qies generate runs/first --prompt "And it came to pass" --decoding sample --seed 3 --stop "."
        qies generate runs/first --prompt-file article.txt --save-state article.state
        qies generate runs/first --load-state article.state --prompt " In short," " The author"

    Args:
        checkpoint: A run's folder, or a folder with config.json and safetensors.
        prompt: Texts to continue, one after the other. Special tokens in them, such as <|endoftext|>, are plain text,
            as in training.
        prompt_file: Files of text to continue, each as a whole; - is the standard input.
        decoding: greedy, sample, entangled or speculative.
        max_new_tokens: Maximum number of new tokens.
        temperature: Sampling temperature.
        top_k: Number of most likely tokens to sample from.
        top_p: Probability of the most likely tokens to sample from.
        seed: Sampling seed.
        stop: Texts at which a continuation ends, without them.
        strength: Of entangled decoding: how much more what the state says counts; 0 is greedy.
        plausibility: Of entangled decoding: tokens less likely than this fraction of the most likely one are left out.
        draft: Of speculative decoding: what drafting leaves out, state or attention.
        ahead: Of speculative decoding: tokens drafted at a time.
        save_state: Write the state after the one prompt to this file, and continue nothing.
        load_state: Continue after the text of this file, a saved state, without reading that text again.
        json: Print prompts and continuations as JSON, in a list if there are several.
    """
    from qies import decoding as decodings
    from qies.cli.options import check_outputs

    prompts = [*prompt, *(_read(path) for path in prompt_file)]
    if not prompts:
        raise UserError("qies generate needs --prompt or --prompt-file (- for the standard input).")
    if save_state is not None and len(prompts) > 1:
        raise UserError(f"--save-state keeps one text, but {len(prompts)} are given; join them or save each by itself.")
    how = decodings.Decoding(
        decoding, max_new_tokens, temperature, top_k, top_p, seed, stop, strength, plausibility, draft, ahead
    )
    check_outputs(**{"save-state": save_state})
    model, tokenizer = decodings.load_model(checkpoint)
    state = None if load_state is None else decodings.load_state(load_state, model, tokenizer)
    if save_state is not None:
        read = decodings.read_prompt(model, decodings.encode(tokenizer, prompts[0], state), state)
        size = decodings.save_state(save_state, read, model, tokenizer)
        text = f"{save_state}: the state after {size['tokens']:,} tokens, {size['bytes']:,} bytes"
        show(json, {"state": str(save_state), **size}, lambda: print(text))
        return

    def emit(index: int, piece: str) -> None:
        print(piece, end="", flush=True)

    done = []
    found = decodings.continue_prompts(model, tokenizer, prompts, how, state=state, emit=None if json else emit)
    for i, text_before in enumerate(prompts):
        if not json:
            print(("\n" if i else "") + text_before, end="", flush=True)
        done.append(next(found))
        if not json:
            print()
    if json:
        results = [_result(c) for c in done]
        show(True, results if len(results) > 1 else results[0], lambda: None)


def _result(made: Continuation) -> dict[str, Any]:
    out = {
        "prompt": made.prompt, "continuation": made.text, "tokens": made.tokens, "prompt_tokens": made.read,
        "reused_tokens": made.reused,
    }  # fmt: skip
    if made.acceptance is not None:
        out |= {"drafted": made.acceptance.drafted, "accepted": made.acceptance.accepted}
    return out


def _read(path: Path) -> str:
    """The text of a file, or of the standard input for -."""
    try:
        if str(path) == "-":
            data = sys.stdin.buffer.read(LARGEST + 1)
        else:
            with path.open("rb") as file:
                data = file.read(LARGEST + 1)
    except OSError as e:
        raise UserError(f"--prompt-file {path} cannot be read ({e.strerror}); give a file of text.") from None
    if len(data) > LARGEST:
        raise UserError(f"--prompt-file {path} is larger than {LARGEST >> 20} MiB; give a shorter text.")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise UserError(f"--prompt-file {path} is not UTF-8; convert it first.") from None

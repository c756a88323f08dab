"""The verb generate: text from a trained model."""

from __future__ import annotations

from pathlib import Path

from qies.terminal import show


def generate(
    checkpoint: Path,
    /,
    prompt: str,
    decoding: str = "greedy",
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Continue a prompt with a trained model.

    For example:

        qies generate runs/first --prompt "The people of the United States"
        qies generate runs/first --prompt "And it came to pass" --decoding sample --seed 3

    Args:
        checkpoint: A run's folder, or a folder with config.json and safetensors.
        prompt: The text to continue. Special tokens in it, such as <|endoftext|>, are plain text, as in training.
        decoding: greedy or sample.
        max_new_tokens: Maximum number of new tokens.
        temperature: Sampling temperature.
        top_k: Number of most likely tokens to sample from.
        seed: Sampling seed.
        json: Print prompt and continuation as JSON.
    """
    from qies.decoding import continue_text, load_model

    model, tokenizer = load_model(checkpoint)
    [text] = continue_text(
        model, tokenizer, [prompt], max_new_tokens=max_new_tokens, decoding=decoding, temperature=temperature,
        top_k=top_k, seed=seed,
    )  # fmt: skip
    show(json, {"prompt": prompt, "continuation": text}, lambda: print(prompt + text))

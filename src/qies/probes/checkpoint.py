"""What one trained language model can do: copying, recall and state tracking in text, and what its layers hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from qies.data.sources.stories import KINDS, brackets
from qies.data.tokenizer import encode_texts
from qies.errors import UserError
from qies.model import QiesForCausalLM
from qies.probes.linear import hidden_states, probe_layers
from qies.probes.stories import score_stories
from qies.train.induction import induction_gain

EVENTS = (1, 2, 4, 8, 16, 32)
PAIRS = 16
ROWS = 64
POSITIONS = 8  # classes of the position probe
DEPTH = 6


def probe_checkpoint(
    model: QiesForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seq_len: int,
    events: Sequence[int] = EVENTS,
    count: int = 100,
    seed: int = 0,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """All probes of one model, as plain data; `seq_len` is the context that it was trained on.

    induction: gain in nats on the repeat of a random segment (`qies.train.induction`). recall: gain in nats on values
    whose pairs come again in another order. stories: `score_stories` for every kind and number of events. linear:
    probes of position and bracket depth for every layer.
    """
    result: dict[str, Any] = {"seq_len": seq_len, "seed": seed}
    progress("copying and recall")
    result["induction"] = induction_gain(model, seq_len=seq_len, precision=torch.no_grad)
    result["recall"] = recall_gain(model, seed=seed)
    result["stories"] = []
    for kind in KINDS:
        for number in events:
            progress(f"{kind}, {number} events")
            result["stories"].append(score_stories(model, tokenizer, kind, number, count=count, seed=seed))
    progress("hidden states")
    result["linear"] = linear_probes(model, tokenizer, seed=seed)
    return result


@torch.no_grad()
def recall_gain(model: QiesForCausalLM, *, pairs: int = PAIRS, seed: int = 0) -> float:
    """Loss on the values of random key-value pairs minus that when the same pairs come again in another order, in nats.

    0 for a model that recalls nothing. Unlike on a repeated segment, what came before a key is another token each time.
    Raises UserError when the vocabulary holds fewer than 2 `pairs` + 1 tokens.
    """
    if model.config.vocab_size <= 2 * pairs:
        raise UserError(f"{pairs} pairs need more than {2 * pairs} tokens; the model knows {model.config.vocab_size}.")
    rng = np.random.default_rng(seed)
    tokens = np.stack([rng.choice(model.config.vocab_size - 1, 2 * pairs, replace=False) + 1 for _ in range(ROWS)])
    first = tokens.reshape(ROWS, pairs, 2)
    order = rng.permuted(np.tile(np.arange(pairs), (ROWS, 1)), axis=1)
    again = np.take_along_axis(first, order[..., None], 1)
    ids = torch.from_numpy(np.concatenate([first.reshape(ROWS, -1), again.reshape(ROWS, -1)], 1))
    model.eval()
    logs = model(ids[:, :-1], use_cache=False).logits.double().log_softmax(-1)
    losses = -logs.gather(2, ids[:, 1:, None])[..., 0]
    values = losses[:, ::2]  # the token after each key
    return float(values[:, :pairs].mean() - values[:, pairs:].mean())


def linear_probes(
    model: QiesForCausalLM, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, length: int = 128
) -> dict[str, list[dict[str, Any]]]:
    """Position (eight equal parts of `length` tokens) and bracket depth (0 to 6), read off the states of each layer."""
    texts = []
    for i in range(ROWS):
        rng, text = np.random.default_rng([seed, 2, i]), ""
        while len(text) < 16 * length:
            text += brackets(rng, int(rng.integers(4, 40)), DEPTH).text
        texts.append(text)
    ids, depths = [], []
    for coded in encode_texts(tokenizer.backend_tokenizer, texts):
        own = coded[:length].tolist()
        ids.append(own)
        depths.append(_depths(tokenizer.batch_decode([[i] for i in own])))
    tokens = torch.tensor(ids)
    states = hidden_states(model, tokens)
    position = (torch.arange(length) * POSITIONS // length).expand(ROWS, -1)
    return {
        "position": probe_layers(states, tokens, position, POSITIONS, seed=seed),
        "depth": probe_layers(states, tokens, torch.tensor(depths), DEPTH + 1, seed=seed),
    }


def _depths(pieces: Iterable[str]) -> list[int]:
    """Open brackets after each token."""
    depth, found = 0, []
    for piece in pieces:
        depth += sum(piece.count(c) for c in "([{") - sum(piece.count(c) for c in ")]}")
        found.append(depth)
    return found

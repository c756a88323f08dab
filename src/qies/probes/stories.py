"""State tracking in text: a language model answers questions on unseen stories (`qies.data.sources.stories`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from qies.data.sources.stories import KINDS, Question
from qies.data.tokenizer import encode_texts
from qies.errors import UserError, unknown
from qies.model import QiesForCausalLM
from qies.probes.task import IGNORED


def score_stories(
    model: QiesForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    kind: str,
    events: int,
    *,
    count: int = 100,
    seed: int = 0,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Answers to the questions of `count` stories of one kind, each with `events` events.

    An answer is the most probable of the question's choices, by the sum of the log-probabilities of the tokens in which
    the choices differ. Only the first question of a story is asked: later ones contain earlier answers.

    Returns:
        n; accuracy and its standard error; log_probability (nats) and brier (the squared error of the distribution over
        the choices, 0 to 2), which change smoothly where accuracy jumps; chance; resolution, the smallest difference in
        accuracy that n questions can show.

    Raises UserError for an unknown kind or a number out of range.
    """
    if kind not in KINDS:
        raise unknown("kind of story", kind, KINDS)
    for name, value in (("events", events), ("count", count), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1.")
    made = [KINDS[kind](np.random.default_rng([seed, 1, events, i]), events) for i in range(count)]
    questions = [story.questions[0] for story in made]
    logs = choice_log_probabilities(model, tokenizer, questions, batch_size)
    right = np.array([q.choices.index(q.answer) for q in questions])
    chosen = np.array([row.argmax() for row in logs])
    hits = (chosen == right).astype(float)
    logs = [row - np.logaddexp.reduce(row) for row in logs]
    brier = [((np.exp(row) - (np.arange(len(row)) == r)) ** 2).sum() for row, r in zip(logs, right, strict=True)]
    return {
        "kind": kind,
        "events": events,
        "n": count,
        "accuracy": float(hits.mean()),
        "stderr": float(hits.std() / np.sqrt(count)),
        "log_probability": float(np.mean([row[r] for row, r in zip(logs, right, strict=True)])),
        "brier": float(np.mean(brier)),
        "chance": float(np.mean([1 / len(q.choices) for q in questions])),
        "resolution": 1 / count,
    }


@torch.no_grad()
def choice_log_probabilities(
    model: QiesForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question], batch_size: int = 32
) -> list[np.ndarray]:
    """Log-probabilities in nats, float64, of the choices of each question, in order.

    A text is encoded together with each choice, as in training, after the end-of-text token. What all choices of a
    question share is the condition; the rest of each is scored.
    """
    model.eval()
    rows: list[tuple[list[int], int]] = []  # tokens, and how many of them are the condition
    for question in questions:
        texts = [question.text + choice for choice in question.choices]
        coded = [[tokenizer.eos_token_id, *ids.tolist()] for ids in encode_texts(tokenizer.backend_tokenizer, texts)]
        shared = next(i for i, column in enumerate(zip(*coded, strict=False)) if len(set(column)) > 1)
        rows += [(ids, shared) for ids in coded]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    sums = np.zeros(len(rows))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids = pad_sequence([torch.tensor(rows[i][0]) for i in batch], batch_first=True)
        mask = pad_sequence([torch.ones(len(rows[i][0]), dtype=torch.long) for i in batch], batch_first=True)
        labels = torch.where(mask.bool(), ids, IGNORED)
        for row, i in enumerate(batch):
            labels[row, : rows[i][1]] = IGNORED
        logits = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        sums[batch] = -losses.sum(1).numpy()
    ends = np.cumsum([len(q.choices) for q in questions])
    return np.split(sums, ends[:-1])

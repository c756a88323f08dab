"""Overlap of held-out with training text: the 13-grams of tokens of the validation split that occur in training.

A model predicts a passage better if it was trained on it, so the loss is also reported on the clean documents, with at
most a tenth of their n-grams in train. Touvron et al., "Llama 2" (2023), arXiv:2307.09288, appendix A.6, partition
evaluation data in the same way; there a sample is clean if less than a fifth of its tokens are in matches of more than
ten tokens.
"""

from __future__ import annotations

import numpy as np

from qies.data.builder.progress import Progress, Step
from qies.data.hashing import N, hash_ngrams, mix
from qies.data.manifest import ValOverlap
from qies.data.shards import Tokens

MEASURED = 1 << 23
"""Maximum number of held-out tokens measured. It bounds the memory: about 60 bytes per token, 0.5 GB."""
_BLOCK = 1 << 18  # training tokens per step


def measure_overlap(train: Tokens, val: Tokens, vocab_size: int, progress: Progress) -> ValOverlap:
    """Count the n-grams of each document of `val`, and those that also occur in `train`.

    The first token of `val` begins every document and occurs in no n-gram. Only documents that end within the first
    `MEASURED` tokens are measured. N-grams are compared by 64-bit hashes: for 10^7 held-out and 10^11 training n-grams
    the expected number of false matches is below 0.1.
    """
    ids = val[:MEASURED]
    begin = ids[0]
    starts = np.flatnonzero(ids == begin)
    if len(val) > MEASURED:
        ids, starts = ids[: starts[-1]], starts[:-1]
    values = mix(np.arange(vocab_size, dtype=np.uint64))
    document = np.cumsum(ids == begin) - 1
    windows = max(len(ids) - N + 1, 0)
    inside = (ids[:windows] != begin) & (document[:windows] == document[N - 1 :])
    document = document[:windows][inside]
    own, number = np.unique(hash_ngrams(values[ids])[inside], return_inverse=True)
    found = np.zeros(len(own), dtype=bool)
    # Most n-grams of train do not occur in val; a table of hash prefixes rejects about 90 % of them.
    shift = np.uint64(64 - (8 * len(own)).bit_length())
    among = np.zeros(1 << (64 - int(shift)), dtype=bool)
    among[own >> shift] = True
    for start in range(0, len(train) if len(own) else 0, _BLOCK):
        grams = hash_ngrams(values[train[start : start + _BLOCK + N - 1]])
        grams = grams[among[grams >> shift]]
        place = np.minimum(np.searchsorted(own, grams), len(own) - 1)
        found[place[own[place] == grams]] = True
        progress(Step("comparing val with train", min(start + _BLOCK, len(train)), len(train)))
    counts = np.bincount(document, minlength=len(starts))
    shared = np.bincount(document[found[number]], minlength=len(starts))
    return ValOverlap(tuple(counts.tolist()), tuple(shared.tolist()))

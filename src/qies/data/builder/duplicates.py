"""Clusters of near-duplicate documents, such as editions of one text, by common word 13-grams.

The similarity is containment (Broder, "On the resemblance and containment of documents", 1997): the number of shared
n-grams divided by the number of n-grams of the shorter document, counted exactly. MinHash would estimate resemblance
(Jaccard similarity), which is low for a chapter and its book; exact counting takes half a minute for 3 * 10^7 words.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import count

import numpy as np

from qies.data.builder.contamination import words
from qies.data.hashing import hash_ngrams, mix
from qies.data.manifest import CLEAN

_BOILERPLATE = 100  # an n-gram in more documents than this (a template, a licence) does not link them


def clusters(texts: Sequence[str], containment: float = CLEAN) -> np.ndarray:
    """The cluster of each text, int32 `[texts]`. Texts whose containment is at least `containment` share a cluster.

    Clusters are connected components (single linkage), so a chain of versions is one cluster. Uses about 50 bytes of
    memory per word.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    grams, document = _ngrams(texts)
    size = np.bincount(document, minlength=len(texts))
    order = np.argsort(grams, kind="stable")
    grams, document = grams[order], document[order]
    _, documents = np.unique(grams, return_counts=True)
    shared = np.repeat((documents > 1) & (documents <= _BOILERPLATE), documents)
    grams, document = grams[shared], document[shared].astype(np.int64)
    found = [np.zeros(0, dtype=np.int64)]
    for apart in range(1, _BOILERPLATE):  # pairs of documents, by their distance in the list of an n-gram
        same = np.flatnonzero(grams[apart:] == grams[:-apart])
        found.append(document[same] * len(texts) + document[same + apart])
    pairs, both = np.unique(np.concatenate(found), return_counts=True)
    one, other = np.divmod(pairs, max(len(texts), 1))
    linked = both >= containment * np.minimum(size[one], size[other])
    links = coo_array((np.ones(linked.sum()), (one[linked], other[linked])), shape=(len(texts), len(texts)))
    return connected_components(links, directed=False)[1]


def _ngrams(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the distinct n-grams of each text, uint64 `[n]`, and the index of the text, int32 `[n]`."""
    number: defaultdict[str, int] = defaultdict(count().__next__)
    parts = [np.zeros(0, dtype=np.uint64)]
    for text in texts:
        ids = np.fromiter((number[word] for word in words(text)), dtype=np.uint64)
        parts.append(np.unique(hash_ngrams(mix(ids))))
    document = np.repeat(np.arange(len(parts) - 1, dtype=np.int32), [len(part) for part in parts[1:]])
    return np.concatenate(parts), document

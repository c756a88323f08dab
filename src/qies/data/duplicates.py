"""Near-duplicates in a corpus: documents that share n-grams of 13 words, as editions and versions of one text do.

The measure is Broder's containment ("On the resemblance and containment of documents", 1997): the n-grams that two
documents share, as a share of the shorter one's. It is counted, not estimated from MinHash, which estimates resemblance
and so misses a chapter within a book; at up to 10^8 words counting takes seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import count

import numpy as np

from qies.data.contamination import words
from qies.data.hashing import hash_ngrams, mix
from qies.data.manifest import CLEAN

_FORMULA = 100  # documents above which an n-gram is a formula (of a template or a licence), which links none of them


def clusters(texts: Sequence[str], containment: float = CLEAN) -> np.ndarray:
    """Of each text the number of its cluster, int32 `[texts]`: two that share so many n-grams are in the same one.

    Clusters are the connected components (single linkage), so a chain of versions is one cluster. Takes about 50
    bytes of memory a word.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    grams, document = _ngrams(texts)
    size = np.bincount(document, minlength=len(texts))
    order = np.argsort(grams, kind="stable")
    grams, document = grams[order], document[order]
    _, documents = np.unique(grams, return_counts=True)
    shared = np.repeat((documents > 1) & (documents <= _FORMULA), documents)
    grams, document = grams[shared], document[shared].astype(np.int64)
    found = [np.zeros(0, dtype=np.int64)]
    for apart in range(1, _FORMULA):  # pairs of documents, by their distance among those of one n-gram
        same = np.flatnonzero(grams[apart:] == grams[:-apart])
        found.append(document[same] * len(texts) + document[same + apart])
    pairs, both = np.unique(np.concatenate(found), return_counts=True)
    one, other = np.divmod(pairs, max(len(texts), 1))
    linked = both >= containment * np.minimum(size[one], size[other])
    links = coo_array((np.ones(linked.sum()), (one[linked], other[linked])), shape=(len(texts), len(texts)))
    return connected_components(links, directed=False)[1]


def _ngrams(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of each text's n-grams, each once, uint64, and the number of the text, int32."""
    number: defaultdict[str, int] = defaultdict(count().__next__)
    parts = [np.zeros(0, dtype=np.uint64)]
    for text in texts:
        ids = np.fromiter((number[word] for word in words(text)), dtype=np.uint64)
        parts.append(np.unique(hash_ngrams(mix(ids))))
    document = np.repeat(np.arange(len(parts) - 1, dtype=np.int32), [len(part) for part in parts[1:]])
    return np.concatenate(parts), document

"""Clusters of near-duplicates against counting by hand, and the split that keeps them together."""

import random
from itertools import combinations

import numpy as np
import pytest

from qies.data.builder import duplicates
from qies.data.builder.contamination import ngrams
from qies.data.builder.corpus import Corpus, Source
from qies.data.builder.duplicates import clusters
from qies.data.builder.split import split_documents
from qies.data.sources.documents import Document


def _text(seed: int, words: int = 200) -> str:
    return " ".join(random.Random(seed).choices([f"word{i}" for i in range(5000)], k=words))


def _groups(labels: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in set(labels.tolist())}


def test_editions_and_parts_of_a_text_are_one_cluster() -> None:
    first = _text(0)
    edition = f"A New Edition. {first.upper()[:600]} {_text(1, 60)}"  # case and punctuation are no difference
    book, chapter = (
        _text(2, 3000),
        " ".join(_text(2, 3000).split()[1000:1100]),
    )  # 1/30 of what is in either: resemblance
    mention = f"{_text(3)} {' '.join(first.split()[:15])}"  # three n-grams of 203
    texts = [first, edition, book, chapter, mention, _text(4), "", "too short"]
    assert _groups(clusters(texts)) == {frozenset(group) for group in ([0, 1], [2, 3], [4], [5], [6], [7])}
    assert len(clusters([])) == 0 and clusters(["", ""]).tolist() == [0, 1]


def test_clusters_are_the_components_of_the_containment_counted_by_hand() -> None:
    rng = random.Random(0)
    passages = [_text(100 + i, 25) for i in range(30)]
    texts = [" ".join([*rng.sample(passages, rng.randint(0, 2)), _text(i, rng.randint(20, 90))]) for i in range(60)]
    grams = [set(ngrams(text)) for text in texts]
    for share in (0.1, 0.2, 0.4):
        group = list(range(60))
        for i, j in combinations(range(60), 2):
            if (both := len(grams[i] & grams[j])) and both >= share * min(len(grams[i]), len(grams[j])):
                group = [group[i] if label == group[j] else label for label in group]
        assert _groups(clusters(texts, share)) == _groups(np.array(group))
        assert 3 < len(set(group)) < 60


def test_a_formula_of_many_documents_links_none(monkeypatch: pytest.MonkeyPatch) -> None:
    notice = _text(7, 20)
    texts = [f"{notice} {_text(i, 20)}" for i in range(10, 20)]
    monkeypatch.setattr(duplicates, "_BOILERPLATE", 10)
    assert len(set(clusters(texts).tolist())) == 1
    monkeypatch.setattr(duplicates, "_BOILERPLATE", 9)
    assert len(set(clusters(texts).tolist())) == 10


# --- the split


def _corpus(groups: tuple[int, ...] = ()) -> Corpus:
    """60 documents of 3 sources, of lengths 100 to 600."""
    rng = random.Random(5)
    documents = [Document("x" * rng.randint(100, 600), "abc"[i // 20], f"d{i:02d}") for i in range(60)]
    own = {s: [d for d in documents if d.source == s] for s in "abc"}
    sources = [Source(s, "", "", 20, sum(len(d.text) for d in own[s]), "") for s in "abc"]
    return Corpus("c", documents, sources, "", groups=groups)


def test_without_groups_the_split_is_that_of_single_documents() -> None:
    train, val = split_documents(_corpus(), 0.1, 0)
    assert [d.id for d in val] == PINNED
    assert [d.id for d in train] == sorted({f"d{i:02d}" for i in range(60)} - set(PINNED))
    assert split_documents(_corpus(tuple(range(60))), 0.1, 0) == (train, val)


PINNED = ["d42", "d33", "d06", "d56", "d58", "d22", "d12"]


@pytest.mark.parametrize("seed", range(5))
def test_no_group_crosses_the_split(seed: int) -> None:
    rng = random.Random(seed)
    groups = tuple(rng.randrange(25) for _ in range(60))
    corpus = _corpus(groups)
    train, val = split_documents(corpus, 0.2, seed)
    of = dict(zip((d.id for d in corpus.documents), groups, strict=True))
    assert {of[d.id] for d in train}.isdisjoint(of[d.id] for d in val)
    assert len(train) + len(val) == 60 and {d.source for d in train} == set("abc")
    for source in corpus.sources:
        size = sum(len(d.text) for d in val if d.source == source.name)
        assert size <= 0.2 * source.bytes or len({of[d.id] for d in val if d.source == source.name}) == 1


def test_a_source_whose_groups_are_all_too_long_holds_the_shortest_out() -> None:
    whole = split_documents(_corpus((0,) * 20 + (1,) * 10 + (2,) * 10 + tuple(range(3, 23))), 0.1, 0)[1]
    held = {d.id for d in whole}
    assert not held & {f"d{i:02d}" for i in range(20)}  # one group: nothing of it would be left in train
    first, second = ({f"d{i}" for i in range(start, start + 10)} for start in (20, 30))
    sizes = {d.id: len(d.text) for d in _corpus().documents}
    shorter = min(first, second, key=lambda ids: sum(sizes[id] for id in ids))
    assert held & (first | second) == shorter

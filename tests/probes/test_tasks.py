"""The tasks' targets against definitions written down separately, and the groups' axioms."""

import itertools

import numpy as np
import pytest

from qies.errors import UserError
from qies.probes import tasks
from qies.probes.groups import alternating, cyclic, product, symmetric
from qies.probes.recall import ContextRecall, Needle, NoisyRecall, Recall, SelectiveCopy
from qies.probes.state_tracking import Arithmetic, Dyck, WordProblem
from qies.probes.task import IGNORED
from qies.probes.tasks import TASKS, task

GROUPS = {
    "Z1": (cyclic(1), 1),
    "Z7": (cyclic(7), 7),
    "S3": (symmetric(3), 6),
    "S4": (symmetric(4), 24),
    "A4": (alternating(4), 12),
    "A5": (alternating(5), 60),
    "A4xZ5": (product(alternating(4), cyclic(5)), 60),
}


def rng():
    return np.random.default_rng(3)


@pytest.mark.parametrize("name", GROUPS)
def test_the_axioms_of_a_group(name):
    group, order = GROUPS[name]
    table, every = group.table, np.arange(order)
    assert table.shape == (order, order)
    assert (table[0] == every).all() and (table[:, 0] == every).all()  # 0 is the identity
    assert all((np.sort(row) == every).all() for row in (*table, *table.T))  # a Latin square: inverses
    a, b, c = rng().integers(0, order, (3, 500))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()


@pytest.mark.parametrize("name", GROUPS)
def test_the_generators_generate(name):
    group, order = GROUPS[name]
    reached = {0}
    while True:
        further = reached | {int(group.table[g, x]) for g in group.generators for x in reached}
        if further == reached:
            break
        reached = further
    assert len(reached) == order


def test_only_the_abelian_groups_commute():
    commutes = {name: bool((group.table == group.table.T).all()) for name, (group, _) in GROUPS.items()}
    assert {name for name, yes in commutes.items() if yes} == {"Z1", "Z7"}


def test_the_word_problem_of_s3_by_permutations():
    elements = list(itertools.permutations(range(3)))
    ids, targets = WordProblem(symmetric(3)).sample(rng(), 5, 40)
    for word, answers in zip(ids, targets, strict=True):
        state = (0, 1, 2)
        for letter, answer in zip(word, answers, strict=True):
            state = tuple(elements[letter][p] for p in state)  # the letter acts after what came before
            assert elements[answer] == state


def test_parity_is_the_sum_modulo_two():
    ids, targets = task("parity").sample(rng(), 4, 50)
    assert (targets == ids.cumsum(1) % 2).all()


def test_letters_of_a5_are_generators_inverses_and_the_identity():
    problem = task("a5")
    ids, _ = problem.sample(rng(), 50, 50)
    assert set(np.unique(ids)) == set(problem.letters.tolist()) and len(problem.letters) == 5


def test_dyck_by_a_stack():
    ids, targets = Dyck(kinds=3, depth=4).sample(rng(), 30, 60)
    deepest = 0
    for word, answers in zip(ids, targets, strict=True):
        stack = []
        for token, answer in zip(word, answers, strict=True):
            if token < 3:
                stack.append(token)
            else:
                assert stack.pop() == token - 3
            deepest = max(deepest, len(stack))
            assert answer == (stack[-1] if stack else 3)
    assert deepest == 4


def test_recall_by_a_dictionary():
    ids, targets = Recall(vocab_size=64, pairs=8).sample(rng(), 20, 64)
    for word, answers in zip(ids, targets, strict=True):
        pairs = dict(zip(word[:16:2], word[1:16:2], strict=True))
        assert len(pairs) == 8 and min(pairs.values()) >= 32
        asked = np.flatnonzero(answers != IGNORED)
        assert asked.min() >= 16 and sorted(word[asked]) == sorted(pairs)  # every key once
        assert [pairs[key] for key in word[asked]] == answers[asked].tolist()
        assert set(word[16:]) <= {0, *pairs}


def test_recall_asks_soon_after_the_pairs():
    """A power law with exponent near -1: half of the queries of two pairs stand in the first tenth of the room."""
    _, targets = Recall(vocab_size=64, pairs=2).sample(rng(), 400, 104)
    at = np.nonzero(targets != IGNORED)[1] - 4
    assert 0.45 < (at < 10).mean() < 0.75


def test_selective_copy_keeps_the_order():
    ids, targets = SelectiveCopy(vocab_size=10, items=4).sample(rng(), 20, 30)
    for word, answers in zip(ids, targets, strict=True):
        assert [token for token in word if token > 1] == answers[-4:].tolist()
        assert (word[-4:] == 1).all() and (answers[:-4] == IGNORED).all()


def test_arithmetic_by_evaluation():
    ids, targets = Arithmetic(modulus=7).sample(rng(), 10, 31)
    for word, answers in zip(ids, targets, strict=True):
        value = word[0]
        assert answers[0] == value and (answers[1::2] == IGNORED).all()
        for operator, number, answer in zip(word[1::2], word[2::2], answers[2::2], strict=True):
            value = {7: value + number, 8: value - number, 9: value * number}[operator] % 7
            assert answer == value


def test_context_recall_by_a_dictionary_of_pairs():
    made = ContextRecall(contexts=3, pairs=4, keys=6, values=9)
    ids, targets = made.sample(rng(), 20, 60)
    told, asked = 3 + 24, 12
    several = 0
    for word, answers in zip(ids, targets, strict=True):
        known, context = {}, None
        for block in word[:told].reshape(3, -1):
            context = block[0]
            assert 1 <= context <= 3
            known |= {(context, key): value for key, value in zip(block[1::2], block[2::2], strict=True)}
        questions = word[-2 * asked :].reshape(-1, 2)
        assert sorted(map(tuple, questions)) == sorted(known)  # each once
        assert [known[tuple(pair)] for pair in questions] == answers[-2 * asked + 1 :: 2].tolist()
        assert (answers != IGNORED).sum() == asked and (word[told : -2 * asked] == 0).all()
        several += len({key for _, key in known}) == 4 and len(set(known.values())) > 4
    assert several == 20  # the same keys in every context, with values of their own


@pytest.mark.parametrize(("depth", "at"), [(0.0, 0), (0.5, 8), (1.0, 17), (None, None)])
def test_the_needle_stands_where_it_should(depth, at):
    ids, targets = Needle(vocab_size=9, depth=depth).sample(rng(), 200, 20)
    where = (ids[:, :-1] == 0).argmax(1)
    assert ((ids == 0).sum(1) == 2).all() and (ids[:, -1] == 0).all()
    assert set(where) == ({at} if at is not None else set(range(18)))
    assert (targets[:, -1] == ids[np.arange(200), where + 1]).all() and (targets[:, :-1] == IGNORED).all()


def test_recall_among_noise_by_a_dictionary():
    ids, targets = NoisyRecall(keys=5, values=7, noise=0.3).sample(rng(), 30, 80)
    noise = 0
    for word, answers in zip(ids, targets, strict=True):
        known, t = {}, 0
        while t < 79:
            token = word[t]
            if token >= 12:
                noise += 1
                assert answers[t] == IGNORED
                t += 1
            else:
                assert answers[t] == known.get(token, IGNORED) and word[t + 1] == known.get(token, word[t + 1])
                known[token] = word[t + 1]
                assert 5 <= word[t + 1] < 12 and answers[t + 1] == IGNORED
                t += 2
    pairs = (30 * 80 - noise) / 2
    assert noise / (noise + pairs) == pytest.approx(0.3, abs=0.05)


def test_options_of_a_task():
    assert task("mqar:pairs=4:vocab_size=64") == Recall(vocab_size=64, pairs=4)
    assert task("needle:depth=0.5") == Needle(depth=0.5)


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_fixes_the_data(name):
    chosen = task(name)
    for first, second in zip(*(chosen.sample(rng(), 3, 72) for _ in range(2)), strict=True):
        assert (first == second).all() and first.dtype == np.int64 and first.shape == (3, 72)
        assert first.max() < max(chosen.vocab_size, getattr(chosen, "kinds", 0) + 1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: task("s33"), "Did you mean 's3'"),
        (lambda: Recall(vocab_size=16, pairs=8).sample(rng(), 1, 64), "fewer pairs"),
        (lambda: Recall(pairs=8).sample(rng(), 1, 23), "24 tokens"),
        (lambda: SelectiveCopy().sample(rng(), 1, 15), "at least 16"),
        (lambda: ContextRecall(pairs=17).sample(rng(), 1, 999), "fewer pairs"),
        (lambda: ContextRecall().sample(rng(), 1, 67), "68 tokens"),
        (lambda: task("mqar:pears=4"), "no option 'pears=4'. Options: vocab_size, pairs"),
        (lambda: task("mqar:pairs"), "no option 'pairs'"),
        (lambda: task("s3:all_letters=1"), "Options: none"),
        (lambda: task("mqar:pairs=0"), "at least 1"),
        (lambda: task("mqar:pairs=true"), "at least 1"),
        (lambda: task("needle:depth=1.5"), "from 0 to 1"),
    ],
)
def test_what_cannot_be_drawn_is_said(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_chance_is_the_rate_of_a_uniform_guess():
    for name in tasks.TASKS:
        chosen = task(name)
        _, targets = chosen.sample(rng(), 2000, 72)
        assert len(np.unique(targets[targets != IGNORED])) == pytest.approx(1 / chosen.chance, abs=0.5), name

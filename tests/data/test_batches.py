from types import SimpleNamespace

import numpy as np
import pytest

from qies.data.batches import Batches, permute, val_batches
from qies.data.shards import Shards, Tokens
from qies.data.tokenizer import token_byte_lengths
from qies.errors import UserError


def _stream(length: int) -> SimpleNamespace:
    """Shards whose token at position i is i, in files of 37."""
    ids = np.arange(length, dtype="<u2")
    return SimpleNamespace(tokens=lambda split: Tokens([ids[i : i + 37] for i in range(0, length, 37)]))


def _permuted(size: int, seed: int, epoch: int) -> np.ndarray:
    index = np.arange(size, dtype=np.uint64)
    return permute(index, size, seed, np.full(size, epoch, dtype=np.uint64))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 97, 100, 1000, 4097])
@pytest.mark.parametrize("epoch", [0, 1, 2**40])
def test_permutation_is_one(size: int, epoch: int) -> None:
    assert np.array_equal(np.sort(_permuted(size, 3, epoch)), np.arange(size))


def test_permutations_differ_and_look_random() -> None:
    size = 10_000
    orders = [_permuted(size, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (-1, 0), (2**80, 0))]
    for i, a in enumerate(orders):
        assert (a == np.arange(size)).mean() < 0.01
        assert abs(np.corrcoef(a.astype(float), np.arange(size))[0, 1]) < 0.04  # 4 standard errors
        assert abs(np.corrcoef(a[1:].astype(float), a[:-1].astype(float))[0, 1]) < 0.04
        for b in orders[:i]:
            assert (a == b).mean() < 0.01
            assert abs(np.corrcoef(a.astype(float), b.astype(float))[0, 1]) < 0.04


def test_permutation_of_billions_is_cheap() -> None:
    size = 3_000_000_019
    index = np.arange(1000, dtype=np.uint64)
    out = permute(index, size, 0, np.zeros(1000, dtype=np.uint64))
    assert len(np.unique(out)) == 1000 and out.max() < size
    assert abs(out.astype(float).mean() / size - 0.5) < 0.04  # 4 standard errors


def test_batch_is_a_window_of_the_stream_and_the_token_after() -> None:
    batches = Batches(_stream(1001), "train", seq_len=10, batch_size=4, seed=0)
    assert batches.windows == 100
    batch = batches.batch(7)
    assert batch.shape == (4, 11) and batch.dtype == np.int64
    assert (batch[:, 0] % 10 == 0).all()
    assert np.array_equal(batch, batch[:, :1] + np.arange(11))


def test_batch_is_a_function_of_seed_and_step() -> None:
    make = lambda seed: Batches(_stream(1001), "train", seq_len=10, batch_size=8, seed=seed)  # noqa: E731
    forward = [make(5).batch(step) for step in range(30)]
    one = make(5)
    assert all(np.array_equal(one.batch(step), forward[step]) for step in reversed(range(30)))
    assert not np.array_equal(make(6).batch(0), forward[0])


@pytest.mark.parametrize("batch_size", [1, 7, 100, 250])
def test_epoch_visits_every_window_once(batch_size: int) -> None:
    """Also when a batch holds the end of an epoch and the start of the next, or several epochs."""
    batches = Batches(_stream(1001), "train", seq_len=10, batch_size=batch_size, seed=0)
    steps = -(-300 // batch_size)
    windows = np.concatenate([batches.batch(step)[:, 0] // 10 for step in range(steps)])[:300].reshape(3, 100)
    assert all(np.array_equal(np.sort(epoch), np.arange(100)) for epoch in windows)
    assert not np.array_equal(windows[0], windows[1])


@pytest.mark.parametrize("length", [2, 10, 11, 12, 41, 100, 101])
@pytest.mark.parametrize("max_tokens", [None, 1, 10, 25, 10_000])
def test_validation_predicts_every_token_once(length: int, max_tokens: int | None) -> None:
    batches = list(val_batches(_stream(length), 10, 3, max_tokens))
    targets = np.concatenate([batch[:, 1:].ravel() for batch in batches])
    assert np.array_equal(targets, np.arange(1, min(length - 1, max_tokens or length) + 1))
    for batch in batches:
        assert np.array_equal(batch, batch[:, :1] + np.arange(batch.shape[1])) and batch.dtype == np.int64
    assert all(batch.shape == (3, 11) for batch in batches[:-2])


def test_validation_bytes_are_those_of_the_text(shards: Shards) -> None:
    """The first token is <|endoftext|>, of no bytes: what is predicted is the whole held-out text."""
    lengths = token_byte_lengths(shards.tokenizer())
    size = sum(lengths[batch[:, 1:]].sum() for batch in val_batches(shards, 32, 4))
    assert size == shards.manifest.val.bytes


def test_real_shards_give_batches(shards: Shards) -> None:
    batch = Batches(shards, "train", seq_len=64, batch_size=4, seed=0).batch(3)
    whole = np.asarray(shards.tokens("train"))
    windows = np.lib.stride_tricks.sliding_window_view(whole, 65)[::64]
    assert all((windows == row).all(axis=1).any() for row in batch)


def test_too_short_is_one_line() -> None:
    with pytest.raises(UserError, match=r"the train text has 10 tokens, too few for one window of 10 \+ 1"):
        Batches(_stream(10), "train", seq_len=10, batch_size=1, seed=0)
    with pytest.raises(UserError, match="must be at least 1"):
        Batches(_stream(10), "train", seq_len=0, batch_size=1, seed=0)
    with pytest.raises(UserError, match="none of which can be predicted"):
        val_batches(_stream(1), 10, 1)
    with pytest.raises(UserError, match="must be at least 1"):
        val_batches(_stream(100), 10, 1, max_tokens=0)

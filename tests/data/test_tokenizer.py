from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from qies.data.tokenizer import (
    END,
    END_ID,
    encode_texts,
    load_tokenizer,
    read_tokenizer,
    save_tokenizer,
    token_byte_lengths,
    tokenizer_sha256,
    train_tokenizer,
)
from qies.errors import UserError

TEXTS = ["the king sent a letter to the people of the north, and the people sent a letter to the king. " * 20] * 3
TOKENIZER = train_tokenizer(TEXTS, 280)
LENGTHS = token_byte_lengths(TOKENIZER)


def _ids(text: str) -> np.ndarray:
    return next(iter(encode_texts(TOKENIZER, [text])))


@settings(max_examples=60, deadline=None)
@given(st.text() | st.text(alphabet=list("<|endoftext|> \n\t\u00a0\u200d\U0001f468é'")) | st.just(f"a{END}b"))
def test_any_text_comes_back_and_its_bytes_add_up(text: str) -> None:
    ids = _ids(text)
    assert TOKENIZER.decode(ids.tolist(), skip_special_tokens=False) == text
    assert LENGTHS[ids].sum() == len(text.encode())
    assert END_ID not in ids


def test_vocabulary_is_the_special_token_the_bytes_and_merges() -> None:
    assert TOKENIZER.get_vocab_size() == 280
    assert TOKENIZER.token_to_id(END) == END_ID == 0
    assert LENGTHS.shape == (280,) and LENGTHS[0] == 0
    assert LENGTHS[1:257].tolist() == [1] * 256
    assert LENGTHS[257:].min() >= 2
    assert len(_ids(" the")) == 1 and len(_ids(" ehT")) == 4  # frequent words have become tokens


def test_short_text_gives_fewer_entries() -> None:
    assert 257 < train_tokenizer(["a few words"], 4096).get_vocab_size() < 300


def test_only_part_of_a_long_text_is_read() -> None:
    """Twice 2,500 bytes an entry: every second text is read, so the others teach nothing."""
    vocabulary = train_tokenizer(["abc " * 250, "xyz " * 250] * 650, 260).get_vocab()
    assert "ab" in vocabulary and "xy" not in vocabulary


def test_same_texts_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_tokenizer(train_tokenizer(TEXTS, 280), tmp_path / name)
    assert tokenizer_sha256(tmp_path / "one") == tokenizer_sha256(tmp_path / "two")
    save_tokenizer(train_tokenizer(TEXTS, 270), tmp_path / "other")
    assert tokenizer_sha256(tmp_path / "one") != tokenizer_sha256(tmp_path / "other")


def test_transformers_reads_what_was_saved(tmp_path: Path) -> None:
    save_tokenizer(TOKENIZER, tmp_path)
    for tokenizer in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        text = "the king  sent\n\n café 日本"
        ids = tokenizer(text)["input_ids"]
        assert ids == _ids(text).tolist() and tokenizer.decode(ids) == text
        assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
        assert len(tokenizer) == 280
        assert np.array_equal(token_byte_lengths(tokenizer), LENGTHS)


def test_bad_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocab_size 256 is too small"):
        train_tokenizer(TEXTS, 256)
    with pytest.raises(UserError, match="no tokenizer can be read"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(UserError, match="no tokenizer can be read"):
        read_tokenizer(tmp_path)
    with pytest.raises(UserError, match="not byte-level"):
        token_byte_lengths(Tokenizer(models.WordLevel({"日本": 0}, unk_token="日本")))

import json
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from qies.cli import VERBS
from qies.data.tokenizer import (
    END,
    encode_texts,
    end_token,
    load_tokenizer,
    open_tokenizer,
    read_tokenizer,
    save_tokenizer,
    token_byte_lengths,
    tokenizer_sha256,
    train_tokenizer,
    vocabulary,
)
from qies.errors import UserError
from qies.terminal import run

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
    assert 0 not in ids


def test_vocabulary_is_the_special_token_the_bytes_and_merges() -> None:
    assert TOKENIZER.get_vocab_size() == 280
    assert TOKENIZER.token_to_id(END) == 0
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


# --- tokenizers of others


def _gpt2_like(folder: Path, end: object = "<|end|>") -> Path:
    """Byte-level, its special tokens last, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(["<|end|>", "<|other|>"])
    tokenizer.enable_truncation(4)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    return folder


def _llama_like(path: Path) -> Path:
    """SentencePiece's way: U+2581 for a space, one in front of the text, bytes for what has no token."""
    letters = [chr(c) for c in range(33, 127)] + ["\u2581", "\u2581t", "th", "\u00e9"]
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters])}
    tokenizer = Tokenizer(models.BPE(vocab, [("\u2581", "t"), ("t", "h")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("end", ["<|end|>", {"content": "<|end|>", "special": True}])
def test_a_folder_of_others_is_taken_with_its_end(tmp_path: Path, end: object) -> None:
    tokenizer, token = open_tokenizer(str(_gpt2_like(tmp_path / "gpt2", end)))
    assert token == "<|end|>" and vocabulary(tokenizer) == tokenizer.get_vocab_size()
    assert len(next(encode_texts(tokenizer, [TEXTS[0]]))) > 100  # not truncated
    save_tokenizer(tokenizer, tmp_path / "saved", token)
    loaded = load_tokenizer(tmp_path / "saved")
    assert loaded.eos_token == loaded.bos_token == loaded.pad_token == end_token(tmp_path / "saved") == "<|end|>"
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token_id == tokenizer.token_to_id("<|end|>") > 0


def test_bytes_add_up_with_a_space_in_front_and_byte_fallback(tmp_path: Path) -> None:
    tokenizer, end = open_tokenizer(str(_llama_like(tmp_path / "tokenizer.json")))
    lengths = token_byte_lengths(tokenizer)
    begin = tokenizer.token_to_id(end)
    assert end == "</s>" and lengths[begin] == -1
    for text in ("the cat", " the  cat", "caf\u00e9 \u65e5\u672c\n\t\U0001f600", "\u00a0"):
        (ids,) = encode_texts(tokenizer, [text])
        assert lengths[[begin, *ids]].sum() == len(text.encode())
        assert tokenizer.decode(ids.tolist()) == text


def test_tokenizers_that_cannot_serve_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _gpt2_like(tmp_path / "a", "<|absent|>")
    with pytest.raises(UserError, match="names no token that ends a text"):
        open_tokenizer(str(folder))
    with pytest.raises(UserError, match="names no token that ends a text"):
        open_tokenizer(str(folder / "tokenizer.json"))
    lower = Tokenizer.from_file(str(folder / "tokenizer.json"))
    lower.normalizer = normalizers.Lowercase()
    save_tokenizer(lower, tmp_path / "lower", "<|end|>")
    with pytest.raises(UserError, match="does not give back every text"):
        open_tokenizer(str(tmp_path / "lower"))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"no tokenizer '.*' can be read \("):
        open_tokenizer(str(folder))


def test_a_name_without_the_hub_is_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert run(VERBS, ["data", "build", "builtin", "--out", str(tmp_path / "x"), "--tokenizer", "gpt2"], "") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("qies: no tokenizer 'gpt2' can be read (")

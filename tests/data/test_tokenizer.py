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
from qies.config import DataConfig
from qies.data.builder import pipeline
from qies.data.builder.pipeline import build_shards
from qies.data.builder.tokenizer import open_tokenizer, save_tokenizer, train_tokenizer
from qies.data.manifest import Build
from qies.data.tokenizer import (
    END,
    encode_texts,
    end_token,
    load_tokenizer,
    read_tokenizer,
    token_byte_lengths,
    tokenizer_sha256,
    vocabulary_size,
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


def llama_like(path: Path) -> Path:
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
    assert token == "<|end|>" and vocabulary_size(tokenizer) == tokenizer.get_vocab_size()
    assert len(next(encode_texts(tokenizer, [TEXTS[0]]))) > 100  # not truncated
    save_tokenizer(tokenizer, tmp_path / "saved", token)
    loaded = load_tokenizer(tmp_path / "saved")
    assert loaded.eos_token == loaded.bos_token == loaded.pad_token == end_token(tmp_path / "saved") == "<|end|>"
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token_id == tokenizer.token_to_id("<|end|>") > 0


def test_bytes_add_up_with_a_space_in_front_and_byte_fallback(tmp_path: Path) -> None:
    tokenizer, end = open_tokenizer(str(llama_like(tmp_path / "tokenizer.json")))
    lengths = token_byte_lengths(tokenizer)
    begin = tokenizer.token_to_id(end)
    assert end == "</s>" and lengths[begin] == -1
    for text in ("the cat", " the  cat", "caf\u00e9 \u65e5\u672c\n\t\U0001f600", "\u00a0"):
        (ids,) = encode_texts(tokenizer, [text])
        assert lengths[[begin, *ids]].sum() == len(text.encode())
        assert tokenizer.decode(ids.tolist()) == text


def test_tokenizers_that_cannot_serve_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _gpt2_like(tmp_path / "a", "<|absent|>")
    with pytest.raises(UserError, match="has no end-of-text token"):
        open_tokenizer(str(folder))
    with pytest.raises(UserError, match="has no end-of-text token"):
        open_tokenizer(str(folder / "tokenizer.json"))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"no tokenizer '.*' can be read \("):
        open_tokenizer(str(folder))


def _changed(folder: Path, change) -> Path:
    spec = json.loads((folder / "tokenizer.json").read_text())
    change(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


def _added(content: str, **flags: bool) -> dict:
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    return {"id": 302, "content": content, **usual, **flags}


def _byte_level_alphabet_without(spec: dict, character: str) -> None:
    spec["model"]["vocab"]["qqqq"] = spec["model"]["vocab"].pop(character)


METASPACE = {"type": "Metaspace", "replacement": "\u2581", "split": False}
LOSSY = {
    "lower case": ({"normalizer": {"type": "Lowercase"}}, r"normalizer Lowercase"),
    "composed": ({"normalizer": {"type": "NFC"}}, r"normalizer NFC"),
    "compatible": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "StripAccents"}]}},
        r"normalizer NFKC and StripAccents",
    ),
    "stripped": ({"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}, r"normalizer Strip"),
    "space in front": (
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        r"pre-tokenizer ByteLevel \(add_prefix_space True\)",
    ),
    "no decoder": ({"decoder": None}, "changed by the tokenizer's decoder"),
    "added, left": ({"added": _added("<sep>", lstrip=True)}, r"added token '<sep>' \(lstrip\)"),
    "added, right": ({"added": _added("<sep>", rstrip=True)}, r"added token '<sep>' \(rstrip\)"),
    "a byte missing": ({"without": "\u0127"}, "vocabulary, which has no token for the byte 0x85"),
}


@pytest.mark.parametrize("case", LOSSY)
def test_a_tokenizer_that_loses_text_is_refused_and_its_part_named(case: str, tmp_path: Path) -> None:
    values, message = LOSSY[case]

    def change(spec: dict) -> None:
        for key, value in values.items():
            if key == "added":
                spec["added_tokens"].append(value)
            elif key == "without":
                _byte_level_alphabet_without(spec, value)
            else:
                spec[key] = value

    folder = _gpt2_like(tmp_path / "own")
    open_tokenizer(str(folder))
    _changed(folder, change)
    with pytest.raises(UserError, match=f"own' is not lossless.*{message}") as caught:
        open_tokenizer(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_metaspace_that_puts_a_space_in_front_is_refused(scheme: str, tmp_path: Path) -> None:
    """With it "a" and " a" are the same tokens."""

    def change(spec: dict) -> None:
        spec["normalizer"], spec["pre_tokenizer"] = None, METASPACE | {"prepend_scheme": scheme}

    path = llama_like(tmp_path / "tokenizer.json")
    open_tokenizer(str(path))
    _changed(tmp_path, change)
    with pytest.raises(UserError, match=rf"pre-tokenizer Metaspace \(prepend_scheme {scheme}\)"):
        open_tokenizer(str(path))


def test_metaspace_that_puts_nothing_in_front_serves(tmp_path: Path) -> None:
    def change(spec: dict) -> None:
        spec["normalizer"], spec["pre_tokenizer"] = None, METASPACE | {"prepend_scheme": "never"}
        spec["decoder"]["decoders"] = spec["decoder"]["decoders"][:-1]  # nothing to strip

    path = llama_like(tmp_path / "tokenizer.json")
    _changed(tmp_path, change)
    tokenizer, end = open_tokenizer(str(path))
    assert token_byte_lengths(tokenizer)[tokenizer.token_to_id(end)] == 0


def test_a_plain_added_token_and_a_list_of_ends_serve(tmp_path: Path) -> None:
    folder = _changed(_gpt2_like(tmp_path / "own"), lambda spec: spec["added_tokens"].append(_added("<sep>")))
    for ends in (["<|end|>", "<|other|>"], [{"content": "<|end|>"}]):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": ends}))
        tokenizer, end = open_tokenizer(str(folder))
        assert end == "<|end|>"
    text = "the <sep> king"
    (ids,) = encode_texts(tokenizer, [text])
    assert token_byte_lengths(tokenizer)[ids].sum() == len(text.encode())


def test_unigram_with_byte_fallback_serves(tmp_path: Path) -> None:
    def change(spec: dict) -> None:
        vocab = [[token, -1.0] for token in spec["model"]["vocab"]]
        spec["model"] = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": True}

    path = llama_like(tmp_path / "tokenizer.json")
    _changed(tmp_path, change)
    tokenizer, end = open_tokenizer(str(path))
    lengths = token_byte_lengths(tokenizer)
    for text in ("the cat", " \u65e5\u672c\n"):
        (ids,) = encode_texts(tokenizer, [text])
        assert lengths[[tokenizer.token_to_id(end), *ids]].sum() == len(text.encode())
    _changed(tmp_path, lambda spec: spec["model"].update(byte_fallback=False))
    with pytest.raises(UserError, match="is not byte-level"):
        open_tokenizer(str(path))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("late", [False, True])
def test_a_document_that_a_tokenizer_changes_is_named(late: bool, workers: int, tmp_path: Path, monkeypatch) -> None:
    """U+2581 is SentencePiece's sign for a space. Found in the sample before the build, or in the build behind it."""
    monkeypatch.setattr(pipeline, "_PROBED", 0 if late else 1_000_000)
    tokenizer = str(llama_like(tmp_path / "tokenizer.json"))
    rows = [json.dumps({"text": f"the cat {i}" + " \u2581" * (i == 30)}) + "\n" for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    cfg = DataConfig(str(tmp_path / "a.jsonl"), val_fraction=0.2)
    message = r"the document 'a.jsonl#30' of 'a.jsonl' is changed by .* normalizer Prepend \(prepend .\) and Replace"
    with pytest.raises(UserError, match=message):
        build_shards(cfg, tmp_path / "out", build=Build(tokenizer=tokenizer), workers=workers)
    assert (tmp_path / "out").exists() == late


def test_a_name_without_the_hub_is_one_line(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert run(VERBS, ["data", "build", "builtin", "--out", str(tmp_path / "x"), "--tokenizer", "gpt2"], "") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("qies: no tokenizer 'gpt2' can be read (")

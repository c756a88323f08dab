"""Byte-level byte-pair encoding: every text has an encoding, and every token a known number of bytes.

Source: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016), over bytes and with the
pre-tokenisation of Radford et al. (GPT-2, 2019); the work is done by the `tokenizers` library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qies.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
"""The one special token, id 0: it begins a document (bos), ends the one before (eos) and pads (pad)."""
END_ID = 0
FILES = ("tokenizer.json", "tokenizer_config.json")

_SAMPLE = 2_500  # bytes of text that are read for each entry of the vocabulary; more change it little and cost time
_BATCH = 32  # documents encoded at once, over all threads


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` entries: `<|endoftext|>`, the 256 bytes, and merges learnt from `texts`.

    A text too short to teach that many merges gives fewer entries. Where `texts` hold more than 2,500 bytes for each
    entry, every n-th is read. The same texts give the same tokenizer. Raises UserError if `vocab_size` is below 257.
    """
    if vocab_size < 257:
        raise UserError(f"vocab_size {vocab_size} is too small; give at least 257 (the bytes and {END})")
    step = max(1, round(sum(map(len, texts)) / (_SAMPLE * vocab_size)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[::step], trainer)
    return tokenizer


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[np.ndarray]:
    """Token ids of each text, uint32 `[tokens]`. A literal `<|endoftext|>` in a text is text, no special token."""
    tokenizer.encode_special_tokens = True
    for start in range(0, len(texts), _BATCH):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + _BATCH], add_special_tokens=False):
            yield np.array(encoding.ids, dtype=np.uint32)


def token_byte_lengths(tokenizer: Tokenizer | PreTrainedTokenizerFast) -> np.ndarray:
    """UTF-8 bytes each token stands for, int64 `[N]` for a vocabulary of N; 0 for special tokens.

    Summed over the tokens of a text they are the length of the text, which makes losses of models with different
    tokenizers comparable (bits per byte). Raises UserError if the tokenizer is not byte-level.
    """
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder()
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())  # one character a byte
    lengths = np.zeros(backend.get_vocab_size(with_added_tokens=True), dtype=np.int64)
    for token, id in backend.get_vocab(with_added_tokens=True).items():
        if id in added:
            lengths[id] = 0 if added[id].special else len(added[id].content.encode())
        elif alphabet.issuperset(token):
            lengths[id] = len(token)
        else:
            raise UserError(f"the tokenizer is not byte-level (token {id} is {token!r}); give a byte-level one")
    return lengths


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that `AutoTokenizer.from_pretrained(folder)` reads; the same tokenizer gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
    }
    (folder / FILES[0]).write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    (folder / FILES[1]).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `save_tokenizer` wrote. Raises UserError if it is missing or unreadable."""
    try:
        return Tokenizer.from_file(str(folder / FILES[0]))
    except Exception as error:  # the library raises plain Exception, whatever is wrong with the file
        reason = " ".join(str(error).split())
        raise UserError(f"no tokenizer can be read from '{folder}' ({reason}); build the data again") from None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The same as a tokenizer of `transformers`."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=read_tokenizer(folder),
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def tokenizer_sha256(folder: Path) -> str:
    """Digest over the files of a saved tokenizer. Raises OSError if one is missing."""
    digest = hashlib.sha256()
    for name in FILES:
        digest.update(hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()

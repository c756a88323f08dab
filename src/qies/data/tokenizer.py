"""Reading a data set's tokenizer: token ids of texts, and the number of bytes that each token stands for.

Tokenizers are byte-level BPE, or SentencePiece's with byte fallback: every text has an encoding. `builder.tokenizer`
trains, opens and saves them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from qies.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
"""The only special token of a tokenizer trained here, id 0. It begins a document (bos), ends the previous one (eos) and
pads (pad). In shards made with another tokenizer, the token that ends its texts has these roles."""
FILES = ("tokenizer.json", "tokenizer_config.json")

_BATCH = 32  # documents encoded per call, over all threads
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[np.ndarray]:
    """Token ids of each text, uint32 `[tokens]`. Special tokens are not parsed: a literal `<|endoftext|>` is text."""
    tokenizer.encode_special_tokens = True
    for start in range(0, len(texts), _BATCH):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + _BATCH], add_special_tokens=False):
            yield np.array(encoding.ids, dtype=np.uint32)


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """The highest token id plus one."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def token_byte_lengths(tokenizer: Tokenizer | PreTrainedTokenizerFast) -> np.ndarray:
    """The number of UTF-8 bytes that each token stands for, int64 `[N]` for ids below N; 0 for special tokens.

    The sum over the tokens of a document, including the special token that begins it, is the length of the text, so
    that losses of models with different tokenizers are comparable (bits per byte). A tokenizer that inserts a space
    before each text has -1 for its special tokens, which cancels that byte. Raises UserError for a tokenizer that is
    neither byte-level nor has byte fallback: its tokens do not determine the length of the text.
    """
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder()
    fallback = has_byte_fallback(backend)
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())  # one character per byte
    lengths = np.zeros(vocabulary_size(backend), dtype=np.int64)
    for token, id in backend.get_vocab(with_added_tokens=True).items():
        if id in added:
            lengths[id] = 0 if added[id].special else len(added[id].content.encode())
        elif fallback:  # SentencePiece: a space is U+2581, a single byte <0x..>
            lengths[id] = 1 if _BYTE.fullmatch(token) else len(token.replace("\u2581", " ").encode())
        elif alphabet.issuperset(token):
            lengths[id] = len(token)
        else:
            raise UserError(f"the tokenizer is not byte-level (token {id} is {token!r}); give a byte-level one")
    if fallback:
        extra = lengths[backend.encode("a", add_special_tokens=False).ids].sum() - 1
        lengths[[id for id, token in added.items() if token.special]] = -extra
    return lengths


def read_tokenizer(folder: Path) -> Tokenizer:
    """The saved tokenizer in `folder`. Raises UserError if it is missing or unreadable."""
    try:
        return Tokenizer.from_file(str(folder / FILES[0]))
    except Exception as error:  # the library raises plain Exception for every fault of the file
        reason = " ".join(str(error).split())
        raise UserError(f"no tokenizer can be read from '{folder}' ({reason}); build the data again") from None


def end_token(folder: Path) -> str:
    """The token that begins and ends documents, as it was saved. Raises UserError if it cannot be read."""
    try:
        return str(json.loads((folder / FILES[1]).read_text(encoding="utf-8"))["eos_token"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"'{folder / FILES[1]}' is missing or damaged; build the data again") from None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The saved tokenizer in `folder` as a tokenizer of `transformers`."""
    from transformers import PreTrainedTokenizerFast

    end = end_token(folder)
    return PreTrainedTokenizerFast(
        tokenizer_object=read_tokenizer(folder),
        bos_token=end,
        eos_token=end,
        pad_token=end,
        clean_up_tokenization_spaces=False,
    )


def tokenizer_sha256(folder: Path) -> str:
    """sha256 over the files of a saved tokenizer. Raises OSError if one is missing."""
    digest = hashlib.sha256()
    for name in FILES:
        digest.update(hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()


def has_byte_fallback(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer falls back to a token per byte (SentencePiece); the library hides this for Unigram."""
    found = getattr(tokenizer.model, "byte_fallback", None)
    return bool(json.loads(tokenizer.to_str())["model"].get("byte_fallback") if found is None else found)

"""Byte-level byte-pair encoding: every text has an encoding, and every token a known number of bytes.

Source: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016), over bytes and with the
pre-tokenisation of Radford et al. (GPT-2, 2019); the work is done by the `tokenizers` library.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qies.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
"""The one special token of a tokenizer trained here, id 0: it begins a document (bos), ends the one before (eos) and
pads (pad). In shards made with another tokenizer the token that ends its texts does all this."""
FILES = ("tokenizer.json", "tokenizer_config.json")

SAMPLE = 2_500  # bytes of text that are read for each entry of the vocabulary; more change it little and cost time
_BATCH = 32  # documents encoded at once, over all threads
_ENDS = (END, "</s>", "<eos>", "<|end_of_text|>")  # looked for where nothing but a tokenizer.json is given
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_PROBE = "A Probe:  two spaces,\ttab,\n\nnew lines, caf\u00e9, \u65e5\u672c, \U0001f600 and CAPITALS."


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of at most `vocab_size` entries: `<|endoftext|>`, the 256 bytes, and merges learnt from `texts`.

    A text too short to teach that many merges gives fewer entries. Where `texts` hold more than 2,500 bytes for each
    entry, every n-th is read. The same texts give the same tokenizer. Raises UserError if `vocab_size` is below 257.
    """
    if vocab_size < 257:
        raise UserError(f"vocab_size {vocab_size} is too small; give at least 257 (the bytes and {END})")
    step = max(1, round(sum(map(len, texts)) / (SAMPLE * vocab_size)))
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


def vocabulary(tokenizer: Tokenizer) -> int:
    """One more than the highest token id."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def token_byte_lengths(tokenizer: Tokenizer | PreTrainedTokenizerFast) -> np.ndarray:
    """UTF-8 bytes each token stands for, int64 `[N]` for ids below N; 0 for special tokens.

    Summed over the tokens of a document, with the special token that begins it, they are the length of the text, which
    makes losses of models with different tokenizers comparable (bits per byte). A tokenizer that writes a space in
    front of each text has -1 for its special tokens, which takes that byte back. Raises UserError for a tokenizer that
    is neither byte-level nor falls back to bytes, as its tokens do not tell the length of the text.
    """
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.backend_tokenizer
    added = backend.get_added_tokens_decoder()
    fallback = bool(getattr(backend.model, "byte_fallback", False))
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())  # one character a byte
    lengths = np.zeros(vocabulary(backend), dtype=np.int64)
    for token, id in backend.get_vocab(with_added_tokens=True).items():
        if id in added:
            lengths[id] = 0 if added[id].special else len(added[id].content.encode())
        elif fallback:  # SentencePiece's way: a space is U+2581, a single byte <0x..>
            lengths[id] = 1 if _BYTE.fullmatch(token) else len(token.replace("\u2581", " ").encode())
        elif alphabet.issuperset(token):
            lengths[id] = len(token)
        else:
            raise UserError(f"the tokenizer is not byte-level (token {id} is {token!r}); give a byte-level one")
    if fallback:
        extra = lengths[backend.encode("a", add_special_tokens=False).ids].sum() - 1
        lengths[[id for id, token in added.items() if token.special]] = -extra
    return lengths


def open_tokenizer(name: str) -> tuple[Tokenizer, str]:
    """The tokenizer in a folder, in a `tokenizer.json`, or of that name on the hub, and the token that ends its texts.

    No code of a tokenizer is run. Raises UserError: none found (or no network), none that ends a text, or one that
    loses text (lower-cases it, has no token for a character), as then losses say nothing of bytes.
    """
    path = Path(name).expanduser()
    try:
        path = path if path.exists() else _fetch(name)
        tokenizer, end = _read_any(path)
    except Exception as error:  # the libraries raise all kinds, plain Exception among them
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"no tokenizer '{name}' can be read ({reason}); give a folder, a tokenizer.json, or a name where the "
            "hub is reached"
        ) from None
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    end = end or next((token for token in _ENDS if token in special), None)
    if end is None or tokenizer.token_to_id(end) is None:
        raise UserError(
            f"tokenizer '{name}' names no token that ends a text; give its folder, with tokenizer_config.json"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    lengths = token_byte_lengths(tokenizer)
    ids = next(encode_texts(tokenizer, [_PROBE]))
    begin = lengths[tokenizer.token_to_id(end)]
    if lengths[ids].sum() + begin != len(_PROBE.encode()) or tokenizer.decode(ids.tolist()) != _PROBE:
        raise UserError(f"tokenizer '{name}' does not give back every text as it was; give one that loses nothing")
    return tokenizer, end


def _fetch(name: str) -> Path:
    """The folder with the files of a tokenizer of the hub."""
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, FILES[0])
    if isinstance(cached, str):
        return Path(cached).parent
    revision = HfApi().model_info(name).sha  # fails at once where a download would be tried again for a minute
    return Path(
        snapshot_download(name, revision=revision, allow_patterns=["*token*", "*.model", "vocab*", "merges.txt"])
    )


def _read_any(path: Path) -> tuple[Tokenizer, str | None]:
    """The tokenizer in a folder or a file, and the token that its configuration says ends a text."""
    file = path / FILES[0] if path.is_dir() else path
    if not file.is_file():  # files of an older kind, which transformers converts
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        return found.backend_tokenizer, found.eos_token or found.bos_token
    config = json.loads((path / FILES[1]).read_text(encoding="utf-8")) if (path / FILES[1]).is_file() else {}
    end = config.get("eos_token") or config.get("bos_token")
    return Tokenizer.from_file(str(file)), end["content"] if isinstance(end, dict) else end


def save_tokenizer(tokenizer: Tokenizer, folder: Path, end: str = END) -> None:
    """Write the files that `AutoTokenizer.from_pretrained(folder)` reads; the same tokenizer gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
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


def end_token(folder: Path) -> str:
    """The token that begins and ends documents, as `save_tokenizer` wrote it. Raises UserError if it cannot be read."""
    try:
        return str(json.loads((folder / FILES[1]).read_text(encoding="utf-8"))["eos_token"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"'{folder / FILES[1]}' is missing or damaged; build the data again") from None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The same as a tokenizer of `transformers`."""
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
    """Digest over the files of a saved tokenizer. Raises OSError if one is missing."""
    digest = hashlib.sha256()
    for name in FILES:
        digest.update(hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()

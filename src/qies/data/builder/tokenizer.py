"""The tokenizer of a build: trained on its text, or an existing one that is checked to be lossless.

Source: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016), over bytes and with the
pre-tokenisation of Radford et al. (GPT-2, 2019); implemented by the library `tokenizers`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qies.data.tokenizer import END, FILES, encode_texts, has_byte_fallback, token_byte_lengths
from qies.errors import UserError

SAMPLE = 2_500  # bytes of text per vocabulary entry; more text changes the merges little and takes longer
_ENDS = (END, "</s>", "<eos>", "<|end_of_text|>")  # end tokens looked for if there is only a tokenizer.json
_PROBES = (
    "A Probe:  two spaces,\ttab,\n\nnew lines, caf\u00e9, \u65e5\u672c, \U0001f600 and CAPITALS.",
    " a space in front", "   three", "a space behind ", "\n\ta line\r\n", "\u00a0\u2003\u200b\ufeff spaces \u3000",
    "e\u0301 \ufb01 \u212b \u00bd \u2460 \uff21 \uac00 \u1112\u1161 composed and decomposed",
    "".join(map(chr, range(1, 0x800))),  # with the next probe, every byte that occurs in UTF-8
    "".join(map(chr, (0x800, *range(0x1000, 0x10000, 0x1000), 0x10000, 0x40000, 0x80000, 0xC0000, 0x100000))),
)  # fmt: skip


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Train a tokenizer of at most `vocab_size` entries: `<|endoftext|>`, the 256 bytes, and merges.

    Short texts give fewer merges. If `texts` have more than 2,500 bytes per entry, only every n-th text is used. The
    same texts give the same tokenizer. Raises UserError if `vocab_size` is below 257.
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


def save_tokenizer(tokenizer: Tokenizer, folder: Path, end: str = END) -> None:
    """Write the files that `AutoTokenizer.from_pretrained(folder)` reads. Equal tokenizers give equal bytes."""
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


def open_tokenizer(name: str) -> tuple[Tokenizer, str]:
    """Open the tokenizer in a folder, in a `tokenizer.json`, or on the hub; returns it with its end-of-text token.

    No code of a tokenizer is run. Raises UserError: no such tokenizer (or no network), no end-of-text token, or a
    tokenizer that is not lossless (its normalizer changes text, a byte has no token, "a" and " a" encode alike), with
    which bits per byte would be wrong.
    """
    path = Path(name).expanduser()
    try:
        path = path if path.exists() else _fetch(name)
        tokenizer, end = _read_any(path)
    except Exception as error:  # the libraries raise errors of many types, including plain Exception
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"no tokenizer '{name}' can be read ({reason}); give a folder, a tokenizer.json, or a name on "
            "a hub that is reachable"
        ) from None
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    end = end or next((token for token in _ENDS if token in special), None)
    if end is None or tokenizer.token_to_id(end) is None:
        raise UserError(f"tokenizer '{name}' has no end-of-text token; give its folder, with tokenizer_config.json")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    added = (token.content for token in tokenizer.get_added_tokens_decoder().values() if not token.special)
    check = LosslessEncoder(tokenizer, end)
    for text in (*_PROBES, *(f"a {content} b{content}\n" for content in added)):
        fault = f"tokenizer '{name}' is not lossless: the text {text[:40]!r}"
        [ids], _ = check([text], [fault])
        if tokenizer.decode(ids.tolist()) != text:
            raise UserError(f"{fault} is changed by the tokenizer's decoder; give a lossless tokenizer")
    return tokenizer, end


class LosslessEncoder:
    """Encodes texts and verifies that none is changed: its tokens have its bytes, and normalization keeps it."""

    def __init__(self, tokenizer: Tokenizer, end: str) -> None:
        self.tokenizer = tokenizer
        self.lengths = token_byte_lengths(tokenizer)
        self.begin = int(self.lengths[tokenizer.token_to_id(end)])

    def __call__(self, texts: Sequence[str], names: Sequence[str]) -> tuple[list[np.ndarray], list[int]]:
        """Token ids and size in bytes of each text. Raises UserError with the name of the first text that is changed
        and the component of the tokenizer that changes it."""
        encoded = list(encode_texts(self.tokenizer, texts))
        sizes = [int(self.lengths[ids].sum()) + self.begin for ids in encoded]
        for text, name, size, ids in zip(texts, names, sizes, encoded, strict=True):
            if size != len(text.encode()) or not self._normal(text):
                raise UserError(f"{name} is changed by {self._part(text, ids)}; give a lossless tokenizer")
        return encoded, sizes

    def _normal(self, text: str) -> bool:
        """Whether the normalizer keeps the text, up to U+2581 for a space and a space in front."""
        normalizer = self.tokenizer.normalizer
        return normalizer is None or normalizer.normalize_str(text).replace("\u2581", " ") in (text, f" {text}")

    def _part(self, text: str, ids: np.ndarray) -> str:
        spec = json.loads(self.tokenizer.to_str())
        if not self._normal(text):
            return f"the tokenizer's normalizer {_described(spec['normalizer'])}"
        vocab = self.tokenizer.get_vocab()
        names = [f"<0x{byte:02X}>" for byte in range(256)] if has_byte_fallback(self.tokenizer) else _byte_level()
        if absent := [byte for byte in sorted(set(text.encode())) if names[byte] not in vocab]:
            return f"the tokenizer's vocabulary, which has no token for the byte 0x{absent[0]:02X}"
        for token in self.tokenizer.get_added_tokens_decoder().values():
            if not token.special and token.content in text:
                flags = [flag for flag in ("lstrip", "rstrip", "single_word") if getattr(token, flag)]
                return f"the tokenizer's added token {token.content!r} ({', '.join(flags) or 'no flags'})"
        return f"the tokenizer's pre-tokenizer {_described(spec['pre_tokenizer'])}"


def _described(part: dict[str, Any] | None) -> str:
    """A component of a tokenizer.json: its types, and the options that insert something before a text."""
    if part is None:
        return "(none)"
    inner = part.get("pretokenizers") or part.get("normalizers")
    if inner:
        return " and ".join(map(_described, inner))
    front = {key: part[key] for key in ("prepend_scheme", "add_prefix_space", "prepend") if part.get(key)}
    return part["type"] + "".join(f" ({key} {value})" for key, value in front.items())


def _byte_level() -> list[str]:
    """The characters that represent the bytes 0 ... 255: printable bytes themselves, others from U+0100 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = iter(character for character in alphabet if ord(character) > 255)
    return [chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)]


def _fetch(name: str) -> Path:
    """Download the files of a tokenizer from the hub; returns their folder."""
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, FILES[0])
    if isinstance(cached, str):
        return Path(cached).parent
    revision = HfApi().model_info(name).sha  # fails at once, while a download retries for a minute
    return Path(
        snapshot_download(name, revision=revision, allow_patterns=["*token*", "*.model", "vocab*", "merges.txt"])
    )


def _read_any(path: Path) -> tuple[Tokenizer, str | None]:
    """The tokenizer in a folder or a file, and the end-of-text token of its configuration."""
    file = path / FILES[0] if path.is_dir() else path
    if not file.is_file():  # an older format, which transformers converts
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        return found.backend_tokenizer, found.eos_token or found.bos_token
    config = json.loads((path / FILES[1]).read_text(encoding="utf-8")) if (path / FILES[1]).is_file() else {}
    end = config.get("eos_token") or config.get("bos_token")
    if isinstance(end, list):  # the first is the end-of-text token
        end = end[0]
    return Tokenizer.from_file(str(file)), end["content"] if isinstance(end, dict) else end

"""Text of a model with a tokenizer of SentencePiece's kind: bytes counted as they are, and no space lost."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_tokenizer import llama_like
from transformers import PreTrainedTokenizerFast

from qies.cli import VERBS
from qies.config import DataConfig, RunConfig, TrainConfig
from qies.data.builder.pipeline import build_shards
from qies.data.builder.tokenizer import save_tokenizer, train_tokenizer
from qies.data.manifest import Build
from qies.data.shards import open_shards
from qies.data.tokenizer import load_tokenizer
from qies.decoding import continue_text
from qies.errors import UserError
from qies.terminal import run
from qies.train.loop import build_model
from qies.train.validation import held_out_loss


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> PreTrainedTokenizerFast:
    path = llama_like(tmp_path_factory.mktemp("llama") / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="</s>", bos_token="<s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("own")
    save_tokenizer(train_tokenizer(["the king sent a letter"] * 9, 280), folder)
    return load_tokenizer(folder)


def _model(given: list, *tokens: int):
    """Continues every prompt with `tokens`, and keeps the ids that it was given."""

    def generate(ids, **_):
        given.append(ids[0].tolist())
        return torch.cat([ids, torch.tensor([tokens])], 1)

    return SimpleNamespace(generate=generate, config=SimpleNamespace(position="rope", max_position_embeddings=1))


@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level"])
@pytest.mark.parametrize("continuation", [" the end", "s and", "  two", "\n", " caf\u00e9"])
def test_a_continuation_keeps_the_space_it_begins_with(kind, continuation, request) -> None:
    tokenizer = request.getfixturevalue(kind)
    backend = tokenizer.backend_tokenizer
    whole = backend.encode(f"the cat{continuation}", add_special_tokens=False).ids
    new = whole[len(backend.encode("the cat", add_special_tokens=False).ids) :]
    assert continue_text(_model([], *new, tokenizer.eos_token_id), tokenizer, ["the cat"]) == [continuation]


def test_a_special_token_typed_in_a_prompt_is_text_as_in_training(byte_level) -> None:
    given: list[list[int]] = []
    [text] = continue_text(_model(given, 5), byte_level, ["a<|endoftext|>b"])
    end = byte_level.eos_token_id
    assert given[0][0] == end and end not in given[0][1:]
    assert byte_level.decode(given[0][1:]) == "a<|endoftext|>b"
    assert text == byte_level.decode([5])


def test_a_prompt_that_is_no_utf8_is_one_line(byte_level, capsys, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"The prompt 'caf\\udce9' is not UTF-8"):
        continue_text(_model([], 5), byte_level, ["good", "caf\udce9"])
    monkeypatch.setattr("qies.decoding.load_model", lambda path: (_model([], 5), byte_level))
    assert run(VERBS, ["generate", "x", "--prompt", "caf\udce9"], "") == 2
    assert capsys.readouterr().err.startswith("qies: The prompt")


@pytest.mark.parametrize("max_tokens", [0, 40])
def test_held_out_bytes_are_those_of_the_text(max_tokens: int, tmp_path: Path) -> None:
    """A space in front of each text is taken back by the token that begins it, the first of all too."""
    tokenizer = llama_like(tmp_path / "tokenizer.json")
    rows = [json.dumps({"text": f"the cat {i} caf\u00e9"}) + "\n" for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    manifest = build_shards(
        DataConfig(str(tmp_path / "a.jsonl"), val_fraction=0.2), tmp_path / "out", build=Build(tokenizer=str(tokenizer))
    )
    shards = open_shards(tmp_path / "out")
    config = RunConfig("transformer", "20k", 32 * 4, train=TrainConfig(seq_len=32, batch_size=4))
    model = build_model(config, manifest.vocab_size).eval()
    found = held_out_loss(model, shards, seq_len=32, batch_size=4, max_tokens=max_tokens, precision=nullcontext)
    ids = shards.tokens("val")[: found["val_tokens"] + 1]
    texts = [shards.tokenizer().decode(part) for part in _documents(ids, shards.tokenizer().eos_token_id)]
    assert found["val_bytes"] == sum(len(text.encode()) for text in texts)
    assert max_tokens or found["val_bytes"] == manifest.val.bytes


def _documents(ids, end: int) -> list[list[int]]:
    documents: list[list[int]] = []
    for id in ids.tolist():
        documents.append([]) if id == end else documents[-1].append(id)
    return documents

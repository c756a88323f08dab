"""Decodings from the state: contrast, speculation, snapshots on disk, streaming and stopping."""

import dataclasses
import io
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build, stirred

from qies import cli, decoding
from qies.data.builder.tokenizer import save_tokenizer, train_tokenizer
from qies.data.tokenizer import load_tokenizer
from qies.decoding import Acceptance, Decoding, entangled, speculative
from qies.decoding import contrast as contrast_module
from qies.decoding.contrast import contrast, gate
from qies.decoding.snapshots import load_state, read_prompt, save_state
from qies.errors import UserError
from qies.model import QiesCache
from qies.terminal import run

TEXT = "the king sent a letter to the queen and the queen read it\n"
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
STATES = ["qies", "complex", "registers", "unitary", "recurrent", "no_conv"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer([TEXT] * 9, 280), folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def model(tokenizer):
    """One that can say everything that the tokenizer has."""
    return stirred("qies", vocab_size=len(tokenizer), eos_token_id=None)


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def ids(batch=1, length=11):
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(1))


# --- contrast


def test_contrast_is_the_formula():
    full, local = torch.log(torch.tensor([[0.5, 0.3, 0.16, 0.04]])), torch.log(torch.tensor([[0.7, 0.1, 0.1, 0.1]]))
    scores = contrast(full + 3, local - 2, torch.tensor([2.0]), plausibility=0.1)
    expected = [math.log(p) + 2 * math.log(p / q) for p, q in ((0.5, 0.7), (0.3, 0.1), (0.16, 0.1))]
    assert scores[0, :3].tolist() == pytest.approx(expected, abs=1e-5) and scores[0, 3] == -torch.inf


def test_the_gate_is_one_for_the_most_entangled_state_and_a_uniform_model():
    product, most = torch.zeros(1, 1, 4, 2), torch.cat([torch.eye(2), torch.zeros(2, 2)])[None, None]
    product[..., 0, 0] = 1
    flat, sure = torch.zeros(1, 8), torch.tensor([[100.0] + [0.0] * 7])
    assert gate(flat, [most]).item() == pytest.approx(1)
    assert gate(flat, [product]).item() == pytest.approx(0) == gate(sure, [most]).item()
    assert gate(flat, [most, product]).item() == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["qies", "transformer"])
def test_without_strength_it_is_greedy_decoding(kind):
    model, x = stirred(kind), ids(2)
    greedy = model.generate(x, max_new_tokens=8, **GREEDY)
    assert torch.equal(model.generate(x, max_new_tokens=8, custom_generate=entangled, strength=0.0, **GREEDY), greedy)


@pytest.mark.parametrize("kind", ["qies", "complex"])
def test_one_pass_is_two_models(kind):
    """The chosen tokens are those of the formula on a model with its read-outs and one without."""
    model, x = stirred(kind), ids(2)
    out = model.generate(x, max_new_tokens=6, custom_generate=entangled, strength=8.0, plausibility=0.01, **GREEDY)
    text, on, off = x, QiesCache(model.config), QiesCache(model.config)
    new = x
    with torch.no_grad():
        for _ in range(6):
            full = model(new, past_key_values=on).logits[:, -1]
            with model.read_state(False):
                local = model(new, past_key_values=off).logits[:, -1]
            states = [s for i in range(3) for s in on.layers[i].recurrent_states.values()]
            new = contrast(full, local, 8.0 * gate(full, states), 0.01).argmax(-1, keepdim=True)
            text = torch.cat([text, new], 1)
    assert torch.equal(out, text)
    assert not torch.equal(out, model.generate(x, max_new_tokens=6, **GREEDY))


def test_padded_rows_are_contrasted_as_they_are_alone():
    model, x = stirred("qies"), ids(2)
    x[0, :4], mask = 0, torch.ones_like(x)
    mask[0, :4] = 0
    how = {"max_new_tokens": 5, "custom_generate": entangled, "strength": 4.0, **GREEDY}
    together = model.generate(x, attention_mask=mask, **how)
    assert torch.equal(together[0, 11:], model.generate(x[:1, 4:], **how)[0, 7:])
    assert torch.equal(together[1, 11:], model.generate(x[1:], **how)[0, 11:])


@torch.no_grad()
def test_rows_may_differ_in_whether_they_read():
    model, x = stirred("qies"), ids(2)
    with model.read_state(torch.tensor([True, False])):
        both = model(x, use_cache=False).logits
    with model.read_state(False):
        off = model(x, use_cache=False).logits
    assert torch.allclose(both[0], model(x, use_cache=False).logits[0], atol=1e-5)
    assert torch.allclose(both[1], off[1], atol=1e-5)


def test_contrast_refuses_a_model_without_states():
    with pytest.raises(UserError, match="no entanglement layer"):
        stirred("transformer").generate(ids(), custom_generate=entangled, max_new_tokens=2, **GREEDY)


# --- speculation


@pytest.mark.parametrize("draft", ["state", "attention"])
@pytest.mark.parametrize("kind", ["qies", "complex", "unitary"])
def test_speculation_is_greedy_decoding(kind, draft):
    model, x, counts = stirred(kind), ids(), Acceptance()
    greedy = model.generate(x, max_new_tokens=20, **GREEDY)
    out = model.generate(
        x, max_new_tokens=20, custom_generate=speculative, draft=draft, ahead=3, acceptance=counts, **GREEDY
    )
    assert torch.equal(out, greedy)
    assert 0 <= counts.accepted <= counts.drafted and counts.drafted >= 3
    assert model.model.layers[0].mixes and model.model.layers[3].mixes


@pytest.mark.parametrize("length", range(3, 10))
def test_after_speculation_a_given_cache_holds_the_text_but_its_last_token(length):
    model, x = stirred("qies"), ids()
    cache = QiesCache(model.config)
    how = {"custom_generate": speculative, "ahead": 3, **GREEDY}
    out = model.generate(x, max_new_tokens=length, past_key_values=cache, **how)
    assert cache.get_seq_length() == out.shape[1] - 1
    longer = torch.cat([out, ids()[:, :5]], 1)
    with torch.no_grad():
        onwards = model(longer[:, cache.get_seq_length() :], past_key_values=cache).logits[:, -1]
        assert torch.allclose(onwards, model(longer).logits[:, -1], atol=1e-5)


@pytest.mark.parametrize("decoding", [speculative, entangled])
def test_beams_are_refused(decoding):
    with pytest.raises(UserError, match="beams"):
        stirred("qies").generate(ids(), max_new_tokens=3, num_beams=3, custom_generate=decoding, **GREEDY)


def test_the_gate_of_the_contrast_leaves_out_unitary_heads():
    """Their states are at the ceiling of the entropy whatever the text."""
    model = stirred("unitary")
    cache = QiesCache(model.config)
    with torch.no_grad():
        model(ids().repeat(4, 1), past_key_values=cache)
    held = contrast_module._written(cache, model)
    assert [s.shape[1:] for s in held] == [(2, 16, 16)] * 3 and all(len(s) == 2 for s in held)


def test_a_prompt_beyond_the_learned_positions_is_refused_before_it_is_read():
    model = stirred("gpt2")
    with pytest.raises(UserError, match="64 positions, and the text takes 65"):
        read_prompt(model, torch.zeros(1, 65, dtype=torch.long))


def test_a_state_of_other_settings_is_refused(tokenizer, tmp_path):
    model = stirred("qies", vocab_size=len(tokenizer))
    save_state(tmp_path / "state", read_prompt(model, ids()), model, tokenizer)
    other = stirred("qies", vocab_size=len(tokenizer), rope_theta=1e4)
    other.load_state_dict(model.state_dict())
    with pytest.raises(UserError, match="of another configuration"):
        load_state(tmp_path / "state", other, tokenizer)


def test_a_draft_that_is_right_is_accepted():
    """With its mixers' outputs at zero, as a model starts, the draft is the model itself."""
    model, counts = build("qies").eval(), Acceptance()
    model.generate(ids(), max_new_tokens=11, custom_generate=speculative, ahead=4, acceptance=counts, **GREEDY)
    assert (counts.drafted, counts.accepted, counts.rate) == (8, 8, 1.0)


def test_speculation_stops_where_greedy_decoding_does():
    model, x = stirred("qies"), ids()
    greedy = model.generate(x, max_new_tokens=12, **GREEDY)
    end = int(greedy[0, 16])
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
    assert torch.equal(model.generate(x, custom_generate=speculative, **how), model.generate(x, **how))


@pytest.mark.parametrize(("kind", "more", "words"), [
    ("gpt2", {}, "no layers that a draft without 'state' can skip"),
    ("qies", {"draft": "stat"}, "Did you mean 'state'"), ("qies", {"ahead": 0}, "at least 1"),
    ("qies", {"do_sample": True}, "one prompt at a time"),
])  # fmt: skip
def test_speculation_refuses_what_it_cannot_do(kind, more, words):
    with pytest.raises(UserError, match=words):
        stirred(kind).generate(ids(), max_new_tokens=2, custom_generate=speculative, **{**GREEDY, **more})


# --- snapshots


@torch.no_grad()
@pytest.mark.parametrize("kind", [*STATES, "transformer", "gpt2", "transformer_no_conv"])
def test_a_cache_goes_back_to_a_snapshot(kind):
    model, x, cache = stirred(kind), ids(2, 20), None
    cache = QiesCache(model.config)
    model(x[:, :8], past_key_values=cache)
    held = cache.snapshot()
    after = model(x[:, 8:14], past_key_values=cache).logits
    for _ in range(2):
        model(x[:, 14:], past_key_values=cache)
        cache.restore(held)
        assert cache.get_seq_length() == 8
        assert torch.equal(model(x[:, 8:14], past_key_values=cache).logits, after)
    cache.reset()
    assert torch.equal(model(x[:, 8:14], past_key_values=held).logits, after)


@torch.no_grad()
@pytest.mark.parametrize("kind", [*STATES, "transformer", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_continues_bit_for_bit(kind, dtype, tokenizer, tmp_path):
    model, x = stirred(kind).to(dtype), ids(1, 20)
    held = decoding.read_prompt(model, x[:, :12])
    size = decoding.save_state(tmp_path / "state", held, model, tokenizer)
    assert size == {"tokens": 12, "bytes": (tmp_path / "state").stat().st_size}
    tensors = load_file(tmp_path / "state")
    assert all(t.dtype == torch.float32 for name, t in tensors.items() if name.startswith("state."))
    again = decoding.load_state(tmp_path / "state", model, tokenizer)
    assert torch.equal(again.ids, x[:, :12]) and again.cache.get_seq_length() == 12
    plain = model(x[:, 12:], past_key_values=held.cache).logits
    assert torch.equal(model(x[:, 12:], past_key_values=again.cache).logits, plain)
    if dtype == torch.float32:
        assert torch.allclose(plain, model(x, use_cache=False).logits[:, 12:], atol=1e-5, rtol=1e-5)


def test_a_state_of_something_else_is_refused(model, tokenizer, tmp_path):
    path = tmp_path / "state"
    decoding.save_state(path, decoding.read_prompt(model, ids()), model, tokenizer)
    other = stirred("qies", seed=1, vocab_size=len(tokenizer))
    with pytest.raises(UserError, match="of a model with other weights"):
        decoding.load_state(path, other, tokenizer)
    with pytest.raises(UserError, match="another dtype"):
        decoding.load_state(path, stirred("qies", vocab_size=len(tokenizer)).to(torch.bfloat16), tokenizer)
    save_tokenizer(train_tokenizer(["other words"] * 9, 270), tmp_path / "other")
    with pytest.raises(UserError, match="another tokenizer"):
        decoding.load_state(path, model, load_tokenizer(tmp_path / "other"))
    with pytest.raises(UserError, match="No state at"):
        decoding.load_state(tmp_path / "absent", model, tokenizer)
    tensors = load_file(path)
    save_file(tensors, tmp_path / "plain")
    with pytest.raises(UserError, match="another format"):
        decoding.load_state(tmp_path / "plain", model, tokenizer)
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read as a state"):
        decoding.load_state(tmp_path / "cut", model, tokenizer)
    bent = bytearray(path.read_bytes())
    bent[-3] ^= 1
    (tmp_path / "bent").write_bytes(bent)
    with pytest.raises(UserError, match="is damaged"):
        decoding.load_state(tmp_path / "bent", model, tokenizer)


@pytest.mark.parametrize("how", ["greedy", "sample", "speculative"])
def test_many_questions_cost_one_reading(model, tokenizer, how):
    """The text after a state is that of the whole prompt, whose tokens before it are counted as reused."""
    state = decoding.read_prompt(model, decoding.encode(tokenizer, TEXT))
    settings = Decoding(how, max_new_tokens=6, temperature=2.0)
    questions = [" the letter", " a queen", " the letter"]
    found = list(decoding.continue_prompts(model, tokenizer, questions, settings, state=state))
    whole = state.ids.tolist()[0]
    for question, made in zip(questions, found, strict=True):
        own = decoding.encode(tokenizer, question, state)
        assert (made.read, made.reused) == (own.shape[1], len(whole))
        with torch.no_grad():
            torch.manual_seed(0)
            both = torch.cat([state.ids, own], 1)
            args = {"do_sample": True, "temperature": 2.0, "top_k": 50} if how == "sample" else {"do_sample": False}
            mask = torch.ones_like(both)
            plain = model.generate(both, attention_mask=mask, max_new_tokens=6, pad_token_id=0, **args)
        assert made.text == tokenizer.decode(plain[0, both.shape[1] :], clean_up_tokenization_spaces=False)
    assert found[0] == found[2]
    with pytest.raises(UserError, match="holds no token"):
        decoding.continue_prompts(model, tokenizer, [""], settings, state=state)


# --- streaming and stopping


class Says:
    """A model that continues every prompt with the tokens of a text, one by one."""

    def __init__(self, tokenizer, text):
        self.tokens = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        self.config = SimpleNamespace(position="rope", max_position_embeddings=1)

    def generate(self, ids, stopping_criteria=(), **_):
        for token in self.tokens:
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
            if any(criterion(ids, None).all() for criterion in stopping_criteria):
                break
        return ids


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [(" caf\u00e9 \u6f22", (), " caf\u00e9 \u6f22"), (" one. two", (".",), " one"), (" abab\n", ("abc", "b\n"), " aba"),
     (" x<end>y", ("<end>",), " x"), (" x<en", ("<end>",), " x<en"), ("stop", ("stop",), "")],
)  # fmt: skip
def test_pieces_add_up_to_the_text_before_the_first_stop(tokenizer, text, stop, expected):
    pieces = []
    made = list(
        decoding.continue_prompts(
            Says(tokenizer, text), tokenizer, ["a"], Decoding(stop=stop), emit=lambda i, piece: pieces.append(piece)
        )
    )
    assert "".join(pieces) == made[0].text == expected
    assert "\ufffd" not in pieces and all(pieces)
    if not stop:
        assert len(pieces) > 1
    made = list(decoding.continue_prompts(Says(tokenizer, text), tokenizer, ["a"], Decoding(stop=stop)))
    assert made[0].text == expected


@pytest.mark.parametrize(
    ("bad", "words"),
    [({"name": "gredy"}, "Did you mean 'greedy'"), ({"top_p": 0.0}, r"\(0, 1\]"), ({"stop": ("",)}, "empty text"),
     ({"strength": -1.0}, "positive"), ({"plausibility": 2.0}, r"\(0, 1\]"), ({"draft": "all"}, "draft"),
     ({"max_new_tokens": 0}, "at least 1"), ({"seed": 2**63}, "64 bits"), ({"temperature": 0.0}, "1e-6")],
)  # fmt: skip
def test_bad_settings_are_refused(bad, words):
    with pytest.raises(UserError, match=words):
        Decoding(**bad)


@pytest.mark.parametrize(("kind", "how"), [("transformer", "entangled"), ("gpt2", "speculative")])
def test_a_decoding_without_its_layers_is_refused_before_any_text(kind, how, tokenizer):
    with pytest.raises(UserError, match=r"no (entanglement layer|layers that)"):
        decoding.continue_prompts(stirred(kind), tokenizer, ["a"], Decoding(how))


def test_top_p_keeps_the_most_likely_tokens(model, tokenizer):
    nearly = Decoding("sample", max_new_tokens=8, top_p=1e-6, temperature=1.0)
    [made] = decoding.continue_prompts(model, tokenizer, ["the king"], nearly)
    [greedy] = decoding.continue_prompts(model, tokenizer, ["the king"], Decoding(max_new_tokens=8))
    assert made.text == greedy.text


# --- the command line


def call(*argv):
    return run(cli.VERBS, ["generate", *argv], "")


@pytest.mark.parametrize("how", ["greedy", "sample", "entangled", "speculative"])
def test_printed_text_is_the_json_text(how, saved, capsys):
    argv = [saved, "--prompt", "the king", "a queen", "--decoding", how, "--max-new-tokens", "5", "--seed", "3"]
    assert call(*argv, "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert [m["prompt"] for m in made] == ["the king", "a queen"] and all(m["tokens"] == 5 for m in made)
    assert ("drafted" in made[0]) == (how == "speculative")
    assert call(*argv) == 0
    assert capsys.readouterr().out == "\n".join(f"{m['prompt']}{m['continuation']}\n" for m in made)


def test_prompts_from_files_and_the_standard_input(saved, tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt").write_text(TEXT)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"a letter")))
    argv = [saved, "--prompt-file", str(tmp_path / "a.txt"), "-", "--max-new-tokens", "2", "--json"]
    assert call(*argv) == 0
    assert [m["prompt"] for m in json.loads(capsys.readouterr().out)] == [TEXT, "a letter"]


def test_save_then_ask(saved, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    state = str(tmp_path / "state")
    assert call(saved, "--prompt-file", str(tmp_path / "a.txt"), "--save-state", state, "--json") == 0
    kept = json.loads(capsys.readouterr().out)
    assert call(saved, "--load-state", state, "--prompt", " the letter", "--max-new-tokens", "3", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    assert made["reused_tokens"] == kept["tokens"] > 5 > made["prompt_tokens"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [([], "needs --prompt or --prompt-file"), (["--prompt-file", "absent"], "cannot be read"),
     (["--prompt", "a", "--load-state", "absent"], "No state at absent"),
     (["--prompt", "a", "b", "--save-state", "x"], "2 are given"), (["--prompt", "a", "--top-p", "0"], "top_p is 0.0"),
     (["--prompt", "a", "--decoding", "entangled", "--load-state", "STATE"], "start it without a state"),
     (["--prompt-file", "LATIN"], "is not UTF-8"), (["--prompt", "a", "--save-state", "no/x"], "does not exist")],
)  # fmt: skip
def test_bad_input_is_one_line(argv, words, saved, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "LATIN").write_bytes(b"caf\xe9")
    if "STATE" in argv:
        assert call(saved, "--prompt", "a", "--save-state", "STATE") == 0
        capsys.readouterr()
    assert call(saved, *argv) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_settings_are_the_options_of_the_verb():
    """So that no field of `Decoding` is out of reach of the command line."""
    import inspect

    from qies.cli.generate import generate

    options = inspect.signature(generate).parameters
    for field in dataclasses.fields(Decoding):
        assert options["decoding" if field.name == "name" else field.name].default == field.default

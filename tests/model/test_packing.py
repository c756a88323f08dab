"""Several texts packed into one row: as if each were alone, from any of the forms in which collators mark them."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import ARMS, VARIANTS, build
from transformers import DataCollatorWithFlattening

from qies.model import QiesCache
from qies.model.packing import of_block_mask, read_rows

LENGTHS = [9, 1, 2, 23, 6]  # shorter and longer than the convolution; 41 tokens in all


def texts(rows: int = 1) -> list[list[torch.Tensor]]:
    gen = torch.Generator().manual_seed(2)
    return [[torch.randint(1, 97, (n,), generator=gen) for n in torch.tensor(LENGTHS).roll(r)] for r in range(rows)]


def positions(row: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([torch.arange(len(t)) for t in row])


def numbers(row: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([torch.full((len(t),), i) for i, t in enumerate(row)])


def block_mask(row: list[torch.Tensor]) -> torch.Tensor:
    return torch.block_diag(*(torch.ones(len(t), len(t)).tril() for t in row)).bool()


def forms(rows: list[list[torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    """Everything that marks the same texts."""
    seq_idx, position_ids = (torch.stack([f(r) for r in rows]) for f in (numbers, positions))
    ends = torch.tensor([0, *(len(t) for r in rows for t in r)]).cumsum(0).int()
    blocks = torch.stack([block_mask(r) for r in rows])[:, None]
    additive = torch.zeros(blocks.shape).masked_fill(~blocks, torch.finfo(torch.float32).min)
    return {
        "seq_idx": {"seq_idx": seq_idx.int()},
        "position_ids": {"position_ids": position_ids},
        "position_ids beside ones": {"position_ids": position_ids, "attention_mask": torch.ones_like(seq_idx)},
        "cu_seq_lens": {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 23, "max_length_k": 23},
        "boolean mask": {"attention_mask": blocks},
        "additive mask": {"attention_mask": additive},
    }


def moved(name: str, **more):
    """A model a little way from its start, so that every path matters and rounding is not amplified."""
    model = build(name, **more)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.03 * torch.randn_like(p))
    return model.eval()


def gradients(model, loss: torch.Tensor) -> list[torch.Tensor]:
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), grads, strict=True)]


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    """In the Frobenius norm."""
    assert got.shape == want.shape and torch.isfinite(got).all()
    assert (got - want).norm() <= tolerance * max(1.0, want.norm())


# A gradient in float32 is itself only good to 1e-4 here; in float64 the controls are still rounded to float32.
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 5e-5), (torch.float64, 1e-6)], ids=["float32", "float64"])
@pytest.mark.parametrize("name", VARIANTS)
def test_packed_texts_equal_separate_ones(name, dtype, tolerance):
    model, rows = moved(name).double().to(dtype), texts(2)
    model.train(dtype == torch.float32)
    alone = torch.stack([torch.cat([model(t[None]).logits[0] for t in row]) for row in rows])
    packed = model(torch.stack([torch.cat(r) for r in rows]), **forms(rows)["seq_idx"]).logits
    close(packed, alone, 1e-5 if dtype == torch.float32 else 1e-6)
    weights = torch.randn(alone.shape, generator=torch.Generator().manual_seed(3))
    for got, want in zip(*(gradients(model, (x * weights).sum()) for x in (packed, alone)), strict=True):
        close(got, want, tolerance)


@pytest.mark.parametrize("name", ["qies", "transformer", "gpt2"])
def test_every_form_means_the_same(name):
    model, rows = moved(name), texts(2)
    ids = torch.stack([torch.cat(r) for r in rows])
    want = model(ids, **forms(rows)["seq_idx"]).logits
    for form, given in forms(rows).items():
        assert torch.equal(model(ids, **given).logits, want), form


@pytest.mark.parametrize("name", VARIANTS)
def test_the_first_text_does_not_reach_the_second(name):
    """There is no path, not even one on which nothing but rounding flows."""
    model, (row,) = moved(name), texts()
    embeds = torch.randn(1, 41, 32, requires_grad=True, generator=torch.Generator().manual_seed(4))
    logits = model(inputs_embeds=embeds, seq_idx=numbers(row)[None]).logits
    for i, (start, end) in enumerate(zip([0, 9, 10, 12, 35], [9, 10, 12, 35, 41], strict=True)):
        (grad,) = torch.autograd.grad(logits[:, start:end].square().sum(), embeds, retain_graph=i < 4)
        inside = torch.zeros(41, dtype=torch.bool)
        inside[start:end] = True
        assert (grad[:, ~inside] == 0).all() and (grad[:, inside].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("name", ARMS)
def test_the_collators_of_transformers(name):
    model, (row,) = moved(name).train(), texts()
    examples = [{"input_ids": t.tolist()} for t in row]
    alone = [model(t[None], labels=t[None]).loss * (len(t) - 1) for t in row if len(t) > 1]
    want = torch.stack(alone).sum() / sum(len(t) - 1 for t in row)
    for options in ({"return_seq_idx": True}, {"return_flash_attn_kwargs": True}, {}):
        batch = DataCollatorWithFlattening(return_tensors="pt", **options)(examples)
        close(model(**batch).loss, want)
        close(model(**batch | {"labels": batch["input_ids"]}).loss, want)  # labels that cross from text to text


@pytest.mark.parametrize("name", ["qies", "complex", "transformer", "gpt2", "transformer_input_conv"])
def test_pads_anywhere_in_packed_rows(name):
    model, (row,) = moved(name), texts()
    row = row[:3]
    ids, seq_idx = torch.cat(row), numbers(row)
    real = torch.ones(len(ids) + 7, dtype=torch.bool)
    real[[0, 1, 5, 10, 13, 18, 17]] = False  # before, inside, between and after the texts
    padded, marks = torch.zeros(2, len(real), dtype=torch.long)
    padded[real], marks[real] = ids, seq_idx
    marks[~real] = 50
    want = model(ids[None], seq_idx=seq_idx[None]).logits
    got = model(padded[None], attention_mask=real[None].long(), seq_idx=marks[None]).logits
    close(got[:, real], want)
    blocks = torch.zeros(len(real), len(real), dtype=torch.bool)
    blocks[real.outer(real)] = block_mask(row).flatten()
    close(model(padded[None], attention_mask=blocks[None, None]).logits[:, real], want)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_every_attention_implementation_keeps_texts_apart(name):
    (row,) = texts()
    want = moved("qies")(torch.cat(row)[None], seq_idx=numbers(row)[None]).logits
    model = moved("qies")
    model.set_attn_implementation(name)
    close(model(torch.cat(row)[None], seq_idx=numbers(row)[None]).logits, want)


def test_a_flash_kernel_gets_the_ends_of_the_texts(monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, rows = moved("qies"), texts(2)
    seq_idx = torch.stack([numbers(r) for r in rows])
    ids = torch.stack([torch.cat(r) for r in rows])
    want = model(ids, seq_idx=seq_idx).logits

    def varlen(module, q, k, v, mask, *, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, scaling, **kwargs):
        assert mask is None and torch.equal(cu_seq_lens_q, cu_seq_lens_k)
        assert max_length_q == max_length_k == cu_seq_lens_q.diff().max() and cu_seq_lens_q.dtype == torch.int32
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        parts = [x.split(cu_seq_lens_q.diff().tolist()) for x in (q, k, v)]
        out = [
            F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part), is_causal=True, scale=scaling)
            for part in zip(*parts, strict=True)
        ]
        return torch.cat(out, 1).transpose(0, 1).unflatten(0, (len(ids), -1)), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", varlen)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    close(model(ids, seq_idx=seq_idx).logits, want)
    real = torch.ones_like(ids)
    real[:, -1] = 0
    with pytest.raises(ValueError, match="flash_attention_2; use attn_implementation='sdpa'"):
        model(ids, seq_idx=seq_idx, attention_mask=real)


def test_one_text_is_not_packed():
    ids = torch.arange(1, 12)[None]
    model, want = moved("qies"), moved("qies")(ids).logits
    for given in (
        {"seq_idx": torch.full_like(ids, 3)},
        {"position_ids": torch.arange(4, 15)[None]},
        {"cu_seq_lens_q": torch.tensor([0, 11])},
        {"attention_mask": torch.ones(1, 1, 11, 11).tril().bool()},
    ):
        out = model(ids, **given)
        close(out.logits, want)
        assert isinstance(out.past_key_values, QiesCache) or "attention_mask" in given


@pytest.mark.parametrize("name", ["qies", "transformer", "recurrent", "gpt2"])
def test_what_does_not_go_together_is_refused_in_one_line(name):
    model, (row,) = moved(name), texts()
    ids, seq_idx = torch.cat(row)[None], numbers(row)[None]
    cases = [
        ({"seq_idx": seq_idx, "use_cache": True}, ValueError, "combined with a cache"),
        ({"seq_idx": seq_idx, "past_key_values": QiesCache(model.config)}, ValueError, "combined with a cache"),
        ({"position_ids": positions(row)[None], "use_cache": True}, ValueError, "combined with a cache"),
        ({"seq_idx": seq_idx[:, 1:]}, ValueError, r"seq_idx is \[1, 40\] but must be \[1, 41\]"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 40])}, ValueError, "number of tokens, 41"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 41]), "cu_seq_lens_k": torch.tensor([0, 8, 41])}, ValueError, "differ"),
        ({"attention_mask": 1 + seq_idx}, ValueError, "number packed texts in seq_idx"),
        ({"attention_mask": torch.ones(1, 41, 41)}, ValueError, "attention_mask must be"),
        ({"segment_ids": seq_idx}, TypeError, "unexpected keyword argument 'segment_ids'"),
    ]
    for given, error, words in cases:
        with pytest.raises(error, match=words) as raised:
            model(ids, **given)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["qies", "transformer"])
def test_a_mask_that_a_state_cannot_follow_is_refused(name):
    ids = torch.arange(1, 12)[None]
    window = torch.ones(11, 11).tril().triu(-3).bool()[None, None]
    with pytest.raises(ValueError, match="not block-causal"):
        moved(name)(ids, attention_mask=window)
    attention = moved("transformer_no_conv")
    got, full = attention(ids, attention_mask=window).logits, attention(ids).logits
    close(got[:, :4], full[:, :4])
    assert not torch.allclose(got[:, 6:], full[:, 6:])


def test_where_texts_begin():
    shape, pads = torch.Size([2, 6]), torch.tensor([[0, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 0]])
    position_ids = torch.tensor([[9, 0, 1, 0, 7, 1], [5, 6, 7, 9, 0, 0]])
    rows = read_rows(shape, pads, position_ids)
    assert rows.texts.tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 2, 2]] and torch.equal(rows.real, pads.bool())
    assert read_rows(shape, cu_seq_lens=torch.tensor([0, 2, 6, 9, 12, 12])).texts.tolist() == [
        [0, 0, 1, 1, 1, 1],
        [0, 0, 0, 1, 1, 1],
    ]
    assert read_rows(shape, position_ids=torch.arange(6)[None]) == (None, None, None)
    assert of_block_mask(torch.ones(2, 1, 6, 6), torch.Size([2, 5])) is None


@pytest.mark.parametrize("name", ["qies", "transformer"])
def test_checkpointed_training_on_packed_rows(name):
    (row,) = texts()
    batch = {"input_ids": torch.cat(row)[None], "labels": torch.cat(row)[None], "seq_idx": numbers(row)[None]}
    plain, saving = build(name).train(), build(name).train()
    saving.gradient_checkpointing_enable()
    for a, b in zip(*(gradients(m, m(**batch).loss) for m in (plain, saving)), strict=True):
        close(a, b)

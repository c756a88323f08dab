"""Generation by transformers: every decoding a state allows, padded batches, chunks, caches handed back."""

import pytest
import torch
from tiny_models import ARMS, ATTENTION, VARIANTS, stirred

from qies.model import QiesCache

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(params=VARIANTS, scope="module")
def model(request):
    return stirred(request.param)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 97, (3, 11), generator=torch.Generator().manual_seed(1))


def padded(ids, lengths):
    """Rows cut to `lengths`, filled up on the left, and their mask."""
    batch, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, n in enumerate(lengths):
        batch[i, ids.shape[1] - n :], mask[i, ids.shape[1] - n :] = ids[i, :n], 1
    return batch, mask


@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"prefill_chunk_size": 4}], ids=["greedy", "beams", "chunks"])
def test_a_left_padded_batch_generates_what_its_rows_do_alone(model, ids, how):
    lengths = (11, 1, 6)
    batch, mask = padded(ids, lengths)
    together = model.generate(batch, attention_mask=mask, max_new_tokens=5, **GREEDY, **how)
    for i, n in enumerate(lengths):
        alone = model.generate(ids[i : i + 1, :n], max_new_tokens=5, **GREEDY)
        if "num_beams" in how:
            alone = model.generate(ids[i : i + 1, :n], max_new_tokens=5, **GREEDY, **how)
        assert torch.equal(together[i, 11:], alone[0, n:])


@pytest.mark.parametrize("chunk", [1, 3, 11, 50])
def test_a_prompt_may_be_read_in_chunks(model, ids, chunk):
    whole = model.generate(ids, max_new_tokens=5, output_logits=True, return_dict_in_generate=True, **GREEDY)
    parts = model.generate(
        ids, max_new_tokens=5, prefill_chunk_size=chunk, output_logits=True, return_dict_in_generate=True, **GREEDY
    )
    assert torch.equal(whole.sequences, parts.sequences)
    assert torch.allclose(torch.stack(whole.logits), torch.stack(parts.logits), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_leave_states_and_convolutions_alone(model, ids, side):
    lengths = (11, 2, 6)
    batch, mask = padded(ids, lengths)
    if side == "right":
        batch, mask = ids * (torch.arange(11) < torch.tensor(lengths)[:, None]), mask.flip(1)
    cache = QiesCache(model.config)
    model(batch, attention_mask=mask, past_key_values=cache)
    for i, n in enumerate(lengths):
        alone = QiesCache(model.config)
        model(ids[i : i + 1, :n], past_key_values=alone)
        for held, expected in zip(cache.layers, alone.layers, strict=True):
            for kind in ("recurrent_states", "conv_states"):
                for g, state in getattr(expected, kind).items():
                    row = getattr(held, kind)[g]
                    assert (row is None) == (state is None)
                    assert state is None or torch.allclose(row[i], state[0], atol=1e-4)


def test_a_cache_is_handed_back_and_taken_in_again(model, ids):
    """Generate, hear more, and generate on: a padded conversation, from the cache and from scratch."""
    batch, mask = padded(ids, (11, 4, 6))
    kw = {"max_new_tokens": 3, "return_dict_in_generate": True, **GREEDY}
    first = model.generate(batch, attention_mask=mask, **kw)
    heard = torch.cat([first.sequences, ids[:, :4]], 1)
    mask = torch.cat([mask, torch.ones(3, 7, dtype=torch.long)], 1)
    assert first.past_key_values.get_seq_length() == 13  # the last token has not been read yet
    again = model.generate(heard, attention_mask=mask, past_key_values=first.past_key_values, **kw)
    assert torch.equal(again.sequences, model.generate(heard, attention_mask=mask, **kw).sequences)


def test_embeddings_may_stand_for_a_prompt(model, ids):
    embeds = model.get_input_embeddings()(ids)
    from_ids = model.generate(ids, max_new_tokens=4, **GREEDY)
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=4, **GREEDY), from_ids[:, 11:])


@torch.no_grad()
def test_a_cache_knows_that_it_is_filled_and_how_long(model, ids):
    """Also without a convolution, and in stacks without attention, where transformers counts nothing."""
    cache = QiesCache(model.config)
    assert cache.get_seq_length() == 0 and not cache.has_previous_state()
    model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 11 and cache.has_previous_state()
    assert all(cache.has_previous_state(i) for i in range(4))
    assert cache.get_max_length() == -1 and not cache.is_compileable
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.has_previous_state()
    again = model(ids, past_key_values=cache).logits
    assert torch.allclose(again, model(ids).logits, atol=1e-5)


@torch.no_grad()
def test_only_keys_and_values_can_be_cropped(model, ids):
    cache = QiesCache(model.config)
    model(ids, past_key_values=cache)
    assert cache.is_croppable == (model.config.layer_types == ATTENTION and not model.config.attention_conv_size)
    if cache.is_croppable:
        cache.crop(-3)
        assert cache.get_seq_length() == 8
        rest = model(ids[:, 8:], past_key_values=cache).logits
        assert torch.allclose(rest, model(ids).logits[:, 8:], atol=2e-5)
    else:
        with pytest.raises(ValueError, match="cannot be cropped"):
            cache.crop(-1)


@torch.no_grad()
def test_a_refused_crop_changes_nothing(ids):
    model = stirred("qies", layer_types=["full_attention", "linear_attention"] * 2)
    cache = QiesCache(model.config)
    model(ids[:, :8], past_key_values=cache)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)
    rest = model(ids[:, 8:], past_key_values=cache).logits
    assert torch.allclose(rest, model(ids).logits[:, 8:], atol=2e-5)


@pytest.mark.parametrize(
    "how",
    [
        {"prompt_lookup_num_tokens": 3},
        {"assistant_early_exit": 2},
        {"assistant_model": stirred("qies")},
        {"penalty_alpha": 0.6, "top_k": 4, "trust_remote_code": True},
        {"dola_layers": "low", "trust_remote_code": True},
        {"num_beams": 4, "num_beam_groups": 2, "trust_remote_code": True},
        {"num_beams": 2, "force_words_ids": [[5]], "trust_remote_code": True},
    ],
    ids=["lookup", "early_exit", "assistant", "contrastive", "dola", "groups", "constrained"],
)
@pytest.mark.parametrize("arm", ["qies", "transformer"])
def test_decodings_that_need_a_rollback_are_refused_in_one_line(arm, how, ids):
    with pytest.raises(ValueError, match=r"only supports .*greedy_search.* but got generation mode") as refusal:
        stirred(arm).generate(ids[:1], max_new_tokens=3, **GREEDY, **how)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["static", "offloaded", "quantized"])
def test_caches_of_another_kind_are_refused(kind, ids):
    with pytest.raises(ValueError, match="does not support states; omit it"):
        stirred("qies").generate(ids, cache_implementation=kind, max_new_tokens=2, **GREEDY)


@pytest.mark.parametrize("arm", ARMS)
def test_generate_reports_scores_states_and_weights(arm, ids):
    model = stirred(arm)
    model.set_attn_implementation("eager")
    out = model.generate(
        ids, max_new_tokens=3, return_dict_in_generate=True, output_scores=True, output_hidden_states=True,
        output_attentions=True, **GREEDY,
    )  # fmt: skip
    attention = model.config.layer_types.count("full_attention")
    assert [s.shape for s in out.scores] == [(3, 97)] * 3
    assert [[h.shape for h in step] for step in out.hidden_states] == [[(3, t, 32)] * 5 for t in (11, 1, 1)]
    expected = [[(3, 2, t, s)] * attention for t, s in ((11, 11), (1, 12), (1, 13))]
    assert [[a.shape for a in step] for step in out.attentions] == expected


def test_several_samples_of_one_prompt(ids):
    model = stirred("registers")
    torch.manual_seed(0)
    out = model.generate(ids, do_sample=True, num_return_sequences=4, max_new_tokens=6, eos_token_id=None)
    assert out.shape == (12, 17) and torch.equal(out[:, :11], ids.repeat_interleave(4, 0))
    assert len(set(map(tuple, out[:4].tolist()))) > 1


def test_without_a_prompt_generation_starts_from_bos():
    model = stirred("qies")
    out = model.generate(max_new_tokens=4, **GREEDY)
    assert torch.equal(out, model.generate(torch.zeros(1, 1, dtype=torch.long), max_new_tokens=4, **GREEDY))


def test_finished_rows_are_filled_with_pads(ids):
    model = stirred("qies")
    free = model.generate(ids, max_new_tokens=8, **GREEDY)[:, 11:]
    end = int(free[0, 2])
    out = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=end, pad_token_id=0)[:, 11:]
    for row, told in zip(free, out, strict=True):
        stop = row.tolist().index(end) + 1 if end in row else len(row)
        assert torch.equal(told[:stop], row[:stop]) and not told[stop:].any()


def test_learned_positions_end_with_one_clear_line():
    model = stirred("gpt2")
    with pytest.raises(ValueError, match="longer than the 64 learned positions"):
        model.generate(torch.ones(1, 60, dtype=torch.long), max_new_tokens=9, **GREEDY)

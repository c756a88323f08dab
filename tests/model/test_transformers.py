"""At home in transformers: Trainer, pipeline, adapters, resizing, attention implementations."""

import pytest
import torch
from tiny_models import ARMS, build, stirred
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline


class Rows(torch.utils.data.Dataset):
    """Sixty-four rows that count upwards, so that there is something to learn."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        ids = (torch.arange(24) + i) % 97
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def trainer(model, folder, **more):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=8, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=4,
        logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=0, **more,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=Rows())


@pytest.mark.parametrize("name", ARMS)
def test_trainer_learns_and_resumes_to_the_same_weights(name, tmp_path):
    whole = trainer(build(name), tmp_path / "whole")
    whole.train()
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    again = trainer(build(name), tmp_path / "whole")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_trainer_accumulates_to_the_loss_of_the_whole_batch(tmp_path):
    one = trainer(build("qies"), tmp_path / "one")
    one.train()
    two = Trainer(
        model=build("qies"), train_dataset=Rows(),
        args=TrainingArguments(
            output_dir=str(tmp_path / "two"), max_steps=8, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True,
            disable_tqdm=True, seed=0, save_strategy="no",
        ),
    )  # fmt: skip
    two.train()
    a, b = ([row["loss"] for row in t.state.log_history if "loss" in row] for t in (one, two))
    assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("marked", [True, False], ids=["pads -100", "pads labelled"])
def test_trainer_gives_the_loss_of_the_model_however_the_batch_is_split(side, marked, tmp_path):
    model = stirred("qies")
    rows = []
    for i in range(8):
        ids, real = torch.arange(1, 25) + i, torch.arange(24) < 4 + 2 * i
        real = real.flip(0) if side == "left" else real
        ids = ids * real
        rows.append({"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(~real & marked, -100)})
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    with torch.no_grad():
        want = model(**batch).loss.item()
    for size in (1, 4, 8):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=size, per_device_eval_batch_size=8,
            gradient_accumulation_steps=8 // size, learning_rate=0.0, logging_steps=1, save_strategy="no", report_to=[],
            use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        run = Trainer(model=model, args=arguments, train_dataset=rows)
        run.train()
        assert run.state.log_history[0]["loss"] == pytest.approx(want, abs=1e-4)
    assert run.evaluate(rows)["eval_loss"] == pytest.approx(want, abs=1e-4)


def test_evaluation_gives_logits_and_the_same_loss(tmp_path):
    model = build("qies")
    result = trainer(model, tmp_path).evaluate(Rows())
    model.eval()
    ids = torch.stack([Rows()[i]["input_ids"] for i in range(64)])
    assert result["eval_loss"] == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-4)


def test_pipeline_generates_text(shards, tmp_path):
    tokenizer = shards.tokenizer()
    model = stirred("qies", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    pipe = pipeline("text-generation", model=loaded, tokenizer=AutoTokenizer.from_pretrained(tmp_path))
    prompts = ["Ada wrote", "Bell measured the phase and then"]
    alone = [pipe(p, max_new_tokens=4, do_sample=False)[0]["generated_text"] for p in prompts]
    together = pipe(prompts, max_new_tokens=4, do_sample=False, batch_size=2)
    assert [t[0]["generated_text"] for t in together] == alone
    assert all(t.startswith(p) for t, p in zip(alone, prompts, strict=True))


@pytest.mark.parametrize("name", ARMS)
@torch.no_grad()
def test_eager_and_sdpa_agree(name):
    ids = torch.randint(0, 97, (2, 21))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    out = []
    for kind in ("sdpa", "eager"):
        model = stirred(name)
        model.set_attn_implementation(kind)
        out.append(model(ids, attention_mask=mask, output_attentions=kind == "eager"))
    real = mask.bool()
    assert torch.allclose(out[0].logits[real], out[1].logits[real], atol=1e-5)
    weights = out[1].attentions[-1]
    assert weights.shape == (2, model.config.num_attention_heads, 21, 21)
    assert torch.allclose(weights[1].sum(-1), torch.ones(()))


def test_bf16_model_trains_and_reloads_in_bf16(tmp_path):
    model = build("selective_phase").to(torch.bfloat16)
    ids = torch.randint(0, 97, (2, 16))
    model.train()(ids, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wide = {name.split(".")[-1] for name, p in loaded.named_parameters() if p.dtype == torch.float32}
    assert loaded.dtype == torch.bfloat16 and wide == {"beta_bias", "decay_bias", "decay_rate", "phase_bias"}


@pytest.mark.parametrize("name", ARMS)
def test_lora_adapts_every_projection(name, tmp_path):
    import peft

    base = stirred(name, tie_word_embeddings=False)
    linear = {n.rsplit(".", 1)[-1] for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    options = peft.LoraConfig(target_modules=sorted(linear), r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(base, options)
    ids = torch.arange(24)[None] % 97
    logits = model.eval()(input_ids=ids).logits
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    loss = model.train()(input_ids=ids, labels=ids).loss
    assert torch.allclose(loss, expected, atol=1e-5)  # the head's adapter counts in the loss too
    assert torch.allclose(model(input_ids=ids, labels=ids, num_items_in_batch=46).loss, expected / 2, atol=1e-5)
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0] == []
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(stirred(name, tie_word_embeddings=False), tmp_path).eval()
    assert torch.allclose(again(input_ids=ids).logits, logits, atol=1e-5)
    merged = model.eval().merge_and_unload()
    assert torch.allclose(merged(ids).logits, logits, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("peft_too", [False, True], ids=["whole", "lora"])
def test_trl_fine_tunes_and_evaluates_to_the_loss_of_the_model(shards, tmp_path, peft_too):
    trl = pytest.importorskip("trl", reason="trl is no dependency: pip install trl")
    datasets = pytest.importorskip("datasets")
    import peft

    tokenizer = shards.tokenizer()
    model = stirred("qies", vocab_size=len(tokenizer))
    texts = ["Ada wrote the phase", "Bell measured the long sequence and then forgot it", "Curie", "Dirac knew"] * 2
    rows = datasets.Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in texts]})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=4, per_device_eval_batch_size=8,
        learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        max_length=32, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    lora = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if peft_too else None
    run = trl.SFTTrainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer, peft_config=lora
    )
    losses = []
    for row in rows["input_ids"]:
        with torch.no_grad():
            ids = torch.tensor([row])
            losses.append((model.eval()(ids, labels=ids).loss.item() * (len(row) - 1), len(row) - 1))
    want = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
    assert run.evaluate()["eval_loss"] == pytest.approx(want, abs=1e-3)
    run.train()
    assert run.evaluate()["eval_loss"] < want - 0.1


@pytest.mark.slow  # lm-eval is an extra: make test-all installs it
@torch.no_grad()
def test_lm_eval_sees_the_same_model_at_every_batch_size(shards):
    from lm_eval.api.instance import Instance
    from lm_eval.models import huggingface

    model = stirred("registers", vocab_size=len(shards.tokenizer()))
    texts = [("Ada", " wrote the phase"), ("", "Bell forgot"), ("Curie measured the long", " sequence 3 times.")]
    asked = [Instance("loglikelihood", {}, t, i) for i, t in enumerate(texts * 3)]
    got = []
    for size in (1, 8):
        lm = huggingface.HFLM(pretrained=model, tokenizer=shards.tokenizer(), batch_size=size, device="cpu")
        got.append([value for value, _ in lm.loglikelihood(asked, disable_tqdm=True)])
    assert got[0] == pytest.approx(got[1], abs=1e-3)

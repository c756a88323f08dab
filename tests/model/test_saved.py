"""Configurations that were saved before a field existed load as the model that they were saved from."""

import json

import pytest
import torch
from tiny_models import SHAPE, config, stirred

from qies.model import QiesConfig, QiesForCausalLM

NEWER = ("attention_conv", "register_mode", "nope_interval", "rope_fraction")


@pytest.mark.parametrize("arm", ["transformer", "no_phase"])
def test_a_convolution_from_before_it_had_a_place_is_on_the_input(arm, tmp_path):
    model = stirred(arm, attention_conv="input")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    assert saved["attention_conv"] == "input" and saved["attention_conv_size"] == 4
    path.write_text(json.dumps({k: v for k, v in saved.items() if k not in NEWER}))
    ids = torch.randint(0, 97, (2, 20))
    old = QiesForCausalLM.from_pretrained(tmp_path)
    assert old.config.attention_conv == "input"
    with torch.no_grad():
        assert torch.equal(old(ids).logits, model(ids).logits)
        other = stirred(arm, attention_conv="keys")
        other.load_state_dict(model.state_dict())
        assert not torch.allclose(other(ids).logits, model(ids).logits, atol=1e-3)
    assert QiesConfig.from_json_file(path).attention_conv == "input"


def test_a_hybrid_from_before_register_heads_has_none():
    saved = {**SHAPE, "model_type": "qies", "attention_conv_size": 0, "phase": "selective"}
    assert QiesConfig.from_dict(saved).register_heads == 0


def test_what_is_saved_today_and_what_is_written_by_hand_have_the_defaults():
    today = config("qies")
    assert QiesConfig.from_dict(today.to_dict()).to_dict() == today.to_dict()
    assert QiesConfig(attention_conv_size=4).attention_conv == QiesConfig.from_dict({}).attention_conv == "keys"
    assert QiesConfig.from_dict({"hidden_size": 64}).register_heads == 4

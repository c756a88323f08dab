"""A prompt's state on disk, so that many questions to one text cost one pass over it.

A file is safetensors: `ids` [1,n], and of each layer i that has them `state.i.g` fp32 (of head group g), `conv.i`,
`keys.i` and `values.i`. Its metadata identify the model's weights and settings, the tokenizer, the dtype and the
tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from qies import presets, storage
from qies.accounting.parameters import longest_context
from qies.errors import UserError
from qies.mixers import mixer
from qies.model import QiesCache, QiesForCausalLM
from qies.model.cache import write_conv, write_states

FORMAT = "qies-state-1"


@dataclass(frozen=True)
class Snapshot:
    """A text that a model has read: its tokens [1,n], and the cache after them."""

    ids: Tensor
    cache: QiesCache


@torch.no_grad()
def read_prompt(model: QiesForCausalLM, ids: Tensor, after: Snapshot | None = None) -> Snapshot:
    """The snapshot after the tokens ids [1,n], which follow those of `after` where it is given.

    Raises UserError for a text beyond the positions that a model has learned.
    """
    total, limit = ids.shape[1] + (0 if after is None else after.ids.shape[1]), longest_context(vars(model.config))
    if total > limit:
        raise UserError(f"The model has learned {limit} positions, and the text takes {total}; shorten it.")
    cache = QiesCache(model.config) if after is None else after.cache.snapshot()
    model.model(ids, past_key_values=cache, use_cache=True)
    return Snapshot(ids if after is None else torch.cat([after.ids, ids], 1), cache)


def save_state(
    path: Path, snapshot: Snapshot, model: QiesForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> dict[str, int]:
    """Write a snapshot, atomically. Returns its tokens and the bytes of the file."""
    tensors = {"ids": snapshot.ids}
    for i, layer in enumerate(snapshot.cache.layers):
        tensors |= {f"state.{i}.{g}": s for g, s in layer.recurrent_states.items() if s is not None}
        tensors |= {f"conv.{i}": s for s in layer.conv_states.values() if s is not None}
        if getattr(layer, "keys", None) is not None:
            tensors |= {f"keys.{i}": layer.keys, f"values.{i}": layer.values}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    whole = save(tensors, _identity(model, tokenizer) | {"content": _digest(tensors)})
    storage.write_bytes(path, whole)
    return {"tokens": snapshot.ids.shape[1], "bytes": len(whole)}


def load_state(path: Path, model: QiesForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Snapshot:
    """The snapshot in a file that `save_state` wrote.

    Raises UserError where there is none, it is damaged, or it is of another model, tokenizer or dtype.
    """
    if not path.is_file():
        raise UserError(f"No state at {path}; write one with --save-state.")
    try:
        with safe_open(path, framework="pt", device=str(model.device)) as file:
            found = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} cannot be read as a state ({' '.join(str(e).split())}); save it again.") from None
    for key, wanted in _identity(model, tokenizer).items():
        if found.get(key) != wanted:
            what = {"format": "written in another format", "model": "of a model with other weights"}
            raise UserError(f"{path} is {what.get(key, f'of another {key}')}; save it again with this model.")
    if found.get("content") != _digest(tensors):
        raise UserError(f"{path} is damaged: its tensors are not those that were saved; save it again.")
    cache = QiesCache(model.config)
    for i, (layer, kind) in enumerate(zip(cache.layers, model.config.layer_types or [], strict=True)):
        if f"conv.{i}" in tensors:
            write_conv(layer, tensors[f"conv.{i}"])
        if count := len(mixer(kind).states(vars(model.config))):
            write_states(layer, [tensors[f"state.{i}.{g}"] for g in range(count)])
        if f"keys.{i}" in tensors:
            layer.update(tensors[f"keys.{i}"], tensors[f"values.{i}"])
    ids = tensors["ids"]
    cache.seen_tokens = ids.shape[1]
    return Snapshot(ids, cache)


def _identity(model: QiesForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """What a state belongs to: the weights, the settings of the model, the tokenizer and the dtype."""
    settings = {name: getattr(model.config, name) for name in presets.model_fields(model.config.layer_types or [])}
    words = tokenizer.backend_tokenizer.to_str().encode()
    return {
        "format": FORMAT,
        "dtype": str(model.dtype),
        "tokenizer": hashlib.sha256(words).hexdigest(),
        "model": _digest(model.state_dict()),
        "configuration": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
    }


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, with their shapes and dtypes."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        whole.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()

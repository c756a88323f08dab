"""The entangled states of a model while it reads a text, and their entropies. Legend: B T H m V L."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qies.errors import UserError
from qies.mixers import mixer
from qies.model import QiesCache, QiesForCausalLM
from qies.ops.measures import (
    entropy_ceiling,
    page_entropy,
    renyi2_entropy,
    schmidt_spectrum,
    von_neumann_entropy,
)


@torch.no_grad()
def capture(model: QiesForCausalLM, ids: Tensor, positions: Sequence[int]) -> dict[int, list[Tensor]]:
    """The states of every entanglement layer after each number of tokens in `positions` (ascending).

    ids [B,T] -> {layer: one [P,B,H,2m,V] fp32 for each group of heads}; empty for a model without such layers. Raises
    UserError when a position is beyond the end of the text.
    """
    if list(positions) != sorted(set(positions)) or not positions or positions[-1] > ids.shape[1] or positions[0] < 1:
        raise UserError(f"positions {list(positions)} must ascend within the text's {ids.shape[1]} tokens.")
    layers = [i for i, kind in enumerate(model.config.layer_types) if mixer(kind).entangled]
    cache = QiesCache(model.config)
    seen: dict[int, list[list[Tensor]]] = {i: [] for i in layers}
    start, was = 0, model.training
    model.eval()
    for end in positions:
        model.model(ids[:, start:end], past_key_values=cache, use_cache=True)
        for i in layers:
            seen[i].append([state.clone() for state in cache.layers[i].recurrent_states.values()])
        start = end
    model.train(was)
    return {i: [torch.stack(group) for group in zip(*states, strict=True)] for i, states in seen.items()}


def entropies(states: dict[int, list[Tensor]], positions: Sequence[int]) -> dict[str, Any]:
    """Entropies in nats and mean Schmidt spectra of captured states, as plain data for the report.

    Per head at the last position: mean and standard deviation over the texts of the von Neumann and Renyi-2
    entropy, their ceiling log min(m, V), Page's mean for random states, and the mean spectrum. And the mean
    von Neumann entropy over layers, heads and texts at every position.
    """
    layers, by_position = [], []
    for layer, groups in states.items():
        heads: list[dict[str, Any]] = []
        entropy = []
        for psi in groups:
            m, v = psi.shape[-2] // 2, psi.shape[-1]
            spectrum = schmidt_spectrum(psi)  # [P,B,H,min(m,V)]
            s1, s2 = von_neumann_entropy(spectrum), renyi2_entropy(psi[-1])
            entropy.append(s1)
            heads += [
                {
                    "head": len(heads) + h,
                    "m": m,
                    "v": v,
                    "ceiling": entropy_ceiling(m, v),
                    "page": page_entropy(m, v),
                    "von_neumann": _mean_std(s1[-1, :, h]),
                    "renyi2": _mean_std(s2[:, h]),
                    "spectrum": spectrum[-1, :, h].mean(0).tolist(),
                }
                for h in range(psi.shape[2])
            ]
        by_position.append(torch.cat(entropy, 2).mean(dim=(1, 2)))
        layers.append({"layer": layer, "heads": heads})
    return {
        "layers": layers,
        "positions": list(positions),
        "entropy_by_position": torch.stack(by_position).mean(0).tolist(),
    }


def _mean_std(values: Tensor) -> list[float]:
    return [values.mean().item(), values.std(unbiased=False).item()]

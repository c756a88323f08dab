"""Linear probes: what can be read off hidden states, and how much of that is the probe's own doing.

A probe is ridge regression onto one-hot labels, in closed form, so that it has no seed and no learning rate. Its
*selectivity* is its accuracy minus that of the same probe on a control task, in which every input token has a random
label of its own (Hewitt and Liang, arXiv:1909.03368): a probe that only memorises tokens has none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qies.errors import UserError
from qies.model import QiesForCausalLM

RIDGE = 1e-3  # of the mean feature variance


@torch.no_grad()
def hidden_states(model: QiesForCausalLM, ids: Tensor) -> Tensor:
    """Residual stream after the embedding and after every layer: ids [B,T] -> [L+1,B,T,D] in fp32."""
    model.eval()
    states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    return torch.stack([state.float() for state in states])


def fit_probe(features: NDArray[np.floating], labels: NDArray[np.integer], classes: int) -> NDArray[np.float64]:
    """Ridge regression of one-hot labels on features and a constant: [N,D], [N] -> weights [D+1,classes].

    Features are scaled by their standard deviation, so that the penalty does not depend on their unit. Raises UserError
    for shapes that do not fit or labels out of range.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise UserError(f"features [N,D] and labels [N] do not fit: {features.shape} and {labels.shape}.")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"labels must lie in 0 to {classes - 1}, not {labels.min()} to {labels.max()}.")
    x = features.astype(np.float64)
    mean, scale = x.mean(0), x.std(0) + 1e-12
    x = (x - mean) / scale
    target = np.eye(classes)[labels]
    share = target.mean(0)
    gram = x.T @ x / len(x)
    slope = np.linalg.solve(gram + RIDGE * np.eye(len(gram)), x.T @ (target - share) / len(x)) / scale[:, None]
    return np.concatenate([slope, (share - mean @ slope)[None]])


def accuracy(weights: NDArray[np.float64], features: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """Share of rows whose largest score is that of the label."""
    return float(((features @ weights[:-1] + weights[-1]).argmax(1) == labels).mean())


def probe_layers(states: Tensor, ids: Tensor, labels: Tensor, classes: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """One probe for each layer, trained on the first half of the rows and scored on the others.

    states [L+1,B,T,D]; ids [B,T]; labels [B,T] in 0 to `classes` - 1, or negative where nothing is asked.

    Returns for each layer: accuracy; control, the accuracy on the control task; selectivity, their difference;
    majority, the share of the most frequent label among the scored positions; n, how many those are.

    Raises UserError for fewer than two rows, or halves without labels.
    """
    half = len(ids) // 2
    asked = labels >= 0
    if not (asked[:half].any() and asked[half:].any()):
        raise UserError("A linear probe needs labels in both halves of the rows.")
    random = np.random.default_rng(seed).integers(0, classes, int(ids.max()) + 1)
    control = torch.from_numpy(random)[ids]
    result = []
    for layer in states:
        train, test = layer[:half][asked[:half]].numpy(), layer[half:][asked[half:]].numpy()
        scores = {}
        for name, target in (("accuracy", labels), ("control", control)):
            weights = fit_probe(train, target[:half][asked[:half]].numpy(), classes)
            scores[name] = accuracy(weights, test, target[half:][asked[half:]].numpy())
        scored = labels[half:][asked[half:]]
        result.append(
            {
                **scores,
                "selectivity": scores["accuracy"] - scores["control"],
                "majority": float(scored.bincount(minlength=classes).max() / len(scored)),
                "n": len(scored),
            }
        )
    return result

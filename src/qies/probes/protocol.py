"""One probe: a small model trained on a task at growing lengths, then scored at lengths up to 16 times as long."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from qies import presets, strict_yaml
from qies.errors import UserError
from qies.probes.task import IGNORED, Task
from qies.probes.tasks import task

SUCCESS = 0.99  # accuracy from which on a run counts as having solved the task
CLIP = 1.0
WARMUP = 0.05  # share of the steps
SCORED = 2**16  # tokens of every evaluation


@dataclass(frozen=True)
class ProbeConfig:
    """One run: an arm of one or few layers without a short convolution, trained from scratch on one task.

    arm: the name of an arm, and after it options of this arm alone, fields of QiesConfig or `layers`:
    `no_phase:eigenvalues=unit`, `transformer:layers=2`.
    length: the longest of the training lengths, which double from 4 during the first half of the steps.
    longer: evaluation lengths as multiples of `length`. Every layer has the mixer of the arm's first one (its
    entanglement layer, or attention where it has none). model: fields of QiesConfig to replace.

    label_smoothing: share of the target spread over all tokens. Without it the loss vanishes once every answer at the
    trained length is right, and with it the gradient on how exactly the state is tracked, which decides the answers at
    greater lengths.
    """

    task: str = "s3"
    arm: str = "qies"
    seed: int = 0
    layers: int = 1
    hidden_size: int = 64
    heads: int = 4
    length: int = 64
    longer: tuple[int, ...] = (1, 2, 4, 8, 16)
    steps: int = 2000
    batch_size: int = 64
    lr: float = 3e-3
    label_smoothing: float = 0.1
    model: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.length < 4 or not self.longer or min(self.longer) < 1:
            raise UserError("length must be at least 4 and longer a list of multiples of at least 1.")
        if self.hidden_size % (2 * self.heads):
            raise UserError(f"hidden_size {self.hidden_size} must be a multiple of twice the {self.heads} heads.")
        if not 0 < self.lr < math.inf:
            raise UserError(f"lr is {self.lr}; it must be positive.")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing is {self.label_smoothing}; it must lie in [0, 1).")
        self.values()
        for length in {self.length, self.length * max(self.longer)}:
            task(self.task).sample(np.random.default_rng(0), 1, length)  # a length that does not fit is said now

    def values(self) -> dict[str, Any]:
        """The keyword arguments of `QiesConfig`."""
        name, options = arm_options(self.arm)
        arm, layers = presets.find_arm(name), options.pop("layers", self.layers)
        if not isinstance(layers, int) or layers < 1:
            raise UserError(f"Option 'layers' of arm '{name}' is {layers!r}; it must be a whole number of at least 1.")
        kinds, changes = [arm.pattern[0]] * layers, self.model | options
        for key in changes:
            if key not in presets.MODEL_FIELDS:
                presets.settings(name, "100k", 4096, **{key: None})  # raises, with the nearest name
        values = {
            **presets.model_fields(kinds), **arm.settings, "num_hidden_layers": layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.heads, "head_dim": self.hidden_size // self.heads,
            "intermediate_size": 2 * self.hidden_size, "conv_size": 0, "attention_conv_size": 0, "logit_softcap": 0.0,
            "layer_types": kinds, "vocab_size": task(self.task).vocab_size, **changes,
        }  # fmt: skip
        if problem := presets.inconsistent(values):
            raise UserError(problem)
        return values


def arm_options(text: str) -> tuple[str, dict[str, Any]]:
    """`no_phase:eigenvalues=unit:register_heads=0` -> ("no_phase", {"eigenvalues": "unit", "register_heads": 0})."""
    name, *options = text.split(":")
    values = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not key or not equals:
            raise UserError(f"Option '{option}' of arm '{name}' must be written KEY=VALUE, such as layers=2.")
        values[key] = strict_yaml.loads(value)
    return name, values


def train_probe(config: ProbeConfig, progress: Callable[[int, float], None] | None = None) -> dict[str, Any]:
    """Train and score one probe in float32 on this process; the result as plain data.

    accuracy: {length: share of the scored positions that are right}; `last`: the same at the last scored position of
    each row alone; `validation`: the mean accuracy over the lengths on other rows, by which a learning rate is chosen.
    AdamW, warm-up over 5 % of the steps, cosine decay to zero, gradients clipped to norm 1.
    """
    from qies.model import QiesConfig, QiesForCausalLM

    chosen, values = task(config.task), config.values()
    torch.manual_seed(config.seed)
    model = QiesForCausalLM(QiesConfig(**values)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, round(WARMUP * config.steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, config.steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    rng, lengths = np.random.default_rng([config.seed, 0]), training_lengths(config, chosen)
    start = time.monotonic()
    for step, length in enumerate(lengths):
        ids, targets = chosen.sample(rng, config.batch_size, length)
        logits = model(torch.from_numpy(ids), use_cache=False).logits
        loss = F.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(targets).flatten(), label_smoothing=config.label_smoothing
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if progress is not None:
            progress(step, loss.item())
    seconds = time.monotonic() - start
    spans = [config.length * multiple for multiple in config.longer]
    scores = {length: accuracy(model, chosen, length, [config.seed, 1, length]) for length in spans}
    validation = [accuracy(model, chosen, length, [config.seed, 2, length], SCORED // 4)[0] for length in spans]
    return {
        "parameters": presets.count_parameters(values)["non_embedding"],
        "accuracy": {str(length): score[0] for length, score in scores.items()},
        "last": {str(length): score[1] for length, score in scores.items()},
        "validation": float(np.mean(validation)),
        "chance": chosen.chance,
        "seconds": seconds,
    }


def training_lengths(config: ProbeConfig, chosen: Task) -> list[int]:
    """The length of every step: doubling from 4 over the first half of the steps, then `config.length`.

    A length that the task cannot fill is replaced by the next one that it can.
    """
    doublings = max(1, math.ceil(math.log2(config.length / 4)))
    lengths = [min(config.length, 4 * 2**i) for i in range(doublings + 1)]
    fitting = [length for length in lengths if _fits(chosen, length)]
    stages = [next(other for other in fitting if other >= length) for length in lengths]
    return [stages[min(doublings, step * 2 * doublings // config.steps)] for step in range(config.steps)]


def _fits(chosen: Task, length: int) -> bool:
    try:
        chosen.sample(np.random.default_rng(0), 1, length)
    except UserError:
        return False
    return True


@torch.no_grad()
def accuracy(
    model: torch.nn.Module, chosen: Task, length: int, seed: Sequence[int], tokens: int = SCORED
) -> tuple[float, float]:
    """Share of right answers over about `tokens` tokens of rows that training did not see: all scored positions, and
    the last of each row."""
    rng = np.random.default_rng(seed)
    rows = max(16, tokens // length)
    model.eval()
    right: list[np.ndarray] = []
    last: list[np.ndarray] = []
    for _ in range(4):
        ids, targets = chosen.sample(rng, rows // 4, length)
        answers = model(torch.from_numpy(ids), use_cache=False).logits.argmax(-1).numpy()
        scored = targets != IGNORED
        hit = answers == targets
        right.append(hit[scored])
        end = length - 1 - scored[:, ::-1].argmax(1)
        last.append(hit[np.arange(len(hit)), end])
    return float(np.concatenate(right).mean()), float(np.concatenate(last).mean())

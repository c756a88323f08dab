"""A callback with which a Hugging Face trainer anneals the objective's terms and logs them."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class ObjectiveCallback(TrainerCallback):
    """Calls `model.set_progress` before each step, and adds the terms of the last forward pass to the logs, as
    `objective/NAME`, unweighted, while they are computed."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].set_progress(min(1.0, state.global_step / max(1, state.max_steps)))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        terms, logs = kwargs["model"].objective, kwargs["logs"]
        if terms is not None and terms.factor > 0:
            logs |= {f"objective/{name}": value.item() for name, value in terms.values.items()}

"""Sampled continuations of the study's prompts by each arm's largest model."""

from __future__ import annotations

from typing import Any

from qies.analyses.finished import Finished
from qies.analyses.parts import Passage, Section
from qies.analyses.records import Study


def inputs(study: Finished) -> dict[str, Any]:
    """The runs and the prompts."""
    return {"runs": study.hashes, "prompts": list(study.config.prompts)}


def compute(study: Finished) -> dict[str, Any]:
    """Sample up to 48 tokens after each prompt from each arm's largest model."""
    from qies.decoding import continue_text, load_model, room

    arms: dict[str, Any] = {}
    for arm in study.config.arms:
        record = study.largest(arm)
        if record is not None:
            model, tokenizer = load_model(study.run_folder(record))
            texts = []
            for prompt in study.config.prompts:
                left = room(model, tokenizer, prompt)
                if left is not None and left < 1:
                    texts.append(f"(the prompt takes all {model.config.max_position_embeddings} learned positions)")
                    continue
                length = 48 if left is None else min(48, left)
                texts += continue_text(model, tokenizer, [prompt], max_new_tokens=length, decoding="sample")
            arms[arm] = {"size": record.size, "continuations": texts}
    return {"schema": 1, "prompts": list(study.config.prompts), "arms": arms}


def section(result: dict[str, Any], study: Study) -> Section | None:
    """Each prompt with the continuations side by side."""
    if not result:
        return None
    passages = [
        Passage(str(prompt), [(f"{arm} {s['size']}", str(s["continuations"][i])) for arm, s in result["arms"].items()])
        for i, prompt in enumerate(result["prompts"])
    ]
    return Section("Samples", ["Continuations by the largest model of each arm."], list(passages))

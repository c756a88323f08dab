"""Text from a trained model: decodings, saved states, streaming."""

from qies.decoding.contrast import entangled, has_states
from qies.decoding.snapshots import Snapshot, load_state, read_prompt, save_state
from qies.decoding.speculative import DRAFTS, Acceptance, drafts, speculative
from qies.decoding.text import (
    DECODINGS,
    Continuation,
    Decoding,
    continue_prompts,
    continue_text,
    encode,
    load_model,
    room,
)

__all__ = [
    "DECODINGS",
    "DRAFTS",
    "Acceptance",
    "Continuation",
    "Decoding",
    "Snapshot",
    "continue_prompts",
    "continue_text",
    "drafts",
    "encode",
    "entangled",
    "has_states",
    "load_model",
    "load_state",
    "read_prompt",
    "room",
    "save_state",
    "speculative",
]

"""The entangled states of a model, and their spectra and entropies across the cut key | value."""

from qies.entanglement.states import capture, entropies
from qies.ops.measures import (
    entropy_ceiling,
    page_entropy,
    participation_ratio,
    renyi2_entropy,
    schmidt_spectrum,
    von_neumann_entropy,
)

__all__ = [
    "capture",
    "entropies",
    "entropy_ceiling",
    "page_entropy",
    "participation_ratio",
    "renyi2_entropy",
    "schmidt_spectrum",
    "von_neumann_entropy",
]

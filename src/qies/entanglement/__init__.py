"""What the entangled state holds: spectra and entropies of Psi across the cut key | value."""

from qies.entanglement.measures import (
    entropy_ceiling,
    page_entropy,
    participation_ratio,
    renyi2_entropy,
    schmidt_spectrum,
    von_neumann_entropy,
)

__all__ = [
    "entropy_ceiling",
    "page_entropy",
    "participation_ratio",
    "renyi2_entropy",
    "schmidt_spectrum",
    "von_neumann_entropy",
]

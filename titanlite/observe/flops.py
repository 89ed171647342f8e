"""How much a card could do, and how much of that a run uses (MFU). No torch; the card is known by its name.

Peaks are the makers' figures for dense bf16 matrix products with float32 accumulation: data sheets that quote
structured sparsity are halved. A card that is not listed has no MFU rather than a guessed one.
"""

from __future__ import annotations

import re

_PEAKS: tuple[tuple[str, float], ...] = (
    (r"GB200", 2500e12),
    (r"B[23]00", 2250e12),
    (r"GH200", 989e12),
    (r"H[12]00 NVL", 835e12),
    (r"H[18]00 PCIe", 756e12),
    (r"H200|H[18]00", 989e12),
    (r"H20", 148e12),
    (r"A[18]00", 312e12),
    (r"A30", 165e12),
    (r"L40S", 362e12),
    (r"L40", 181e12),
    (r"L4", 121e12),
    (r"RTX 5090", 209.5e12),
    (r"RTX 4090", 165.2e12),
    (r"RTX 3090", 71.2e12),
    (r"MI3(?:00|25)X", 1307e12),
)
"""Pattern in the driver's name of the card → FLOP/s; the first that matches a whole word holds."""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of one card by the name its driver gives ('NVIDIA H100 80GB HBM3'); None if not known.

    A slice of a card (MIG) is not the card, and laptop chips share names with larger ones: None for both.
    """
    if re.search(r"\bMIG\b|\bLaptop\b|\bMax-Q\b", device_name):
        return None
    return next((peak for name, peak in _PEAKS if re.search(rf"\b(?:{name})\b", device_name)), None)


def mfu(tokens_per_second_per_device: float, flops_per_token: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation from 0 to 1 (PaLM, appendix B): the model's own FLOP/s over the card's peak.

    `flops_per_token` counts the mathematics of a training step, so recomputed activations do not raise it.
    """
    return None if peak is None else tokens_per_second_per_device * flops_per_token / peak

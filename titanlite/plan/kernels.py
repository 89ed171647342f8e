"""Which operations run as fused Triton kernels, and why; from the recipe and the kind of device alone."""

from __future__ import annotations

from typing import NamedTuple

from titanlite.errors import UsageError
from titanlite.recipe.sections import Recipe

OPERATIONS = ("rms_norm", "rope", "swiglu")
"""Every model's."""
QUANTISE = "float8_quantise"
"""With `precision.float8` alone."""


class Choice(NamedTuple):
    """How one operation runs."""

    fused: bool
    why: str


def choices(recipe: Recipe, device: str = "cuda") -> dict[str, Choice]:
    """By operation, how it runs on a `device` of that type."""
    names = (*OPERATIONS, QUANTISE) if recipe.precision.float8.enabled else OPERATIONS
    return {name: _choice(recipe, name, device) for name in names}


def fused(recipe: Recipe, device: str) -> list[str]:
    """The operations that run as Triton kernels. Raises `UsageError` if one was asked for that cannot."""
    for key in ("backend", *OPERATIONS, QUANTISE):
        if device != "cuda" and getattr(recipe.kernels, key) == "triton":
            raise UsageError(
                f"kernels.{key} = 'triton': Triton needs a GPU, and this run is on {device}. Leave it at 'auto'."
            )
    return [name for name, choice in choices(recipe, device).items() if choice.fused]


def _choice(recipe: Recipe, name: str, device: str) -> Choice:
    asked = getattr(recipe.kernels, name) or recipe.kernels.backend
    if asked == "torch":
        return Choice(False, "asked for")
    if device != "cuda":
        return Choice(False, f"Triton does not run on a {device.upper()}")
    if recipe.precision.compute == "float64":
        return Choice(False, "the kernels compute in float32")
    if asked == "triton":
        return Choice(True, "asked for")
    if recipe.compile.enabled:
        return Choice(False, "the compiler fuses it with its neighbours")
    return Choice(True, "without the compiler nothing else fuses it")


def describe_kernels(recipe: Recipe) -> str:
    """One line on what runs on a GPU; on a CPU all operations are PyTorch's own."""
    found = choices(recipe)
    parts = []
    for way, runs in (("Triton", True), ("torch", False)):
        reasons: dict[str, list[str]] = {}
        for name, choice in found.items():
            if choice.fused is runs:
                reasons.setdefault(choice.why, []).append(name)
        parts += [f"{', '.join(names)} by {way} ({why})" for why, names in reasons.items()]
    if any(choice.fused for choice in found.values()):
        parts[0] = f"on a GPU {parts[0]}"
    return "; ".join([*parts, _HEAD[recipe.kernels.linear_cross_entropy]])


_HEAD = {
    "auto": "head and loss by chunks of large logits",
    "torch": "head and loss by chunks, without Triton",
    "off": "head and loss with all logits at once",
}
"""What `kernels.linear_cross_entropy` means."""

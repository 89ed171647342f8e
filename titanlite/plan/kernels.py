"""Which operations run by fused kernels, and why; from the recipe and the kind of device alone."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from titanlite.errors import UsageError
from titanlite.models.spec import spec_of
from titanlite.recipe.sections import Recipe
from titanlite.registry import Registry

OPERATIONS = ("rms_norm", "rope", "swiglu")  # every model's
QUANTISE = "float8_quantise"  # with `precision.float8` alone

# By operation, what `models.fused.use_kernels` can give layers for it, by the name that `[kernels]` has for it.
KERNELS = {
    name: Registry(f"kernel of {name}", {"triton": f"titanlite.models.fused:{name.upper()}"}) for name in OPERATIONS
}


class Choice(NamedTuple):
    kernel: str  # `torch` for PyTorch's own operations, `triton`, or a plugin's name
    why: str


def choices(recipe: Recipe, device: str = "cuda") -> dict[str, Choice]:
    """By operation, how it runs on a `device` of that type."""
    names = (*OPERATIONS, QUANTISE) if recipe.precision.float8.enabled else OPERATIONS
    return {name: _choice(recipe, name, device) for name in names}


def choose_kernels(recipe: Recipe, device: str) -> dict[str, str]:
    """Operations that run by fused kernels -> their names. Raises `UsageError` if one was asked for that cannot."""
    for key in ("backend", *OPERATIONS, QUANTISE):
        if device != "cuda" and getattr(recipe.kernels, key) == "triton":
            raise UsageError(
                f"kernels.{key} = 'triton': Triton needs a GPU, and this run is on {device}. Leave it at 'auto'."
            )
    return {name: choice.kernel for name, choice in choices(recipe, device).items() if choice.kernel != "torch"}


def _choice(recipe: Recipe, name: str, device: str) -> Choice:
    asked = getattr(recipe.kernels, name) or recipe.kernels.backend
    if asked not in ("auto", "triton"):
        return Choice(asked, "asked for")
    if device != "cuda":
        return Choice("torch", f"Triton does not run on a {device.upper()}")
    if recipe.precision.compute == "float64":
        return Choice("torch", "the kernels compute in float32")
    if asked == "triton":
        return Choice("triton", "asked for")
    if recipe.compile.enabled:
        return Choice("torch", "the compiler fuses it with its neighbours")
    return Choice("triton", "without the compiler nothing else fuses it")


def attends_by_lengths(recipe: Recipe) -> bool:
    """Whether attention needs the lengths of what it stays within: documents, windows, or parts of a sequence (cp)."""
    config = spec_of(recipe.model.preset).configure(recipe.model)
    narrow = any(0 < window < recipe.training.sequence_length for window in config.windows)
    return recipe.data.document_mask or narrow or recipe.parallel.cp > 1


def describe_attention(recipe: Recipe) -> str:
    """What each token attends to."""
    config = spec_of(recipe.model.preset).configure(recipe.model)
    windows = Counter(window for window in config.windows if 0 < window < recipe.training.sequence_length)
    found = [f"window of {window:,} tokens in {n} of {config.layers} layers" for window, n in sorted(windows.items())]
    return ", ".join([f"causal within {'documents' if recipe.data.document_mask else 'sequences'}", *found])


def describe_kernels(recipe: Recipe) -> str:
    """One line on what runs on a GPU; on a CPU all operations are PyTorch's own."""
    alike: dict[Choice, list[str]] = {}
    for name, choice in choices(recipe).items():
        alike.setdefault(choice, []).append(name)
    kinds = sorted(alike, key=lambda choice: (choice.kernel == "torch", choice.kernel))
    parts = [f"{', '.join(alike[k])} by {k.kernel.replace('triton', 'Triton')} ({k.why})" for k in kinds]
    head = {"auto": "by chunks of large logits", "torch": "by chunks, without Triton", "off": "with all logits at once"}
    flash = attends_by_lengths(recipe) or recipe.kernels.attention == "flash"
    attention = "FlashAttention" if flash else "cuDNN or FlashAttention"
    loss = head[recipe.kernels.linear_cross_entropy]
    return f"on a GPU {'; '.join(parts)}; attention by {attention}; head and loss {loss}"

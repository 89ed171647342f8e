"""Triton where it is installed; without it, kernels are still defined, so that references and fakes import everywhere.

Operations take `tl`, `jit`, `wrap_triton` and `serves` from here and import nothing of Triton themselves.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton warns where it is not set

try:
    import triton
    import triton.language as tl
except ImportError:  # not on this platform, or a CPU build of torch: the references serve
    triton = tl = None

__all__ = ["INSTALLED", "INTERPRETING", "blank", "cdiv", "jit", "multiprocessors", "power_of_two", "serves", "tl"]
__all__ += ["triton", "wrap_triton"]

INSTALLED = triton is not None
INTERPRETING = INSTALLED and bool(triton.knobs.runtime.interpret)
"""Whether kernels run as Python on CPU tensors (TRITON_INTERPRET=1): right, and very slow."""


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`; without Triton, the function as it stands, which is never launched."""
    return triton.jit(function) if INSTALLED else function


def wrap_triton(kernel: Any) -> Any:
    """`torch.library.wrap_triton`, which lets the compiler see a launch; interpreted kernels are launched directly."""
    return kernel if INTERPRETING else torch.library.wrap_triton(kernel)


def serves(x: Tensor) -> bool:
    """Whether Triton kernels run on x: on a CUDA device (or in the interpreter), in a width that they compute in.

    Below float32 they compute in float32. Float64 is for proofs: there the reference is the answer.
    """
    return INSTALLED and (x.is_cuda or (INTERPRETING and x.device.type == "cpu")) and x.dtype != torch.float64


@cache
def multiprocessors(device: torch.device) -> int:
    """How many the device has; those of an H100 where there is none to ask (tracing for one that is elsewhere)."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n: blocks have such lengths."""
    return 1 << max(n - 1, 0).bit_length()


def blank(x: Tensor) -> Tensor:
    """Memory of x's shape and dtype."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)

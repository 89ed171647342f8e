"""SwiGLU's middle, silu(gate) * up (Shazeer 2020), forward and a backward that keeps nothing but its inputs.

Shapes: gate, up and the result alike, any number of dimensions; bfloat16 or float16, computed in float32, or float32,
computed in float64: results are rounded once.
Bytes, for n elements of b bytes: forward 3nb (two read, one written), backward 5nb (three read, two written).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titanlite_kernels.build import Build
from titanlite_kernels.optional_triton import blank, cdiv, jit, serves, tl, wrap_triton

BLOCK = 2048
WARPS = 4


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, like gate: by Triton where that serves, else the reference. Raises ValueError if not alike."""
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must be alike")
    return swiglu_op(gate, up) if serves(gate) else swiglu_reference(gate, up)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The same in PyTorch, which below float32 rounds silu(gate) before it multiplies."""
    return F.silu(gate) * up


@jit
def _forward(gate, up, out, elements, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK  # 64 bits: 131,072 tokens of 28,672 are past 2^31
    at = tl.arange(0, BLOCK)
    inside = start + at < elements
    wide: tl.constexpr = tl.float64 if gate.dtype.element_ty == tl.float32 else tl.float32
    g = tl.load(gate + start + at, mask=inside).to(wide)
    u = tl.load(up + start + at, mask=inside).to(wide)
    tl.store(out + start + at, g * tl.sigmoid(g) * u, mask=inside)


@jit
def _backward(grad, gate, up, grad_gate, grad_up, elements, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    inside = start + at < elements
    wide: tl.constexpr = tl.float64 if gate.dtype.element_ty == tl.float32 else tl.float32
    d = tl.load(grad + start + at, mask=inside).to(wide)
    g = tl.load(gate + start + at, mask=inside).to(wide)
    u = tl.load(up + start + at, mask=inside).to(wide)
    sigmoid = tl.sigmoid(g)
    tl.store(grad_up + start + at, d * g * sigmoid, mask=inside)
    tl.store(grad_gate + start + at, d * u * sigmoid * (1 + g * (1 - sigmoid)), mask=inside)


def _launch_forward(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if n := gate.numel():
        wrap_triton(_forward)[(cdiv(n, BLOCK),)](gate, up, out, n, BLOCK=BLOCK, num_warps=WARPS)
    return out


def _launch_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    if n := gate.numel():
        wrap_triton(_backward)[(cdiv(n, BLOCK),)](grad, gate, up, grad_gate, grad_up, n, BLOCK=BLOCK, num_warps=WARPS)
    return grad_gate, grad_up


swiglu_op: Any = torch.library.triton_op("titanlite_kernels::swiglu", _launch_forward, mutates_args=())
swiglu_backward_op: Any = torch.library.triton_op(
    "titanlite_kernels::swiglu_backward", _launch_backward, mutates_args=()
)


@swiglu_op.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return blank(gate)


@swiglu_backward_op.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return blank(gate), blank(up)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_backward_op(grad, *ctx.saved_tensors)


swiglu_op.register_autograd(_differentiate, setup_context=_save)


def _build(name: str, operation: Callable[..., object], taken: int, moved: int) -> Build:
    """For an operation that takes `taken` tensors, and reads and writes `moved` in all."""
    tokens, width = 8192, 14336
    return Build(
        name=f"swiglu.{name}",
        launch=lambda dtype: operation(*[torch.empty(tokens, width, dtype=dtype, device="meta")] * taken),
        shape=f"Llama 3 8B: {tokens:,} x {width:,}, bfloat16",
        minimal_bytes=moved * 2 * tokens * width,
    )


BUILDS = _build("forward", _launch_forward, 2, 3), _build("backward", _launch_backward, 3, 5)

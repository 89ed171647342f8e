"""Linear layers whose products are formed in float8, on `torch._scaled_mm`, with scales found anew at each use.

What is multiplied is rounded, and nothing else; there is no state to save. Scales are powers of two, so that numbers do
not depend on how a batch or a weight is cut over ranks (docs/float8.md), and no rank needs to ask others for theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from titanlite_kernels.float8_reference import Float8, quantise_both_reference, quantise_reference
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from titanlite.errors import UsageError
from titanlite.models.layers import device_kind
from titanlite.plan.float8 import BLOCK, Cast, Float8Settings, LinearDecision, Product

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_MANTISSA_BITS = 23  # of a float32, below its exponent


class FusedCast(Cast):
    """One by Triton where it can be."""


def fuse_casts(part: Any) -> Any:
    """The same settings, product or cast, with fused casts."""
    if isinstance(part, Cast):
        return FusedCast(part.format, part.scale)
    if isinstance(part, Product | Float8Settings):
        return replace(part, **{key: fuse_casts(each) for key, each in vars(part).items()})
    return part


def quantise(matrix: Tensor, cast: Cast) -> Float8:
    """`matrix` [rows, columns] in float8, contiguous whatever its strides."""
    operation = _kernels().quantise if isinstance(cast, FusedCast) else quantise_reference
    if cast.scale == "block":
        values, scale = operation(matrix.reshape(-1, BLOCK), FORMATS[cast.format], "row")
        return Float8(values.view(matrix.shape), scale.view(matrix.shape[0], -1))
    return operation(matrix, FORMATS[cast.format], cast.scale)


def quantise_both(matrix: Tensor, plain: Cast, turned: Cast) -> tuple[Float8, Float8]:
    """`matrix` [rows, columns] cast by `plain`, and its transpose cast by `turned`."""
    if plain != turned or plain.scale == "block":
        return quantise(matrix, plain), quantise(matrix.t(), turned)
    operation = _kernels().quantise_both if isinstance(plain, FusedCast) else quantise_both_reference
    return operation(matrix, FORMATS[plain.format], plain.scale)


def _kernels() -> Any:
    from titanlite_kernels import float8_quantise  # with Triton: a second that a run without kernels need not pay

    return float8_quantise


def product(
    left: Float8, right: Float8, dtype: torch.dtype, fast_accumulation: bool, native_blocks: bool = False
) -> Tensor:
    """left [m, k] times right [n, k] transposed -> [m, n] in `dtype`; in float64 exact but for the last bits.

    Products of blocks are formed in `dtype`, which has every value of e4m3 times a power of two, or with
    `native_blocks` by the device, if it is one that `multiplies_blocks`.
    """
    in_blocks = left.scale.dim() == 2 and left.scale.shape[1] > 1
    by_rows, kind = not in_blocks and (left.scale.dim() > 0 or right.scale.dim() > 0), device_kind(left.values)
    # The CPU's `_scaled_mm` learnt scales of rows after torch 2.11.
    widens = not native_blocks if in_blocks else by_rows and kind == "cpu"
    if dtype == torch.float64 or widens:
        return left.widened(dtype) @ right.widened(dtype).t()
    if in_blocks:
        # Torch's function for public use, `scaled_mm`, takes the same; inductor of torch 2.13 does not, in tiles.
        scales = in_tiles(left.scale), in_tiles(right.scale)
    elif by_rows:
        # Where one factor has scales of rows, the other must have them too.
        by_left, by_right = (factor.scale.expand(len(factor.values), 1).contiguous() for factor in (left, right))
        scales = by_left, by_right.t()
    else:
        scales = left.scale, right.scale
    result = torch._scaled_mm(
        left.values,
        right.values.t(),
        *scales,
        # CUDA's kernels for scales of rows know no wider result.
        out_dtype=torch.bfloat16 if by_rows and kind == "cuda" else dtype,
        use_fast_accum=fast_accumulation,
    )
    return result.to(dtype)


def in_tiles(scale: Tensor) -> Tensor:
    """Scales [rows, blocks], powers of two -> e8m0 in the order that cuBLAS reads them in, filled up to whole tiles.

    A tile is of 128 rows by 4 blocks: rows 0, 32, 64 and 96 with 4 bytes each, then rows 1, 33, 65 and 97, and so on.
    Tiles follow each other by rows (cuBLAS documentation, "1D Block Scaling Factors Layout").
    """
    rows, blocks = scale.shape
    # The exponent's bits are e8m0's; NaN's, too.
    exponents = (scale.view(torch.int32) >> _MANTISSA_BITS).to(torch.uint8)
    tiles = F.pad(exponents, (0, -blocks % 4, 0, -rows % 128)).view(-(-rows // 128), 4, 32, -(-blocks // 4), 4)
    return tiles.permute(0, 3, 2, 1, 4).flatten().view(torch.float8_e8m0fnu)


class _Float8Linear(torch.autograd.Function):
    """x [tokens, inputs], weight [outputs, inputs] -> [tokens, outputs] in x's dtype; so are both gradients formed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, settings: Float8Settings, native: bool, *kept: Tensor) -> Tensor:
        """`kept`: the weight in float8 as both products with it take it, values and scale of each; or nothing."""
        ctx.settings, ctx.native, ctx.weight_dtype = settings, native, weight.dtype
        how = settings.output
        ready = Float8(*kept[:2]) if kept else quantise(weight.to(x.dtype), how.right)
        # Not the weight in float8: where weights are gathered anew for backward, it would stay whole.
        ctx.save_for_backward(x, *(kept[2:] if kept else (weight,)))
        return product(quantise(x, how.left), ready, x.dtype, how.fast_accumulation, native)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        settings, (for_input, for_weight, *_) = ctx.settings, ctx.needs_input_grad
        tokens, how, also, native = x.shape[0], settings.grad_input, settings.grad_weight, ctx.native
        if also is not None and tokens % settings.alignment:  # the sum over tokens
            grad, x = (F.pad(matrix, (0, 0, 0, -tokens % settings.alignment)) for matrix in (grad, x))
        if also is None:
            plain = quantise(grad, how.left)
        else:
            plain, turned = quantise_both(grad, how.left, also.left)
        grad_input = grad_weight = None
        if for_input:
            right = Float8(*saved) if len(saved) == 2 else quantise(saved[0].to(x.dtype).t(), how.right)
            grad_input = product(plain, right, x.dtype, how.fast_accumulation, native)[:tokens]
        if for_weight and also is None:
            grad_weight = (grad.t() @ x).to(ctx.weight_dtype)
        elif for_weight:
            right = quantise(x.t(), also.right)
            grad_weight = product(turned, right, x.dtype, also.fast_accumulation, native).to(ctx.weight_dtype)
        return grad_input, grad_weight, *[None] * (len(ctx.needs_input_grad) - 2)


class Float8Linear(nn.Module):
    """Takes the place of a linear's `multiply`; its weight stays where it is."""

    def __init__(self, settings: Float8Settings, weight: Tensor | None = None, native_blocks: bool = False) -> None:
        """With a `weight`, buffers keep it in float8 (twice, for the two products that it is a factor of).
        `native_blocks`: see `multiplies_blocks`.
        """
        super().__init__()
        self.settings, self.native_blocks = settings, native_blocks
        for index, tensor in enumerate(() if weight is None else self._cast(weight.detach())):
            self.register_buffer(f"cast{index}", tensor, persistent=False)

    def _cast(self, weight: Tensor) -> tuple[Tensor, ...]:
        plain, turned = quantise_both(weight, self.settings.output.right, self.settings.grad_input.right)
        return *plain, *turned

    def refresh(self, weight: Tensor) -> None:
        """Cast `weight` [outputs, inputs] anew, into the same memory: a compiled product reads it there."""
        for buffer, tensor in zip(self.buffers(), self._cast(weight), strict=True):
            buffer.copy_(tensor)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., inputs], weight [outputs, inputs] -> [..., outputs]."""
        rows, how = x.flatten(0, -2), (self.settings, self.native_blocks)
        result: Tensor = _Float8Linear.apply(rows, weight, *how, *self.buffers())  # type: ignore[no-untyped-call]
        return result.view(*x.shape[:-1], result.shape[-1])


@torch.no_grad()
def refresh_casts(modules: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Cast the weights of converted linears anew, whenever they have changed; rounded first to the `dtype` of
    activations, in which weights travel elsewhere.
    """
    for module in modules:
        assert isinstance(module.multiply, Float8Linear)
        weight: Any = module.weight
        held = weight.to_local() if hasattr(weight, "to_local") else weight
        module.multiply.refresh(held.to(dtype))


def convert(
    model: nn.Module, found: Sequence[LinearDecision], settings: Float8Settings, cache: bool, native: bool = False
) -> list[nn.Module]:
    """Convert those of the linears in `found` that are in `model`, in place; `native`: see `multiplies_blocks`.

    With `cache`, for weights that rest whole where the model runs, a weight is cast once a step, instead of in every
    microbatch, twice: the returned ones need `refresh_casts` before each.
    """
    names = {each.name for each in found if each.skipped is None}
    modules = [module for name, module in model.named_modules() if name in names]
    for module in modules:
        weight = module.get_parameter("weight") if cache else None
        module.multiply = Float8Linear(settings, weight, native)
    return modules if cache else []


def multiplies_blocks(device: torch.device) -> bool:
    """Whether products of blocks are formed by `device` from float8, and not emulated in the compute dtype."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0)


def require_float8(device: torch.device) -> None:
    """Raises `UsageError` if `device` cannot multiply float8."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UsageError(
            "precision.float8: GPUs multiply float8 from compute capability 8.9 on (Ada, Hopper, Blackwell), and this "
            f"is {torch.cuda.get_device_name(device)}. Write precision.float8.enabled = false."
        )

"""Float8 products on a GPU give what they give on a CPU: the same casts, and sums in another order."""

from __future__ import annotations

import pytest
import torch

from titanlite.plan.float8 import SETTINGS, Cast
from titanlite.precision.float8 import Float8Linear, fuse_casts, multiplies_blocks, quantise_both

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="this GPU has no float8"
    ),
]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("cast", [Cast("e4m3", "tensor"), Cast("e4m3", "row"), Cast("e5m2", "tensor")], ids=str)
def test_casts_are_the_cpus(cast: Cast, fused: bool) -> None:
    x = torch.randn(256, 512).bfloat16() * torch.logspace(-6, 2, 256).bfloat16()[:, None]
    own = fuse_casts(cast) if fused else cast
    for here, there in zip(quantise_both(x, cast, cast), quantise_both(x.cuda(), own, own), strict=True):
        assert all(torch.equal(a.float(), b.cpu().float()) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("recipe", SETTINGS)
def test_products_are_the_cpus(recipe: str, dtype: torch.dtype, compiled: bool) -> None:
    """40 tokens are no multiple of 16. Fast sums have some 14 bits, the result of scaled rows 8."""
    x, weight, grad = torch.randn(40, 256).to(dtype), torch.randn(128, 256).to(dtype), torch.randn(40, 128).to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        inputs = x.to(device).requires_grad_(), weight.to(device).requires_grad_()
        how = SETTINGS[recipe]
        linear = Float8Linear(fuse_casts(how) if device == "cuda" and not compiled else how)
        multiply = torch.compile(linear, fullgraph=True) if compiled and device == "cuda" else linear
        out = multiply(*inputs)
        out.backward(grad.to(device))
        results.append([tensor.detach().float().cpu() for tensor in (out, inputs[0].grad, inputs[1].grad)])
    for here, there in zip(*results, strict=True):
        assert (here - there).norm() < 4e-3 * here.norm()


@pytest.mark.skipif(
    not (torch.cuda.is_available() and multiplies_blocks(torch.device("cuda"))), reason="this GPU emulates blocks"
)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_native_products_of_blocks_are_the_emulated_ones(dtype: torch.dtype, compiled: bool) -> None:
    """Blocks of very different size, over several tiles of scales that are not full; 200 tokens are no multiple of 32.

    Both multiply the same float8 values: what differs is the order of sums.
    """
    sizes = torch.logspace(-4, 4, 11).repeat_interleave(32)
    x, weight, grad = torch.randn(200, 352) * sizes, torch.randn(288, 352) / sizes, torch.randn(200, 288)
    results = []
    for native in (False, True):
        inputs = x.to("cuda", dtype).requires_grad_(), weight.to("cuda", dtype).requires_grad_()
        linear = Float8Linear(SETTINGS["mxfp8"], native_blocks=native)
        multiply = torch.compile(linear, fullgraph=True) if compiled and native else linear
        out = multiply(*inputs)
        out.backward(grad.to("cuda", dtype))
        results.append([tensor.detach().float() for tensor in (out, inputs[0].grad, inputs[1].grad)])
    for emulated, native_result in zip(*results, strict=True):
        assert (native_result - emulated).norm() < 4e-3 * emulated.norm()

"""RMSNorm, rotary embedding, SwiGLU and casts to float8: what they compile to, and what compilers see of them.

Their exactness is for `run_norms.py` and `run_float8_quantise.py`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from titanlite_kernels import float8_quantise, rms_norm, rope, swiglu
from titanlite_kernels.build import Build, compile_build
from titanlite_kernels.inspect import row
from titanlite_kernels.optional_triton import INSTALLED
from torch.utils.checkpoint import checkpoint

needs_triton = pytest.mark.skipif(not INSTALLED, reason="needs Triton: pip install 'triton>=3.6' (Linux)")

BUILDS = (*rms_norm.BUILDS, *rope.BUILDS, *swiglu.BUILDS, *float8_quantise.BUILDS)


def test_the_kernels(run_on_device: Callable[[str], None]) -> None:
    run_on_device("run_norms.py", "run_float8_quantise.py")


def builds() -> Iterator[object]:
    for build in BUILDS:
        for target in build.targets:
            quick = target == "sm_90" and build.shape.startswith("Llama 3 8B:") and "backward" in build.name
            quick |= target == "sm_90" and build.name.endswith("cast_rows_both") and "activations" in build.shape
            name = f"{build.name}-{target}-{build.shape.split(':')[0]}"
            yield pytest.param(build, target, marks=() if quick else pytest.mark.slow, id=name)


@needs_triton
@pytest.mark.parametrize(("build", "target"), list(builds()))
def test_built_without_spills_and_with_wide_loads(build: Build, target: str) -> None:
    built = row(build, target)
    assert built["spill_bytes"] == 0
    assert built["vector_bytes"] >= 16
    # Sums of the weight's gradient; lanes beyond the end of a row of 14,336, which are counted and move nothing.
    more = {"rms_norm.backward": 1.03, "add_rms_norm.backward": 1.03, "float8_quantise.by_rows": 1.15}
    assert 1 <= built["bytes_over_minimum"] <= more.get(build.name, 1.0)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("build", [*(b for b in rms_norm.BUILDS if "70B" not in b.shape), *rope.BUILDS, *swiglu.BUILDS])
def test_float32_is_built_without_spills_although_it_is_computed_in_float64(build: Build) -> None:
    assert compile_build(build, "sm_90", torch.float32).spill_bytes == 0


@needs_triton
def test_compilers_see_the_kernels_in_one_graph_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.backends.compiler import GPUTarget

    # Tracing asks for a device's kind only; nothing runs.
    device = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", device)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    @torch.compile(fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    def block(
        x: torch.Tensor, weight: torch.Tensor, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor
    ) -> torch.Tensor:
        y, h = rms_norm.add_rms_norm_op(x, x, weight, 1e-5)
        z = checkpoint(lambda h: rms_norm.rms_norm_op(h, weight, 1e-5), h, use_reentrant=False)
        turned, _ = rope.rope_op(q, k, cos, cos, False)
        scale = float8_quantise.float8_quantise_both_op(y.detach().flatten(0, 1), torch.float8_e5m2, False)[1]
        return swiglu.swiglu_op(y, z).sum() + turned.sum() + scale

    with FakeTensorMode():
        x, weight = torch.empty(2, 8, 64, requires_grad=True), torch.empty(64, requires_grad=True)
        q, k = torch.empty(2, 8, 4, 16, requires_grad=True), torch.empty(2, 8, 2, 16, requires_grad=True)
        block(x, weight, q, k, torch.empty(1, 8, 1, 16)).backward()
    kernels = [sum("triton_kernel_wrapper" in str(node.target) for node in graph.graph.nodes) for graph in graphs]
    forward, recomputed, backward = 4 + 2, 1, 4
    assert kernels == [forward, recomputed + backward]


@pytest.mark.slow
def test_without_triton_the_references_serve_and_nothing_compiles() -> None:
    script = """
import sys
sys.modules["triton"] = None
import torch
from titanlite_kernels.inspect import main
from titanlite_kernels.float8_quantise import quantise
from titanlite_kernels.rms_norm import add_rms_norm, rms_norm
from titanlite_kernels.rope import rope
from titanlite_kernels.swiglu import swiglu
x = torch.randn(2, 3, 4, 8, requires_grad=True)
y, h = add_rms_norm(x, x, x[0, 0, 0], 1e-5)
q, k = rope(y, rms_norm(h, x[0, 0, 0], 1e-5), x[:, :, :1].detach(), x[:, :, :1].detach())
swiglu(q, k).sum().backward()
assert x.grad.isfinite().all()
assert quantise(x[0, 0].detach(), torch.float8_e5m2, "row").scale.shape == (4, 1)
sys.exit(main([]))
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == 2 and "Triton is not installed" in process.stderr, process.stderr

"""Inductor's code for an H100, made on a machine without a GPU, and what it counts of its own kernels.

A build of torch for CPUs can't run autograd on CUDA tensors, not even on fake ones. So graphs are captured first, on
fake CPU tensors of full size (`capture`); then torch is made to find an H100 (`pretend_h100`, for the rest of the
process), and inductor compiles the same graphs for fake CUDA tensors (`generate`), up to where it would load the code.
"""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.utils._triton as triton_checks
from torch import Tensor, fx
from torch._dynamo.device_interface import CudaInterface
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.fx_passes.micro_pipeline_tp import micro_pipeline_tp_pass
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._symmetric_memory import _test_mode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_map

CUDA = torch.device("cuda", 0)
_H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    L2_cache_size=50 << 20, shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
)  # fmt: skip


@dataclass(frozen=True)
class Graph:
    """What inductor is given of a compiled function: one graph for its forward pass and one for its backward pass."""

    module: fx.GraphModule
    inputs: Sequence[Any]  # fake tensors, and sizes
    is_backward: bool


@dataclass(frozen=True)
class Kernels:
    """What inductor made of a graph. Collectives are in none of the numbers."""

    code: str
    launches: int  # of Triton kernels
    bytes: int  # read and written by all kernels, products and attention too
    kept: int  # bytes of the graph's results, without those that are its inputs


def capture(function: Callable[..., Any], inputs: Sequence[Any]) -> tuple[list[Graph], int]:
    """The graphs of `function` with its gradients, and how many times it was compiled again in later calls.

    To be called inside a `FakeTensorMode`. Raises `torch._dynamo.exc.Unsupported` where the graph would break.
    """
    graphs: list[Graph] = []

    def keep(module: fx.GraphModule, inputs: Sequence[Any], is_backward: bool = False, **_: Any) -> Any:
        graphs.append(Graph(module, list(inputs), is_backward))
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(
        function, backend=lambda *graph: compile_fx(*graph, inner_compile=keep), dynamic=False, fullgraph=True
    )
    for _ in range(2):
        result = compiled(*inputs)
        result.backward(torch.empty_like(result))
    return graphs, counters["stats"]["unique_graphs"] - 1


def pretend_h100() -> None:
    """Have torch and Triton answer for an H100 until the process ends. No tensor on it can be computed with."""
    import triton
    from triton.backends.compiler import GPUTarget

    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": _H100,
        "get_device_capability": (9, 0), "synchronize": None, "set_device": None, "is_bf16_supported": True,
        "get_compute_capability": 90, "get_raw_stream": 0, "exchange_device": 0, "maybe_exchange_device": 0,
        "is_triton_capable": True, "raise_if_triton_unavailable": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None, "_lazy_init": None,
        "_exchange_device": 0, "_maybe_exchange_device": 0,
    }  # fmt: skip
    for name, answer in answers.items():
        for owner in (torch.cuda, CudaInterface):
            if hasattr(owner, name):
                setattr(owner, name, staticmethod(lambda *_, answer=answer, **__: answer))
    for name in ("getDevice", "exchangeDevice", "maybeExchangeDevice"):
        setattr(torch._C, f"_cuda_{name}", lambda *_: 0)
    torch._C._cuda_getCurrentRawStream = lambda *_: 0
    torch.version.cuda = "13.0"
    driver = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_active_torch_device=lambda: CUDA,
        get_device_interface=lambda: torch.cuda,
        get_current_device=lambda: 0,
        get_current_stream=lambda *_: 0,
        is_active=lambda: True,
    )
    triton.runtime.driver.set_active(driver)
    for check in vars(triton_checks).values():  # answered, and remembered, before
        if hasattr(check, "cache_clear"):
            check.cache_clear()


class _CodeMade(BaseException):
    """Ends a compilation; not an `Exception`, which inductor would turn into another."""


def generate(graph: Graph) -> Kernels:
    """Inductor's code for `graph` on an H100; after `pretend_h100`."""
    module, inputs, fakes = _move_to_cuda(graph)
    made: list[Kernels] = []

    def stop(lowering: GraphLowering) -> None:
        code = lowering.codegen()[0].value
        sizes = [node.get_read_write_buffers_sizes() for node in lowering.scheduler.nodes if _moves_memory(node)]
        made.append(Kernels(code, len(re.findall(r"\.run\(", code)), sum(sizes), _kept_bytes(module)))
        raise _CodeMade

    with (
        tracing(TracingContext(fakes)),
        V.set_fake_mode(fakes),
        torch.no_grad(),
        inductor.patch({"compile_threads": 1, "force_disable_caches": True}),
        patch.object(GraphLowering, "compile_to_module", stop),
        suppress(_CodeMade),
    ):
        compile_fx_inner(module, inputs, is_backward=graph.is_backward)
    return made[0]


def _moves_memory(node: Any) -> bool:
    """Whether what a scheduler's node runs reads and writes memory of this GPU alone, unlike views and collectives."""
    operation = getattr(node.node, "op_overload", None)
    return not getattr(operation, "is_view", False) and getattr(operation, "namespace", "") != "_c10d_functional"


def _move_to_cuda(graph: Graph) -> tuple[fx.GraphModule, list[Any], FakeTensorMode]:
    """A copy of the graph, and its inputs, on the fake GPU."""
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    module = copy.copy(graph.module)
    module.graph = copy.deepcopy(graph.module.graph)

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return CUDA if isinstance(value, torch.device) else value
        with fakes:
            return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=CUDA)

    inputs = [move(value) for value in graph.inputs]
    for node in module.graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), move)
        # The strides that an operator was given where it insists on them, as products in float8 do.
        if "eager_input_vals" in node.meta:
            node.meta["eager_input_vals"] = tree_map(move, node.meta["eager_input_vals"])
        node.meta.pop("val", None)
        node.meta.pop("tensor_meta", None)
        if node.op == "get_attr" and isinstance(getattr(module, node.target), Tensor):
            setattr(module, node.target, move(getattr(module, node.target)))
    module.recompile()
    with torch.no_grad():
        FakeTensorProp(module, fakes).propagate_dont_convert_inputs(*inputs)
    return module, inputs, fakes


def _kept_bytes(module: fx.GraphModule) -> int:
    """Bytes of the memory that a graph's results are in and its inputs are not."""
    storages = {}
    nodes = list(module.graph.nodes)
    for node in nodes[-1].all_input_nodes:
        if isinstance(value := node.meta.get("val"), Tensor):
            storages[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    for node in nodes:
        if node.op == "placeholder" and isinstance(value := node.meta.get("val"), Tensor):
            storages.pop(value.untyped_storage()._cdata, None)
    return sum(storages.values())


def count_collectives(graph: Graph) -> tuple[int, int]:
    """Collectives in the graph, and how many of them torch's async tensor parallelism joins with products."""
    module, _, _ = _move_to_cuda(graph)
    view_to_reshape(module)  # as inductor does before the pass, which looks for reshapes
    before = _collectives(module.graph)
    with _test_mode(), patch.object(dist, "is_nccl_available", lambda: True):
        micro_pipeline_tp_pass(module.graph)
    return before, before - _collectives(module.graph)


def _collectives(graph: fx.Graph) -> int:
    operations = torch.ops._c10d_functional
    waits = (operations.wait_tensor.default,)
    found = [str(node.target) for node in graph.nodes if node.target not in waits]
    return sum(name.startswith("_c10d_functional.") for name in found)

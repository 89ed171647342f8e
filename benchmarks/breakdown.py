"""Where the time of a training step goes, by the names in a profiler's trace: kernels on a GPU, operators on a CPU.

Tables of patterns, and the sums. What no pattern knows is `other`, and the report names it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

OPTIMIZER = "titanlite: optimizer"
"""Annotation around the optimizer's step: whatever runs in it is the optimizer's, Muon's products too."""

CLASSES = ("gemm", "attention", "memory-bound", "optimizer", "communication", "other")

KERNELS = (
    # Inductor's fusions, before all else: what they fused is in their names.
    ("memory-bound", r"^triton_(poi|red|per|for|split_scan)_"),
    ("communication", r"nccl|nvshmem|symm_mem|multimem|(one|two)_shot_all_reduce"),
    ("attention", r"[Ff]lash|fmha|sdpa|attention|attn"),
    ("optimizer", r"multi_tensor_apply_kernel|[Ff]used_?[Aa]dam"),
    # cuBLAS (nvjet, xmma, splitK), CUTLASS, and Inductor's templates of products.
    ("gemm", r"nvjet|[Gg]emm|cutlass|cublas|xmma|splitK|gemv|scaled_mm|^triton_(tem|mm)_"),
    # Our own Triton kernels, whose names begin with an underscore; PyTorch's; copies.
    ("memory-bound", r"^_[a-z]\w*$|^Mem(cpy|set)\b"),
    (
        "memory-bound",
        r"elementwise|reduce_kernel|[Ss]oft_?[Mm]ax|layer_norm|CatArrayBatched|copy|[Ii]ndex|gather|scatter|embedding|fill"
        r"|[Tt]ranspose|cub::|thrust::|[Ss]ort|cumsum|triu_tril|distribution|nll_loss",
    ),
)
"""Class and pattern of a kernel's name; the first that is found holds."""

OPERATORS = (
    ("communication", r"^(c10d|_c10d_functional|gloo|nccl):"),
    ("attention", r"^aten::\w*(scaled_dot_product|flash_attention|efficient_attention)"),
    ("optimizer", r"^aten::(_fused_adam|_foreach_)"),
    ("gemm", r"^aten::(add)?(mm|bmm|mv)_?$|^aten::(baddbmm|linear|matmul|_scaled_mm|_addmm\w*|dot)$|mkldnn_linear"),
    ("memory-bound", r"^(aten|titanlite_kernels|prims)::|Compiled|cpp_fused"),
)
"""The same for operators; one inside another belongs to the outer, if that is of a class before `memory-bound`."""


def kernel_class(name: str) -> str:
    """Of a kernel or copy on a GPU."""
    return _class(name, KERNELS)


def operator_class(name: str) -> str:
    """Of an operator on a CPU."""
    return _class(name, OPERATORS)


def _class(name: str, table: Iterable[tuple[str, str]]) -> str:
    return next((kind for kind, pattern in table if re.search(pattern, name)), "other")


@dataclass(frozen=True)
class Breakdown:
    """Seconds of one step by class. Classes may run at the same time, so their sum may be above `busy`."""

    seconds: dict[str, float]
    busy: float
    """In which anything ran."""
    unknown: dict[str, float]
    """The largest of `other`, by name."""


@dataclass(frozen=True)
class _Span:
    """Something that ran, in the profiler's microseconds."""

    name: str
    start: float
    end: float


def breakdown(trace: dict[str, Any], gpu: bool) -> Breakdown:
    """Of a Chrome trace of one step, as torch.profiler exports it; on a GPU its kernels count, else the operators.

    Raises `ValueError` if a GPU's kernels were not recorded.
    """
    if gpu:
        kernels = list(_spans(trace, "kernel", "gpu_memcpy", "gpu_memset"))
        if not kernels:
            raise ValueError("the profiler recorded no kernels: may this process use CUPTI?")
        inside = [span for span in _spans(trace, "gpu_user_annotation") if span.name == OPTIMIZER]
        parts = [(_kernel_part(kernel, inside), kernel.name, kernel.end - kernel.start) for kernel in kernels]
        return _summed(parts, _union(kernels))
    parts, outer = [], []
    threads = {event.get("tid") for event in trace["traceEvents"] if event.get("cat") == "cpu_op"}
    for thread in threads:
        spans = list(_spans(trace, "cpu_op", "user_annotation", thread=thread))
        spans = [span for span in spans if span.name == OPTIMIZER or not span.name.startswith(_PROFILER)]
        parts += _self_times(spans)
        outer += spans
    return _summed(parts, _union(outer))


_PROFILER = ("ProfilerStep", "PyTorch Profiler")


def _spans(trace: dict[str, Any], *categories: str, thread: object = None) -> Iterator[_Span]:
    for event in trace["traceEvents"]:
        if event.get("ph") == "X" and event.get("cat") in categories and thread in (None, event.get("tid")):
            yield _Span(event["name"], float(event["ts"]), float(event["ts"]) + float(event["dur"]))


def _kernel_part(kernel: _Span, optimizer: list[_Span]) -> str:
    if any(span.start <= kernel.start < span.end for span in optimizer):
        return "optimizer"
    return kernel_class(kernel.name)


def _self_times(spans: list[_Span]) -> list[tuple[str, str, float]]:
    """(class, name, microseconds without those of what runs inside) of each span of one thread."""
    parts: list[list[Any]] = []
    open_spans: list[tuple[_Span, int, str | None]] = []  # with their places in `parts`, and the class they impose
    for span in sorted(spans, key=lambda span: (span.start, -span.end)):
        while open_spans and open_spans[-1][0].end <= span.start:
            open_spans.pop()
        imposed = open_spans[-1][2] if open_spans else None
        if open_spans:
            parts[open_spans[-1][1]][2] -= span.end - span.start
        kind = imposed or ("optimizer" if span.name == OPTIMIZER else operator_class(span.name))
        imposes = kind if kind not in ("memory-bound", "other") else None
        open_spans.append((span, len(parts), imposes))
        parts.append([kind, span.name, span.end - span.start])
    return [(kind, name, max(0.0, duration)) for kind, name, duration in parts]


def _union(spans: Iterable[_Span]) -> float:
    """Microseconds in which at least one ran."""
    total, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total


def _summed(parts: Iterable[tuple[str, str, float]], busy: float) -> Breakdown:
    seconds = dict.fromkeys(CLASSES, 0.0)
    unknown: dict[str, float] = defaultdict(float)
    for kind, name, microseconds in parts:
        seconds[kind] += microseconds / 1e6
        if kind == "other":
            unknown[name] += microseconds / 1e6
    largest = sorted(unknown.items(), key=lambda item: -item[1])[:5]
    return Breakdown(seconds, busy / 1e6, dict(largest))

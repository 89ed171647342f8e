"""Attention, forward and backward, by what a token attends to and by length: which kernel ran, and its rate.

Rates count the pairs of query and key that are seen: 4 x heads x head_dim operations a pair forward, 10 backward (Dao
2023). A GPU is needed; --small runs small sizes on a CPU, and says nothing of speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from titanlite.models.attention.kernels import attention_kernels
from titanlite.models.layers import causal_attention

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # of Llama 3 8B
DOCUMENT = 1024  # tokens of each
WINDOW = 1024
FORWARD, BACKWARD = 4, 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small sizes, on a CPU too")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    with attention_kernels("auto", device):
        for length in (1024,) if arguments.small else (8192, 32768):
            for name, documents, window in (("causal", 0, 0), ("documents", DOCUMENT, 0), ("window", 0, WINDOW)):
                documents, window = (size // 4 if arguments.small else size for size in (documents, window))
                rows.append({"mode": name, "length": length, **measure(length, documents, window, device)})
                rates = ", ".join(f"{rows[-1][f'tflops_{way}']:.3g} {way}" for way in ("forward", "backward"))
                print(f"{name}, {length} tokens: TFLOP/s {rates}; {rows[-1]['kernel']}", file=sys.stderr)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(json.dumps({"device": card, "attention": rows}))
    return 0


def measure(length: int, document: int, window: int, device: torch.device) -> dict[str, Any]:
    """One sequence of `length` tokens, in documents of `document` (0: all of it), with a `window` (0: all)."""
    q, k, v = (
        torch.randn(1, length, heads, HEAD_DIM, dtype=torch.bfloat16, device=device, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    offsets = torch.arange(0, length + 1, document, dtype=torch.int32, device=device) if document else None
    grad = torch.randn_like(q)

    def forward() -> Tensor:
        return causal_attention(q, k, v, offsets, window)

    out = forward()

    def backward() -> None:
        torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

    seen = document or length
    pairs = length // seen * (seen * (seen + 1) // 2)
    if window:
        pairs = window * length - window * (window - 1) // 2
    work = pairs * HEADS * HEAD_DIM / 1e12
    rates = [factor * work / seconds(run, device) for factor, run in ((FORWARD, forward), (BACKWARD, backward))]
    return {"kernel": longest_kernel(forward, device), "tflops_forward": rates[0], "tflops_backward": rates[1]}


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median of ten runs after three."""
    times = []
    for _ in range(13):
        _wait(device)
        before = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - before)
    return statistics.median(times[3:])


def longest_kernel(run: Callable[[], object], device: torch.device) -> str:
    """The name of what takes the most time of a run."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU], acc_events=True) as found:
        run()
        _wait(device)
    which = "device_time_total" if on_gpu else "self_cpu_time_total"
    return str(max(found.key_averages(), key=lambda event: getattr(event, which)).key)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())

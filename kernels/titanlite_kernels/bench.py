"""`python -m titanlite_kernels.bench`: how close each operation comes to the bandwidth of the device, and to others.

The yardstick is a copy, measured in the same run. Contestants are the references: eager, and through torch.compile.
Without a CUDA device the operations are their references, at toy sizes: that this runs, and nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titanlite_kernels import rms_norm, rope, swiglu
from titanlite_kernels.inspect import table
from titanlite_kernels.optional_triton import triton

Operation = Callable[..., Any]


@dataclass(frozen=True)
class Model:
    """The widths that operations see."""

    dim: int
    ffn_dim: int
    heads: int
    kv_heads: int
    head_dim: int


MODELS = {
    "toy": Model(64, 160, 4, 2, 16),
    "1B": Model(2048, 8192, 32, 8, 64),
    "8B": Model(4096, 14336, 32, 8, 128),
    "70B": Model(8192, 28672, 64, 8, 128),
}


@dataclass(frozen=True)
class Case:
    """One operation, and what it is given."""

    name: str
    operation: Operation
    reference: Operation
    arguments: Callable[[Model, int, torch.device], list[Any]]
    """Of a model, for so many tokens; those that require gradients are differentiated."""
    passes: tuple[int, int]
    """How many times the bytes of the widest argument(s), `wide` in number, are moved: forward, backward."""
    wide: int = 1


def _leaf(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)


def _rope_arguments(model: Model, tokens: int, device: torch.device) -> list[Any]:
    q, k = (_leaf(device, 1, tokens, heads, model.head_dim) for heads in (model.heads, model.kv_heads))
    half = torch.rand(1, tokens, 1, model.head_dim // 2, device=device)
    angles = torch.cat((half, half), dim=-1)
    return [q, k, angles.cos(), angles.sin()]


def _norm_arguments(inputs: int) -> Callable[[Model, int, torch.device], list[Any]]:
    def arguments(model: Model, tokens: int, device: torch.device) -> list[Any]:
        weight = _leaf(device, model.dim, dtype=torch.float32)
        return [*(_leaf(device, tokens, model.dim) for _ in range(inputs)), weight, 1e-5]

    return arguments


CASES = (
    Case("rms_norm", rms_norm.rms_norm, rms_norm.rms_norm_reference, _norm_arguments(1), (2, 3)),
    Case("add_rms_norm", rms_norm.add_rms_norm, rms_norm.add_rms_norm_reference, _norm_arguments(2), (4, 4)),
    Case("rope", rope.rope, rope.rope_reference, _rope_arguments, (2, 2), wide=2),
    Case(
        "swiglu",
        swiglu.swiglu,
        swiglu.swiglu_reference,
        lambda model, tokens, device: [_leaf(device, tokens, model.ffn_dim) for _ in range(2)],
        (3, 5),
    ),
)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median time of `work`, with cold caches where the device has a clock of its own."""
    if device.type == "cuda":
        return float(triton.testing.do_bench(work, return_mode="median")) / 1e3
    work()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written together, of a copy too large for any cache (on the CPU: of a small one)."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**22, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device)


def forward_and_backward(operation: Operation, arguments: Sequence[Any], device: torch.device) -> tuple[float, float]:
    """Seconds of each."""

    def forward() -> tuple[Tensor, ...]:
        returned = operation(*arguments)
        return returned if isinstance(returned, tuple) else (returned,)

    outputs = forward()
    gradients = [torch.randn_like(output) for output in outputs]
    wanted = [argument for argument in arguments if isinstance(argument, Tensor) and argument.requires_grad]
    return seconds(forward, device), seconds(
        lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True), device
    )


def rows(case: Case, name: str, tokens: int, device: torch.device, copy: float, compiled: bool) -> list[dict[str, Any]]:
    """Two lines of the table, forward and backward; `eager` and `compiled` are their times over ours."""
    arguments = case.arguments(MODELS[name], tokens, device)
    once = sum(argument.numel() * argument.element_size() for argument in arguments[: case.wide])
    ours = forward_and_backward(case.operation, arguments, device)
    eager = forward_and_backward(case.reference, arguments, device)
    others = {"eager": eager}
    if compiled:
        torch.compiler.reset()
        others["compiled"] = forward_and_backward(torch.compile(case.reference), arguments, device)
    return [
        {
            "operation": f"{case.name}.{way}",
            "model": name,
            "tokens": tokens,
            "microseconds": round(ours[index] * 1e6, 1),
            "gb_per_second": round(case.passes[index] * once / ours[index] / 1e9, 1),
            "share_of_copy": round(case.passes[index] * once / ours[index] / copy, 3),
            **{other: round(taken[index] / ours[index], 2) for other, taken in others.items()},
        }
        for index, way in enumerate(("forward", "backward"))
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m titanlite_kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["1B", "8B", "70B"] if cuda else ["toy"])
    parser.add_argument("--tokens", type=int, default=16384 if cuda else 64)
    parser.add_argument("--operation", help="only those whose name contains this")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out; off the GPU it always is")
    parser.add_argument("--json", metavar="FILE", help="write rows and device there; -: as the output's last line")
    asked = parser.parse_args(arguments)
    chosen = [case for case in CASES if (asked.operation or "") in case.name]
    if not chosen:
        parser.error(f"no operation's name contains {asked.operation!r}")
    device = torch.device("cuda" if cuda else "cpu")
    copy = copy_bandwidth(device)
    measured = [
        row
        for case in chosen
        for model in asked.models
        for row in rows(case, model, asked.tokens, device, copy, compiled=cuda and not asked.no_compile)
    ]
    on = {
        "device": torch.cuda.get_device_name() if cuda else "cpu (references, no claim)",
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else None,
        "copy_gb_per_second": round(copy / 1e9, 1),
    }
    print(", ".join(f"{key} {value}" for key, value in on.items()))
    print(table(measured))
    if asked.json == "-":
        print(json.dumps({**on, "rows": measured}))
    elif asked.json:
        Path(asked.json).write_text(json.dumps({**on, "rows": measured}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m titanlite_kernels.bench`: how close each operation comes to what the device can do, and to others.

The yardsticks are a copy and a bfloat16 matrix product, measured in the same run. Contestants are the references, eager
and through torch.compile, and Liger-Kernel where it is installed; all take turns, in another order each round.
Without a CUDA device all is plain PyTorch at toy sizes: that this runs, and nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from timeit import timeit
from typing import Any, TypeVar

import torch
from torch import Tensor

from titanlite_kernels import float8_quantise, float8_reference, liger, linear_cross_entropy, rms_norm, rope, swiglu
from titanlite_kernels.inspect import table
from titanlite_kernels.optional_triton import triton

Operation = Callable[..., Any]
Turn = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Model:
    """The widths that operations see."""

    dim: int
    ffn_dim: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


MODELS = {
    "toy": Model(64, 160, 4, 2, 16, 272),
    "1B": Model(2048, 8192, 32, 8, 64, 128_256),
    "8B": Model(4096, 14336, 32, 8, 128, 128_256),
    "70B": Model(8192, 28672, 64, 8, 128, 128_256),
}


@dataclass(frozen=True)
class Case:
    """One operation, and what it is given: bytes are counted in `passes`, or operations in `flops`."""

    name: str
    operation: Operation
    reference: Operation
    arguments: Callable[[Model, int, torch.device], list[Any]]
    """Of (model, tokens, device); those that require gradients are differentiated."""
    passes: tuple[float, ...] = ()
    """How many times the bytes of the widest argument(s), `wide` in number, are moved: forward, and backward if any."""
    wide: int = 1
    flops: Callable[[Model, int], int] | None = None
    """Of both passes, which are then timed as one: for what does the work of the second in the first. Memory counts
    too. The operation returns a scalar."""
    liger: Operation | None = None

    @property
    def ways(self) -> tuple[str, ...]:
        """What of it is timed."""
        return ("both",) if self.flops else ("forward", "backward")[: len(self.passes)]


@dataclass(frozen=True)
class Roofs:
    """What the device does at best: bytes per second of a copy, read and written; operations per second."""

    copy: float
    matmul: float


def _leaf(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype).mul_(scale).requires_grad_()


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


def _head_arguments(model: Model, tokens: int, device: torch.device) -> list[Any]:
    labels = torch.randint(0, model.vocab, (tokens,), device=device)
    weight = _leaf(device, model.vocab, model.dim, scale=model.dim**-0.5)  # logits as of a model, not saturated
    return [_leaf(device, tokens, model.dim), weight, labels]


def _float8(name: str, both: bool, format: torch.dtype, scale: float8_reference.Scale, passes: float) -> Case:
    suffix = "_both" * both
    return Case(
        f"float8_{name}{suffix}",
        partial(getattr(float8_quantise, f"quantise{suffix}"), format=format, scale=scale),
        partial(getattr(float8_reference, f"quantise{suffix}_reference"), format=format, scale=scale),
        lambda model, tokens, device: [torch.randn(tokens, model.dim, device=device, dtype=torch.bfloat16)],
        (passes,),
    )


CASES = (
    Case("rms_norm", rms_norm.rms_norm, rms_norm.rms_norm_reference, _norm_arguments(1), (2, 3), liger=liger.rms_norm),
    Case(
        "add_rms_norm", rms_norm.add_rms_norm, rms_norm.add_rms_norm_reference, _norm_arguments(2), (4, 4),
        liger=liger.add_rms_norm,
    ),
    Case("rope", rope.rope, rope.rope_reference, _rope_arguments, (2, 2), wide=2, liger=liger.rope),
    Case(
        "swiglu", swiglu.swiglu, swiglu.swiglu_reference,
        lambda model, tokens, device: [_leaf(device, tokens, model.ffn_dim) for _ in range(2)], (3, 5),
        liger=liger.swiglu,
    ),
    Case(
        "linear_cross_entropy", linear_cross_entropy.linear_cross_entropy,
        linear_cross_entropy.linear_cross_entropy_reference, _head_arguments,
        flops=lambda model, tokens: 6 * tokens * model.dim * model.vocab, liger=liger.linear_cross_entropy,
    ),
    _float8("tensor", False, torch.float8_e4m3fn, "tensor", passes=2.5),
    _float8("tensor", True, torch.float8_e5m2, "tensor", passes=3),
    _float8("rows", False, torch.float8_e4m3fn, "row", passes=1.5),
    _float8("rows", True, torch.float8_e4m3fn, "row", passes=3),
)  # fmt: skip


# ---- time ------------------------------------------------------------------------------------------------------------

WARM_UP = 2
SECONDS = 0.5  # of turns, on a GPU; and rounds, on any device:
FEWEST, MOST = 5, 50
COLD_BYTES = 2**28  # more than any cache holds: an H200's has 50 MB, a B200's 126
AHEAD_CYCLES = 2_000_000
"""About a millisecond, in which the host gets ahead: else small kernels would wait for their own launch."""


def rounds(turns: Mapping[Name, Turn], device: torch.device) -> dict[Name, list[float]]:
    """Seconds of each turn, round by round. All warm up first; caches are cold where the device has its own clock."""
    for turn in turns.values():
        for _ in range(WARM_UP):
            turn()
    timed = _timed_by_events if device.type == "cuda" else _timed_by_the_host
    count = FEWEST
    if device.type == "cuda":
        once = sum(timed([turn], device)[0] for turn in turns.values())
        count = min(MOST, max(FEWEST, int(SECONDS / max(once, 1e-6))))
    names, order = list(turns), random.Random(0)
    found: dict[Name, list[float]] = {name: [] for name in names}
    for _ in range(count):
        shuffled = order.sample(names, len(names))
        for name, seconds in zip(shuffled, timed([turns[name] for name in shuffled], device), strict=True):
            found[name].append(seconds)
    return found


def _timed_by_events(turns: Sequence[Turn], device: torch.device) -> list[float]:
    # What lay in the cache makes room for what is read. Were it written instead, it would go to memory during the turn.
    cold = torch.zeros(COLD_BYTES // 4, device=device)
    events = []
    for turn in turns:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cold.sum()
        torch.cuda._sleep(AHEAD_CYCLES)
        start.record()
        turn()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _timed_by_the_host(turns: Sequence[Turn], device: torch.device) -> list[float]:
    return [timeit(turn, number=1) for turn in turns]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written together, of a copy too large for any cache (on the CPU: of a small one)."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**22, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = rounds({"copy": lambda: target.copy_(source)}, device)["copy"]
    return 2 * source.numel() / statistics.median(times)


def matmul_flops(device: torch.device) -> float:
    """Operations per second of bfloat16 products of square matrices, so many in a row that the clock settles."""
    size, products = (8192, 20) if device.type == "cuda" else (256, 2)
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(left)

    def multiply() -> None:
        for _ in range(products):
            torch.mm(left, right, out=out)

    return products * 2 * size**3 / statistics.median(rounds({"matmul": multiply}, device)["matmul"])


def _peak_bytes(turn: Turn, device: torch.device) -> int | None:
    """Memory that a turn takes beside what is there; None where the device does not count."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    turn()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


# ---- contestants -----------------------------------------------------------------------------------------------------


def turns_of(case: Case, operation: Operation, arguments: Sequence[Any]) -> dict[str, Turn]:
    """What is timed of one contestant, by way."""
    wanted = [argument for argument in arguments if isinstance(argument, Tensor) and argument.requires_grad]

    def forward() -> tuple[Tensor, ...]:
        returned = operation(*arguments)
        return tuple(returned) if isinstance(returned, tuple) else (returned,)

    if case.ways == ("both",):
        return {"both": lambda: torch.autograd.grad(forward(), wanted)}
    if case.ways == ("forward",):
        return {"forward": forward}
    outputs = forward()
    gradients = [torch.randn_like(output) for output in outputs]
    return {"forward": forward, "backward": lambda: torch.autograd.grad(outputs, wanted, gradients, retain_graph=True)}


def contestants(case: Case, compiled: bool) -> dict[str, Operation]:
    """By column of the table."""
    found = {"ours": case.operation, "eager": case.reference}
    if compiled:
        found["compiled"] = torch.compile(case.reference, dynamic=False)
    if case.liger and liger.version():
        found["liger"] = case.liger
    return found


def rows(
    case: Case, name: str, tokens: int, device: torch.device, roofs: Roofs, compiled: bool
) -> list[dict[str, Any]]:
    """A line of the table for each way; `eager`, `compiled` and `liger` are their times over ours.

    Medians over rounds, of ratios too. A contestant that raises has the error's name instead, and does not take part.
    """
    if compiled:
        torch.compiler.reset()  # the next model's shapes are constants too
    model = MODELS[name]
    turns: dict[tuple[str, str], Turn] = {}
    failures: dict[str, str] = {}
    peaks: dict[str, int | None] = {}
    moved = 0
    for who, operation in contestants(case, compiled).items():
        torch.manual_seed(0)
        try:
            arguments = case.arguments(model, tokens, device)
            moved = sum(argument.numel() * argument.element_size() for argument in arguments[: case.wide])
            own = turns_of(case, operation, arguments)
            for turn in own.values():
                turn()
            peaks[who] = _peak_bytes(own["both"], device) if case.flops else None
        except Exception as failure:
            failures[who] = f"{type(failure).__name__}: {failure}"
        else:
            turns |= {(who, way): turn for way, turn in own.items()}
    times = rounds(turns, device)

    def against(who: str, way: str) -> float | str | None:
        if who in failures:
            return failures[who].partition(":")[0]
        if "ours" in failures or (who, way) not in times:
            return None
        pairs = zip(times[who, way], times["ours", way], strict=True)
        return round(statistics.median(theirs / ours for theirs, ours in pairs), 2)

    found = []
    for index, way in enumerate(case.ways):
        ours = statistics.median(times["ours", way]) if "ours" not in failures else None
        bandwidth = case.passes[index] * moved / ours if ours and case.passes else None
        speed = case.flops(model, tokens) / ours if ours and case.flops else None
        peak, eager_peak = peaks.get("ours"), peaks.get("eager")
        found.append(
            {
                "operation": f"{case.name}.{way}",
                "model": name,
                "tokens": tokens,
                "microseconds": round(ours * 1e6, 1) if ours else failures["ours"].partition(":")[0],
                "gb_per_second": bandwidth and round(bandwidth / 1e9, 1),
                "share_of_copy": bandwidth and round(bandwidth / roofs.copy, 3),
                "tflops": speed and round(speed / 1e12, 3),
                "share_of_matmul": speed and round(speed / roofs.matmul, 3),
                "peak_gib": peak and round(peak / 2**30, 2),
                "share_of_eager_peak": round(peak / eager_peak, 3) if peak and eager_peak else None,
                **{who: against(who, way) for who in ("eager", "compiled", "liger")},
                "failures": failures,
            }
        )
    return found


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """The table, without empty columns, and what went wrong."""
    used = [key for key in rows[0] if key != "failures" and any(row[key] is not None for row in rows)]
    lines = [table([{key: "" if row[key] is None else row[key] for key in used} for row in rows])]
    for row in rows:
        lines += [f"{row['operation']} {row['model']}, {who}: {why}" for who, why in row["failures"].items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 if an operation of ours raised."""
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
    roofs = Roofs(copy_bandwidth(device), matmul_flops(device))
    on = {
        "device": torch.cuda.get_device_name() if cuda else "cpu (references, no claim)",
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else None,
        "liger_kernel": liger.version(),
        "copy_gb_per_second": round(roofs.copy / 1e9, 1),
        "matmul_tflops": round(roofs.matmul / 1e12, 3),
    }
    print(", ".join(f"{key} {value}" for key, value in on.items()))
    measured: list[dict[str, Any]] = []
    for case in chosen:
        for model in asked.models:
            measured += rows(case, model, asked.tokens, device, roofs, compiled=cuda and not asked.no_compile)
        if asked.json == "-" and case is not chosen[-1]:  # for who may end this before it is done
            print(json.dumps({**on, "rows": measured}), flush=True)
    print(format_rows(measured))
    if asked.json == "-":
        print(json.dumps({**on, "rows": measured}))
    elif asked.json:
        Path(asked.json).write_text(json.dumps({**on, "rows": measured}, indent=2) + "\n", encoding="utf-8")
    return 1 if any("ours" in row["failures"] for row in measured) else 0


if __name__ == "__main__":
    sys.exit(main())

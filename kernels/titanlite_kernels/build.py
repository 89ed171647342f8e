"""Real builds of kernels for devices that need not be there, and what can be read from the machine code.

Triton compiles for any NVIDIA target on any machine. From the results this reads registers, spills, shared memory,
the width of memory accesses, the use of tensor cores, and counts the bytes that a kernel moves. It measures no time.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from titanlite_kernels.optional_triton import INTERPRETING, triton

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
"""Compute capabilities (ten times the number) of A100, H100/H200 and B200."""


class CannotBuild(Exception):
    """This process or machine cannot compile kernels; the message says why."""


@dataclass(frozen=True)
class Build:
    """One kernel as an operation launches it at one shape."""

    name: str  # operation.kernel, such as `rms_norm.forward`
    launch: Callable[[torch.dtype], object]
    """Runs the operation on tensors on the meta device, activations in the dtype given. Arguments that kernels have at
    run time are given by position, constants by name."""
    shape: str  # what is built, in words: `Llama 3 8B: 8,192 tokens x 4,096, bfloat16`
    minimal_bytes: int
    """What the operation must move between memory and chip at this shape, by the contract in its file."""
    number: int = 0  # which of the operation's launches it is
    trips: tuple[float, ...] = ()
    """How often each loop runs whose bounds are no compile-time constants, in the order of the source; the mean over
    the programs."""
    cached: tuple[str, ...] = ()
    """Pointers that programs share, small enough for the cache: what they point to counts once, as `minimal_bytes` says
    it, not once for each program."""
    targets: tuple[str, ...] = tuple(TARGETS)  # those that the kernel is for: not every device has every number format


@dataclass(frozen=True)
class Launch:
    """A kernel with what it was launched with."""

    kernel: Any  # the `jit` function
    programs: int
    values: Mapping[str, Any]  # argument -> tensor or number
    constants: Mapping[str, Any]
    options: Mapping[str, Any]  # `num_warps`, and more


def record_launch(build: Build, dtype: torch.dtype) -> Launch:
    """What `build.launch` would launch."""
    with patch.object(torch.library, "wrap_triton") as wrap:
        build.launch(dtype)
    taken = wrap.return_value.__getitem__
    kernel = wrap.call_args_list[build.number].args[0]
    call, (grid,) = taken.return_value.call_args_list[build.number], taken.call_args_list[build.number].args
    constants = {name: value for name, value in call.kwargs.items() if name in kernel.arg_names}
    options = {name: value for name, value in call.kwargs.items() if name not in constants}
    values = dict(zip((name for name in kernel.arg_names if name not in constants), call.args, strict=True))
    return Launch(kernel, prod(grid), values, constants, options)


@dataclass(frozen=True)
class Compiled:
    """What was read from one build for one target; the fields but `traffic` are a row's columns."""

    registers: int  # per thread
    spill_bytes: int  # per thread: registers that the compiler had to keep in memory
    shared_bytes: int  # per program
    vector_bytes: int  # the widest load from global memory that a thread makes in one instruction
    tensor_cores: str  # the family of matrix instructions: `wgmma`, `tcgen05`, `mma`, or nothing
    warps: int  # of a program
    moved_bytes: int  # loaded and stored in all at the build's shape; `Build.cached` pointers left out


def compile_build(build: Build, target: str, dtype: torch.dtype = torch.bfloat16) -> Compiled:
    """Compile for one of `TARGETS` and read the result. Raises CannotBuild without a usable Triton."""
    if triton is None:
        raise CannotBuild("Triton is not installed: pip install 'triton>=3.6' (Linux)")
    if INTERPRETING:
        raise CannotBuild("TRITON_INTERPRET is set, so kernels are Python here: unset it in this process")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = record_launch(build, dtype)
    signature, constants, attributes = _specialise(launch)
    compiled = triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", TARGETS[target], 32),
        options={"num_stages": 3, "enable_fp_fusion": True, **launch.options},
    )
    registers, spills = _resources(compiled.asm["cubin"])
    return Compiled(
        registers=registers,
        spill_bytes=spills,
        shared_bytes=compiled.metadata.shared,
        vector_bytes=widest_load(compiled.asm["ptx"]),
        tensor_cores=matrix_instructions(compiled.asm["ptx"]),
        warps=launch.options["num_warps"],
        moved_bytes=round(launch.programs * _moved_by_a_program(build, launch, compiled.asm["ttir"])),
    )


def _specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Types, constants and attributes of the arguments, as Triton's own launcher would derive them: an integer that is
    1 is a constant, and that one is a multiple of 16 is made use of.
    """
    ones = {name: 1 for name, value in launch.values.items() if isinstance(value, int) and value == 1}
    constants = {**launch.constants, **ones}
    signature: dict[str, str] = {}
    attributes = {}
    for index, name in enumerate(launch.kernel.arg_names):
        value: Any = launch.values.get(name)
        signature[name] = "constexpr" if name in constants else _type(value)
        if signature[name][0] == "*" or (signature[name][0] == "i" and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _type(value: Tensor | int | float) -> str:
    if isinstance(value, Tensor):
        return f"*{_POINTERS[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if value < 2**31 else "i64"


_POINTERS = {
    torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.int32: "i32", torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5",
}  # fmt: skip


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack and local memory a thread, by the disassembler that Triton brings along."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def widest_load(ptx: str) -> int:
    """Bytes of the widest load from global memory, straight to registers or (`cp.async`) to shared memory."""
    loads = re.findall(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[bufs](\d+)\b", ptx)
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\], (0x[0-9a-f]+|\d+)", ptx)
    widths = [int(count or 1) * int(bits) // 8 for count, bits in loads] + [int(size, 0) for size in copies]
    return max(widths, default=0)


def matrix_instructions(ptx: str) -> str:
    """The newest family of tensor core instructions in a kernel, or nothing."""
    return next((family for family in ("tcgen05", "wgmma", "mma") if re.search(rf"\b{family}\.", ptx)), "")


# ---- bytes, counted in Triton's own intermediate code: there, loops still have bounds and pointers names ------------

_ARGUMENT = re.compile(r"(%\w+): !tt\.ptr<")
_RESULT = re.compile(r"^\s*(%\w+)(?::\d+)? = ")
_OPERAND = re.compile(r"(%\w+)")
_ACCESS = re.compile(r"tt\.(load|store|atomic_rmw)\b.*?(%\w+).*: \(?(?:tensor<([\dx]+)x)?!tt\.ptr<(\w+)>")
_LOOP = re.compile(r"scf\.for %\w+ = (%\w+) to (%\w+) step (%\w+)")
_CARRIED = re.compile(r"(%\w+) = (%\w+)")
_CONSTANT = re.compile(r"(%\w+) = arith\.constant (-?\d+) : i\d+")


def _moved_by_a_program(build: Build, launch: Launch, ttir: str) -> float:
    """Bytes that one program loads and stores, masked lanes included, `build.cached` pointers left out."""
    pointers = [name for name, value in launch.values.items() if isinstance(value, Tensor)]
    moved: defaultdict[str, float] = defaultdict(float)
    base: dict[str, str] = {}  # value -> the argument that it points into
    constants: dict[str, int] = {}
    trips = iter(build.trips)
    runs = [1.0]  # how often the block around a line runs, outermost first
    for line in ttir.splitlines():
        if "tt.func" in line:
            base = dict(zip(_ARGUMENT.findall(line), pointers, strict=True))
        for carried, start in _CARRIED.findall(line) if "iter_args" in line else ():
            if start in base:
                base[carried] = base[start]
        if constant := _CONSTANT.search(line):
            constants[constant[1]] = int(constant[2])
        assert "tt.descriptor_" not in line, f"{build.name}: accesses by descriptor are not counted yet"
        if access := _ACCESS.search(line):
            kind, pointer, shape, dtype = access.groups()
            size = prod(int(length) for length in shape.split("x")) if shape else 1
            passes = 2 if kind == "atomic_rmw" else 1
            moved[base[pointer]] += runs[-1] * passes * size * _bytes_of(dtype)
        elif result := _RESULT.match(line):
            operand = next((name for name in _OPERAND.findall(line)[1:] if name in base), None)
            if operand is not None and "!tt.ptr" in line:
                base[result[1]] = base[operand]
        closes, opens = line.lstrip().startswith("}"), line.rstrip().endswith("{")
        if closes:
            runs.pop()
        if opens:
            runs.append(runs[-1] * (_trips(line, constants, trips) if "scf.for" in line else 1))
    return sum(size for name, size in moved.items() if name not in build.cached)


def _bytes_of(dtype: str) -> int:
    """`bf16`, `f8E4M3FN`, `i1` -> 2, 1, 1."""
    bits = re.search(r"\d+", dtype)
    assert bits is not None, dtype
    return max(1, int(bits[0]) // 8)


def _trips(line: str, constants: dict[str, int], given: Iterator[float]) -> float:
    loop = _LOOP.search(line)
    assert loop is not None, line
    if all(bound in constants for bound in loop.groups()):
        first, end, step = (constants[bound] for bound in loop.groups())
        return max(0, -(-(end - first) // step))
    return next(given)

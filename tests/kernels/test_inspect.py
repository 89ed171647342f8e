"""What `titanlite_kernels.inspect` reads from builds, against kernels whose traffic and faults are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from titanlite_kernels import inspect
from titanlite_kernels.build import Build, CannotBuild, compile_build, matrix_instructions, widest_load
from titanlite_kernels.optional_triton import INSTALLED, jit, tl, wrap_triton

needs_triton = pytest.mark.skipif(not INSTALLED, reason="needs Triton: pip install 'triton>=3.6' (Linux)")


@jit
def known_traffic(x, table, scale, out, total, repeats, SIDE: tl.constexpr):
    at = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    product = tl.zeros([SIDE, SIDE], tl.float32)
    shared = tl.load(table + at)
    for tile in range(repeats):
        for part in range(3):
            product += tl.dot(tl.load(x + (tile * 3 + part) * SIDE * SIDE + at), shared)
    product *= tl.load(scale)
    tl.atomic_add(total, tl.sum(product))
    tl.store(out + at, product)


def launch_traffic(dtype: torch.dtype) -> None:
    narrow, wide = torch.empty(1, dtype=dtype, device="meta"), torch.empty(1, device="meta")
    wrap_triton(known_traffic)[(2,)](narrow, narrow, wide, wide, wide, 5, SIDE=64, num_warps=4)


TRAFFIC = Build(
    name="known.traffic", launch=launch_traffic, shape="5 x 3 tiles of 64 x 64, twice", minimal_bytes=1, trips=(5,)
)
TILE = 64 * 64
OF_A_PROGRAM = {"x": 5 * 3 * TILE * 2, "table": TILE * 2, "scale": 4, "out": TILE * 4, "total": 2 * 4}


@jit
def too_many_values(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    values = tl.load(x + at)
    tl.store(out + at, values / tl.sum(values))


def launch_too_many(dtype: torch.dtype) -> None:
    wide = torch.empty(1, device="meta")
    wrap_triton(too_many_values)[(1,)](wide, wide, SIZE=8192, num_warps=1)


SPILLING = Build(
    name="too.many", launch=launch_too_many, shape="256 values a thread, each in a register", minimal_bytes=2 * 4 * 8192
)


@needs_triton
def test_bytes_are_those_of_every_pass_of_every_loop() -> None:
    built = compile_build(TRAFFIC, "sm_90")
    assert built.moved_bytes == 2 * sum(OF_A_PROGRAM.values())
    cached = compile_build(replace(TRAFFIC, cached=("table",)), "sm_90")
    assert cached.moved_bytes == 2 * (sum(OF_A_PROGRAM.values()) - OF_A_PROGRAM["table"])
    assert built.tensor_cores == "wgmma" and built.spill_bytes == 0 and built.shared_bytes > 0


@needs_triton
@pytest.mark.slow
def test_spills_end_the_command_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(inspect, "builds", lambda: iter([SPILLING, TRAFFIC]))
    assert inspect.main(["--json", "--target", "sm_80"]) == 1
    said = capsys.readouterr()
    spilling, traffic = json.loads(said.out)
    assert spilling["spill_bytes"] > 0 and spilling["bytes_over_minimum"] == 1
    assert traffic["spill_bytes"] == 0 and traffic["tensor_cores"] == "mma"
    assert "too.many (sm_80)" in said.err and "known" not in said.err
    assert inspect.main(["--target", "sm_80", "--kernel", "known"]) == 0
    assert "| known.traffic | sm_80 " in capsys.readouterr().out


def test_a_name_that_no_kernel_has_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        inspect.main(["--kernel", "no_such"])
    assert end.value.code == 2 and "no_such" in capsys.readouterr().err


def test_every_operation_is_found() -> None:
    names = {build.name for build in inspect.builds()}
    assert names >= {f"{name}.{way}" for name in ("rms_norm", "rope", "swiglu") for way in ("forward", "backward")}


def test_kernels_that_are_interpreted_are_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("titanlite_kernels.build.INTERPRETING", True)
    monkeypatch.setattr("titanlite_kernels.build.triton", object())
    with pytest.raises(CannotBuild, match="TRITON_INTERPRET"):
        compile_build(TRAFFIC, "sm_90")


@pytest.mark.parametrize(
    ("line", "width"),
    [
        ("ld.global.b16 { %rs1 }, [ %rd1 + 0 ];", 2),
        ("@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", 16),
        ("ld.global.L1::evict_first.v8.b32 { %r1, %r2 }, [ %rd1 + 0 ];", 32),
        ("ld.global.nc.v2.f64 {%fd1, %fd2}, [%rd1];", 16),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", 16),
        ("cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, 0x4;", 4),
        ("ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];", 0),
        ("st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };", 0),
    ],
)
def test_the_widest_load_is_read_from_instructions(line: str, width: int) -> None:
    assert widest_load(f"\t{line}\n") == width


def test_families_of_matrix_instructions() -> None:
    assert matrix_instructions("mma.sync.aligned.m16n8k16") == "mma"
    assert matrix_instructions("wgmma.mma_async.sync.aligned") == "wgmma"
    assert matrix_instructions("tcgen05.mma.cta_group::1.kind::f16") == "tcgen05"
    assert matrix_instructions("fma.rn.f32") == ""


@needs_triton
@pytest.mark.slow
def test_the_documented_table_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """Registers differ between versions of Triton: this holds with the one in scripts/constraints.txt."""
    assert inspect.main([]) == 0
    documented = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in documented, "python -m titanlite_kernels.inspect, into docs/kernels.md"

"""The kernels' benchmark still runs, and counts bytes and operations as the contracts do. No speed is asserted here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from titanlite_kernels import bench, liger
from titanlite_kernels.bench import CASES, MODELS, Case, Roofs
from titanlite_kernels.linear_cross_entropy import linear_cross_entropy_reference
from titanlite_kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from titanlite_kernels.rope import rope_reference
from titanlite_kernels.swiglu import swiglu_reference
from torch import Tensor

CPU = torch.device("cpu")
ROOFS = Roofs(copy=1e9, matmul=1e12)


@pytest.fixture
def no_time_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every turn takes a microsecond, but for eager's: those take three."""

    def rounds(turns: Mapping[tuple[str, str], object], device: torch.device) -> dict[tuple[str, str], list[float]]:
        return {(who, way): [3e-6 if who == "eager" else 1e-6] for who, way in turns}

    monkeypatch.setattr(bench, "rounds", rounds)


def test_every_operation_has_its_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    assert bench.main(["--models", "toy", "--tokens", "8", "--no-compile", "--json", str(out)]) == 0
    measured = json.loads(out.read_text())
    rows = measured["rows"]
    assert [row["operation"] for row in rows] == [f"{case.name}.{way}" for case in CASES for way in case.ways]
    assert all(row["microseconds"] > 0 and row["eager"] > 0 and not row["failures"] for row in rows)
    assert measured["copy_gb_per_second"] > 0 and measured["matmul_tflops"] > 0
    said = capsys.readouterr().out
    assert "| rope.backward " in said and "peak_gib" not in said, "a column that nobody fills is left out"


@pytest.mark.usefixtures("no_time_passes")
def test_bytes_and_operations_over_time() -> None:
    found = {row["operation"]: row for case in CASES for row in bench.rows(case, "toy", 100, CPU, ROOFS, False)}
    head = found.pop("linear_cross_entropy.both")
    assert head["tflops"] == round(6 * 100 * 64 * 272 / 1e6, 3) and head["share_of_matmul"] == head["tflops"]
    dim, ffn, heads = 100 * 64 * 2, 100 * 160 * 2, 100 * (4 + 2) * 16 * 2
    expected = {
        **{"rms_norm.forward": 2 * dim, "rms_norm.backward": 3 * dim},
        **{"add_rms_norm.forward": 4 * dim, "add_rms_norm.backward": 4 * dim},
        **{"rope.forward": 2 * heads, "rope.backward": 2 * heads},
        **{"swiglu.forward": 3 * ffn, "swiglu.backward": 5 * ffn},
        **{"float8_tensor.forward": 2.5 * dim, "float8_tensor_both.forward": 3 * dim},
        **{"float8_rows.forward": 1.5 * dim, "float8_rows_both.forward": 3 * dim},
    }
    known = {name: row["gb_per_second"] * 1e3 for name, row in found.items() if name in expected}
    assert known == expected, "bytes in a microsecond"
    assert all(row["share_of_copy"] == row["gb_per_second"] and row["eager"] == 3 for row in found.values())


@pytest.mark.usefixtures("no_time_passes")
def test_without_gradients_only_the_forward_pass_counts() -> None:
    arguments = lambda model, tokens, device: [torch.ones(1000)]  # noqa: E731
    case = Case("half", lambda x: (x / 2, None), lambda x: x / 2, arguments, (1.5,))
    (row,) = bench.rows(case, "toy", 100, CPU, ROOFS, False)
    assert row["operation"] == "half.forward" and row["gb_per_second"] * 1e3 == 1.5 * 4000


def test_turns_are_taken_in_rounds() -> None:
    taken: list[str] = []
    turns = {name: lambda name=name: taken.append(name) for name in "abc"}
    times = bench.rounds(turns, CPU)  # type: ignore[arg-type]
    rounds = [taken[at : at + 3] for at in range(3 * bench.WARM_UP, len(taken), 3)]
    assert [len(of) for of in times.values()] == [bench.FEWEST] * 3 and len(rounds) == bench.FEWEST
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds) and len({tuple(turn) for turn in rounds}) > 1


# ---- a stand-in for Liger-Kernel: its signatures and layouts, in plain PyTorch ---------------------------------------


NORM = (0.0, "llama", False)  # offset, roundings, and whether the gradient is written over the one that comes in


def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """[batch, heads, seq, head_dim], and [1, seq, head_dim]; the newest hands the angles back."""
    assert q.shape[2] == k.shape[2] == cos.shape[1] == sin.shape[1] and cos.dim() == sin.dim() == 3
    rotated = rope_reference(q.transpose(1, 2), k.transpose(1, 2), cos.unsqueeze(2), sin.unsqueeze(2))
    return (*(x.transpose(1, 2) for x in rotated), cos.view_as(cos), sin.view_as(sin))


def _linear_cross_entropy(  # type: ignore[no-untyped-def]
    _input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0,
    label_smoothing=0.0, reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None,
):  # fmt: skip
    assert bias is ce_weight is softcap is None and ignore_index == -100 and reduction == "sum"
    assert accum_dtype == torch.float32 and not lse_square_scale and not label_smoothing and not return_z_loss
    assert _input.dim() == 2 and target.dim() == 1 and _input.dtype == weight.dtype
    return linear_cross_entropy_reference(_input, weight, target), None, None, None


STAND_IN = {
    "rms_norm.LigerRMSNormFunction": lambda x, w, eps, *how: rms_norm_reference(x, w, eps) if how == NORM else None,
    "fused_add_rms_norm.LigerFusedAddRMSNormFunction": (
        lambda x, r, w, eps, *how: add_rms_norm_reference(x, r, w, eps) if how == NORM else None
    ),
    "rope.LigerRopeFunction": _rope,
    "swiglu.LigerSiLUMulFunction": swiglu_reference,
    "fused_linear_cross_entropy.LigerFusedLinearCrossEntropyFunction": _linear_cross_entropy,
}


@pytest.fixture
def liger_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "installed_version", lambda name: "0.6.4")
    for package in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    for path, function in STAND_IN.items():
        module, name = path.split(".")
        stand_in = ModuleType(f"liger_kernel.ops.{module}")
        setattr(stand_in, name, SimpleNamespace(apply=function))
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)


@pytest.mark.usefixtures("liger_kernel", "no_time_passes")
@pytest.mark.parametrize("case", [case for case in CASES if case.liger], ids=lambda case: case.name)
def test_liger_is_asked_for_the_same(case: Case) -> None:
    def results(operation: Callable[..., Any]) -> list[Tensor]:
        torch.manual_seed(0)
        turns = bench.turns_of(case, operation, case.arguments(MODELS["toy"], 8, CPU))
        return [tensor for turn in turns.values() for tensor in turn()]  # type: ignore[attr-defined]

    assert case.liger
    for theirs, ours in zip(results(case.liger), results(case.reference), strict=True):
        torch.testing.assert_close(theirs, ours)
    assert all(row["liger"] == 1 for row in bench.rows(case, "toy", 8, CPU, ROOFS, False))


@pytest.mark.usefixtures("liger_kernel")
def test_who_raises_is_named_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise AttributeError("this release has none")

    monkeypatch.setattr(sys.modules["liger_kernel.ops.swiglu"].LigerSiLUMulFunction, "apply", fail)
    assert bench.main(["--tokens", "8", "--operation", "swiglu", "--json", "-"]) == 0
    said = capsys.readouterr().out
    rows = json.loads(said.splitlines()[-1])["rows"]
    assert all(row["liger"] == "AttributeError" and row["eager"] > 0 for row in rows)
    assert "swiglu.forward toy, liger: AttributeError: this release has none" in said
    broken = Case("broken", fail, swiglu_reference, CASES[3].arguments, (3, 5))
    monkeypatch.setattr(bench, "CASES", (broken,))
    assert bench.main(["--tokens", "8"]) == 1, "an operation of ours that raises"
    assert "| broken.backward " in capsys.readouterr().out


def test_where_liger_is_not_installed_it_has_no_column(capsys: pytest.CaptureFixture[str]) -> None:
    if liger.version():
        pytest.skip("Liger-Kernel is installed here")
    assert "liger" not in bench.contestants(CASES[0], compiled=False)

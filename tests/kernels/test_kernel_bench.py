"""The kernels' benchmark still runs, and counts bytes as the contracts do. No speed is asserted here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from titanlite_kernels import bench


def test_every_operation_has_its_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    assert bench.main(["--models", "toy", "--tokens", "8", "--no-compile", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    both = ("forward", "backward")
    assert [row["operation"] for row in rows] == [f"{case.name}.{way}" for case in bench.CASES for way in both]
    assert all(row["microseconds"] > 0 for row in rows)
    assert "| rope.backward " in capsys.readouterr().out


def test_bytes_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "seconds", lambda work, device: 1e-6)
    found = {
        row["operation"]: row["gb_per_second"] * 1e3  # bytes in a microsecond
        for case in bench.CASES
        for row in bench.rows(case, "toy", 100, torch.device("cpu"), copy=1.0, compiled=False)
    }
    dim, ffn, heads = 100 * 64 * 2, 100 * 160 * 2, 100 * (4 + 2) * 16 * 2
    assert found == {
        **{"rms_norm.forward": 2 * dim, "rms_norm.backward": 3 * dim},
        **{"add_rms_norm.forward": 4 * dim, "add_rms_norm.backward": 4 * dim},
        **{"rope.forward": 2 * heads, "rope.backward": 2 * heads},
        **{"swiglu.forward": 3 * ffn, "swiglu.backward": 5 * ffn},
    }

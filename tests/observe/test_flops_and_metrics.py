"""Peaks by the names drivers give, and the rows' arithmetic under a clock that the test turns."""

from __future__ import annotations

import pytest
import torch

from titanlite.observe.jsonl import validation_row
from titanlite.observe.metrics import Metrics, mfu, peak_flops, peak_memory_bytes

PEAKS = {
    "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A100 80GB PCIe": 312, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835, "NVIDIA H200": 989, "NVIDIA H200 NVL": 835, "NVIDIA H20": 148, "NVIDIA GH200 480GB": 989,
    "NVIDIA B200": 2250, "NVIDIA GB200": 2500, "NVIDIA L4": 121, "NVIDIA L40": 181, "NVIDIA L40S": 362,
    "NVIDIA GeForce RTX 4090": 165.2, "AMD Instinct MI300X": 1307, "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None, "NVIDIA RTX A4000": None, "Tesla T4": None, "cpu": None,
}  # fmt: skip
"""Name of the card -> TFLOP/s."""


@pytest.mark.parametrize("name", PEAKS)
def test_peaks_are_dense_and_a_card_that_is_not_known_has_none(name):
    assert peak_flops(name) == (None if PEAKS[name] is None else PEAKS[name] * 1e12)


def test_mfu_of_an_8b_model_on_an_h100():
    # 6 FLOPs a parameter and token: 8e9 parameters at 10,000 tokens/s are 480 TFLOP/s of 989.
    assert mfu(10_000, 6 * 8e9, 989e12) == pytest.approx(0.48534, abs=1e-5)
    assert mfu(10_000, 6 * 8e9, None) is None


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


HALF = torch.tensor(0.5)


def metrics(clock, devices=2, peak=1e12):
    return Metrics(devices=devices, device=torch.device("cpu"), flops_per_token=1e6, peak_flops=peak, clock=clock)


def train(recorder, clock, steps, logged, seconds=2.0):
    rows, waited = [], 0.0
    for step in steps:
        clock.now += seconds
        waited += 0.25
        if step in logged:
            rows.append(recorder.record(step, torch.tensor(float(step)), HALF, {}, 1e-3, step * 4, step * 400, waited))
            waited = 0.0
    return rows


def test_the_rows_of_a_run():
    clock = Clock()
    recorder = metrics(clock)
    recorder.start(0, tokens=0)
    rows = train(recorder, clock, range(1, 26), {1, 10, 20, 25})
    assert list(rows[1]) == [
        "step", "samples", "tokens", "loss", "grad_norm", "lr", "step_seconds", "data_wait_seconds",
        "tokens_per_second", "tokens_per_second_per_device", "tflops_per_device", "mfu", "memory_peak_gib",
    ]  # fmt: skip
    assert rows[1]["loss"] == 10.0 and rows[1]["samples"] == 40 and rows[1]["tokens"] == 4000
    for row in rows:
        assert row["step_seconds"] == pytest.approx(2.0)
        assert row["data_wait_seconds"] == 0.25
        assert row["tokens_per_second"] == pytest.approx(200)
        assert row["tokens_per_second_per_device"] == pytest.approx(100)
        assert row["tflops_per_device"] == pytest.approx(1e-4)
        assert row["mfu"] == pytest.approx(1e-4)


def test_validation_and_saves_are_in_no_steps_time():
    clock = Clock()
    recorder = metrics(clock, peak=None)
    recorder.start(0, tokens=0)
    train(recorder, clock, range(1, 5), {1})
    with pytest.raises(RuntimeError), recorder.paused():
        clock.now += 1000
        raise RuntimeError
    with recorder.paused():
        clock.now += 500
    (row,) = train(recorder, clock, range(5, 11), {10})
    assert row["step_seconds"] == pytest.approx(2.0) and row["mfu"] is None


def test_the_rows_of_a_resumed_run():
    clock = Clock()
    recorder = metrics(clock)
    clock.now += 60  # setting up
    recorder.start(13, tokens=13 * 400)
    rows = train(recorder, clock, range(14, 26), {20, 25})
    assert rows[0]["tokens_per_second"] == pytest.approx(200) and rows[0]["step_seconds"] == pytest.approx(2.0)


def test_a_loss_in_float64_keeps_its_bits():
    recorder = metrics(Clock())
    recorder.start(0, tokens=0)
    loss = torch.tensor(1 / 3, dtype=torch.float64)
    assert recorder.record(1, loss, loss, {}, 0.0, 1, 1, 0.0)["loss"] == 1 / 3


def test_peak_memory_grows_by_what_is_held():
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(max(before, 2**28) // 4 + 2**24)
    assert peak_memory_bytes(torch.device("cpu")) >= before + 2**24
    assert held[0] == 1


def test_rows_of_validation():
    assert validation_row(3, 2.5, 1.9) == {"step": 3, "validation_loss": 2.5, "bits_per_byte": 1.9}
    assert validation_row(3, 2.5, 1.9, "code")["set"] == "code"


@pytest.mark.gpu
def test_on_a_gpu_the_peak_is_torchs_and_the_window_holds_the_devices_work():
    device = torch.device("cuda")
    held = torch.ones(2**26, device=device)
    assert peak_memory_bytes(device) >= held.nbytes
    peak = peak_flops(torch.cuda.get_device_name())
    recorder = Metrics(devices=1, device=device, flops_per_token=1, peak_flops=peak)
    recorder.start(0, tokens=0)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    a = torch.randn(8192, 8192, device=device)
    start.record()
    for _ in range(20):
        a = (a @ a).clamp(-1, 1)
    end.record()
    row = recorder.record(1, a.sum(), a.sum(), {}, 0.0, 1, 1, 0.0)
    assert row["step_seconds"] >= start.elapsed_time(end) / 1000

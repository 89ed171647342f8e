"""Rows of metrics out of what the trainer hands over each step, measured without making the device wait; and how much
a card could do, of which MFU is the part that a run uses.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from titanlite.observe.jsonl import Row


@dataclass
class Metrics:
    """Rows of the steps that a run logs. Times are of this process."""

    devices: int
    device: torch.device
    flops_per_token: float
    peak_flops: float | None
    clock: Callable[[], float] = time.perf_counter

    def start(self, step: int, tokens: int) -> None:
        """Begin timing after `step`, with `tokens` trained; call right before the first step of this process."""
        self._window = step, tokens
        self._window_start = self.clock()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside (validation, saving) is not part of any step's time."""
        self._synchronise()
        before = self.clock()
        try:
            yield
        finally:
            self._synchronise()
            self._window_start += self.clock() - before

    def record(
        self,
        step: int,
        loss: Tensor,
        grad_norm: Tensor,
        reports: Mapping[str, Tensor],
        lr: float,
        samples: int,
        tokens: int,
        data_wait_seconds: float,
    ) -> Row:
        """The row of a step that was just taken. Reads the device.

        `loss`, `grad_norm` and what the model `reports` are over the global batch; numbers of a report `load` are
        `model/load/0`, `model/load/1` … in the row. `samples` and `tokens` count from the start of the
        run, `data_wait_seconds` from the row before. Seconds in the row are means over the steps since then; rates are
        of the same window.
        """
        before, trained = self._window
        loss_value, norm_value = loss.item(), grad_norm.item()  # waits for the device, so the clock is read after it
        seconds = max(self.clock() - self._window_start, 1e-9)
        tokens_per_second = (tokens - trained) / seconds
        per_device = tokens_per_second / self.devices
        row = {
            "step": step,
            "samples": samples,
            "tokens": tokens,
            "loss": loss_value,
            "grad_norm": norm_value,
            "lr": lr,
            "step_seconds": seconds / (step - before),
            "data_wait_seconds": data_wait_seconds / (step - before),
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_device": per_device,
            "tflops_per_device": per_device * self.flops_per_token / 1e12,
            "mfu": mfu(per_device, self.flops_per_token, self.peak_flops),
            "memory_peak_gib": peak_memory_bytes(self.device) / 2**30,
        }
        for name, report in reports.items():
            names = [f"model/{name}/{index}" for index in range(report.numel())] if report.dim() else [f"model/{name}"]
            row |= dict(zip(names, report.flatten().tolist(), strict=True))
        self.start(step, tokens)
        return row

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory held at once so far: torch's allocations on a CUDA device, else this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# Pattern in the driver's name of the card, and FLOP/s; the first that matches a whole word holds. Makers' figures for
# dense bf16 matrix products with float32 accumulation: data sheets that quote structured sparsity are halved. A card
# that is not listed has no MFU rather than a guessed one.
_PEAKS = {
    r"GB200": 2500e12, r"B[23]00": 2250e12,
    r"GH200": 989e12, r"H[12]00 NVL": 835e12, r"H[18]00 PCIe": 756e12, r"H200|H[18]00": 989e12, r"H20": 148e12,
    r"A[18]00": 312e12, r"A30": 165e12,
    r"L40S": 362e12, r"L40": 181e12, r"L4": 121e12,
    r"RTX 5090": 209.5e12, r"RTX 4090": 165.2e12, r"RTX 3090": 71.2e12,
    r"MI3(?:00|25)X": 1307e12,
}  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of one card by the name its driver gives ('NVIDIA H100 80GB HBM3'); None if not known."""
    # A slice of a card (MIG) is not the card, and laptop chips share names with larger ones.
    if re.search(r"\bMIG\b|\bLaptop\b|\bMax-Q\b", device_name):
        return None
    return next((peak for name, peak in _PEAKS.items() if re.search(rf"\b(?:{name})\b", device_name)), None)


def mfu(tokens_per_second_per_device: float, flops_per_token: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation from 0 to 1 (PaLM, appendix B): the model's own FLOP/s over the card's peak."""
    return None if peak is None else tokens_per_second_per_device * flops_per_token / peak

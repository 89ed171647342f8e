"""What all contestants share: sizes, optimizer settings, the text they read, and the gate that takes turns.

A contestant is a process of its own. It trains for ever; between two steps it calls `Gate.boundary`, which blocks on a
pipe until the referee (`benchmarks/single_device.py`) lets it take so many steps more, and reports how long they took.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import dataclass

LEARNING_RATE = 3e-4
BETAS = (0.9, 0.95)
ADAM_EPS = 1e-8
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
INIT_STD = 0.02
NORM_EPS = 1e-5
ROPE_THETA = 10_000.0


@dataclass(frozen=True)
class Settings:
    """One contestant's task."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn_dim: int
    vocab_size: int
    sequence_length: int
    batch: int
    """Sequences in a step; a step is one forward and backward pass."""
    precision: str
    """`float32` or `bfloat16` (mixed: weights and optimizer states in float32)."""
    compile: bool
    corpus: str
    """File whose bytes are the tokens."""
    folder: str
    """For whatever the contestant wants to write."""

    @staticmethod
    def from_command_line() -> Settings:
        return Settings(**json.loads(sys.argv[1]))


class Gate:
    """Holds a contestant between its steps. Speaks JSON lines: the number of steps comes in, a report goes out."""

    def __init__(self, parameters: int) -> None:
        self._reports = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print goes to the log, not between the reports
        self._left = 0
        self._running = False
        self._parameters = parameters

    def boundary(self) -> None:
        """To be called before the first step and after each. Ends the process when the referee hangs up."""
        if self._running:
            self._left -= 1
            if self._left == 0:
                self._report()
        if self._left == 0:
            self._left = self._wait()
            self._running = True
            self._cpu_started, self._started = time.process_time(), time.perf_counter()

    def _report(self) -> None:
        import torch

        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._started
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        report = {
            "seconds": seconds,
            "cpu_seconds": time.process_time() - self._cpu_started,
            "memory_peak_bytes": torch.cuda.max_memory_allocated() if cuda else rss,
            "parameters": self._parameters,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "torch": torch.__version__,
        }
        print(json.dumps(report), file=self._reports, flush=True)

    def _wait(self) -> int:
        line = sys.stdin.readline()
        if not line:
            raise SystemExit(0)
        return int(line)

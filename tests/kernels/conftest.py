"""Kernels' tests run on a CUDA device where there is one, else in Triton's interpreter, in a process of its own.

Files called `run_*.py` hold them; pytest collects those only when it is given their names, as `run_on_device` does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from titanlite_kernels.optional_triton import INSTALLED, INTERPRETING

ROOT = Path(__file__).parents[2]


def _round_as_devices_do() -> None:
    """Have the interpreter round float32 to the nearest bfloat16 or float8, as every device does; it cuts bits off, and
    makes other numbers of bfloat16's smallest.
    """
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    convert = interpreter._convert_float
    rounded = {
        tl.bfloat16: (torch.bfloat16, torch.uint16),
        tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
        tl.float8e5: (torch.float8_e5m2, torch.uint8),
    }

    def rounding(values: np.ndarray, source: object, target: object, mode: object) -> np.ndarray:
        if source == tl.float32 and target in rounded:
            dtype, bits = rounded[target]
            return torch.from_numpy(np.array(values)).to(dtype).view(bits).numpy()
        if source == tl.bfloat16 and target == tl.float32:
            return values.astype(np.uint32) << 16
        return convert(values, source, target, mode)

    interpreter._convert_float = rounding


if INTERPRETING:
    _round_as_devices_do()


@pytest.fixture
def run_on_device() -> Callable[..., None]:
    """Run the tests in files beside this one, with kernels that work; imports are dear, so one process for all."""
    if not INSTALLED:
        pytest.skip("needs Triton: pip install 'triton>=3.6' (Linux)")

    def run(*files: str) -> None:
        interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
        paths = [str(Path(__file__).parent / file) for file in files]
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *paths]
        process = subprocess.run(command, cwd=ROOT, env=os.environ | interpreted, capture_output=True, text=True)
        assert process.returncode == 0, process.stdout + process.stderr

    return run

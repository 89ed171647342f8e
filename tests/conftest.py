"""What every test gets: one thread a process, a fixed seed, and no GPU tests where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two OpenMP threads on a busy two-core machine collapse

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make the n-th step from now on have a gradient that is not a number."""
    from titanlite.parallel.program import Program

    forward_backward = Program.forward_backward

    def at(step: int) -> None:
        steps = iter(range(1, 10**6))

        def poisoned(self: Program, batch: object) -> torch.Tensor:
            loss = forward_backward(self, batch)  # type: ignore[arg-type]
            if next(steps) == step:
                gradient = next(self.model.parameters()).grad
                assert gradient is not None
                gradient[0] = float("nan")
            return loss

        monkeypatch.setattr(Program, "forward_backward", poisoned)

    return at


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

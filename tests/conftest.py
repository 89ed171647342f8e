"""What every test gets: one thread a process, a fixed seed, one pool of workers, and no GPU tests without a GPU."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two OpenMP threads on a busy two-core machine collapse

import pytest
import torch
from support.pool import Pool
from support.tiny import write_tiny

QUICK = {"recipe", "plan", "parallel", "optim", "data", "observe"}
"""Folders whose tests `./scripts/test.sh --quick` runs, unless they start other processes by one of these fixtures."""
_NOT_QUICK = {"pool", "run_on_device"}

torch.set_num_threads(1)
# The compiler's cache does not tell apart programs for other vectors, which here would corrupt memory or not build.
CACHE = f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}_{torch.backends.cpu.get_cpu_capability()}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", CACHE)

# Where the tests run in the background these are ignored, and so they would be by the processes that tests signal.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """The only one of the session; its workers start when tests first need them."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What parity tests train on."""
    from support.parity.parity_runs import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt")


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a tiny recipe and its corpus; `TINY` of the test's module says how it differs."""
    write_tiny(tmp_path, **getattr(request.module, "TINY", {}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def torch_of_the_check(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have the recipe check take torch for another version; for 2.13, unless told otherwise, whatever is installed."""

    def claim(found: str) -> None:
        monkeypatch.setattr("titanlite.plan.rules.conflicts.version", lambda _: found)

    claim("2.13.0")
    return claim


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make the n-th step from now on have a gradient that is not a number."""
    from titanlite.parallel.model import Batch, ParallelModel

    forward_backward = ParallelModel.forward_backward

    def at(step: int) -> None:
        steps = iter(range(1, 10**6))

        def poisoned(self: ParallelModel, batch: Batch, valid: torch.Tensor) -> torch.Tensor:
            loss = forward_backward(self, batch, valid)
            if next(steps) == step:
                gradient = next(self.module.parameters()).grad
                assert gradient is not None
                gradient[0] = float("nan")
            return loss

        monkeypatch.setattr(ParallelModel, "forward_backward", poisoned)

    return at


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "needs a CUDA device"
    if tuple(map(int, version("torch").split(".")[:2])) < (2, 13):
        reasons["splits"] = "schedules that split the backward pass need torch 2.13"
    for item in items:
        if item.path.parent.name in QUICK and not _NOT_QUICK.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("quick")
        for marker in reasons.keys() & item.keywords:
            item.add_marker(pytest.mark.skip(reason=reasons[marker]))

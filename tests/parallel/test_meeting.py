"""How ranks find each other: under a name that no earlier start used, and with clear words when they do not."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
from torch.distributed import DistNetworkError, TCPStore  # type: ignore[attr-defined]

from titanlite.errors import UsageError
from titanlite.parallel.world import is_peer_failure, open_store
from titanlite.plan.launch import Launch


@contextmanager
def agent_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[TCPStore]:
    """The store of a torchrun agent, which outlives the processes it starts."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    yield store


def met(size: int, value: str) -> list[str]:
    """Each rank leaves a value for the others to see; what the first one left, as each of them sees it."""
    seen = [""] * size

    def rank(number: int) -> None:
        store = open_store(Launch(rank=number, size=size), 120)
        if number == 0:
            store.set("address", value)
        store.wait(["address"], timedelta(seconds=120))
        seen[number] = store.get("address").decode()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in reversed(threads):  # the first rank is the last to come
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def test_no_start_sees_what_an_earlier_one_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's agent keeps its store: without names of their own, ranks would dial dead processes."""
    with agent_store(monkeypatch):
        for size, value in ((3, "first"), (3, "second"), (2, "third"), (4, "fourth")):
            assert met(size, value) == [value] * size


@pytest.mark.parametrize(
    ("rank", "taken"),
    [
        pytest.param(1, False, id="nobody listens"),
        pytest.param(0, False, id="nobody comes"),
        pytest.param(0, True, id="another program has the port"),
    ],
)
def test_ranks_that_cannot_meet_say_where_and_why(monkeypatch: pytest.MonkeyPatch, rank: int, taken: bool) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        port = other.getsockname()[1]
        if taken:
            other.listen()
        else:
            other.close()
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UsageError) as failure:
            open_store(Launch(rank=rank, size=2), 1)
    said = str(failure.value)
    assert said.startswith(f"rank {rank} of 2 could not meet the others at localhost:{port} within 1 s"), said
    assert "parallel.timeout_seconds" in said and "MASTER_PORT" in said and "\n" not in said


def test_whose_fault_an_error_is() -> None:
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:1"
    assert is_peer_failure(RuntimeError(gloo)) and is_peer_failure(DistNetworkError("the socket timed out"))
    assert not is_peer_failure(RuntimeError("mat1 and mat2 cannot be multiplied"))
    assert not is_peer_failure(ValueError(gloo))


@pytest.mark.parametrize(("innermost", "lost"), [(ValueError("its own"), False), (DistNetworkError("gone"), True)])
def test_causes_may_form_a_ring(innermost: Exception, lost: bool) -> None:
    """Issue 14, item 17."""
    outer, middle = RuntimeError("outer"), RuntimeError("middle")
    outer.__cause__, middle.__cause__, innermost.__cause__ = middle, innermost, outer
    assert is_peer_failure(outer) is lost and is_peer_failure(innermost) is lost

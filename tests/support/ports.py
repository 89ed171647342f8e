"""Ports for the processes that tests start, and those that they listen on."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path


def free_port() -> int:
    """One that nobody listens on, and that the system gives to nobody meanwhile.

    Connections that go out get theirs from 32768 on. At random, for other tests may look for one at the same time.
    """
    numbers = random.SystemRandom()
    while True:
        port = numbers.randrange(10_000, 30_000)
        with suppress(OSError), socket.socket() as tried:
            tried.bind(("", port))
            return port


def family(process: int) -> list[int]:
    """The process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = file.read_text().rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(file.parent.name))
    found = [process]
    for each in found:
        found += children.get(each, [])
    return found


def listeners(processes: Iterable[int]) -> Iterator[tuple[int, str, int]]:
    """Process, address and port of each TCP socket that one of them listens on, as `ss -ltnp` lists them."""
    sockets: dict[str, list[int]] = {}
    for process in processes:
        with suppress(OSError):
            for number in Path(f"/proc/{process}/fd").iterdir():
                with suppress(OSError):
                    sockets.setdefault(os.readlink(number), []).append(process)
    for table, kind in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            address, _, port = local.partition(":")
            words = (int(address[start : start + 8], 16) for start in range(0, len(address), 8))
            if state == "0A":
                for process in sockets.get(f"socket:[{inode}]", []):
                    yield process, socket.inet_ntop(kind, b"".join(struct.pack("=I", w) for w in words)), int(port, 16)

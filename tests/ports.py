"""Ports for the processes that tests start."""

from __future__ import annotations

import random
import socket
from contextlib import suppress


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

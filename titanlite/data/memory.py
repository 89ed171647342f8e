"""Texts that do not fit into memory: an error of the process that reads them, before the system kills one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from titanlite.errors import DataError
from titanlite.plan.launch import launch_environment_or_default
from titanlite.text import format_bytes

_CGROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Limit and use of a container's memory, by version 2 and 1 of control groups."""


@contextmanager
def within_memory(what: str) -> Iterator[None]:
    """Give what is read within the memory that is free now, shared among the ranks of this machine, and no more.

    Linux grants more than there is, and kills when it is used. Raises `DataError` that begins with `what`, instead.
    """
    free = _free_bytes() if sys.platform == "linux" else None
    if free is None:
        yield
        return
    import resource  # not on Windows

    before = resource.getrlimit(resource.RLIMIT_DATA)
    free //= max(1, launch_environment_or_default().local_size)
    limit = 1024 * _number_after("VmData:", Path("/proc/self/status")) + free
    allowed = [each for each in before if each != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([limit, *allowed]), before[1]))
    try:
        yield
    except MemoryError as error:
        raise DataError(
            f"{what}: does not fit into memory ({format_bytes(free)} are free for each rank). Prepare it with "
            "`titanlite data prepare`, and name the token file; a text file is one document, read whole: cut it into "
            "several files, or into the lines of a .jsonl file."
        ) from error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _free_bytes() -> int | None:
    """What the system, or this container, can give without taking it from others; None if that is unknown."""
    free = None
    with suppress(OSError, ValueError):
        free = 1024 * sum(_number_after(name, Path("/proc/meminfo")) for name in ("MemAvailable:", "SwapFree:"))
    for names in _CGROUPS:
        with suppress(OSError, ValueError):  # "max": no limit
            limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in names)
            statistics = Path("/sys/fs/cgroup", names[0]).with_name("memory.stat")
            free = min(free or limit, max(0, limit - used + _number_after("inactive_file", statistics)))
    return free


def _number_after(name: str, path: Path) -> int:
    """The number that follows `name`. Raises `OSError`, or `ValueError` without one."""
    words = path.read_text().split()
    return int(words[words.index(name) + 1])

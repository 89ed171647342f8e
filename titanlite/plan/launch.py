"""Who started this process as one of how many: torchrun's variables, Slurm's, or none. Reads the environment alone."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from titanlite.errors import UsageError

# What schedulers, launchers and users send to have a job end.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
MAX_STARTS = 2**31  # a number of a start from here on is none: the file that says so is damaged

_FIX = "Start the run by torchrun or srun, which set these; or, alone, without RANK, WORLD_SIZE and Slurm's variables."
_PRINTING_SECONDS = 60.0  # within these the first rank comes to where another one failed, or never
_SRUN_SECONDS = 3.0  # for which others wait, so that it has printed its error


@dataclass(frozen=True)
class Launch:
    rank: int = 0
    size: int = 1
    local_rank: int = 0  # number among those of its machine: which GPU is its own
    local_size: int = 1  # how many there are on its machine (at most, where Slurm has put more on some than on others)
    address: str | None = None  # where the ranks meet: set if the launcher did not tell torch itself
    port: int | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def launch_environment(environment: Mapping[str, str] = os.environ) -> Launch:
    """This process's place: `RANK` and its kin (torchrun), else a Slurm step's variables (srun), else alone.

    Raises `UsageError` for variables that are set in part, or to nonsense.
    """
    number = partial(_number, environment)
    if "RANK" in environment:
        place = Launch(number("RANK"), number("WORLD_SIZE"), number("LOCAL_RANK", "0"), number("LOCAL_WORLD_SIZE", "1"))
        names = ("RANK", "WORLD_SIZE")
        if place.size > 1:
            _require(environment, "MASTER_ADDR")
            number("MASTER_PORT")
    # Only a step has these: in the batch script around it there is one process, whatever the job's size.
    elif "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        step = environment["SLURM_STEP_ID"]  # `batch`, or another word, in a job script
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS")
        tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")  # such as "8(x2),4"
        # One for each step of each job, below those that Linux gives to outgoing connections.
        free_port = 10_000 + (31 * number("SLURM_JOB_ID", "0") + (int(step) if step.isdecimal() else 0)) % 20_000
        place = Launch(
            rank=number(names[0]),
            size=number(names[1]),
            local_rank=number("SLURM_LOCALID", "0"),
            local_size=max(map(int, re.findall(r"(?:^|,)(\d+)", tasks)), default=1),
            address=environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", "localhost")),
            port=number("MASTER_PORT") if environment.get("MASTER_PORT") else free_port,
        )
    elif number("WORLD_SIZE", "1") > 1:
        raise UsageError(f"WORLD_SIZE is {environment['WORLD_SIZE']}, and RANK is not set: {_FIX}")
    else:
        return Launch()
    if place.rank >= place.size:
        raise UsageError(f"{names[0]} is {place.rank}, and {names[1]} {place.size}: ranks count from 0. {_FIX}")
    return place


def launch_environment_or_default() -> Launch:
    """Like `launch_environment`, but a single process if the variables are invalid."""
    with suppress(UsageError):
        return launch_environment()
    return Launch()


@dataclass(frozen=True)
class Torchrun:
    """What torchrun tells its processes."""

    restarts: int  # how often it has started them again
    restarts_left: int
    agents: int  # machines (their torchruns) that take part
    names: tuple[str, ...]
    """What this job's starts share: the name of torchrun's folder, and the job's id if machines come and go."""
    elastic: bool  # whether the run goes on without a machine that leaves: `scripts/elastic.env` says so


def torchrun_environment(environment: Mapping[str, str] = os.environ) -> Torchrun | None:
    """None under another launcher, or none. Raises `UsageError` for variables that are not torchrun's."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    number = partial(_number, environment)
    restarts = number("TORCHELASTIC_RESTART_COUNT", "0")
    elastic = environment.get("TITANLITE_ELASTIC") == "1"
    job = environment["TORCHELASTIC_RUN_ID"]
    folder = Path(environment.get("TORCHELASTIC_ERROR_FILE", "")).parts[-4:-3]  # FOLDER/attempt_0/0/error.json
    return Torchrun(
        restarts=restarts,
        restarts_left=number("TORCHELASTIC_MAX_RESTARTS", "0") - restarts,
        agents=number("GROUP_WORLD_SIZE", "1"),
        names=(*folder, job) if elastic and job != "none" else folder,  # the id of every job that was given none
        elastic=elastic,
    )


def torchrun_environment_or_none() -> Torchrun | None:
    """Like `torchrun_environment`, but None if the variables are invalid."""
    with suppress(UsageError):
        return torchrun_environment()
    return None


def prints_for_all() -> bool:
    """Whether this rank prints the error that all ranks end with: the first one, or of each torchrun's the first.

    torchrun kills its ranks when one ends: so others wait until the first has printed (`mark_printed`), or print it.
    """
    place, mark = launch_environment_or_default(), _printed_mark()
    if mark is None:
        if not place.is_first and "SLURM_STEP_ID" in os.environ:
            time.sleep(_SRUN_SECONDS)  # srun may end all ranks when one has, and has no folder where to mark anything
        return place.is_first
    until = time.monotonic() + (_PRINTING_SECONDS if place.local_rank else 0.0)
    while not (printed := mark.exists()) and time.monotonic() < until:
        time.sleep(0.02)
    return not printed


def mark_printed() -> None:
    """Have the ranks that wait in `prints_for_all` end."""
    with suppress(OSError):  # then they wait their time
        if (mark := _printed_mark()) is not None:
            mark.touch()


def _printed_mark() -> Path | None:
    """In the folder that torchrun makes for each start of its ranks; None under another launcher, or none."""
    path = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))  # FOLDER/attempt_0/0/error.json
    return path.parents[1] / "printed" if len(path.parts) > 3 else None


def end_process(code: int) -> NoReturn:
    if launch_environment_or_default().size > 1:
        # At once: threads of a process group that something still refers to abort the interpreter's usual end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _number(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    """A variable that holds a number from 0 on. Raises `UsageError`."""
    text = environment.get(name, default) if default is not None else _require(environment, name)
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UsageError(f"{name} is '{text[:40]}', and should be a number from 0 on. {_FIX}")
    return int(text)


def _require(environment: Mapping[str, str], name: str) -> str:
    """Raises `UsageError` if the variable is not set."""
    if not environment.get(name):
        raise UsageError(f"{name} is not set, though this process is one of a job's. {_FIX}")
    return environment[name]


def first_host(nodes: str) -> str:
    """The first machine of Slurm's short form: `gpu[003-007,012],login1` -> `gpu003`."""
    match = re.match(r"[^,\[]*(?:\[([^\]]*)\][^,\[]*)*", nodes)
    return re.sub(r"\[([0-9]+)[^\]]*\]", r"\1", match[0] if match else nodes)

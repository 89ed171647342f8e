"""Who started this process as one of how many: torchrun's variables, Slurm's, or none. Reads the environment alone."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""What schedulers, launchers and users send to have a job end."""

_NO_ID = "none"
"""torchrun's id of every job that was given none."""


@dataclass(frozen=True)
class Launch:
    """One process of a job."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number among those of its machine: which GPU is its own."""
    address: str | None = None
    """Where the ranks meet: set if the launcher did not tell torch itself."""
    port: int | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def launched(environment: Mapping[str, str] = os.environ) -> Launch:
    """This process's place: `RANK` and its kin (torchrun), else a Slurm step's variables (srun), else alone.

    A Slurm job's first machine is where its ranks meet, on a port that follows from the job's number.
    """
    if "RANK" in environment:
        return Launch(
            rank=int(environment["RANK"]),
            size=int(environment.get("WORLD_SIZE", "1")),
            local_rank=int(environment.get("LOCAL_RANK", "0")),
        )
    # Only a step has these: in the batch script around it there is one process, whatever the job's size.
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        return Launch(
            rank=int(environment["SLURM_PROCID"]),
            size=int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))),
            local_rank=int(environment.get("SLURM_LOCALID", "0")),
            address=environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", "localhost")),
            port=int(environment.get("MASTER_PORT") or _port(environment)),
        )
    return Launch()


@dataclass(frozen=True)
class Torchrun:
    """What torchrun tells its processes about their life so far."""

    restarts: int
    """How often it has started them again."""
    restarts_left: int
    agents: int
    """Machines (their torchruns) that take part."""
    names: tuple[str, ...]
    """What the starts of this job have in common, and those of different jobs do not: the name of the folder that this
    torchrun keeps, and, where machines come and go, the job's id at the rendezvous if it was given one."""
    elastic: bool
    """Whether the run goes on without a machine that leaves: `scripts/elastic.env` says so."""


def torchrun(environment: Mapping[str, str] = os.environ) -> Torchrun | None:
    """torchrun's word; None under another launcher, or none."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    restarts = int(environment.get("TORCHELASTIC_RESTART_COUNT", "0"))
    elastic = environment.get("TITANLITE_ELASTIC") == "1"
    job = environment["TORCHELASTIC_RUN_ID"]
    folder = Path(environment.get("TORCHELASTIC_ERROR_FILE", "")).parts[-4:-3]  # FOLDER/attempt_0/0/error.json
    return Torchrun(
        restarts=restarts,
        restarts_left=int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0")) - restarts,
        agents=int(environment.get("GROUP_WORLD_SIZE", "1")),
        names=(*folder, job) if elastic and job != _NO_ID else folder,
        elastic=elastic,
    )


def end_process(code: int) -> NoReturn:
    """End with `code`. With other ranks: at once, since threads of a process group that something still refers to
    abort the interpreter when it is taken down.
    """
    if launched().size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _port(environment: Mapping[str, str]) -> int:
    """One for each step of each job, below those that Linux gives to outgoing connections."""
    job, step = int(environment.get("SLURM_JOB_ID", "0")), environment["SLURM_STEP_ID"]
    return 10_000 + (31 * job + (int(step) if step.isdigit() else 0)) % 20_000


def first_host(nodes: str) -> str:
    """The first machine of Slurm's short form: `gpu[003-007,012],login1` -> `gpu003`."""
    match = re.match(r"[^,\[]*(?:\[([^\]]*)\][^,\[]*)*", nodes)
    first = match[0] if match else nodes
    return re.sub(r"\[([0-9]+)[^\]]*\]", r"\1", first)

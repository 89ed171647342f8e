"""Which rank this is, from each launcher's variables."""

from __future__ import annotations

import pytest

from titanlite.launch import Launch, Torchrun, first_host, launched, torchrun

STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "13",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_LOCALID": "5",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_JOB_ID": "1234567",
}


def test_alone() -> None:
    assert launched({}) == Launch(rank=0, size=1, local_rank=0)
    batch_script = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "16"}
    assert launched(batch_script).size == 1, "the script around the steps is one process"


def test_torchrun_comes_first() -> None:
    place = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert launched({**STEP, **place}) == Launch(rank=3, size=8, local_rank=1)


def test_slurm() -> None:
    assert launched(STEP) == Launch(
        rank=13, size=16, local_rank=5, address="gpu007", port=10_000 + 31 * 1234567 % 20_000
    )
    told = launched({**STEP, "MASTER_ADDR": "head", "MASTER_PORT": "99"})
    assert (told.address, told.port) == ("head", 99)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("localhost", "localhost"),
        ("gpu[003-007,012],login1", "gpu003"),
        ("a1,b2", "a1"),
        ("rack[1-2]-node[04,09]", "rack1-node04"),
        ("n[9]", "n9"),
        ("c[1,5-6]x.example.org,d", "c1x.example.org"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_what_torchrun_tells() -> None:
    assert torchrun({"RANK": "0", "WORLD_SIZE": "2"}) is None
    told = {"TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_MAX_RESTARTS": "5"}
    assert torchrun(told) == Torchrun(restarts=2, restarts_left=3, agents=1, names=(), elastic=False)
    elastic = torchrun({**told, "GROUP_WORLD_SIZE": "4", "TITANLITE_ELASTIC": "1"})
    assert elastic is not None and elastic.elastic and elastic.agents == 4


@pytest.mark.parametrize(
    ("job", "elastic", "file", "names"),
    [
        ("night", "1", "/tmp/torchelastic_ab/night_cd/attempt_3/0/error.json", ("night_cd", "night")),
        ("night", "0", "/tmp/torchelastic_ab/night_cd/attempt_0/7/error.json", ("night_cd",)),
        ("none", "1", "/tmp/torchelastic_ab/none_cd/attempt_0/0/error.json", ("none_cd",)),
        ("night", "1", "", ("night",)),
        ("none", "0", "", ()),
    ],
)
def test_what_all_starts_of_a_job_have_in_common(job: str, elastic: str, file: str, names: tuple[str, ...]) -> None:
    """torchrun calls every job without an id "none"."""
    told = {"TORCHELASTIC_RUN_ID": job, "TORCHELASTIC_ERROR_FILE": file, "TITANLITE_ELASTIC": elastic}
    under = torchrun(told)
    assert under is not None and under.names == names

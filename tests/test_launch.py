"""Which rank this is, from each launcher's variables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny import write_tiny

from titanlite.cli.main import run_command
from titanlite.cli.train import main
from titanlite.errors import UsageError
from titanlite.plan.launch import Launch, Torchrun, first_host, launch_environment, torchrun_environment

STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "13",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_LOCALID": "5",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_JOB_ID": "1234567",
}


def test_alone() -> None:
    assert launch_environment({}) == Launch(rank=0, size=1, local_rank=0)
    batch_script = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "16"}
    assert launch_environment(batch_script).size == 1, "the script around the steps is one process"


def test_torchrun_comes_first() -> None:
    place = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    place |= {"MASTER_ADDR": "head", "MASTER_PORT": "99"}
    assert launch_environment({**STEP, **place}) == Launch(rank=3, size=8, local_rank=1, local_size=4)


def test_slurm() -> None:
    assert launch_environment(STEP) == Launch(
        rank=13, size=16, local_rank=5, address="gpu007", port=10_000 + 31 * 1234567 % 20_000
    )
    assert launch_environment({**STEP, "SLURM_STEP_TASKS_PER_NODE": "5(x2),6"}).local_size == 6
    told = launch_environment({**STEP, "MASTER_ADDR": "head", "MASTER_PORT": "99"})
    assert (told.address, told.port) == ("head", 99)


MEETING = {"MASTER_ADDR": "head", "MASTER_PORT": "99"}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "99"}, "MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "head"}, "MASTER_PORT is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "head", "MASTER_PORT": "abc"}, "MASTER_PORT is 'abc'"),
        ({"RANK": "x", "WORLD_SIZE": "2", **MEETING}, "RANK is 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "0", **MEETING}, "RANK is 0, and WORLD_SIZE 0"),
        ({"RANK": "3", **MEETING}, "WORLD_SIZE is not set"),
        ({"RANK": "5", "WORLD_SIZE": "4", **MEETING}, "RANK is 5, and WORLD_SIZE 4"),
        ({"RANK": "-1", "WORLD_SIZE": "4", **MEETING}, "RANK is '-1'"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4, and RANK is not set"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}, "SLURM_NTASKS is not set"),
        ({**STEP, "SLURM_PROCID": "16"}, "SLURM_PROCID is 16, and SLURM_STEP_NUM_TASKS 16"),
        ({**STEP, "MASTER_PORT": "abc"}, "MASTER_PORT is 'abc'"),
        ({**STEP, "SLURM_JOB_ID": "abc"}, "SLURM_JOB_ID is 'abc'"),
        ({"RANK": "9" * 5000, "WORLD_SIZE": "4", **MEETING}, "RANK is '9+'"),
    ],
)
def test_variables_that_are_set_in_part(environment: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=f"^{said}.*torchrun or srun"):
        launch_environment(environment)


@pytest.mark.parametrize(
    "odd", [{"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "x"}, {**STEP, "SLURM_JOB_ID": "abc"}]
)
def test_a_process_that_was_started_oddly_ends_in_a_paragraph(tmp_path: Path, odd: dict[str, str]) -> None:
    """Issue 14, section D: also where its end is written down for the scripts."""
    write_tiny(tmp_path)
    words = [sys.executable, "-m", "titanlite.train", "recipe.toml"]
    codes = tmp_path / "codes"
    environment = {**os.environ, **odd, "TITANLITE_EXIT_CODE_FILE": str(codes)}
    process = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (process.returncode, codes.read_text()) == (2, "2\n")
    assert process.stderr.startswith(f"error: {list(odd)[-1]} is") and process.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--training.steps=0", "training.steps: must be"),
        ("--stpes=3", "training.steps"),
        ("--from-step=a", "--from-step: invalid int"),
        ("--allow-change=x.y", "--allow-change x.y"),
        ("--data.corpus=/nowhere", "/nowhere: data.corpus names no file"),
    ],
)
def test_what_is_wrong_on_all_ranks_is_printed_once_and_not_tried_again(tmp_path: Path, word: str, said: str) -> None:
    """Issue 14, item 20: torchrun kills all its ranks once one has ended, and only the first printed the error. Words
    that no rank understands, and data that none finds, were printed by all, and again at each of 100 restarts.
    """
    write_tiny(tmp_path)
    late = 'import os, time\nif os.environ.get("RANK") == "0":\n    time.sleep(1)\n'
    (tmp_path / "sitecustomize.py").write_text(late)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    process = subprocess.run(
        [*words, "-m", "titanlite.train", "recipe.toml", word],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, "torchrun starts again whatever ends otherwise"
    assert (process.stderr.count(said), process.stderr.count("exit code 2")) == (1, 1)


@pytest.mark.parametrize(("end", "said"), [("sys.exit(7)", "exit code 7"), ("os.kill(os.getpid(), 9)", "SIGKILL")])
def test_a_process_that_fails_ends_torchrun_without_its_traceback(tmp_path: Path, end: str, said: str) -> None:
    (tmp_path / "fails.py").write_text(f"import os, sys\n{end}\n")
    words = ["--standalone", "--nproc-per-node=1", "--max-restarts=0", str(tmp_path / "fails.py")]
    process = subprocess.run([sys.executable, "-m", "titanlite.agent", *words], capture_output=True, text=True)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert f"rank 0 ({said})" in process.stderr


@pytest.mark.parametrize("printed", [True, False])
def test_a_rank_prints_what_the_first_of_its_machine_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], printed: bool
) -> None:
    """On each machine, whatever its ranks' numbers are."""
    write_tiny(tmp_path, training={"steps": 0})
    attempt = tmp_path / "none_cd" / "attempt_0"
    place = {"RANK": "8", "WORLD_SIZE": "16", **MEETING}
    monkeypatch.setattr("titanlite.plan.launch._PRINTING_SECONDS", 0.1)
    for local_rank, prints in [("0", True)] * printed + [("1", not printed)]:
        (attempt / local_rank).mkdir(parents=True)
        own = {"LOCAL_RANK": local_rank, "TORCHELASTIC_ERROR_FILE": str(attempt / local_rank / "error.json")}
        for name, value in {**place, **own}.items():
            monkeypatch.setenv(name, value)
        assert run_command(main, [str(tmp_path / "recipe.toml")]) == 2
        assert ("training.steps" in capsys.readouterr().err) is prints


def test_they_are_told_of_in_a_paragraph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    write_tiny(tmp_path)
    assert run_command(main, [str(tmp_path / "recipe.toml")]) == 2
    assert "error: WORLD_SIZE is 4" in capsys.readouterr().err
    assert run_command(main, ["nowhere.toml"]) == 2
    assert "nowhere.toml" in capsys.readouterr().err


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
    assert torchrun_environment({"RANK": "0", "WORLD_SIZE": "2"}) is None
    told = {"TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_MAX_RESTARTS": "5"}
    assert torchrun_environment(told) == Torchrun(restarts=2, restarts_left=3, agents=1, names=(), elastic=False)
    for name in ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "GROUP_WORLD_SIZE"):
        for odd in ("", "x", "-1", "1.5", "\N{SUPERSCRIPT TWO}", "9" * 5000):
            with pytest.raises(UsageError, match=f"^{name} is"):
                torchrun_environment({**told, name: odd})
    elastic = torchrun_environment({**told, "GROUP_WORLD_SIZE": "4", "TITANLITE_ELASTIC": "1"})
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
    under = torchrun_environment(told)
    assert under is not None and under.names == names

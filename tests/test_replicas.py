"""Data-parallel replicas under torchrun: the curve of one process, on any number of ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.ports import free_port
from support.tiny import write_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny(
        tmp_path,
        lines=300,
        run={"name": "run"},
        model={"layers": 2},
        data={"validation_percent": 10},
        training={"global_batch": 5},
        validation={"every_steps": 3, "sequences": 7},
        optimizer={"name": "muon"},
        precision={"compute": "float64"},
        checkpoint={"every_steps": 2},
    )
    return tmp_path


def started(folder: Path, ranks: int, *arguments: str, folders: Sequence[Path] = ()) -> list[subprocess.Popen[bytes]]:
    """The recipe's processes, with the environment that torchrun gives them on one machine; each in its own folder."""
    port, processes = free_port(), []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost"}
        environment = {**os.environ, **place, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "titanlite.train", "recipe.toml", *arguments]
        place_to_run = folders[rank] if folders else folder
        processes.append(subprocess.Popen(command, cwd=place_to_run, env=environment, stderr=subprocess.PIPE))
    return processes


def ended(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes; one that is no planned end shows what its process said."""
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode in (0, 75), errors.decode()
    return [process.returncode for process in processes]


def launch(folder: Path, ranks: int, *arguments: str) -> None:
    ended(started(folder, ranks, *arguments))


def numbers(folder: Path, run: str) -> list[float]:
    rows = map(json.loads, (folder / "runs" / run / "metrics.jsonl").read_text().splitlines())
    kept = ("loss", "grad_norm", "validation_loss", "bits_per_byte")
    return [row[key] for row in rows for key in kept if key in row]


def test_a_signal_to_one_rank_stops_all_after_the_same_step(folder: Path) -> None:
    processes = started(folder, 2, "--run.name=signalled", "--training.steps=100000")
    metrics = folder / "runs/signalled/metrics.jsonl"
    while not metrics.is_file() or '"step": 5' not in metrics.read_text():
        assert processes[0].poll() is None
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    assert ended(processes) == [75, 75]
    assert json.loads((folder / "runs/signalled/status.json").read_text())["state"] == "stopped"


@pytest.mark.slow
def test_another_number_of_ranks_goes_on(folder: Path) -> None:
    """Five sequences over 2 and 3 ranks: padding on some, in float64, where a wrong factor cannot hide."""
    launch(folder, 1, "--run.name=whole")
    assert len(numbers(folder, "whole")) == 6 * 2 + 2 * 2
    launch(folder, 2, "--run.name=parts", "--run.stop_after_step=2", "--parallel.dp_shard=2")
    status = json.loads((folder / "runs/parts/status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("stopped", 75, 2)
    launch(folder, 3, "--run.name=parts", "--parallel.dp_replicate=3", "--training.microbatch=2")
    assert numbers(folder, "parts") == pytest.approx(numbers(folder, "whole"), rel=1e-11)


@pytest.mark.slow
def test_machines_that_share_no_disk_are_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The second rank's folder has no checkpoint: it would begin with fresh weights beside trained ones."""
    launch(folder, 1, "--run.name=alone", "--run.stop_after_step=2")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(folder / "corpus.txt", elsewhere)
    shutil.copy(folder / "recipe.toml", elsewhere)
    processes = started(folder, 2, "--run.name=alone", folders=(folder, elsewhere))
    said = [process.communicate(timeout=240)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [4, 4], said
    assert (
        "rank 1: " in said[0] and "not the folder that the first rank writes to" in said[0] and "error" not in said[1]
    ), said
    with (elsewhere / "corpus.txt").open("a") as file:
        file.write("one more line.\n" * 20)
    shared = f"--run.output_dir={folder / 'runs'}"
    processes = started(folder, 2, "--run.name=other", shared, folders=(folder, elsewhere))
    said = [process.communicate(timeout=240)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [2, 2] and "another corpus" in said[1], said


@pytest.mark.slow
def test_ranks_save_together_by_the_first_ones_clock(folder: Path) -> None:
    """A wish is heard by all one step later, so saves that are always due come after every second step."""
    by_the_clock = ("--checkpoint.every_steps=0", "--checkpoint.every_minutes=1e-9", "--checkpoint.mode=sync")
    launch(folder, 2, *by_the_clock, "--checkpoint.keep_last=0")
    saved = sorted(path.name for path in (folder / "runs" / "run" / "checkpoints").iterdir())
    assert saved == ["step-00000002", "step-00000004", "step-00000006"]

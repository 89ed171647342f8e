"""SIGKILL at random moments: the next start goes on from the last committed checkpoint, and the curve is the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors import safe_open

RECIPE = """
[model]
preset = "debug"
dim = 16
layers = 2
heads = 2
kv_heads = 1
ffn_dim = 24
[data]
corpus = "corpus.txt"
[training]
steps = {steps}
sequence_length = 32
global_batch = 4
[optimizer]
name = "muon"
[precision]
compute = "float32"
[checkpoint]
every_steps = 3
[metrics]
log_every = 1
tensorboard = false
"""
KILLS = 20
STEPS = 2500


def start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "titanlite.train", "recipe.toml", f"--run.name={name}"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


def curve(folder: Path, name: str) -> list[tuple[object, ...]]:
    rows = map(json.loads, (folder / "runs" / name / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["samples"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


def final_tensors(folder: Path, name: str) -> dict[str, bytes]:
    tensors = {}
    for file in (folder / "runs" / name / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors"):
        with safe_open(file, framework="numpy") as handle:
            tensors.update({key: handle.get_tensor(key).tobytes() for key in handle.keys()})  # noqa: SIM118
    return tensors


def trained_steps(folder: Path, name: str) -> int:
    """Rows written so far: how far the run has come, seen from outside."""
    try:
        return (folder / "runs" / name / "metrics.jsonl").read_text().count('"loss"')
    except FileNotFoundError:
        return 0


def test_twenty_sigkills_leave_no_trace_in_the_numbers(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("".join(f"{n} cubed is {n**3}.\n" for n in range(3000)))
    (tmp_path / "recipe.toml").write_text(RECIPE.format(steps=STEPS))
    whole = start(tmp_path, "whole")
    moments = random.Random(time.time_ns())  # other moments each time; whatever they are, the assertions must hold
    reached = []
    for _ in range(KILLS):
        process = start(tmp_path, "killed")
        begun = trained_steps(tmp_path, "killed")
        while process.poll() is None and trained_steps(tmp_path, "killed") <= begun:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        reached.append(trained_steps(tmp_path, "killed"))
    assert reached[-1] < STEPS, "the run must be long enough for every kill to hit it"
    finish(start(tmp_path, "killed"))
    finish(whole)

    assert curve(tmp_path, "killed") == curve(tmp_path, "whole")
    assert final_tensors(tmp_path, "killed") == final_tensors(tmp_path, "whole")
    leftovers = [name for name in os.listdir(tmp_path / "runs/killed/checkpoints") if not name.startswith("step-")]
    assert leftovers == []

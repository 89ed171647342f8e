"""Faults of one rank among others, and other numbers of ranks and layouts after each."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from support.chaos import elastic_run
from support.chaos.fault import EQUAL, Fault, Outcome
from support.chaos.nursery import PATIENCE_SECONDS
from support.chaos.sandbox import EVERY, STEPS, Sandbox
from support.ports import family, free_port

RELATIVE = 1e-9
"""Allowed between layouts in float64: sums in another order differ by 1e-14, the smallest mistake by far more."""

_FLOAT64 = ("--precision.compute=float64", "--model.heads=4", "--model.kv_heads=2")

SIZES = (
    (4, "--parallel.zero_stage=3"),
    (3, "--parallel.zero_stage=1"),
    (5, "--parallel.zero_stage=2"),
    (1, "--parallel.zero_stage=0"),
)
LAYOUTS = (
    (4, "--parallel.tp=2", "--parallel.zero_stage=1"),
    (4, "--parallel.pp=2", "--parallel.cp=2"),
    (4, "--parallel.dp_replicate=2", "--parallel.zero_stage=3"),
    (4, "--parallel.cp=2", "--parallel.tp=2"),
    (1, "--parallel.zero_stage=2"),
)
"""Ranks and layout of each part of a run."""


def through(what: str, parts: tuple[tuple[Any, ...], ...], slow: bool = False) -> Fault:
    """Each part stops after some steps and the next goes on; every sample is read, once, by one data rank."""

    def run(box: Sandbox) -> Outcome:
        curve, tensors = box.whole(*_FLOAT64)
        for number, (ranks, *layout) in enumerate(parts, 1):
            last = number == len(parts)
            limit = [] if last else [f"--run.stop_after_step={STEPS * number // len(parts)}"]
            first, chaos = box.step() + 1, {"fault": "samples_noted"}
            job = box.start(*_FLOAT64, *layout, *limit, ranks=ranks, **chaos).ended(0 if last else 75)
            _require_all_samples(box, range(first, box.step() + 1), ranks)
        found = box.curve()
        assert [row[:3] for row in found] == [row[:3] for row in curve]
        pairs = zip(np.array(found)[:, 3:5].flat, np.array(curve)[:, 3:5].flat, strict=True)  # loss and gradient norm
        apart = [abs(a - b) / abs(b) for a, b in pairs]
        weights = {name: np.frombuffer(data) for name, data in tensors.items() if name.startswith("model.")}
        final = box.tensors(STEPS)
        for name, expected in weights.items():
            apart.append(np.linalg.norm(np.frombuffer(final[name]) - expected) / np.linalg.norm(expected))
        assert max(apart) < RELATIVE
        compared = f"within {max(apart):.0e}, in float64; every sample once"
        return Outcome(0, compared, box.message(job.said, "resumed"))

    return Fault(21, what, "stopped and gone on with", run, slow)


def _require_all_samples(box: Sandbox, steps: range, ranks: int) -> None:
    """Each step's samples are the next in order, and each is met by as many ranks as any other."""
    met: dict[int, Counter[int]] = {step: Counter() for step in steps}
    for rank in range(ranks):
        notes = box.folder / f"samples-{rank}.jsonl"
        for step, *samples in map(json.loads, notes.read_text().splitlines()):
            met[step].update(samples)
        notes.unlink()
    for step, samples in met.items():
        assert sorted(samples) == list(range(4 * (step - 1), 4 * step)), f"step {step} read {samples}"
        assert len(set(samples.values())) == 1, f"step {step}: {samples}"


def machines(box: Sandbox) -> Outcome:
    """Each a torchrun of its own: two die, two come, one is signalled."""
    changes, rehearsal = elastic_run.rehearse(box.folder)
    for change in changes:
        killed = change.what.endswith("killed")
        assert change.lost_steps <= (2 * elastic_run.EVERY if killed else 0), "whoever is signalled saves first"
    batches, batch = elastic_run.trained(rehearsal.notes()), elastic_run.BATCH
    assert sorted(batches) == list(range(1, elastic_run.STEPS + 1))
    for step, samples in batches.items():
        assert sorted(samples) == list(range((step - 1) * batch, step * batch))
    pairs = zip(elastic_run.losses(box.run_folder("elastic")), elastic_run.alone(box.folder), strict=True)
    apart = max(abs(found - expected) / expected for found, expected in pairs)
    assert apart < RELATIVE
    said = "; ".join(f"{change.what}: {change.total:.0f} s" for change in changes)
    lost = sum(change.lost_steps for change in changes)
    return Outcome(lost, f"within {apart:.0e}, in float64; every sample once", said)


def killed_under_torchrun(box: Sandbox) -> Outcome:
    """One rank in its first life, another in the second: torchrun starts all of them again each time."""
    meeting = ("--rdzv-backend=static", f"--rdzv-endpoint=localhost:{free_port()}")  # as scripts/torchrun.sh has it
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, "--nproc-per-node=2", "--max-restarts=3"]
    process = subprocess.run(
        [*command, str(Path(__file__).with_name("faulty_train.py")), "titanlite.train", "recipe.toml"],
        cwd=box.folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CHAOS": json.dumps({"fault": "killed_in_two_lives", "step": 7})},
        capture_output=True,
        text=True,
        timeout=3 * PATIENCE_SECONDS,  # three starts
    )
    assert process.returncode == 0, process.stderr
    starts = [row["detail"] for row in box.events("started")]
    assert ["restart 0" in starts[0], "restart 1" in starts[1], "restart 2" in starts[2], len(starts)] == [1, 1, 1, 3]
    box.require_whole(ranks=2)
    lost = [int(reached) for reached in (box.folder / "killed").read_text().split()]
    resumed = [row["step"] for row in box.events("resumed")]
    assert all(0 <= a - b < 2 * EVERY for a, b in zip(lost, resumed, strict=True))
    return Outcome(sum(lost) - sum(resumed), EQUAL, starts[-1])


def rendezvous_lost(box: Sandbox) -> Outcome:
    """Two machines, each a torchrun; that at which they meet is lost, with its rank (issue 14, item 19)."""
    port = free_port()
    meet = ["--nnodes=2", "--nproc-per-node=1", f"--rdzv-endpoint=localhost:{port}"]
    command = [sys.executable, "-m", "titanlite.agent", *meet, "-m", "titanlite.train", "recipe.toml"]
    logs = [box.folder / f"agent-{number}.txt" for number in range(2)]

    def start(log: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*command, "--training.steps=100000"],
            cwd=box.folder,
            env=elastic_run.environment(),
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
        )

    agents = [start(logs[0])]
    try:
        box.until(lambda: _listens(port))
        agents.append(start(logs[1]))
        box.until(lambda: box.steps())
        for process in family(agents[0].pid):
            os.kill(process, signal.SIGKILL)
        code = agents[1].wait(PATIENCE_SECONDS)
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()
    reached, said = box.step(), logs[1].read_text()
    assert code == 75 and "Traceback" not in said, f"{code}: {said}"
    end = f"--run.stop_after_step={reached + 1}"
    box.start("--training.steps=100000", end, ranks=2).ended(75)
    box.start("--training.steps=100000", end, "--run.name=whole", ranks=2).ended(75)
    assert box.curve() == box.curve("whole") and box.tensors(reached + 1) == box.tensors(reached + 1, "whole")
    return Outcome(reached - box.resumed(), EQUAL, box.message(said, "has gone").replace(str(port), "29400"))


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


def hung(box: Sandbox) -> Outcome:
    words = ("--resilience.watchdog_seconds=8",)
    job = box.start(*words, ranks=2, fault="stopped", step=EVERY + 3, on=[1]).ended(1)
    logs = box.run_folder() / "logs"
    verdict = (logs / "watchdog.log").read_text().splitlines()[0]
    assert "rank 1 " in verdict and "rank 0 " not in verdict
    for rank in range(2):
        assert 'faulty_train.py", line' in (logs / f"rank-{rank:05d}.log").read_text(), "each rank leaves its stacks"
    reached = box.step()
    assert verdict in job.said
    box.train(*words, ranks=2)
    box.require_whole(ranks=2)
    return Outcome(reached - box.resumed(), EQUAL, verdict)


def slowed(box: Sandbox) -> Outcome:
    # Ranks hear of each other twice a second rather than every other one.
    job = box.start("--resilience.watchdog_seconds=30", ranks=2, fault="slow_on_rank_1", seconds=0.6).done()
    told, *_ = box.events("straggler")
    assert told["detail"].startswith("rank 1 ") and "faulty_train.py:_slow_disk" in told["detail"]
    assert told["detail"] in job.said
    box.require_whole(ranks=2)
    return Outcome(0, EQUAL, told["detail"])


_HURRY = "--parallel.timeout_seconds=2"


def nobody_listens(box: Sandbox) -> Outcome:
    """The first rank was never started; the second says where it looked, and for how long."""
    port = free_port()
    said = box.start(_HURRY, ranks=2, missing=1, port=port).ended(2).said
    assert not box.run_folder().exists()
    return Outcome(None, "nothing trained", box.message(said, "could not meet").replace(str(port), "29500"))


def port_taken(box: Sandbox) -> Outcome:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        job = box.start(_HURRY, ranks=2, port=port).ended(2)
    said = [box.message(child.said, "could not meet").replace(str(port), "29500") for child in job.children]
    assert "address already in use" in said[0] and "there was no answer" in said[1]
    return Outcome(None, "nothing trained", said[0])


def fails_alone(box: Sandbox, *words: str, ranks: int = 3, **chaos: Any) -> Outcome:
    job = box.start(*words, ranks=ranks, fault="raises", step=EVERY + 3, on=[1], **chaos).ended(1)
    others = "".join(child.said for rank, child in enumerate(job.children) if rank != 1)
    failed = job.children[1].said
    assert failed.count("Traceback") == 1 and "ValueError: the sample is poisoned" in failed
    assert "Traceback" not in others and others.count(f"ends because rank 1 of {ranks} on") == ranks - 1, others
    return Outcome(
        box.resume_whole(*words, ranks=ranks), EQUAL, box.message(job.children[0].said, "ends because rank 1")
    )


def crash_loop(box: Sandbox, *words: str, **chaos: Any) -> Outcome:
    """Three times the same step, and no more; deleting the record of it begins anew."""
    chaos = {"fault": "raises", "step": EVERY + 3, "on": [1], **chaos}
    for _ in range(3):
        box.start(*words, ranks=2, **chaos).ended(1)
    reached = box.step()
    job = box.start(*words, ranks=2, **chaos).ended(3)
    shutil.rmtree(box.run_folder() / "logs/crashes")
    box.train(*words, ranks=2)
    box.require_whole(*words, ranks=2)
    said = box.message(job.said, "has failed 3 times in a row")
    assert f"step {EVERY + 3} (samples {4 * (EVERY + 2)} to {4 * (EVERY + 3) - 1})" in said and "rank 1 of 2" in said
    return Outcome(reached - box.resumed(), EQUAL, said)


def ends_with(code: int, said: str, box: Sandbox, *words: str, **chaos: Any) -> Outcome:
    """A rank's own error has its exit code and a record; the other rank says whom it follows."""
    job = box.start(*words, ranks=2, step=EVERY + 3, on=[1], **chaos)
    codes = job.wait()
    assert codes == [1, code] and "Traceback" not in job.said, job.said
    assert "ends because rank 1 of 2 on" in job.children[0].said
    assert (box.run_folder() / "logs/crashes/attempt-00001.json").exists()
    assert box.steps() == [EVERY]
    return Outcome(box.resume_whole(*words, ranks=2), EQUAL, box.message(job.children[1].said, said))


memory_full = partial(ends_with, 2, "memory is full", fault="memory_full")


def nonfinite(box: Sandbox, *words: str, **chaos: Any) -> Outcome:
    return ends_with(3, "non-finite", box, *words, "--debug.find_nonfinite=true", fault="weight_is_nan", **chaos)


def in_stage(fault: Callable[..., Outcome], box: Sandbox, **names: Any) -> Outcome:
    """As without a pipeline, though torch wraps what a stage raises (issue 14, item 17)."""
    return fault(box, "--parallel.pp=2", "--model.layers=2", in_model=True, **names)


FAULTS = [
    through("4, 3, 5 and 1 ranks, ZeRO 3, 1, 2 and 0", SIZES, slow=True),
    through("tensor, pipeline with context, HSDP, context with tensor, one", LAYOUTS, slow=True),
    Fault(21, "4, 3, 2, 4 and 3 machines", "killed, started and signalled under torchrun", machines, slow=True),
    Fault(1, "SIGKILL of a rank of two, twice, under torchrun", "--max-restarts=3", killed_under_torchrun, slow=True),
    Fault(
        1, "machine lost at which all meet", "SIGKILL of one torchrun of two, and its rank", rendezvous_lost, slow=True
    ),
    Fault(11, "hang of one rank of two", "SIGSTOP, for longer than the watchdog waits", hung, slow=True),
    Fault(12, "slow rank", "0.6 s of sleep in each step of one rank of two", slowed, slow=True),
    Fault(26, "rendezvous endpoint dead", "the first rank is never started", nobody_listens, slow=True),
    Fault(26, "port taken", "another program listens there", port_taken),
    Fault(27, "exception in one rank of three", "raised in its step", fails_alone),
    Fault(31, "crash loop at one step", "the same exception at each start", crash_loop, slow=True),
    Fault(28, "memory full on one rank of two", "an allocation of 2^60 bytes", memory_full),
    *(
        Fault(row, f"{what}, in a stage of a pipeline", how, partial(in_stage, run), slow)
        for row, what, how, run, slow in (
            (27, "exception", "raised in its forward pass", partial(fails_alone, ranks=2), False),
            (27, "number that is not finite", "debug.find_nonfinite", nonfinite, True),
            (28, "memory full", "an allocation of 2^60 bytes", memory_full, True),
            (31, "crash loop", "the same exception at each start", crash_loop, True),
        )
    ),
]

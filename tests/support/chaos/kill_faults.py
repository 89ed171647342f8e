"""SIGKILL: of all ranks, of one, and at each point of a save."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from collections import Counter
from functools import partial

from support.chaos.fault import EQUAL, Fault, Outcome
from support.chaos.sandbox import EVERY, Job, Sandbox

POINTS = {
    "before the first byte": 3,
    "in a shard": 4,
    "between shards": 5,
    "before the manifest": 6,
    "in the manifest": 6,
    "before the rename": 7,
    "after the rename": 8,
}
_OF_EACH_RANK = ("before the first byte", "in a shard", "between shards")  # the other points are the first rank's alone


def killed_in_save(point: str, mode: str, ranks: int) -> Fault:
    """The rank that writes is killed in the second save; the others end by themselves."""
    faulty = ranks - 1 if point in _OF_EACH_RANK else 0

    def run(box: Sandbox) -> Outcome:
        words = f"--checkpoint.mode={mode}"
        job = box.start(words, ranks=ranks, fault="killed_in_save", point=point, step=2 * EVERY, on=[faulty])
        codes = job.wait()
        assert codes[faulty] == -signal.SIGKILL and 0 not in codes, job.said
        reached, last = box.step(), 2 * EVERY if point == "after the rename" else EVERY
        assert reached >= 2 * EVERY + 2 * (mode == "async" and ranks == 1), "a save in the background stops nothing"
        assert box.steps()[-1] == last
        box.command("checkpoint", "verify", "runs/run", "--deep")
        said = box.train(words, ranks=ranks).said
        assert box.resumed() == last
        box.require_whole(ranks=ranks)
        return Outcome(reached - last, EQUAL, box.message(said, "the last one"))

    # One process and both modes at each point by default; several ranks where all of them write.
    return Fault(
        POINTS[point] if mode == "sync" else 9,
        f"SIGKILL in a save, {point}" + (f" ({mode}, {ranks} ranks)" if ranks > 1 else f" ({mode})"),
        "the process kills itself there" + (" once training has gone on for two steps" if mode == "async" else ""),
        run,
        slow=(ranks > 1) != (point == "in a shard" and mode == "async"),
    )


def killed_all(box: Sandbox) -> Outcome:
    box.paused(ranks=3, on=[1]).kill()
    reached = box.step()
    said = box.train(ranks=3).said
    box.require_whole(ranks=3)
    return Outcome(reached - box.resumed(), EQUAL, box.message(said, "the last one"))


def killed_one(box: Sandbox) -> Outcome:
    """The others wait for its part of a step, and are not told by anybody."""
    job = box.paused(ranks=3, on=[1])
    job.children[1].kill()
    codes = job.wait()
    assert codes[1] == -signal.SIGKILL and 0 not in codes, "none may go on, or believe that all is well"
    return Outcome(box.resume_whole(ranks=3), EQUAL, box.message(job.children[0].said, "has lost another rank"))


def lost_machine(box: Sandbox, away: int) -> Outcome:
    """Long after the last checkpoint, but soon after a snapshot; the machine is replaced by an empty one."""
    words = ("--resilience.snapshot_every=2", "--resilience.snapshot_dir=memory", "--checkpoint.mode=sync")
    box.mistake = "machines_of_their_own"
    box.paused(*words, "--checkpoint.every_steps=0", ranks=3, on=[1]).kill()
    reached = box.step()
    assert box.steps() == []
    shutil.rmtree(box.folder / "memory" / str(away))
    said = box.train(*words, ranks=3).said
    assert box.resumed() == reached // 2 * 2
    box.require_whole(ranks=3)
    assert not list((box.folder / "memory").glob("*/*")), "a run that has ended leaves no memory taken"
    return Outcome(reached - box.resumed(), EQUAL, box.message(said, "from the snapshot"))


_LONG = ("--training.steps=100000", "--checkpoint.every_steps=2")
_LEFT_BY_A_KILL = r"\.step-[0-9]+\.(writing|replaced|deleting)|\.mark-[0-9a-f]+|\.snapshots"


def at_random(box: Sandbox, ranks: int, kills: int, words: tuple[str, ...] = ()) -> Outcome:
    """Again and again, of one rank or of all, while the run starts, trains and saves in the background."""
    moments = random.Random(time.time_ns())  # other moments each time; whatever they are, the promises hold
    lost, kinds = 0, Counter[str]()
    for _ in range(kills):
        committed, reached = box.steps(), box.step()
        job = box.start(*_LONG, *words, ranks=ranks)
        kinds[_kill_somewhere(box, job, moments)] += 1
        lost += reached - box.resumed() if "resumed" in job.said else 0
        if box.run_folder().exists():
            assert all(re.fullmatch(_LEFT_BY_A_KILL, name) for name in box.leftovers())
            assert max(box.steps(), default=0) >= max(committed, default=0), "what was committed stays"
        if box.steps():
            box.command("checkpoint", "verify", "runs/run", "--deep")
            box.require_audited()

    reached = box.step()
    end = f"--run.stop_after_step={reached + 3}"
    job = box.start(*_LONG, *words, end, ranks=ranks).ended(75)
    lost += reached - (box.resumed() if "resumed" in job.said else 0)  # every kill may have come before the first save
    assert box.leftovers() == [], "the next start clears what a kill has left"
    box.start(*_LONG, *words, end, "--run.name=whole", ranks=ranks).ended(75)
    assert box.curve() == box.curve("whole")
    audits = [json.loads(box.command("data", "audit", f"runs/{run}", "--json")) for run in ("run", "whole")]
    assert audits[0] == {**audits[1], "restarts": audits[0]["restarts"]}
    assert box.tensors(box.step()) == box.tensors(box.step(), "whole")
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return Outcome(lost, EQUAL, f"{listed}; {box.step()} steps in all")


def _kill_somewhere(box: Sandbox, job: Job, moments: random.Random) -> str:
    """Kill one process or all: now and then while they start, mostly in and around steps and saves; what was killed."""
    begun = box.step()
    if moments.random() < 0.15:
        time.sleep(moments.uniform(0, 1))
    else:
        box.until(lambda: box.step() > begun, job)
        time.sleep(moments.uniform(0, 0.3))
    when = "" if box.step() > begun else " while starting"
    if moments.random() < 0.5:
        job.kill()
        return f"of all{when}"
    moments.choice(job.children).kill()
    if not when:  # in the middle of a start, a launcher must end the others
        assert 0 not in job.wait(), "the others end by themselves, and do not believe that all is well"
    job.kill()
    return f"of one{when}"


def with_snapshots(box: Sandbox, ranks: int, kills: int) -> Outcome:
    """At every step, in the background, each rank on a machine of its own; few checkpoints beside."""
    box.mistake = "machines_of_their_own"
    words = "--checkpoint.every_steps=7", "--resilience.snapshot_every=1", "--resilience.snapshot_dir=memory"
    return at_random(box, ranks, kills, words)


def many(ranks: int, kills: int) -> Fault:
    what = f"{kills} SIGKILLs at random moments, of one of {ranks} ranks or of all"
    return Fault(
        2, what, "from outside; the same command again", partial(at_random, ranks=ranks, kills=kills), slow=True
    )


FAULTS = [
    Fault(1, "SIGKILL of one rank of three", "from outside; then started again", killed_one),
    *(
        Fault(
            1,
            f"a machine and its memory are lost, that of rank {away} of three, with a snapshot every 2 steps",
            "SIGKILL of all ranks, and rm of the machine's folder; then started again",
            partial(lost_machine, away=away),
            slow=away == 0,
        )
        for away in (0, 1)
    ),
    Fault(2, "SIGKILL of all ranks", "from outside; then the same command again", killed_all),
    *(many(ranks, kills) for ranks, kills in ((2, 40), (3, 35), (4, 25))),
    Fault(
        2,
        "12 SIGKILLs at random moments, of one of 2 ranks or of all, with a snapshot in memory every step",
        "from outside; the same command again",
        partial(with_snapshots, ranks=2, kills=12),
        slow=True,
    ),
    *(killed_in_save(point, mode, ranks) for mode in ("sync", "async") for point in POINTS for ranks in (1, 2)),
]

"""Signals that ask a run to stop, once and twice."""

from __future__ import annotations

import signal
import time

from support.chaos.fault import EQUAL, Fault, Outcome
from support.chaos.sandbox import EVERY, STEPS, Sandbox


def stopped(number: signal.Signals, ranks: int, slow: bool = False) -> Fault:
    """One rank hears of it; all of them end after the same step, which is saved."""

    def run(box: Sandbox) -> Outcome:
        job = box.paused(ranks=ranks, on=[ranks - 1])
        job.children[-1].send(number)
        box.go()
        job.ended(75)
        status = box.status()
        assert (status["state"], status["exit_code"]) == ("stopped", 75), status
        assert box.steps()[-1] == box.step() == status["step"] < STEPS, "the last step is saved"
        return Outcome(box.resume_whole(ranks=ranks), EQUAL, status["reason"])

    return Fault(10, f"{number.name}{', to one rank of two' if ranks > 1 else ''}", "from outside", run, slow)


def twice(while_saving: bool) -> Fault:
    """The second signal ends the process at once; what was committed stays."""

    def run(box: Sandbox) -> Outcome:
        step = 2 * EVERY if while_saving else EVERY + 3
        job = box.paused(step=step, in_the_save=while_saving)
        box.until(lambda: box.steps() == [EVERY])
        job.send(signal.SIGTERM)
        for _ in range(20):  # the second is enough, but on a machine so busy that it came too close to the first
            time.sleep(1.2)  # closer together they count as one: an echo of the launcher's
            job.send(signal.SIGTERM)
            if job.children[0].poll() is not None:
                break
        job.ended(128 + signal.SIGTERM)
        reached = box.step()
        box.require_resume_from_only(EVERY)
        return Outcome(reached - EVERY, EQUAL, box.message(job.said, "second signal"))

    where = "while a save is written in the background" if while_saving else "in a step"
    return Fault(10, f"SIGTERM twice, {where}", "from outside, 1.2 s apart", run, slow=not while_saving)


FAULTS = [
    stopped(signal.SIGTERM, ranks=2),
    stopped(signal.SIGTERM, ranks=1, slow=True),
    stopped(signal.SIGUSR1, ranks=1),
    stopped(signal.SIGINT, ranks=1),
    twice(while_saving=True),
    twice(while_saving=False),
]

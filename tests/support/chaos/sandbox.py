"""A folder in which a tiny run is started, broken and started again, and the uninterrupted run that it must equal."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from support import runs
from support.chaos.nursery import PATIENCE_SECONDS, Child, Nursery
from support.ports import free_port
from support.tiny import write_tiny
from titanlite.checkpoint.storage import read_manifest
from titanlite.data.read_log import audit, read_records

STEPS = 16
EVERY = 4  # steps between saves

_SECTIONS: dict[str, dict[str, Any]] = {
    "run": {"name": "run"}, "training": {"steps": STEPS, "global_batch": 4}, "optimizer": {"name": "muon"},
    "checkpoint": {"every_steps": EVERY},
}  # fmt: skip

Curve = list[tuple[Any, ...]]


class Job:
    """The processes of one start of a run, by rank."""

    def __init__(self, children: Sequence[Child]) -> None:
        self.children = children

    def wait(self, seconds: float = PATIENCE_SECONDS) -> list[int]:
        """Their exit codes, once all have ended."""
        return [child.wait(seconds) for child in self.children]

    def done(self) -> Job:
        """This job, which must end well."""
        assert set(self.wait()) == {0}, self.said
        return self

    def ended(self, code: int) -> Job:
        """This job, whose every process must end with `code`."""
        assert set(self.wait()) == {code}, f"{self.wait()} and not {code}:\n{self.said}"
        return self

    def send(self, number: int) -> None:
        for child in self.children:
            child.send(number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.wait()

    @property
    def said(self) -> str:
        return "\n".join(child.said for child in self.children)


class Sandbox:
    """One folder, `runs/run` in it, and what can be done to it."""

    def __init__(self, nursery: Nursery, folder: Path, references: dict[tuple[Any, ...], Any]) -> None:
        self.folder = folder
        self.nursery = nursery
        self._references = references
        self._starts = 0
        self.mistake = ""
        """What every process of this sandbox does otherwise than titanlite; a function of `faulty_train`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_tiny(folder, lines=300, **_SECTIONS)

    def another(self, name: str) -> Sandbox:
        """One of the same kind in a folder below this one."""
        return Sandbox(self.nursery, self.folder / name, self._references)

    # --- starting

    def start(self, *arguments: str, ranks: int = 1, port: int = 0, missing: int = 0, **chaos: Any) -> Job:
        """Start `titanlite.train` on so many ranks, as torchrun would; `chaos` is what `faulty_train` makes of it.

        `missing`: so many of the first ranks never start. They meet at `port`, or at one that is free.
        """
        port = port or free_port()
        return Job([self.start_rank(rank, ranks, port, *arguments, **chaos) for rank in range(missing, ranks)])

    def start_rank(self, rank: int, ranks: int, port: int, *arguments: str, **chaos: Any) -> Child:
        return self._child(["titanlite.train", "recipe.toml", *arguments], chaos, _place(rank, ranks, port))

    def train(self, *arguments: str, **names: Any) -> Job:
        """`start`, and wait for a good end."""
        return self.start(*arguments, **names).done()

    def command(self, *arguments: str, code: int = 0, **chaos: Any) -> str:
        """What another command prints, which must end with `code`."""
        child = self.begin(*arguments, **chaos)
        assert child.wait() == code, f"{child.wait()} and not {code}:\n{child.said}"
        return child.said

    def begin(self, *arguments: str, **chaos: Any) -> Child:
        return self._child(["titanlite", *arguments], chaos, {})

    def _child(self, command: list[str], chaos: dict[str, Any], place: dict[str, str]) -> Child:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **place}
        if self.mistake:
            environment["MISTAKE"] = self.mistake
        if chaos:
            environment["CHAOS"] = json.dumps(chaos)
        self._starts += 1
        return self.nursery.start(command, self.folder, self.folder / f"said-{self._starts}.txt", environment)

    def paused(self, *arguments: str, ranks: int = 1, step: int = EVERY + 3, **chaos: Any) -> Job:
        """A run that waits before `step`, or in its save, on the ranks `on`, until `go` is called."""
        job = self.start(*arguments, ranks=ranks, fault="paused", step=step, **chaos)
        self.until((self.folder / "here").exists, job)
        return job

    def go(self) -> None:
        (self.folder / "go").touch()

    # --- looking

    def run_folder(self, run: str = "run") -> Path:
        return self.folder / "runs" / run

    def rows(self, run: str = "run", event: str | None = None) -> list[dict[str, Any]]:
        """Rows of this event, or of none."""
        return runs.rows(self.run_folder(run), event)

    def curve(self, run: str = "run") -> Curve:
        """All digits of every step."""
        return runs.curve(self.run_folder(run))

    def step(self, run: str = "run") -> int:
        """The last step that was written down."""
        return max((row["step"] for row in runs.rows(self.run_folder(run), key="loss")), default=0)

    def events(self, kind: str, run: str = "run") -> list[dict[str, Any]]:
        return self.rows(run, kind)

    def status(self, run: str = "run") -> dict[str, Any]:
        return runs.status(self.run_folder(run))

    def steps(self, run: str = "run") -> list[int]:
        return runs.steps(self.run_folder(run))

    def checkpoint(self, step: int, run: str = "run") -> Path:
        return self.run_folder(run) / "checkpoints" / f"step-{step:08d}"

    def leftovers(self, run: str = "run") -> list[str]:
        """Names beside the committed checkpoints."""
        return [name for name in os.listdir(self.run_folder(run) / "checkpoints") if not name.startswith("step-")]

    def tensors(self, step: int, run: str = "run") -> dict[str, bytes]:
        """Every chunk of a checkpoint, bit by bit."""
        found: dict[str, bytes] = {}
        for file in self.checkpoint(step, run).glob("*.safetensors"):
            with safe_open(file, framework="numpy") as handle:
                found |= {key: handle.get_tensor(key).tobytes() for key in handle.keys()}  # noqa: SIM118
        return found

    def until(self, condition: Callable[[], object], job: Job | None = None) -> None:
        """Wait until it holds; `job` must not end before."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline
            assert job is None or all(child.poll() is None for child in job.children), job.said if job else ""
            time.sleep(0.01)

    # --- comparing

    def prepared(self) -> None:
        """Make `runs/run` one that was stopped at its third save, with the checkpoints of that and the second."""
        key = ("prepared",)
        if key not in self._references:
            source = self.another("prepared")
            source.start(f"--run.stop_after_step={3 * EVERY}").ended(75)
            self._references[key] = source.run_folder()
        shutil.copytree(self._references[key], self.run_folder())

    def resumed(self, run: str = "run") -> int:
        """The step that the run went on from last."""
        return int(self.events("resumed", run)[-1]["step"])

    def require_resume_from_only(self, step: int) -> None:
        """The only checkpoint is that of `step`, undamaged, and the run resumes from it to the whole run's end."""
        assert self.steps() == [step]
        self.command("checkpoint", "verify", "runs/run", "--deep")
        self.train()
        assert self.resumed() == step
        self.require_whole()

    def resume_whole(self, *arguments: str, ranks: int = 1) -> int:
        """Train on to the end of the whole run; how many steps were trained again."""
        reached = self.step()
        self.train(*arguments, ranks=ranks)
        self.require_whole(*arguments, ranks=ranks)
        return reached - self.resumed()

    def whole(self, *arguments: str, ranks: int = 1) -> tuple[Curve, dict[str, bytes]]:
        """Curve and last tensors of a run that nothing befalls; trained once for all sandboxes."""
        key = (ranks, arguments, (self.folder / "recipe.toml").read_text())
        if key not in self._references:
            self.train(*arguments, "--run.name=whole", ranks=ranks)
            self._references[key] = self.curve("whole"), self.tensors(self.step("whole"), "whole")
        return self._references[key]

    def require_whole(self, *arguments: str, ranks: int = 1, run: str = "run") -> None:
        """The run has ended as if nothing had befallen it: every number of its curve, every bit of its state."""
        curve, tensors = self.whole(*arguments, ranks=ranks)
        assert self.curve(run) == curve, "the curve differs"
        assert self.tensors(curve[-1][0], run) == tensors, "the last state differs"
        assert self.leftovers(run) == []
        self.require_audited(run)

    def require_audited(self, run: str = "run") -> None:
        """What the ranks wrote down over all starts is that every step to the last saved one read its samples, once."""
        step = self.steps(run)[-1]
        found = audit(read_records(self.run_folder(run)), step, read_manifest(self.checkpoint(step, run)).samples)
        samples = b"".join(number.to_bytes(8, "little") for number in range(found.samples))
        assert found.whole and found.steps == step, found
        assert found.digest == hashlib.blake2b(samples, digest_size=16).hexdigest(), found

    def message(self, text: str, pattern: str) -> str:
        """The lines of what was said that match, without this folder's name; there must be some."""
        lines = [line for line in text.splitlines() if re.search(pattern, line)]
        assert lines, f"'{pattern}' was not said in:\n{text}"
        return " ".join(dict.fromkeys(lines)).replace(f"{self.folder}/", "")


def _place(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a process on one machine."""
    if ranks == 1:
        return {}
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }  # fmt: skip

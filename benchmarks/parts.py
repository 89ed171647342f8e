"""Commands run one after the other, each a process of its own with a time-out, so that one cannot hide the rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Part:
    """A command that ends with 0; the last line on stdout that is a JSON object is its results, wherever it ends."""

    name: str
    command: list[str]
    timeout_seconds: float
    environment: dict[str, str] = field(default_factory=dict)


def run(part: Part, seconds_left: float = float("inf")) -> dict[str, Any]:
    """The part's outcome; its output is kept where it failed. Whatever it started ends with it."""
    allowed = min(part.timeout_seconds, seconds_left)
    started = time.monotonic()
    result: dict[str, Any] = {"name": part.name}
    with TemporaryFile("w+", errors="replace") as stdout, TemporaryFile("w+", errors="replace") as stderr:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env=os.environ | part.environment,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        try:
            code = process.wait(allowed)
            result["outcome"] = "passed" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            what = "over its" if allowed == part.timeout_seconds else "cut off by the deadline after"
            result["outcome"] = f"{what} {allowed:.0f} s"
        finally:
            _end(process)
        result["seconds"] = round(time.monotonic() - started, 1)
        said, errors = (_read(stream) for stream in (stdout, stderr))
    objects = [line for line in said.splitlines() if line.startswith("{") and line.endswith("}")]
    if objects:
        result["result"] = json.loads(objects[-1])
    if result["outcome"] != "passed" or "result" not in result:
        result["output"] = (said + errors)[-3000:]
    return result


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all that it started: compilers' workers would go on, and hold the device."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(stream: Any) -> str:
    stream.seek(0)
    text: str = stream.read()
    return text

"""The parts of `scripts/gpu_check.sh`: each a process of its own with a time-out; one JSON and one table of all."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Part:
    """One check: a command that ends with 0, and whose last line on stdout may be a JSON object of results."""

    name: str
    command: list[str]
    timeout_seconds: int


def parts(small: bool, scratch: str) -> list[Part]:
    """What is run, with sizes for a GPU or, if `small`, such that a CPU finishes in a minute or two."""
    python = sys.executable
    step = [python, "benchmarks/train_step.py"]
    size = ["--model.preset=debug", "--training.sequence_length=128", "--steps", "3"] if small else []
    torch_alone = ["--kernels.backend=torch", "--kernels.linear_cross_entropy=off"]
    compiled = ["--compile.enabled=true"]
    float8 = ["--precision.float8.enabled=true", *(["--precision.float8.min_size=0"] if small else [])]
    test = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    models = [] if small else ["--models", "8B"]
    debug = [python, "-m", "titanlite.train", "configs/debug.toml", f"--run.output_dir={scratch}"]
    if small:
        debug += ["--training.tokens=100K", "--schedule.decay_steps=5", "--validation.sequences=16"]
    return [
        Part("gpu tests", [*test, "tests/gpu"], 240),
        Part("kernels", [*test, "tests/kernels"], 240),
        Part("whole-run tests", [*test, "tests/test_trainer.py"], 240),
        Part("debug recipe", debug, 240),
        Part("step, eager", [*step, *size, *torch_alone], 120),
        Part("step, kernels", [*step, *size], 120),
        Part("step, compiled", [*step, *size, *compiled], 240),
        Part("step, compiled, muon", [*step, *size, *compiled, "--optimizer.name=muon"], 240),
        Part("step, compiled, float8", [*step, *size, *compiled, *float8], 240),
        Part("kernels against a copy", [python, "-m", "titanlite_kernels.bench", *models, "--json", "-"], 240),
    ]


def run(part: Part) -> dict[str, Any]:
    """The part's outcome; its output is kept where it failed."""
    started = time.monotonic()
    result: dict[str, Any] = {"name": part.name}
    try:
        done = subprocess.run(part.command, cwd=ROOT, capture_output=True, text=True, timeout=part.timeout_seconds)
        result["outcome"] = "passed" if done.returncode == 0 else f"failed with {done.returncode}"
        output = done.stdout + done.stderr
        last = done.stdout.strip().splitlines()[-1:]
        if last and last[0].startswith("{"):
            result["result"] = json.loads(last[0])
    except subprocess.TimeoutExpired as expired:
        result["outcome"] = f"over its {part.timeout_seconds} s"
        output = "".join(s.decode() if isinstance(s, bytes) else s or "" for s in (expired.stdout, expired.stderr))
    result["seconds"] = round(time.monotonic() - started, 1)
    if result["outcome"] != "passed" or "result" not in result:
        result["output"] = output[-3000:]
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row a part."""
    lines = ["| part | outcome | s | tokens/s | MFU | peak GiB |", "| --- | --- | --- | --- | --- | --- |"]
    for row in results:
        got = row.get("result", {})
        rate = f"{got['tokens_per_second']:,.0f}" if "tokens_per_second" in got else ""
        use = f"{got['mfu']:.1%}" if got.get("mfu") is not None else ""
        memory = f"{got['memory_peak_gib']:.1f}" if "memory_peak_gib" in got else ""
        lines.append(f"| {row['name']} | {row['outcome']} | {row['seconds']} | {rate} | {use} | {memory} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--small", action="store_true", help="the same parts at a size for a CPU")
    arguments = parser.parse_args()

    import torch

    if not torch.cuda.is_available() and not arguments.small:
        print("no CUDA device here; --small runs the same parts on the CPU", file=sys.stderr)
        return 2
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for part in parts(arguments.small, scratch):
            results.append(run(part))
            print(f"{part.name}: {results[-1]['outcome']} ({results[-1]['seconds']} s)", file=sys.stderr, flush=True)
    report = {"date": date.today().isoformat(), "device": card, "torch": torch.__version__, "parts": results}
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"gpu_check-{report['date']}-{card.replace(' ', '_')}.json"
    (arguments.out / name).write_text(json.dumps(report, indent=1) + "\n")
    print(table(results))
    return 0 if all(row["outcome"] == "passed" for row in results) else 1


if __name__ == "__main__":
    sys.exit(main())

"""titanlite against a plain PyTorch loop and Hugging Face Trainer: one device, same model, text, tokens and precision.

python benchmarks/single_device.py                                   # the whole comparison; some ten minutes on 2 cores
python benchmarks/single_device.py --precision float32 --contestants titanlite-compiled plain-compiled --startups 0
python benchmarks/single_device.py --against ../titanlite-before     # this checkout against another one of titanlite

Every contestant is a process of its own. One at a time takes a turn of a few steps while all others are blocked on a
pipe; the order is drawn anew each round, and ratios are formed within a round. `benchmarks/README.md` says what is
the same for all, and what titanlite does differently.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import contestants.rules as rules

HERE = Path(__file__).resolve().parent
WARMUP_STEPS = 3
FOREIGN_LIMIT = 0.05
"""Mean share of the cores that others may take during turns before the numbers are called worthless."""
SPREAD_LIMIT = 0.10
"""The same for the interquartile range of a contestant's tokens/s over its median."""


@dataclass(frozen=True)
class Contestant:
    """A script in `contestants/`, and the packages without which it is left out."""

    script: str
    compile: bool
    needs: tuple[str, ...] = ()
    checkout: Path = HERE.parent
    """Where the script lies, and titanlite is imported from."""

    @property
    def command(self) -> list[str]:
        return [sys.executable, str(self.checkout / "benchmarks" / "contestants" / self.script)]

    @property
    def environment(self) -> dict[str, str]:
        paths = os.pathsep.join((str(self.checkout), str(self.checkout / "kernels")))
        return {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


CONTESTANTS = {
    "titanlite": Contestant("titanlite_trainer.py", compile=False),
    "titanlite-compiled": Contestant("titanlite_trainer.py", compile=True),
    "plain": Contestant("plain_loop.py", compile=False),
    "plain-compiled": Contestant("plain_loop.py", compile=True),
    "trainer": Contestant("huggingface_trainer.py", compile=False, needs=("transformers", "accelerate")),
    "trainer-compiled": Contestant("huggingface_trainer.py", compile=True, needs=("transformers", "accelerate")),
}
REFERENCES = ("plain-compiled", "trainer", "before", "before-compiled")
OURS = ("titanlite", "before")
"""Contestants that start by the command that users type; `before` is the checkout of `--against`."""


@dataclass(frozen=True)
class Turn:
    """What a contestant did when it was its turn."""

    tokens_per_second: float
    foreign_share: float | None
    """Part of the machine's cores that other processes took meanwhile; None where the system does not tell."""
    memory_peak_bytes: int


class Player:
    """A running contestant; killed at the end of the `with` block."""

    def __init__(self, name: str, settings: rules.Settings) -> None:
        self.name = name
        self.settings = settings
        self.log = Path(settings.folder) / "log.txt"
        self.report: dict[str, Any] = {}
        """The last turn's, as `rules.Gate` sends it."""
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*CONTESTANTS[name].command, json.dumps(vars(settings))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=CONTESTANTS[name].environment,
            )

    def __enter__(self) -> Player:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def take_turn(self, steps: int) -> Turn:
        """Let it do `steps` steps and wait for them."""
        busy_before = busy_core_seconds()
        report = self.report = self._ask(steps)
        foreign = None
        if busy_before is not None:
            others = (busy_core_seconds() or 0.0) - busy_before - report["cpu_seconds"]
            foreign = max(0.0, others) / (report["seconds"] * (os.cpu_count() or 1))
        tokens = steps * self.settings.batch * self.settings.sequence_length
        return Turn(tokens / report["seconds"], foreign, report["memory_peak_bytes"])

    def _ask(self, steps: int) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise SystemExit(self._obituary()) from None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(self._obituary())
        report: dict[str, Any] = json.loads(line)
        return report

    def _obituary(self) -> str:
        return f"{self.name} ended early:\n{self.log.read_text()[-3000:]}"


def busy_core_seconds() -> float | None:
    """Core-seconds that all processes, and other guests of the host, have taken since boot; None off Linux."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def prepare(arguments: argparse.Namespace, name: str, precision: str, scratch: Path) -> rules.Settings:
    """Settings of one contestant with a folder of its own; titanlite's recipe lies in it."""
    folder = scratch / f"{precision}-{name}"
    folder.mkdir()
    sizes = {key: getattr(arguments, key) for key in ("dim", "layers", "heads", "kv_heads", "ffn_dim", "vocab_size")}
    settings = rules.Settings(
        **sizes,
        sequence_length=arguments.sequence_length,
        batch=arguments.batch,
        precision=precision,
        compile=CONTESTANTS[name].compile,
        corpus=str(scratch / "corpus.txt"),
        folder=str(folder),
    )
    (folder / "recipe.toml").write_text(recipe_text(settings))
    return settings


def recipe_text(s: rules.Settings) -> str:
    """The contest as a titanlite recipe."""
    return f"""
[run]
name = "run"
output_dir = {json.dumps(s.folder)}
[model]
preset = "debug"
dim = {s.dim}
layers = {s.layers}
heads = {s.heads}
kv_heads = {s.kv_heads}
ffn_dim = {s.ffn_dim}
vocab_size = {s.vocab_size}
rope_theta = {rules.ROPE_THETA}
norm_eps = {rules.NORM_EPS}
qk_norm = false
init_std = {rules.INIT_STD}
depth_scaled_init = false
[data]
corpus = {json.dumps(s.corpus)}
[training]
steps = 1_000_000
sequence_length = {s.sequence_length}
global_batch = {s.batch}
[optimizer]
lr = {rules.LEARNING_RATE}
betas = {list(rules.BETAS)}
eps = {rules.ADAM_EPS}
weight_decay = {rules.WEIGHT_DECAY}
clip_norm = {rules.CLIP_NORM}
[schedule]
name = "constant"
[precision]
compute = "{s.precision}"
"""


def write_corpus(path: Path, size: int = 2**21) -> None:
    """Text of random words: something to learn, on any machine, without a download."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 7))) for _ in range(500)]
    path.write_text(" ".join(draw.choices(words, k=size // 4))[:size])


def throughput(players: Sequence[Player], rounds: int, steps: int) -> dict[str, list[Turn]]:
    """`rounds` turns of every player; all play once before any plays again."""
    turns: dict[str, list[Turn]] = {player.name: [] for player in players}
    for number in range(rounds):
        for player in random.sample(players, len(players)):
            turns[player.name].append(player.take_turn(steps))
        tell(f"round {number + 1} of {rounds}: " + rates(turns))
    return turns


def rates(turns: dict[str, list[Turn]]) -> str:
    return ", ".join(f"{name} {played[-1].tokens_per_second:,.0f}" for name, played in turns.items())


def startup_seconds(name: str, settings: rules.Settings) -> float:
    """From the start of a fresh process to the end of its first step. titanlite's is the command that users type."""
    started = time.monotonic()
    if name not in OURS:
        with Player(name, settings) as player:
            player.take_turn(1)
            return time.monotonic() - started
    recipe = str(Path(settings.folder) / "recipe.toml")
    command = [sys.executable, "-m", "titanlite.train", recipe, "--fresh", "--force"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=settings.folder,  # -m imports from the working directory first
        env=CONTESTANTS[name].environment,
    ) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("step ") and "loss" in line:
                process.kill()
                return time.monotonic() - started
    raise SystemExit("titanlite ended before its first step:\n" + "".join(said))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; a single value is all three."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def summarise(turns: dict[str, list[Turn]]) -> dict[str, dict[str, Any]]:
    """By contestant: median tokens/s, its spread, quartiles of the ratio to each reference, peak memory."""
    summary: dict[str, dict[str, Any]] = {}
    for name, played in turns.items():
        low, median, high = quartiles([turn.tokens_per_second for turn in played])
        ratios = {
            reference: quartiles(
                [
                    mine.tokens_per_second / theirs.tokens_per_second
                    for mine, theirs in zip(played, turns[reference], strict=True)
                ]
            )
            for reference in REFERENCES
            if reference in turns and reference != name
        }
        summary[name] = {
            "tokens_per_second": median,
            "spread": (high - low) / median,
            "ratio": ratios,
            "memory_peak_bytes": max(turn.memory_peak_bytes for turn in played),
        }
    return summary


def foreign_share(turns: dict[str, list[Turn]]) -> float | None:
    """Part of the cores that others took, on average over the turns."""
    shares = [turn.foreign_share for played in turns.values() for turn in played if turn.foreign_share is not None]
    return statistics.mean(shares) if shares else None


def disturbances(turns: dict[str, list[Turn]], summary: dict[str, dict[str, Any]], rounds: int) -> list[str]:
    """Reasons to believe none of it."""
    reasons = []
    foreign = foreign_share(turns)
    if foreign is not None and foreign > FOREIGN_LIMIT:
        reasons.append(f"other processes took {foreign:.1%} of the cores while contestants ran")
    for name, row in summary.items():
        if row["spread"] > SPREAD_LIMIT:
            reasons.append(f"{name} varied by {row['spread']:.0%} (interquartile range over median)")
    if rounds < 4:
        reasons.append(f"{rounds} rounds are too few to know their spread")
    return reasons


def table(summary: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row a contestant, ratios with their interquartile range over the rounds."""
    references = [name for name in REFERENCES if name in summary]
    head = ["contestant", "tokens/s", "spread", *(f"against {name}" for name in references), "peak memory"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for name, row in summary.items():
        ratios = []
        for reference in references:
            low, median, high = row["ratio"].get(reference, (1.0, 1.0, 1.0))
            ratios.append("1" if reference == name else f"{median:.3f} ({low:.3f} to {high:.3f})")
        memory = f"{row['memory_peak_bytes'] / 2**20:,.0f} MiB"
        cells = [name, f"{row['tokens_per_second']:,.0f}", f"{row['spread']:.1%}", *ratios, memory]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def startup_table(seconds: dict[str, list[float]]) -> str:
    """Markdown: seconds from process start to the end of the first step."""
    reference = "trainer" if "trainer" in seconds else "before"
    lines = [f"| first step done | median s | range | against {reference} |", "| --- | --- | --- | --- |"]
    for name, values in seconds.items():
        median = statistics.median(values)
        ratio = f"{median / statistics.median(seconds[reference]):.2f}" if reference in seconds else ""
        lines.append(f"| {name} | {median:.2f} | {min(values):.2f} to {max(values):.2f} | {ratio} |")
    return "\n".join(lines)


def compare(arguments: argparse.Namespace, names: Sequence[str], precision: str, scratch: Path) -> dict[str, Any]:
    """One precision: warm everybody up, play the rounds, print the table."""
    load_before = os.getloadavg()
    with ExitStack() as stack:
        players = []
        for name in names:
            player = stack.enter_context(Player(name, prepare(arguments, name, precision, scratch)))
            tell(f"{precision}: warming up {name}")
            player.take_turn(WARMUP_STEPS)
            players.append(player)
        counts = {player.name: player.report["parameters"] for player in players}
        assert len(set(counts.values())) == 1, f"the models differ in size: {counts}"
        turns = throughput(players, arguments.rounds, arguments.steps_per_round)
        facts = players[0].report
        threads = {player.name: player.report["threads"] for player in players}
    summary = summarise(turns)
    reasons = disturbances(turns, summary, arguments.rounds)
    print(
        f"\n## {precision}, {facts['parameters']:,} parameters, {arguments.batch} x {arguments.sequence_length} tokens"
    )
    print(f"{facts['device']}, torch {facts['torch']}, threads {threads}")
    print(f"load average before {load_before[0]:.2f}, after {os.getloadavg()[0]:.2f} (the contestants' own included)")
    foreign = foreign_share(turns)
    print("" if foreign is None else f"others took {foreign:.1%} of the cores while contestants ran\n")
    print(table(summary))
    for reason in reasons:
        print(f"NO CLAIM: {reason}")
    result = {key: facts[key] for key in ("device", "torch", "parameters")}
    rows = {name: [vars(turn) for turn in played] for name, played in turns.items()}
    return {**result, "threads": threads, "load": load_before, "summary": summary, "no_claim": reasons, "turns": rows}


def compare_startups(arguments: argparse.Namespace, names: Sequence[str], scratch: Path) -> dict[str, list[float]]:
    """Fresh processes in turn; the first round only fills the file cache."""
    names = [name for name in names if not CONTESTANTS[name].compile]
    settings = {}
    (scratch / "startup").mkdir()
    write_corpus(scratch / "startup" / "corpus.txt")
    for name in names:
        settings[name] = prepare(arguments, name, "float32", scratch / "startup")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(arguments.startups + 1):
        for name in random.sample(names, len(names)):
            taken = startup_seconds(name, settings[name])
            tell(f"start {number}: {name} {taken:.2f} s")
            if number:
                seconds[name].append(taken)
    print(f"\n## Seconds from process start to the end of the first step, float32, eager\n\n{startup_table(seconds)}")
    return seconds


def available(names: Sequence[str]) -> list[str]:
    """Those whose packages are installed; says so of the others."""
    found = []
    for name in names:
        missing = [package for package in CONTESTANTS[name].needs if importlib.util.find_spec(package) is None]
        if missing:
            print(f"{name} is left out: {' and '.join(missing)} not installed (pip install 'titanlite[bench]')")
        else:
            found.append(name)
    return found


def tell(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in {"dim": 256, "layers": 6, "heads": 16, "kv-heads": 16, "ffn-dim": 768}.items():
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--vocab-size", type=int, default=272, help="at least 257, the byte tokenizer's")
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps-per-round", type=int, default=2)
    parser.add_argument("--startups", type=int, default=5, help="fresh starts of each contestant; 0: none")
    listed = list(CONTESTANTS)
    parser.add_argument("--contestants", nargs="+", choices=listed, metavar="NAME", help=f"{listed}")
    parser.add_argument(
        "--against", type=Path, metavar="CHECKOUT", help="another checkout of titanlite: before and before-compiled"
    )
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    arguments = parser.parse_args(argv)
    if arguments.against is None:
        arguments.contestants = arguments.contestants or listed[:-1]
        return arguments
    if not (arguments.against / "benchmarks" / "contestants").is_dir():
        parser.error(f"--against {arguments.against}: no checkout of titanlite (it has no benchmarks/contestants)")
    before = {f"before{suffix}": f"titanlite{suffix}" for suffix in ("", "-compiled")}
    for name, now in before.items():
        CONTESTANTS[name] = replace(CONTESTANTS[now], checkout=arguments.against.resolve())
    arguments.contestants = [*(arguments.contestants or before.values()), *before]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    names = available(arguments.contestants)
    results: dict[str, Any] = {"arguments": {**vars(arguments), "json": None, "against": str(arguments.against or "")}}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_corpus(scratch / "corpus.txt")
        for precision in ("float32", "bfloat16"):
            if arguments.rounds and arguments.precision in (precision, "both"):
                results[precision] = compare(arguments, names, precision, scratch)
        if arguments.startups:
            results["startup_seconds"] = compare_startups(arguments, names, scratch)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

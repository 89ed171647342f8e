"""The data room: tokenising against the tokenizer's library alone, the loader against what a training run takes.

python benchmarks/data.py                       # the standard library's source; a few minutes
python benchmarks/data.py --small               # to see that it works; its numbers say nothing

Contestants take turns in an order drawn anew each round; medians of the ratios within rounds are printed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import struct
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from single_device import FOREIGN_LIMIT, busy_core_seconds, quartiles, tell

from titanlite.cli.data import main as data_command
from titanlite.corpus.corpora import read_corpus
from titanlite.corpus.token_file import HEADER, MAGIC, VERSION, paths_of
from titanlite.corpus.tokenizers import open_tokenizer
from titanlite.data.loader import train_loader
from titanlite.data.mixture import build_schedule
from titanlite.data.packing import Cut
from titanlite.data.sources import Source
from titanlite.data.splits import Split, open_data
from titanlite.plan.layout import BatchPlan
from titanlite.recipe.load import load_recipe
from titanlite.recipe.sections import Data

DEBUG = Path(__file__).resolve().parents[1] / "configs" / "debug.toml"
LENGTH = 2048


def quietly(*words: str) -> None:
    """A `titanlite data` command."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        assert data_command(list(words)) == 0


def write_corpus(path: Path, megabytes: float) -> int:
    """A JSONL file of the standard library's source, again and again up to that size; returns its bytes of text."""
    documents = [document.content.decode(errors="replace") for document in read_corpus(["python-stdlib"], Data())]
    size, limit = 0, int(megabytes * 1e6)
    with path.open("w", encoding="utf-8") as file:
        while size < limit:
            for text in documents:
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                size += len(text.encode())
                if size >= limit:
                    break
    return size


def in_turns(turns: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, by round."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name in random.sample(list(turns), len(turns)):
            seconds[name].append(turns[name]())
    return seconds


def tokenising(folder: Path, megabytes: float, vocabulary: int, rounds: int) -> dict[str, Any]:
    """MB/s a core of `titanlite data prepare` with one worker, and of the library's batches on texts in memory."""
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    corpus, model = folder / "corpus.jsonl", folder / "tokenizer"
    size = write_corpus(corpus, megabytes)
    tell(f"training a tokenizer of {vocabulary} ids on {size / 1e6:.1f} MB")
    quietly("train-tokenizer", str(corpus), "--out", str(model), "--vocab-size", str(vocabulary))
    file = next(model.rglob("tokenizer.json"))
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").split("\n") if line]
    library, ours = Tokenizer.from_file(str(file)), open_tokenizer(str(file))

    def prepare() -> float:
        begun = time.perf_counter()
        quietly("prepare", str(corpus), "--out", str(folder / "tokens"), "--tokenizer", str(file),
                "--workers", "1", "--force")  # fmt: skip
        seconds = time.perf_counter() - begun
        paths_of(folder / "tokens").idx.unlink()  # the next turn is to do it all again
        paths_of(folder / "tokens").sidecar.unlink()
        return seconds

    def alone() -> float:
        begun = time.perf_counter()
        for first in range(0, len(texts), 256):
            library.encode_batch(texts[first : first + 256], add_special_tokens=False)
        return time.perf_counter() - begun

    def encoded() -> float:
        begun = time.perf_counter()
        for text in texts:
            ours.encode(text.encode())
        return time.perf_counter() - begun

    seconds = in_turns({"prepare": prepare, "the library alone": alone, "our encode alone": encoded}, rounds)
    ratios = [library / ours for library, ours in zip(seconds["the library alone"], seconds["prepare"], strict=True)]
    return {
        "text_bytes": size,
        "mb_per_second": {name: size / 1e6 / statistics.median(times) for name, times in seconds.items()},
        "prepare_over_library": quartiles(ratios),
    }


def loading(folder: Path, steps: int) -> dict[str, Any]:
    """Sequences a second of the loader, with nobody who trains, over those that the debug recipe takes."""
    from train_step import measure

    recipe = load_recipe(DEBUG).recipe
    length, batch = recipe.training.sequence_length, recipe.training.global_batch
    taken = list(measure(recipe, 1, 3, with_breakdown=False))[-1]["tokens_per_second"] / length
    quietly("prepare", str(folder / "corpus.jsonl"), "--out", str(folder / "bytes"), "--workers", "1")
    split = open_data(Data(corpus=str(folder / "bytes")), length, 0, validated=False).train
    rates = {}
    for workers in (0, 1, 2):
        batches = train_loader(split, BatchPlan(batch, 1, 0, batch), range(0, steps * batch, batch), workers=workers)
        next(batches)
        begun = time.perf_counter()
        count = sum(1 for _ in batches)
        rates[workers] = count * batch / (time.perf_counter() - begun)
    return {
        "debug_recipe_sequences_per_second": taken,
        "loader_sequences_per_second": rates,
        "over_debug_recipe": {workers: rate / taken for workers, rate in rates.items()},
    }


class _Endless:
    """Tokens that are nowhere, so many that an index over them would show."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.fingerprint, self._length = self, "", tokens

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, key: slice) -> np.ndarray[Any, Any]:
        return np.zeros(len(range(*key.indices(self._length))), np.uint16)


def random_access(tokens: int, samples: int) -> dict[str, Any]:
    """Microseconds and memory of finding samples of a mixture of three sources with that many tokens in all."""
    tokenizer = open_tokenizer("bytes")
    sources = tuple(
        Source(name, (_Endless(int(tokens * share)),), tokenizer, LENGTH, False)  # type: ignore[arg-type]
        for name, share in (("web", 0.7), ("code", 0.2), ("books", 0.1))
    )
    split = Split(sources, build_schedule([(None, (0.6, 0.3, 0.1))], [None] * 3), 0)
    numbers = [random.randrange(Cut(tokens, LENGTH).windows) for _ in range(samples)]
    split.sample(0)
    tracemalloc.start()
    for number in numbers[: samples // 10]:
        split.sample(number)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    begun = time.perf_counter()
    for number in numbers:
        split.sample(number)
    return {
        "tokens": tokens,
        "microseconds_per_sample": (time.perf_counter() - begun) / samples * 1e6,
        "held_bytes": held,
        "peak_bytes": peak,
    }


def start_up(folder: Path, gigabytes: float, documents: int) -> dict[str, Any]:
    """Seconds to open a token file of that size, which is mostly a hole."""
    paths, tokens = paths_of(folder / "sparse"), int(gigabytes * 1e9) // 2
    length = tokens // documents
    lengths = np.full(documents, length, "<i4")
    pointers = np.arange(documents, dtype="<i8") * length * 2
    with open(paths.idx, "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, 8, documents, documents + 1))
        for array in (lengths, pointers, np.arange(documents + 1, dtype="<i8")):
            file.write(array.tobytes())
    with open(paths.bin, "wb") as file:
        file.truncate(documents * length * 2)
        for document in (*range(1000), *range(documents - 1000, documents)):  # those that are looked at
            file.seek((document + 1) * length * 2 - 2)
            file.write(struct.pack("<H", 256))
    begun = time.perf_counter()
    split = open_data(Data(corpus=str(folder / "sparse")), LENGTH, 0, validated=False).train
    split.sample(12345)
    return {"bytes": paths.bin.stat().st_size, "documents": documents, "seconds": time.perf_counter() - begun}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where scratch files go")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    small = arguments.small
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    before, begun, own = busy_core_seconds(), time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        rounds = 1 if small else arguments.rounds
        results = {
            "tokenising": tokenising(folder, 0.3 if small else 40, 512 if small else 16_384, rounds),
            "loading": loading(folder, 20 if small else 400),
            "random_access": random_access(10**12, 200 if small else 20_000),
            "start_up": start_up(folder, 0.1 if small else 100, 3000 if small else 1_000_000),
        }
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg(),
        **results,
    }
    report(facts)
    if before is not None and not small:
        children = os.times().children_user + os.times().children_system
        taken = (busy_core_seconds() or before) - before - (time.process_time() - own) - children
        share = taken / (time.monotonic() - begun) / (os.cpu_count() or 1)
        if share > FOREIGN_LIMIT:
            print(f"NO CLAIM: other processes took {share:.0%} of the cores")
    if arguments.json:
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


def report(facts: dict[str, Any]) -> None:
    """The numbers in words."""
    tokenised, loaded = facts["tokenising"], facts["loading"]
    for name, rate in tokenised["mb_per_second"].items():
        print(f"{name}: {rate:.2f} MB/s on one core")
    low, middle, high = tokenised["prepare_over_library"]
    print(f"prepare over the library: {middle:.3f} ({low:.3f} to {high:.3f})")
    for workers, times in loaded["over_debug_recipe"].items():
        rate = loaded["loader_sequences_per_second"][workers]
        print(f"loader, {workers} workers: {rate:,.0f} sequences/s, {times:,.0f} times what the debug recipe takes")
    access, opened = facts["random_access"], facts["start_up"]
    print(
        f"a sample among {access['tokens']:,} tokens: {access['microseconds_per_sample']:.0f} µs, "
        f"{access['peak_bytes'] / 1e3:.0f} KB at most"
    )
    print(f"opening {opened['bytes'] / 1e9:.1f} GB of {opened['documents']:,} documents: {opened['seconds']:.3f} s")


if __name__ == "__main__":
    sys.exit(main())

"""Batches: the same samples on any layout, with any workers, resumed anywhere; and workers that die as they should."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.corpus.tokenizers import open_tokenizer
from titanlite.data.loader import IGNORED, _leave_signals_to_the_trainer, train_loader, validation_batches
from titanlite.data.splits import Split, split_of
from titanlite.errors import DataError, WorkerKilled
from titanlite.parallel.model import Batch
from titanlite.plan.layout import BatchPlan, ceil_div

LENGTH = 8


def load(split: Split, plan: BatchPlan, first: int, steps: int, **options: Any) -> Iterator[Batch]:
    """The batches of `steps` steps, the first of which begins with sample `first`."""
    return train_loader(split, plan, range(first, first + steps * plan.global_batch, plan.global_batch), **options)


def make_split(windows: int = 50, document_mask: bool = False, seed: int = 5) -> Split:
    """A stream whose every window is recognisable: random bytes with a separator now and then."""
    stream = np.random.default_rng(0).integers(0, 257, windows * LENGTH + 1).astype(np.uint16)
    stream[3::29] = 256
    return split_of(stream, open_tokenizer("bytes"), LENGTH, document_mask, seed)


def reference(split: Split, number: int) -> list[int]:
    return split.sample(number).tolist()


def sequences_of(batch: Batch) -> dict[int, list[int]]:
    """Sample number -> its L + 1 tokens; checks shapes and padding on the way."""
    length = batch.tokens.shape[-1]
    assert batch.tokens.ndim == 3
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.labels.shape == batch.tokens.shape
    tokens, labels = batch.tokens.reshape(-1, length), batch.labels.reshape(-1, length)
    real = len(batch.samples)
    assert (tokens[real:] == 256).all()
    assert (labels[real:] == IGNORED).all()
    assert batch.valid_tokens == int((batch.labels != IGNORED).sum())
    rows = {n: [*t.tolist(), int(label[-1])] for n, t, label in zip(batch.samples, tokens, labels, strict=False)}
    for row, label in zip(rows.values(), labels, strict=False):
        assert label.tolist() == row[1:]
    return rows


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.sampled_from([1, 2, 3, 5, 8]),
    global_batch=st.integers(1, 17),
    microbatch=st.none() | st.integers(1, 6),
    first=st.integers(0, 20),
    count=st.integers(0, 4),
)
def test_a_step_has_the_same_samples_on_any_layout(
    ranks: int, global_batch: int, microbatch: int | None, first: int, count: int
) -> None:
    split = make_split()
    plans = [BatchPlan(global_batch, ranks, rank, microbatch or ceil_div(global_batch, ranks)) for rank in range(ranks)]
    loaders = [load(split, plan, first * global_batch, count) for plan in plans]
    steps = list(zip(*loaders, strict=True))
    assert len(steps) == count
    for step, batches in enumerate(steps, start=first):
        assert len({batch.tokens.shape for batch in batches}) == 1
        found = [item for batch in batches for item in sequences_of(batch).items()]
        expected = range(step * global_batch, (step + 1) * global_batch)
        assert sorted(found) == [(number, reference(split, number)) for number in expected]
        assert all(batch.sequences == global_batch for batch in batches)
        assert sum(batch.valid_tokens for batch in batches) == global_batch * LENGTH


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("first", [0, 7])
@pytest.mark.parametrize("document_mask", [False, True])
def test_workers_change_nothing(workers: int, first: int, document_mask: bool) -> None:
    split = make_split(document_mask=document_mask)
    plan = BatchPlan(global_batch=7, data_ranks=2, data_rank=1, microbatch=2)
    here = list(load(split, plan, first * 7, 12 - first))
    elsewhere = list(load(split, plan, first * 7, 12 - first, workers=workers, prefetch=3))
    assert len(here) == len(elsewhere) == 12 - first
    for one, other in zip(here, elsewhere, strict=True):
        assert (one.samples, one.sequences, one.valid_tokens) == (other.samples, other.sequences, other.valid_tokens)
        for name in ("tokens", "labels", "positions", "documents"):
            a, b = getattr(one, name), getattr(other, name)
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("workers", [0, 1])
def test_padding_of_packed_documents_counts_nowhere_and_is_seen_by_none(workers: int) -> None:
    """One epoch: two data ranks, one of which gets a sequence that is all padding."""
    lengths = [3, 2, 5, 4, 1, 2]
    documents = [[10 * n + i for i in range(length)] for n, length in enumerate(lengths, start=1)]
    stream = np.array([token for document in documents for token in [*document, 256]], np.uint16)
    split = split_of(stream, open_tokenizer("bytes"), LENGTH, document_mask=True, seed=5, packing="best_fit")
    assert split.windows == 3  # 6 + 2, 5 + 3, 4 + 3: one place is left
    plans = [BatchPlan(3, 2, rank, 2) for rank in range(2)]
    batches = [next(load(split, plan, 0, 1, workers=workers)) for plan in plans]
    assert sum(batch.valid_tokens for batch in batches) == len(stream) == 23
    assert [batch.sequences for batch in batches] == [3, 3]
    read: list[list[int]] = []
    for batch in batches:
        assert batch.positions is not None and batch.documents is not None
        assert batch.valid_tokens == int((batch.labels != IGNORED).sum())
        fields, begins = (batch.tokens, batch.labels, batch.positions), set(batch.documents[0].tolist())
        for row, (tokens, labels, positions) in enumerate(zip(*(each[0].tolist() for each in fields), strict=True)):
            end = labels.index(IGNORED) if IGNORED in labels else LENGTH
            assert set(labels[end:]) <= {IGNORED} and set(tokens[end:]) <= {256}
            assert tokens[:end] == [256, *labels[:end]][:end]
            assert positions[end:] == list(range(LENGTH - end)), "padding is one document"
            assert {place for place in range(LENGTH) if positions[place] == 0} == {
                place - row * LENGTH for place in begins if 0 <= place - row * LENGTH < LENGTH
            }
            for place, token in enumerate(tokens[:end]):
                assert positions[place] == (0 if token == 256 else positions[place - 1] + 1)
            read += _split(labels[:end])
    assert sorted(read) == sorted(documents)
    bytes_of_labels = sum(size for _, size in validation_batches(split.sources[0], 9, BatchPlan(1, 1, 0, 2), []))
    assert bytes_of_labels == sum(lengths)


def _split(labels: list[int]) -> Iterator[list[int]]:
    """The documents of a sequence's labels."""
    document: list[int] = []
    for label in labels:
        if label == 256:
            yield document
            document = []
        else:
            document.append(label)
    assert not document


@pytest.mark.parametrize("workers", [0, 1])
def test_overfit_one_batch_reads_step_0_forever(workers: int) -> None:
    split, plan = make_split(), BatchPlan(6, 1, 0, 6)
    batches = list(train_loader(split, plan, itertools.repeat(0, 3), workers=workers))
    assert [batch.samples for batch in batches] == [tuple(range(6))] * 3
    assert sequences_of(batches[-1]) == {number: reference(split, number) for number in range(6)}


@pytest.mark.parametrize("workers", [0, 1])
def test_the_models_randomness_is_left_alone(workers: int) -> None:
    before = torch.get_rng_state()
    list(load(make_split(), BatchPlan(6, 1, 0, 6), 0, 3, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_warnings(recwarn: pytest.WarningsRecorder) -> None:
    list(load(make_split(), BatchPlan(6, 1, 0, 6), 0, 2))
    assert [str(warning.message) for warning in recwarn] == []


def test_a_split_travels_to_a_spawned_worker() -> None:
    split = make_split()
    assert pickle.loads(pickle.dumps(split)).sample(3).tolist() == reference(split, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
def test_nothing_is_pickled_to_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Python's own way to start a process is."""
    split, before = make_split(), multiprocessing.get_start_method(allow_none=True)
    monkeypatch.setattr(Split, "__reduce__", None)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        assert next(load(split, BatchPlan(6, 1, 0, 6), 0, 1, workers=1)).samples == tuple(range(6))
    finally:
        multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize(("workers", "bad"), [(0, 300), (1, 300), (0, -1)])
def test_what_cannot_be_read_is_the_same_error_with_workers(workers: int, bad: int) -> None:
    stream = np.zeros(4 * LENGTH + 1, np.int32)
    stream[-1] = bad
    split = split_of(stream, open_tokenizer("bytes"), LENGTH)
    batches = load(split, BatchPlan(4, 1, 0, 4), 0, 1, workers=workers)
    with pytest.raises(DataError) as caught:
        next(batches)
    ids = f"ids {min(bad, 0)} to {max(bad, 0)}"
    assert str(caught.value).startswith(f"source corpus, its texts: {ids} from token 24 on")


# Validation.


@settings(max_examples=60, deadline=None)
@given(
    windows=st.integers(1, 40),
    sequences=st.integers(1, 50),
    microbatch=st.integers(1, 9),
    ranks=st.sampled_from([1, 2, 3, 5, 8]),
)
def test_validation_is_the_same_on_any_layout(windows: int, sequences: int, microbatch: int, ranks: int) -> None:
    split = make_split(windows).sources[0]
    plans = [BatchPlan(sequences, ranks, rank, microbatch) for rank in range(ranks)]
    parts = [list(validation_batches(split, sequences, plan, [])) for plan in plans]
    count = min(sequences, windows)
    chosen = [split.window(j * windows // count).tolist() for j in range(count)]
    assert len({tuple(batch.tokens.shape for batch, _ in part) for part in parts}) == 1
    found = [item for part in parts for batch, _ in part for item in sequences_of(batch).items()]
    assert sorted(found) == list(enumerate(chosen))
    assert sum(size for part in parts for _, size in part) == sum(t != 256 for row in chosen for t in row[1:])
    starts = [j * windows // count for j in range(count)]
    gaps = {b - a for a, b in itertools.pairwise(starts)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert all(batch.sequences == count and batch.tokens.shape[0] == 1 for part in parts for batch, _ in part)


# Worker processes.

needs_sigwaitinfo = pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="no sigwaitinfo on this system")


def children_but(others: list[multiprocessing.Process]) -> list[multiprocessing.Process]:
    """The processes that this one has started since it had `others` (the tests' own pool, say)."""
    return [child for child in multiprocessing.active_children() if child not in others]  # type: ignore[misc]


def test_workers_that_cannot_be_started_are_the_recipes_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: BaseProcess) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(BaseProcess, "start", refuse)
    with pytest.raises(DataError, match=r"data\.workers = 1: .*temporarily unavailable"):
        load(make_split(), BatchPlan(4, 1, 0, 4), 0, 1, workers=1)


def test_workers_end_with_the_iterator() -> None:
    others = multiprocessing.active_children()
    batches = load(make_split(), BatchPlan(6, 1, 0, 6), 0, 1000, workers=2)
    next(batches)
    assert len(children_but(others)) == 2
    del batches
    assert children_but(others) == []


@needs_sigwaitinfo
def test_workers_outlive_signals_to_the_whole_job() -> None:
    plan, others = BatchPlan(6, 1, 0, 6), multiprocessing.active_children()
    batches = load(make_split(), plan, 0, 40, workers=2, prefetch=1)
    found = [next(batches).samples for _ in range(2)]  # one of each worker, which then is past its beginning
    for child in children_but(others):
        for name in ("-INT", "-TERM"):
            subprocess.run(["kill", name, str(child.pid)], check=True)
    found += [batch.samples for batch in batches]
    assert found == [tuple(range(6 * step, 6 * step + 6)) for step in range(40)]


def _ignore_signals_and_wait(ready: Event) -> None:
    _leave_signals_to_the_trainer(0)
    ready.set()
    time.sleep(200)


@needs_sigwaitinfo
def test_a_stuck_worker_obeys_its_parent() -> None:
    forked = multiprocessing.get_context("fork")
    ready = forked.Event()
    worker = forked.Process(target=_ignore_signals_and_wait, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(60)
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    worker.join(timeout=0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(timeout=60)
    assert worker.exitcode == 0


@pytest.mark.parametrize(
    ("number", "killed", "said"),
    [(signal.SIGKILL, True, "SIGKILL"), (signal.SIGSEGV, False, "SIGSEGV"), (40, False, "exit code -40")],
)
def test_a_worker_that_crashes_is_no_worker_that_was_killed(number: int, killed: bool, said: str) -> None:
    """The first may come again at the same samples, so it counts as a crash (issue 14, item 15)."""
    others = multiprocessing.active_children()  # the pool's
    batches = load(make_split(), BatchPlan(6, 1, 0, 6), 0, 1000, workers=1)
    next(batches)
    (worker,) = (child for child in multiprocessing.active_children() if child not in others)
    assert worker.pid is not None
    os.kill(worker.pid, number)
    with pytest.raises(DataError, match=rf"process {worker.pid} \({said}\); .*data\.workers") as error:
        list(batches)
    assert isinstance(error.value, WorkerKilled) == killed
    del error, batches
    gc.collect()  # torch's frames hold temporary files, which the next worker's copy of them would delete


@pytest.mark.slow
def test_workers_die_with_a_killed_trainer(tmp_path: Path) -> None:
    """torch's workers look for their parent every 5 seconds."""
    script = tmp_path / "trainer.py"
    script.write_text(
        "import multiprocessing, os, signal, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_loader import BatchPlan, load, make_split\n"
        "batches = load(make_split(), BatchPlan(6, 1, 0, 6), 0, 1000, workers=2)\n"
        "next(batches)\n"
        "print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # Not captured through a pipe: the workers inherit it, and reading to its end would wait for them.
    with open(tmp_path / "pids", "w") as output:
        subprocess.run([sys.executable, str(script)], stdout=output, check=False)
    alive = {int(pid) for pid in (tmp_path / "pids").read_text().split()}
    assert len(alive) == 2
    deadline = time.monotonic() + 120
    while alive and time.monotonic() < deadline:
        time.sleep(0.2)
        alive = {pid for pid in alive if _runs(pid)}
    assert not alive


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_memory(workers: int) -> None:
    batch = next(load(make_split(), BatchPlan(6, 1, 0, 6), 0, 2, workers=workers, pin_memory=True))
    assert batch.tokens.is_pinned() and batch.labels.is_pinned()
    moved = batch.to(torch.device("cuda"))
    torch.cuda.synchronize()
    assert torch.equal(moved.tokens.cpu(), batch.tokens)
    assert moved.samples == batch.samples

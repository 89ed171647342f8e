"""Batches: the samples of a step, as the tensors of one data rank.

A batch is a function of (split, plan, number of its first sample) alone. Workers only compute it earlier and elsewhere,
so neither their number nor a restart changes what is read. The state to save is one integer: samples read.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import numpy as np
import torch
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-untyped]

from titanlite.corpus.tokenizers import Tokens
from titanlite.data.packing import document_begins, document_offsets, document_positions
from titanlite.data.sources import Source
from titanlite.data.splits import Split
from titanlite.errors import DataError, WorkerKilled
from titanlite.models.loss import IGNORED
from titanlite.parallel.model import Batch
from titanlite.plan.layout import BatchPlan, ceil_div


def train_loader(
    split: Split,
    plan: BatchPlan,
    first_samples: Iterable[int],
    *,
    workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """The batches that begin with these samples. With `workers`, processes start at once and keep `prefetch` batches
    each ready; they end when the iterator is exhausted or dropped, and when this process dies.
    """
    others, handler = active_children(), signal.getsignal(signal.SIGCHLD) if workers else None
    with warnings.catch_warnings():
        # torchdata 0.11 calls a function of torch's that newer torch warns of; users can do nothing about it.
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
        loader: StatefulDataLoader[Batch | Exception] = StatefulDataLoader(
            _Steps(split, plan),
            batch_size=None,
            sampler=first_samples,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            # Forks share the arrays of the split; other processes would be sent all of them.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            worker_init_fn=_leave_signals_to_the_trainer,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # its own: the workers' seeds must not be drawn from the model's randomness
            snapshot_every_n_steps=0,  # there is no state
        )
    try:
        batches = iter(loader)
    except OSError as error:
        raise DataError(f"data.workers = {workers}: they cannot be started ({error}); set fewer.") from error
    if workers and threading.current_thread() is threading.main_thread():
        # Of torch, this raises for a killed worker wherever the trainer happens to be, in the middle of a step too.
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
    return _read(batches, [child for child in active_children() if child not in others])


UNREADABLE = (OSError, ValueError, DataError)  # because of the data; what else reading a batch raises is a bug
_ENDING_SECONDS = 5.0  # above what the system takes to end a process, if it writes a core file too


def _read(batches: Iterator[Batch | Exception], workers: Sequence[BaseProcess]) -> Iterator[Batch]:
    """The batches; raises in place of one what kept it from being read."""
    while True:
        try:
            read = next(batches, None)
        except (RuntimeError, OSError, EOFError) as error:
            if failure := _explain_end(workers):
                raise failure from error
            raise
        if read is None:
            return
        if isinstance(read, Exception):
            raise read
        yield read


def _explain_end(workers: Sequence[BaseProcess]) -> DataError | None:
    """Why workers have ended, if any has. What one had ready is asked of it, and that fails a little before its end."""
    ending = wait([worker.sentinel for worker in workers], _ENDING_SECONDS if workers else 0)
    for worker in workers:
        if worker.sentinel in ending:
            worker.join(_ENDING_SECONDS)  # it has closed its files; its exit code is there a little later
    ended = {worker.pid: worker.exitcode for worker in workers if worker.exitcode}
    if not ended:
        return None
    names = {-number: number.name for number in signal.Signals}
    causes = ", ".join(f"{pid} ({names.get(code, f'exit code {code}')})" for pid, code in ended.items())
    what = f"a data worker ended, process {causes}"
    if set(ended.values()) <= {-signal.SIGKILL, -signal.SIGTERM}:  # from outside; any other end may come again
        return WorkerKilled(f"{what}; if memory ran out, set a smaller data.workers or data.prefetch, and start again")
    return DataError(f"{what}; a library failed, or, by a SIGBUS, /dev/shm is full: try data.workers = 0")


def validation_batches(
    source: Source, sequences: int, plan: BatchPlan, failures: list[Exception]
) -> Iterator[tuple[Batch, float]]:
    """This rank's part of one validation: batches of one microbatch (in `plan`: the most that one may have), each with
    the bytes its labels stand for. Every rank gets as many of the same shape, filled up with padding.

    The sequences lie evenly over the source and are the same each time. A batch that cannot be read is padding which
    stands for NaN bytes, so that the sums of all ranks show it; why, is added to `failures`.
    """
    count = min(sequences, source.windows)
    microbatch = min(plan.microbatch, ceil_div(count, plan.data_ranks))
    plan = BatchPlan(count, plan.data_ranks, plan.data_rank, microbatch)
    for start in range(0, plan.microbatches * plan.microbatch, plan.microbatch):
        numbers = plan.samples(0)[start : start + plan.microbatch]
        try:
            windows = [source.window(number * source.windows // count) for number in numbers]
            label_bytes: float = sum(source.tokenizer.bytes_of(window[1:]) for window in windows)
        except UNREADABLE as error:
            failures.append(error)
            windows, label_bytes = [], math.nan
        yield _assemble(source, windows, numbers, (1, plan.microbatch), count, 0), label_bytes


@dataclass(frozen=True)
class _Steps(Dataset[Batch | Exception]):
    """The batches of a run on one data rank, by their first samples. In place of one that cannot be read is the error:
    raised in a worker, it would reach the user as that worker's traceback.
    """

    split: Split
    plan: BatchPlan

    def __getitem__(self, first: int) -> Batch | Exception:
        numbers = list(self.plan.samples(first))  # one of 2**62 sequences has no room, and says so at once
        try:
            windows = [self.split.sample(number) for number in numbers]
        except UNREADABLE as error:
            return error
        shape = (self.plan.microbatches, self.plan.microbatch)
        return _assemble(self.split.sources[0], windows, numbers, shape, self.plan.global_batch, first)


def _assemble(
    like: Source, windows: Sequence[Tokens], numbers: Sequence[int], shape: tuple[int, int], sequences: int, first: int
) -> Batch:
    """The batch of `windows`, padded at its end to `shape` ([microbatches, microbatch]) sequences, and each of them to
    the sequence length: so nothing which counts sees padding, whose separators open documents. The windows' sources are
    `like` this one in tokenizer and length.
    """
    tokens = np.full((shape[0] * shape[1], like.sequence_length), like.tokenizer.separator, np.int64)
    labels = np.full_like(tokens, IGNORED)
    for row, window in enumerate(windows):
        tokens[row, : len(window) - 1] = window[:-1]
        labels[row, : len(window) - 1] = window[1:]
    positions = documents = None
    ends = [len(window) - 1 for window in windows] + [0] * (len(tokens) - len(windows))
    if like.document_mask:
        begins = document_begins(tokens, like.tokenizer.separator, ends)
        positions = torch.from_numpy(document_positions(begins)).view(*shape, -1)
        documents = torch.from_numpy(document_offsets(begins.reshape(*shape, -1)))
    inputs, targets = (torch.from_numpy(array).view(*shape, -1) for array in (tokens, labels))
    valid = sum(ends)
    return Batch(inputs, targets, positions, documents, tuple(numbers), first, sequences, valid)


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Keep a worker alive through signals to the whole job, which the trainer answers by finishing its step and saving:
    for that it needs its workers. Only a SIGTERM of its own, when it tears them down, ends them.
    """
    signal.set_wakeup_fd(-1)  # inherited: what this process is sent would be received by the trainer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows, where a SIGTERM still ends a worker
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)

"""metrics.jsonl and event files: what comes back, after kills and full disks too."""

from __future__ import annotations

import io
import json
import math
import os
import resource
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.errors import UsageError
from titanlite.observe.jsonl import JsonlSink, rewind, validation_row
from titanlite.observe.logger import RunLogger
from titanlite.observe.tensorboard import TensorBoardSink, frame_record
from titanlite.plan.rules import apply_rules
from titanlite.plan.sinks import SINKS
from titanlite.recipe.sections import Recipe


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def event_row(step, event, detail):
    return {"step": step, "event": event, "detail": detail}


def metric(step, loss=2.0):
    return {
        "step": step,
        "samples": step,
        "loss": loss,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens_per_second": 5.0,
        "mfu": None,
    }


def test_rows_are_in_the_file_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, 0, pytest.fail)
    rows = [metric(1), validation_row(1, 2.5, 1.9), event_row(1, "note", "größe")]
    for count, row in enumerate(rows, 1):
        sink.write(row)
        assert rows_of(path) == rows[:count]
    sink.close()


def test_what_json_cannot_say_is_null_and_said_beside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, 0, pytest.fail)
    sink.write({**metric(3, math.nan), "grad_norm": -math.inf})
    sink.close()
    odd = {"loss": "nan", "grad_norm": "-inf"}
    assert rows_of(path) == [{**metric(3), "loss": None, "grad_norm": None, "nonfinite": odd}]
    assert "NaN" not in path.read_text()


def test_a_resume_drops_the_rows_that_will_come_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, 0, pytest.fail)
    for step in (10, 20, 30):
        sink.write(metric(step))
    sink.write(validation_row(30, 2.0, 1.5))
    sink.write(event_row(30, "skipped", "loss spike"))
    sink.close()
    JsonlSink(path, 20, pytest.fail).close()
    assert rows_of(path) == [metric(10), metric(20), event_row(30, "skipped", "loss spike")]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_run_that_goes_back_drops_the_rows_it_gives_up(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, 0, pytest.fail)
    for row in (metric(10), metric(20), event_row(20, "rollback", "…"), metric(30)):
        sink.write(row)
    sink.rewind(10)
    sink.write(metric(20, 1.5))
    sink.sync()
    assert rows_of(path) == [metric(10), event_row(20, "rollback", "…"), metric(20, 1.5)]
    sink.rewind(20)
    sink.close()
    assert len(rows_of(path)) == 3


def test_rows_that_wait_for_the_disk_are_not_cut_by_going_back(tmp_path, monkeypatch):
    path, warnings = tmp_path / "metrics.jsonl", []
    sink = JsonlSink(path, 0, warnings.append)
    sink.write(metric(10))
    with monkeypatch.context() as patch:
        write = os.write

        def full(descriptor, data):
            if len(data) <= 50:
                raise OSError(28, os.strerror(28))
            return write(descriptor, bytes(data[:30]))

        patch.setattr(os, "write", full)
        sink.write(metric(20))
        sink.rewind(10)
    sink.write(metric(30))
    sink.close()
    assert rows_of(path) == [metric(10), metric(20), metric(30)] and len(warnings) == 1


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 400), after=st.integers(0, 6), garbage=st.binary(max_size=20))
def test_a_file_cut_anywhere_is_mended(cut, after, garbage, tmp_path_factory):
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    whole = [{"step": step, "loss": step / 7, "detail": "x" * 20} for step in range(1, 6)]
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in whole)
    path.write_bytes(lines[:cut] + garbage)
    rewind(path, after)
    kept = rows_of(path)
    full_lines = lines[:cut].count(b"\n")
    assert kept[:full_lines] == whole[: min(full_lines, after)]
    JsonlSink(path, after, pytest.fail).write(metric(9))
    assert rows_of(path)[-1] == metric(9)


def test_lines_that_are_no_rows_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'3\nnull\n[]\n{"x": 1}\n{"step": "a"}\n\xff\n' + b"\0" * 9 + b'\n{"step": 1}\n' + b"[" * 99999 + b"\n"
    )
    rewind(path, 5)
    assert rows_of(path) == [{"step": 1}]


def test_a_file_that_needs_no_mending_is_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    before = path.stat().st_ino
    rewind(path, 1)
    assert path.stat().st_ino == before
    rewind(tmp_path / "none", 1)
    assert not (tmp_path / "none").exists()


def test_a_full_disk_delays_rows_and_never_ends_the_run(tmp_path):
    path, warnings = tmp_path / "metrics.jsonl", []
    sink = JsonlSink(path, 0, warnings.append)
    child = os.fork()
    if child == 0:
        try:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (150, hard))
            for step in range(1, 6):
                sink.write(metric(step))
            assert len(warnings) == 1 and str(path) in warnings[0] and "File too large" in warnings[0]
            assert path.stat().st_size == 150
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            sink.write(metric(6))
            sink.close()
            assert len(warnings) == 1
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert rows_of(path) == [metric(step) for step in range(1, 7)]


def test_rows_that_never_fit_are_owned_up_to(tmp_path, monkeypatch):
    warnings = []
    sink = JsonlSink(tmp_path / "metrics.jsonl", 0, warnings.append)

    def full(descriptor, data):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "write", full)
    sink.write(metric(1))
    sink.close()
    assert "No space left on device" in warnings[0] and "could not be written" in warnings[1]


@pytest.mark.parametrize("sink", [JsonlSink, TensorBoardSink])
def test_a_place_that_cannot_be_written_is_named_before_training(sink, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=f"cannot write {tmp_path}/file/.*Not a directory"):
        sink(tmp_path / "file" / "below", 0, pytest.fail)


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_what_was_drawn(tmp_path):
    sink = TensorBoardSink(tmp_path, 0, pytest.fail)
    sink.write(metric(1))
    sink.write(metric(2, math.nan))
    sink.write(validation_row(2, 2.5, 1.75))
    sink.write(event_row(2, "note", "x"))
    scalars = read_events(tmp_path)
    sink.close()
    assert scalars["validation/loss"] == [(2, 2.5)] and scalars["validation/bits_per_byte"] == [(2, 1.75)]
    assert scalars["train/loss"][0] == (1, 2.0) and math.isnan(scalars["train/loss"][1][1])
    assert set(scalars) == {
        "train/loss", "train/grad_norm", "train/lr", "progress/samples", "speed/tokens_per_second",
        "validation/loss", "validation/bits_per_byte",
    }  # fmt: skip


def test_tensorboard_forgets_what_comes_again_after_a_resume(tmp_path, monkeypatch):
    for process, (after, steps) in enumerate([(0, (10, 20, 30)), (10, (20, 30, 40))]):
        monkeypatch.setattr("time.time_ns", lambda process=process: (10**9 + process) * 10**9)
        sink = TensorBoardSink(tmp_path, after, pytest.fail)
        for step in steps:
            sink.write(metric(step, float(process)))
        sink.close()
    assert read_events(tmp_path)["train/loss"] == [(10, 0.0), (20, 1.0), (30, 1.0), (40, 1.0)]


def test_tensorboard_forgets_what_a_run_gave_up(tmp_path):
    sink = TensorBoardSink(tmp_path, 0, pytest.fail)
    for step in (10, 20, 30):
        sink.write(metric(step, 0.0))
    sink.rewind(10)
    for step in (20, 30, 40):
        sink.write(metric(step, 1.0))
    sink.close()
    assert read_events(tmp_path)["train/loss"] == [(10, 0.0), (20, 1.0), (30, 1.0), (40, 1.0)]


@settings(max_examples=30, deadline=None)
@given(st.binary(max_size=300))
def test_records_are_framed_as_tensorboard_frames_them(data):
    from tensorboard.summary.writer.record_writer import RecordWriter

    theirs = io.BytesIO()
    RecordWriter(theirs).write(data)
    assert frame_record(data) == theirs.getvalue()


def test_sinks_cost_nothing_before_the_first_row():
    script = (
        "import sys, tempfile, pathlib\n"
        "from titanlite.observe.jsonl import JsonlSink\n"
        "from titanlite.observe.tensorboard import TensorBoardSink\n"
        "folder = pathlib.Path(tempfile.mkdtemp())\n"
        "JsonlSink(folder / 'm', 0, print); sink = TensorBoardSink(folder, 0, print)\n"
        "assert 'torch' not in sys.modules and 'google.protobuf' not in sys.modules\n"
        "sink.write({'step': 1, 'loss': 1.0})\n"
        "assert 'torch' not in sys.modules and 'tensorflow' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


class Flaky:
    """A sink whose server goes away at one of the calls."""

    def __init__(self, fails_at):
        self.fails_at, self.rows = fails_at, []
        self._call("open")

    def _call(self, name):
        if name == self.fails_at:
            raise ConnectionError("no route to host")

    def write(self, row):
        self._call("write")
        self.rows.append(row)

    def rewind(self, after_step):
        self._call("rewind")

    def sync(self):
        self._call("sync")

    def close(self):
        self._call("close")


def open_flaky(recipe, folder, after_step, warn):
    return Flaky((folder / "fails_at").read_text())


def with_sinks(*names, **keys):
    return Recipe.model_validate({"training": {"steps": 1}, "metrics": {"sinks": list(names), **keys}})


@pytest.mark.parametrize("fails_at", ["open", "write", "rewind", "sync", "close"])
def test_a_sink_that_raises_is_reported_once_and_the_run_goes_on(tmp_path, monkeypatch, fails_at):
    monkeypatch.setattr(SINKS, "_entries", {**SINKS._entries, "flaky": "observe.test_sinks:open_flaky"})
    monkeypatch.setitem(sys.modules, "observe.test_sinks", sys.modules[__name__])
    (tmp_path / "fails_at").write_text(fails_at)
    logger = RunLogger()
    logger.open_sinks(with_sinks("flaky", tensorboard=False), tmp_path, 0)
    for step in (1, 2):
        logger.write(metric(step))
        logger.sync()
    logger.rewind(1)
    logger.write(metric(2))
    logger.close()
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    (failed,) = [row for row in rows if row.get("event") == "sink_failed"]
    assert "'flaky'" in failed["detail"] and "ConnectionError: no route to host" in failed["detail"]
    assert os.listdir(tmp_path).count("tensorboard") == 0


def test_what_the_record_raises_ends_the_run(tmp_path):
    logger = RunLogger()
    logger.open_sinks(with_sinks(), tmp_path, 0)
    with pytest.raises(TypeError):
        logger.write({"step": 1, "loss": object()})
    assert (tmp_path / "tensorboard").is_dir()


def test_a_sink_that_nothing_registers_is_refused_by_name():
    (finding,) = (one for one in apply_rules(with_sinks("tensorbord"), 1) if one.key == "metrics.sinks")
    assert finding.severity == "error" and "tensorbord" in finding.problem and "tensorboard" in finding.fix

"""What is shown: plain lines in a log, one progress line on a terminal (here a pseudo-terminal)."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys

import pytest

from titanlite.observe.console import PlainConsole, TerminalConsole, describe_row, open_console
from titanlite.observe.jsonl import validation_row


def metric(step, loss=2.34567, mfu=0.412, seconds=0.5):
    return {
        "step": step, "samples": step, "tokens": step * 100, "loss": loss, "grad_norm": 0.52, "lr": 3e-4,
        "step_seconds": seconds, "data_wait_seconds": 0.001, "tokens_per_second": 5123.4,
        "tokens_per_second_per_device": 5123.4, "tflops_per_device": 0.1, "mfu": mfu, "memory_peak_gib": 1.214,
    }  # fmt: skip


def test_a_metrics_row_says_how_it_goes_and_how_long_it_takes():
    text = describe_row(metric(100), 2000)
    for part in ("step  100/2000", "loss  2.3457", "tokens/s    5.12K", "mfu  41.2%", "eta 0:15:50", "1.21 GiB"):
        assert part in text
    assert "mfu" not in describe_row(metric(100, mfu=None), 2000)
    stream = io.StringIO()
    console = PlainConsole(stream, 100)
    for step in (1, 10, 20, 30, 40, 50):  # the first compiles, and one waits for a file server
        console.write(metric(step, seconds={1: 60.0, 50: 30.0}.get(step, 0.5)))
    found = re.findall("eta (.*)", stream.getvalue())
    assert found[0] == "1:39:00" and found[2:] == ["0:00:40", "0:00:35", "0:00:30", "0:00:25"], "issue 14, item 27"
    assert "eta 0:15:50" in describe_row(metric(100, seconds=30.0), 2000, 0.5)
    assert "eta 115740740 days" in describe_row(metric(1, seconds=1e15), 2**60)
    assert "loss     nan" in describe_row(metric(100, loss=float("nan")), 2000)


def test_columns_stand_below_each_other():
    places = [
        [match.start() for match in re.finditer(r"loss|norm|lr|tokens/s|mfu|mem|eta", describe_row(row, 20000))]
        for row in (metric(1, 10.98765, 0.05, 12.25), metric(12345, 0.1, 0.999))
    ]
    assert places[0] == places[1] and len(places[0]) == 7


def test_a_pipe_gets_one_flushed_line_a_row():
    flushed = []

    class Stream(io.StringIO):
        def flush(self):
            flushed.append(self.getvalue().count("\n"))

    stream = Stream()
    console = open_console(stream, 200, "run")
    assert isinstance(console, PlainConsole)
    console.write(metric(100))
    console.write(validation_row(100, 2.5, 1.9))
    console.write({"step": 100, "event": "stopped", "detail": "signal"})
    console.message("warning: x")
    console.close()
    lines = stream.getvalue().splitlines()
    assert lines[1:] == [
        "step 100/200  validation loss 2.5000  bits per byte 1.9000",
        "step 100/200  stopped: signal",
        "warning: x",
    ]
    assert flushed == [1, 2, 3, 4]


def test_a_reader_that_left_does_not_end_the_run():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    console = PlainConsole(Gone(), 10)
    console.write(metric(1))
    console.message("x")


def test_rich_is_not_imported_for_plain_lines():
    script = (
        "import sys, io\nfrom titanlite.observe.console import open_console\n"
        "open_console(io.StringIO(), 10, 'run').message('x')\n"
        "assert 'rich' not in sys.modules and 'torch' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 120 columns; reading gives what was sent to it so far."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    controller, line = pty.openpty()
    os.set_blocking(controller, False)
    stream = os.fdopen(line, "w")

    def shown() -> str:
        text = b""
        while True:
            try:
                text += os.read(controller, 65536)
            except BlockingIOError:
                return text.decode()

    stream.shown = shown
    yield stream
    stream.close()
    os.close(controller)


def test_a_terminal_gets_one_progress_line_and_the_rest_above_it(terminal):
    console = open_console(terminal, 200, "debug [bold]")
    assert isinstance(console, TerminalConsole)
    try:
        console.write(metric(100))
        first = terminal.shown()
        console.write(validation_row(100, 2.5, 1.9))
        console.message("warning: [red]brackets[/red] stay")
        second = terminal.shown()
    finally:
        console.close()
    for part in ("debug [bold]", "100/200", "loss 2.3457", "tokens/s 5.12K", "mfu 41.2%", "eta 0:00:50"):
        assert part in first
    assert "\x1b[2K" in second, "the line is taken away before another is printed"
    assert "validation loss 2.5000" in second and "[red]brackets[/red]" in second
    assert second.rindex("100/200") > second.index("brackets"), "and is drawn again below it"


def test_a_terminal_that_is_gone_does_not_end_the_run():
    controller, line = pty.openpty()
    with os.fdopen(line, "w") as stream:
        console = TerminalConsole(stream, 10, "run")
        os.close(controller)
        console.write(metric(1))
        console.message("x")
        console.close()


def test_the_cursor_stays_in_sight(terminal):
    console = TerminalConsole(terminal, 10, "run")
    console.write(metric(1))
    text = terminal.shown()
    console.close()
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l"), "a run that is killed here cannot show it again"


def test_prints_of_others_pass_above_the_line(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stdout", terminal)
    console = open_console(terminal, 200, "run")
    console.write(metric(100))
    terminal.shown()
    print("from a library")
    text = terminal.shown()
    console.close()
    assert text.index("\x1b[2K") < text.index("from a library")


def test_a_dumb_terminal_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_console(terminal, 10, "run"), PlainConsole)

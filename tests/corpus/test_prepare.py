"""`titanlite data prepare`: the same bytes from any number of processes and after any kill; bad input is named."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from titanlite import files
from titanlite.cli import data
from titanlite.cli.main import main
from titanlite.corpus import prepare, units, workers
from titanlite.corpus.corpora import FoundFile, read_corpus
from titanlite.corpus.token_file import TokenFile, TokenizerInfo
from titanlite.corpus.tokenizers import open_tokenizer
from titanlite.data.sources import open_streams
from titanlite.errors import DataError
from titanlite.recipe.sections import Data

Run = Callable[..., str]


class InProcess(workers.WorkerPool):
    """The same work, done here: processes are slow to start."""

    def run(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        for number, task in enumerate(tasks):
            yield number, function(*task)


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "SMALLEST_UNIT_BYTES", 512)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], small_units: None) -> Run:
    """`titanlite data prepare` in `tmp_path`, in this process, with `out` as prefix; what it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "WorkerPool", InProcess)
    monkeypatch.setattr(os, "fsync", lambda _: None)

    def run_main(*words: str, out: str = "out", code: int = 0) -> str:
        assert main(["data", "prepare", *words, "--out", out]) == code, capsys.readouterr().err
        said = capsys.readouterr()
        return said.err if code else said.out

    return run_main


def texts_of(prefix: Path | str) -> list[bytes]:
    """The documents of a file of byte tokens."""
    file = TokenFile.open(prefix)
    assert file.tokens[-1] == 256
    ends = np.flatnonzero(file.tokens[:] == 256).tolist()
    starts = [0, *(end + 1 for end in ends[:-1])]
    assert file.document_bounds(0, file.documents).tolist() == [*starts, len(file.tokens)]
    return [file.tokens[start:end].astype(np.uint8).tobytes() for start, end in zip(starts, ends, strict=True)]


def outputs(folder: Path, prefix: str = "out") -> dict[str, bytes]:
    """Contents by the end of their files' names."""
    return {path.name.removeprefix(prefix): path.read_bytes() for path in sorted(folder.glob(f"{prefix}[.-]*"))}


def lines(texts: Sequence[str], key: str = "text") -> bytes:
    return b"".join(json.dumps({key: text}).encode() + b"\n" for text in texts)


def corpus(folder: Path, seed: int = 0) -> None:
    """Something of every kind, with duplicates, empty texts, and one long JSONL."""
    random_ = random.Random(seed)
    words = ["alpha ", "beta ", "gamma\n", "été ", "\u2603 "]

    def some(count: int, most: int) -> list[str]:
        return ["".join(random_.choices(words, k=random_.randrange(most))) for _ in range(count)]

    (folder / "in" / "deep").mkdir(parents=True)
    (folder / "in" / "long.jsonl").write_bytes(lines(some(150, 30)).replace(b"\n", b"\n \r\n", 20))
    (folder / "in" / "short.jsonl").write_bytes(lines(some(3, 9))[:-1])
    (folder / "in" / "packed.jsonl.gz").write_bytes(gzip.compress(lines(some(40, 30))))
    (folder / "in" / "packed.jsonl.zst").write_bytes(zstandard.compress(lines(some(40, 30))))
    (folder / "in" / "page.txt.gz").write_bytes(gzip.compress(b"one page\n" * 100))
    for number, text in enumerate(some(30, 60)):
        (folder / "in" / "deep" / f"{number}.txt").write_text(text)
    (folder / "in" / "any.md").write_bytes(bytes(range(256)) * 9)
    table = pyarrow.table({"id": list(range(100)), "text": some(100, 30)})
    pyarrow.parquet.write_table(table, folder / "in" / "rows.parquet", row_group_size=10)


# What comes out.


def test_every_document_once_and_in_order(run: Run, tmp_path: Path) -> None:
    """As a recipe reads the same folder."""
    corpus(tmp_path)
    run("in")
    expected = list(read_corpus(["in"], Data()))
    assert texts_of(tmp_path / "out") == [text for _, text in expected]
    info = TokenFile.open(tmp_path / "out").info
    assert info is not None
    assert info.documents == len(expected)
    assert info.text_bytes == info.tokens - info.documents == sum(len(text) for _, text in expected)
    assert [(source.path, source.files) for source in info.sources] == [("in", 37)]
    assert info.sources[0].bytes == sum(path.stat().st_size for path in (tmp_path / "in").rglob("*.*"))
    assert main(["data", "verify", "out"]) == 0
    assert list(outputs(tmp_path)) == [".bin", ".idx", ".json"]


def test_names_and_places_do_not_depend_on_the_units(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held out is what a recipe holds out, though it goes by the numbers of lines and rows."""
    corpus(tmp_path)
    for size in (128, 2**20):
        monkeypatch.setattr(prepare, "SMALLEST_UNIT_BYTES", size)
        run("in", "--held-out", "20", out=f"out-{size}")
        assert main(["data", "verify", f"out-{size}", f"out-{size}-validation"]) == 0
    section, tokenizer = Data(validation_percent=20.0), open_tokenizer("bytes")
    texts = open_streams(["in"], "", section, tokenizer)
    for size in (128, 2**20):
        files = open_streams([f"out-{size}"], "", section, tokenizer)
        for (file,), (text,) in zip(files, texts, strict=True):
            assert file.tokens[:].tolist() == text.tokens[:].tolist()
            assert file.fingerprint == text.fingerprint


def test_sources_are_known_by_their_texts(run: Run, tmp_path: Path) -> None:
    """However they lie on the disk."""
    texts = ["one", "two", "three"]
    (tmp_path / "a.jsonl").write_bytes(lines(texts))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(lines(texts[::-1])))
    (tmp_path / "c.jsonl").write_bytes(lines(["one", "two", "four"]))
    run("a.jsonl", "b.jsonl.zst", "c.jsonl")
    info = TokenFile.open("out").info
    assert info is not None
    a, b, c = info.sources
    assert (a.documents, b.documents) == (3, 3)
    assert a.texts_xxh3_128 == b.texts_xxh3_128 != c.texts_xxh3_128


def test_duplicates_are_dropped_wherever_they_are(run: Run, tmp_path: Path) -> None:
    """The first in order stays, also where the next is in another unit, file or part of the split."""
    random_ = random.Random(1)
    for name in "abc":
        texts = ["x" * random_.randrange(60) for _ in range(200)]
        (tmp_path / f"{name}.jsonl").write_bytes(lines(texts))
    run("*.jsonl")
    run("*.jsonl", "--dedup", out="unique")
    everything = texts_of("out")
    assert texts_of("unique") == list(dict.fromkeys(everything))
    info = TokenFile.open("unique").info
    assert info is not None and info.duplicates == len(everything) - len(set(everything))
    run("*.jsonl", "--dedup", "--held-out", "30", out="split")
    train, held = texts_of("split"), texts_of("split-validation")
    assert sorted(train + held) == sorted(set(everything)), "no text is on both sides"


def test_statistics_are_printed(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(["one", "seven77", "one"]))
    said = run("a.jsonl", "--dedup")
    assert "out: 12 tokens" in said
    for line in ("documents        2", "bytes per token  0.833", "lengths          2^2 1, 2^3 1", "1 dropped"):
        assert line in said
    found = json.loads(run("a.jsonl", "--dedup", "--json"))["out"]
    assert (found["documents"], found["duplicates"], found["lengths"]) == (2, 1, {"2^2": 1, "2^3": 1})


@pytest.mark.parametrize(
    ("tokenizer", "made_from", "fingerprint", "hashes"),
    [
        ("bytes", "536fd2017e79820537b3afb8bab6d506", "d9562963a43527cde00a9afa6561ede9",
         ("9367ed009f3b29ed", "a1dfa7bcfca42937", "c34dc0c4bee741fb", "edd170068943ef60")),
        ("tokenizer.model", "258ec248bb4318f3be3a818d836576e0", "f6046ef9107ce52ea3e7620c62bb4ed8",
         ("463975637db35c63", "98802cc28c02c563", "abb9c2b0a5fa36dd", "69aa5b0863b14a0b")),
    ],
)  # fmt: skip
def test_the_bytes_are_those_of_earlier_versions(
    run: Run, tmp_path: Path, tokenizer: str, made_from: str, fingerprint: str, hashes: tuple[str, ...]
) -> None:
    """Stored from commit 086e4ef: ids, index, what is held out, and the hashes by which a file is known again."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(
        b"".join(b'{"text": "%d squared is %d. \\u00e9"}\n' % (n, n * n) for n in range(40))
    )
    (tmp_path / "in/b.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "in/c.txt").write_text("three")
    ranks = [*(bytes([byte]) for byte in range(256)), b"sq", b"squ", b" i"]
    rank_lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(ranks)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(rank_lines))
    run("in", "--held-out", "20", "--dedup", "--tokenizer", tokenizer)
    infos = [json.loads(Path(f"out{end}.json").read_text()) for end in ("", "-validation")]
    assert {(info["made_from"], info["tokenizer"]["fingerprint"]) for info in infos} == {(made_from, fingerprint)}
    assert tuple(info[key] for info in infos for key in ("bin_xxh3_64", "idx_xxh3_64")) == hashes


# Processes, and their ends.


@pytest.mark.parametrize("count", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 3, 5))])
def test_the_bytes_do_not_depend_on_the_number_of_processes(run: Run, tmp_path: Path, count: int) -> None:
    corpus(tmp_path)
    words = ("in", "--dedup", "--held-out", "10")
    run(*words, out="here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "WorkerPool", workers.WorkerPool)
        run(*words, "--workers", str(count), out="there")
    assert len(outputs(tmp_path, "there")) == 6
    assert outputs(tmp_path, "there") == outputs(tmp_path, "here")


@pytest.mark.slow
def test_of_several_bad_lines_the_first_is_reported(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though a later one is met sooner."""
    (tmp_path / "a.jsonl").write_bytes(lines(["some text " * 1_000] * 3_000) + b"{")
    (tmp_path / "b.jsonl").write_bytes(b"{")
    monkeypatch.setattr(prepare, "unit_bytes", lambda _: (tmp_path / "a.jsonl").stat().st_size)
    monkeypatch.setattr(prepare, "WorkerPool", workers.WorkerPool)
    assert "a.jsonl:3001: invalid JSON" in run("a.jsonl", "b.jsonl", "--workers", "2", code=2)


PROGRAM = """
import sys
from titanlite.cli.main import main
from titanlite.corpus import prepare
prepare.SMALLEST_UNIT_BYTES = 512
sys.exit(main(sys.argv[1:]))
"""


def started(folder: Path, count: int) -> subprocess.Popen[bytes]:
    """`prepare` with so many workers in a process group of its own."""
    words = ["prepare", "in", "--out", "out", "--dedup", "--held-out", "10", "--workers", str(count)]
    return subprocess.Popen([sys.executable, "-c", PROGRAM, "data", *words], cwd=folder, start_new_session=True)


def group_is_gone(group: int, seconds: float = 60.0) -> bool:
    """Whether no process of the group is left, once that is so."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def finished_parts(folder: Path) -> int:
    try:
        return sum(name.endswith(".json") for name in os.listdir(folder / "out.parts"))
    except FileNotFoundError:  # not yet there, or not any more
        return 0


def kill_at_random(run: Run, folder: Path, kills: int, seed: int, count: int) -> None:
    """Kill it some moments after it is seen to have got somewhere, again and again, and then let it end."""
    corpus(folder, seed)
    random_ = random.Random(seed)
    words = ("in", "--dedup", "--held-out", "10")
    run(*words, out="whole")
    whole = outputs(folder, "whole")
    for _ in range(kills):
        process = started(folder, count)
        enough = finished_parts(folder) + random_.randrange(12)
        while process.poll() is None and finished_parts(folder) < enough:
            time.sleep(0.001)
        time.sleep(random_.random() * 0.05)
        process.kill()
        process.wait()
        assert group_is_gone(process.pid), "workers die with the process that started them"
    run(*words)
    assert outputs(folder) == whole
    assert not (folder / "out.parts").exists()


def test_killed_and_started_again(run: Run, tmp_path: Path) -> None:
    kill_at_random(run, tmp_path, 1, 0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_killed_at_random(run: Run, tmp_path: Path, seed: int) -> None:
    kill_at_random(run, tmp_path, 8, seed, 1 + seed % 3)


class Killed(BaseException):
    """Stands for the end of the process: nothing is tidied up that a kill would leave."""


@pytest.mark.parametrize("at", range(12))
def test_killed_at_any_rename(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Those of parts and those of the final files: the next start makes what an undisturbed one does."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(lines([f"document {number}" for number in range(30)]))
    words = ("in", "--held-out", "30")
    run(*words, out="whole")
    replace, count = os.replace, iter(range(10**6))

    def dies(source: Path, target: Path) -> None:
        if next(count) == at:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(Killed):
            run(*words)
    if not Path("out.idx").exists():
        with pytest.raises(DataError, match=r"out\.idx: missing; `titanlite data prepare` has not ended"):
            open_streams(["out"], "", Data(), open_tokenizer("bytes"))
    for prefix in ("out", "out-validation"):
        if not Path(f"{prefix}.idx").exists():
            with pytest.raises(DataError, match=r"\.idx: missing"):
                TokenFile.open(prefix)
        else:
            assert TokenFile.open(prefix).info is not None
    run(*words)
    assert outputs(tmp_path) == outputs(tmp_path, "whole")
    assert not list(tmp_path.glob(".*"))


def kill_itself(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_reported() -> None:
    """With what it was at, and the fix."""
    with (
        workers.WorkerPool(1) as pool,
        pytest.raises(DataError, match=r"killed at a\.txt; .* out of memory.*--workers"),
    ):
        list(pool.run(kill_itself, [("a.txt",), ("b.txt",)]))


# What was there before.


def test_a_second_start_is_refused_while_the_first_goes_on(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "out.parts").mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(tmp_path / "out.parts" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        holder.stdout.readline()
        said = run("a.txt", code=2)
        assert "the prefix out is in use by another process. Wait for it to end, or give another --out" in said
        holder.stdin.close()
    run("a.txt")
    assert texts_of("out") == [b"text"]


def test_a_lock_that_was_removed_is_noticed_before_the_parts_are_joined(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 14, item 13: as a run's."""
    (tmp_path / "a.txt").write_text("text")
    write_parts = prepare._write_parts

    def removed(*arguments: Any) -> Any:
        (tmp_path / "out.parts/.lock").unlink()
        return write_parts(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_write_parts", removed)
        assert str(Path("out.parts/.lock")) in run("a.txt", code=2)
    assert not (tmp_path / "out.idx").exists()
    run("a.txt")
    assert texts_of("out") == [b"text"]


def test_what_is_done_is_not_done_again(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus(tmp_path)
    words = ("in", "--held-out", "10")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_join", lambda *_: (_ for _ in ()).throw(DataError("stopped")))
        run(*words, code=2)
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.parts").iterdir() if path.name != ".lock"}
    os.utime(tmp_path / "in" / "any.md", ns=(1, 1))  # changed: the parts of the others serve all the same
    written = []
    write_part = units.write_part
    monkeypatch.setattr(units, "write_part", lambda *given: written.append(write_part(*given)))
    run(*words)
    assert 0 < len(written) < len(parts) / 3 / 4
    monkeypatch.setattr(prepare, "_join", None)
    run(*words)  # finished: nothing at all is done


def test_parts_of_other_settings_or_broken_ones_do_not_serve(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "this", "body": "that"}\n')
    run("a.jsonl", out="whole")
    parts = tmp_path / "out.parts"
    for words in (("a.jsonl", "--text-key", "body"), ("a.jsonl",)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare, "_join", lambda *_: (_ for _ in ()).throw(DataError("stopped")))
            run(*words, code=2)
    assert len(list(parts.glob("*.tokens"))) == 2
    for path in parts.glob("*.tokens"):
        os.truncate(path, 2)
    run("a.jsonl")
    assert texts_of("out") == [b"this"]


def test_other_token_files_are_not_replaced_unasked(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    run("a.txt")
    before = outputs(tmp_path)
    for words, reason in (
        (("a.txt", "--dedup"), "out.bin is there already, and it is of other inputs or settings"),
        (("a.txt", "--held-out", "50"), "it is of other inputs or settings"),
    ):
        assert reason in run(*words, code=2)
        assert outputs(tmp_path) == before
    (tmp_path / "a.txt").write_text("next")
    os.utime(tmp_path / "a.txt", (2**31, 2**31))
    said = run("a.txt", code=2)
    assert "out.bin is there already, and a.txt is newer. Give another --out, or add --force to overwrite it" in said
    run("a.txt", "--force")
    assert texts_of("out") == [b"next"]
    (tmp_path / "foreign.json").write_text("{}")
    assert "foreign.json is there already, and is not whole" in run("a.txt", out="foreign", code=2)
    assert (tmp_path / "foreign.json").read_text() == "{}"
    assert not (tmp_path / "foreign.parts").exists()


# Bad input.


BAD = [b'{"text": "x"', b'{"text": "\xff"}', b'{"body": "x"}', b'{"text": null}', b"[]"]


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_bad_lines_are_counted_or_stop_it(run: Run, tmp_path: Path, packing: str) -> None:
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[packing]
    good = lines([f"text {number}" for number in range(40)]).splitlines()
    mixed = [
        line for number, text in enumerate(good) for line in ([text, BAD[number // 8]] if number % 8 == 7 else [text])
    ]
    (tmp_path / f"a.jsonl{packing}").write_bytes(pack(b"\n".join(mixed)))
    assert f"a.jsonl{packing}:9: invalid JSON at column 13" in run("*.jsonl*", code=2)
    said = run("*.jsonl*", "--bad-lines", "skip")
    assert texts_of("out") == [f"text {number}".encode() for number in range(40)]
    assert "bad lines        5 skipped" in said
    info = TokenFile.open("out").info
    assert info is not None and info.bad_lines == 5
    assert [line.partition(": ")[0] for line in info.bad_line_examples] == [
        f"a.jsonl{packing}:{number}" for number in (9, 18, 27, 36, 45)
    ]


def test_only_the_first_bad_lines_are_listed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{\n" * 500 + lines(["fine"]))
    said = run("a.jsonl", "--bad-lines", "skip")
    assert "bad lines        500 skipped" in said
    assert "a.jsonl:10: " in said and "a.jsonl:11: " not in said
    assert "and 490 more" in said


def test_rows_without_text(run: Run, tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["one", None, "", "two", None]})
    pyarrow.parquet.write_table(table, "a.parquet", row_group_size=2)
    assert "a.parquet:2: 'text' is null" in run("a.parquet", code=2)
    run("a.parquet", "--bad-lines", "skip")
    assert texts_of("out") == [b"one", b"two"]
    info = TokenFile.open("out").info
    assert info is not None and [line[:13] for line in info.bad_line_examples] == ["a.parquet:2: ", "a.parquet:5: "]


def test_what_cannot_be_read_is_named(run: Run, tmp_path: Path) -> None:
    for packing, pack in ((".gz", gzip.compress), (".zst", zstandard.ZstdCompressor(write_checksum=True).compress)):
        whole = pack(lines([os.urandom(50).hex() for _ in range(2_000)]))
        path = tmp_path / f"c.jsonl{packing}"
        path.write_bytes(whole[: len(whole) // 2])
        assert f"c.jsonl{packing}: damaged or cut short" in run(path.name, code=2)
        path.write_bytes(whole[:1000] + b"\0" * 1000 + whole[2000:])
        assert f"c.jsonl{packing}" in run(path.name, "--bad-lines", "skip", code=2)
    assert "nowhere: INPUT names no file" in run("nowhere", code=2)
    (tmp_path / "e.jsonl").write_bytes(b"\n\n")
    assert "the inputs hold no text at all" in run("e.jsonl", code=2)
    assert not list(tmp_path.glob(".*"))


def test_a_file_that_changes_meanwhile(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    find = prepare.find_inputs

    def found_then_changed(inputs: Sequence[str], text_key: str) -> Any:
        found = find(inputs, text_key)
        with open(tmp_path / "a.txt", "a") as file:
            file.write("more")
        return found

    monkeypatch.setattr(data, "find_inputs", found_then_changed)
    assert "a.txt: changed while it was read; start again" in run("a.txt", code=2)


def test_nothing_held_out(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    assert "none of the 1 documents are held out by --held-out" in run("a.txt", "--held-out", "1e-9", code=2)
    assert "all of the 1 documents are held out" in run("a.txt", "--held-out", "99.9999999", code=2)


@pytest.mark.parametrize("words", [("--held-out", "100"), ("--held-out", "-1"), ("--workers", "-1")])
def test_wrong_usage(run: Run, tmp_path: Path, words: tuple[str, ...]) -> None:
    assert words[0] in run("in", *words, code=2)


def test_a_lock_that_its_last_holder_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 14, item 13: between the opening of the lock file and its locking, as the end of another `prepare` may."""
    taken, calls = files._lock_file, []

    def removed_first(lock: int, path: Path, warn: Callable[[str], None]) -> bool:
        calls.append(lock)
        if len(calls) == 1:
            path.unlink()
        return taken(lock, path, warn)

    monkeypatch.setattr(files, "_lock_file", removed_first)
    lock = files.take_lock(tmp_path / ".lock", "it", "wait", print)
    assert lock.is_in_place() and len(calls) == 2
    lock.close()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("prepare", "", "--out", "out"), "the path is empty"),
        (("prepare", "in", "--out", ""), "the path is empty"),
        (("verify", ""), "the path is empty"),
        (("prepare", "in", "--out", "."), "is a folder"),
        (("prepare", "in", "--out", ".."), "is a folder"),
        (("verify", "/"), "is a folder"),
    ],
)
def test_paths_without_a_name(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str) -> None:
    """Issue 14, D: what an unset variable leaves is not the current folder, and a folder is no prefix."""
    with suppress(SystemExit):
        assert main(["data", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_full_disk(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        said = run("a.txt", code=2)
        assert "No space left on device (" in said and "What is done stays done" in said
    run("a.txt")
    assert texts_of("out") == [b"text"]


def test_a_long_document_is_not_copied_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens go to the disk block by block."""
    seen: list[int] = []

    @contextmanager
    def recording(path: Path, writer: str) -> Iterator[Mock]:
        with files.replacing(path, writer) as file:
            yield Mock(wraps=file, write=lambda data: (seen.append(data.nbytes), file.write(data)))

    monkeypatch.setattr(units, "replacing", recording)
    monkeypatch.setattr(units, "BLOCK", 1_000)
    text = os.urandom(50_500)
    (tmp_path / "a.txt").write_bytes(text)
    status = (tmp_path / "a.txt").stat()
    tokenizer = open_tokenizer("bytes")
    request = units.Request((), tmp_path / "out", TokenizerInfo.of("bytes", tokenizer), None, (), "text", 0.0)
    (tmp_path / "out.parts").mkdir()
    file = FoundFile("a.txt", tmp_path / "a.txt", "text", status.st_size, status.st_mtime_ns)
    unit = units.Unit((file,), status.st_size)
    units.write_part(unit, request, tokenizer)
    part = units.find_part(unit, request)
    assert part is not None
    assert np.fromfile(part.tokens, np.uint16).tolist() == [*text, 256]
    assert seen == [*[2_000] * 50, 1_000, 2, units.RECORD.itemsize]


def test_names_that_are_no_text(run: Run, tmp_path: Path) -> None:
    """File names may hold any bytes; JSON and terminals may not."""
    path = os.fsencode(tmp_path) + b"/\xff.jsonl"
    with open(path, "wb") as file:
        file.write(b"{\n" + lines(["fine"]))
    said = run(os.fsdecode(path), "--bad-lines", "skip")
    assert "\\udcff.jsonl:1: invalid JSON" in said
    info = TokenFile.open("out").info
    assert info is not None and info.sources[0].path.endswith("\\udcff.jsonl")


# What is seen of it.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal(), Gone()], ids=["log", "terminal", "gone"])
def test_progress(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(workers, "PLAIN_SECONDS", 0.0)
    monkeypatch.setattr(workers, "MOVING_SECONDS", 0.0)
    with closing(workers.Progress(stream)) as shown:
        shown.begin("tokenizing", 2**21, 2**20)
        shown.advance(2**19)
        shown.message("by the way")
    said = stream.getvalue()
    if isinstance(stream, Gone):
        assert said == ""
        return
    for text in ("tokenizing", "going on: 1.00 MiB of 2.00 MiB are done", "by the way"):
        assert text in said
    assert "tokenizing: 1.50 MiB of 2.00 MiB, 75 %" in said
    assert ("\r" in said) == isinstance(stream, Terminal)

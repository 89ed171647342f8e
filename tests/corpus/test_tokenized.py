"""Texts that are too many for memory: the same samples, from files that are made once, whoever comes first."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from titanlite.corpus import prepare
from titanlite.corpus.token_file import TokenFile
from titanlite.corpus.units import Request
from titanlite.data.splits import DataSplits, open_data
from titanlite.errors import DataError
from titanlite.recipe.sections import Data


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a JSONL file and texts, taken for large."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "IN_MEMORY_BYTES", 100)
    monkeypatch.setattr(prepare, "cores", lambda: 1)
    (tmp_path / "in").mkdir()
    lines = [json.dumps({"text": f"{number} squared is {number**2}. " * (number % 7)}) for number in range(300)]
    (tmp_path / "in" / "many.jsonl").write_text("\n".join(lines))
    for number in range(20):
        (tmp_path / "in" / f"{number}.txt").write_text(f"{number} cubed is {number**3}. " * 9)
    return tmp_path


def opened(corpus: str = "in", folder: Path | None = Path("cache")) -> DataSplits:
    return open_data(Data(corpus=corpus, validation_percent=20.0), 16, 3, texts_folder=folder)


def test_samples_are_those_of_the_texts_in_memory(texts: Path) -> None:
    files, memory = opened(), opened(folder=None)
    assert all(isinstance(stream, TokenFile) for stream in files.train.sources[0].streams)
    assert files.fingerprint == memory.fingerprint
    for number in range(2 * memory.train.windows):
        assert np.array_equal(files.train.sample(number), memory.train.sample(number))
    assert np.array_equal(files.validation[0].window(0), memory.validation[0].window(0))


def test_they_are_made_once_for_each_version_of_the_texts(texts: Path) -> None:
    first = opened()
    made = {path: path.stat().st_mtime_ns for path in Path("cache").glob("*.bin")}
    assert opened().fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in Path("cache").glob("*.bin")} == made
    (texts / "in" / "3.txt").write_text("another text of this name. " * 9)
    assert opened().fingerprint == opened(folder=None).fingerprint != first.fingerprint


def test_what_is_better_read_is_read(texts: Path) -> None:
    (texts / "one").mkdir()
    (texts / "one" / "long.txt").write_text("its end is held out, which files cannot say. " * 50)
    assert opened("one").fingerprint == opened("one", None).fingerprint
    assert not Path("cache").exists()


def test_refusals_name_keys_of_the_recipe(texts: Path) -> None:
    with (texts / "in" / "many.jsonl").open("a") as file:
        file.write('\n{"content": "of another field"}\n')
    with pytest.raises(DataError, match=r"many\.jsonl.*301.*data\.text_key"):
        opened()
    Path("shut").write_text("")
    with pytest.raises(DataError, match=r"cannot write or lock .*shut.*run\.output_dir"):
        opened(folder=Path("shut"))


def test_without_locks_nothing_is_written(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else many ranks would write the same files at once."""

    def unlockable(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "lockf", unlockable)
    with pytest.raises(DataError, match=r"cannot write or lock .*Function not implemented.*run\.output_dir"):
        opened()
    assert not list(Path("cache").glob("*.bin"))


def test_what_is_there_needs_no_lock(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened()
    monkeypatch.setattr(fcntl, "lockf", None)
    assert opened().fingerprint == first.fingerprint


def test_texts_that_change_meanwhile_are_not_kept(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepare.prepare

    def changed_before(*arguments: Any) -> Any:
        (texts / "in" / "3.txt").write_text("another text of this name. " * 9)
        return made(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "prepare", changed_before)
        with pytest.raises(DataError, match="changed while it was read"):
            opened()
    assert opened().fingerprint == opened(folder=None).fingerprint


def test_of_other_settings_or_times_they_are_others(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def stop(request: Request, *_: object) -> None:
        names.append(request.out.name)
        raise DataError("stopped")

    monkeypatch.setattr(prepare, "prepare", stop)
    changes: list[dict[str, Any]] = [{}, {"special_tokens": ["<x>"]}, {"text_key": "t"}, {"validation_percent": 5.0}]
    for change in (*changes, {}):
        with pytest.raises(DataError, match="stopped"):
            open_data(Data(**{"corpus": "in", "validation_percent": 20.0, **change}), 16, 3, texts_folder=Path("cache"))
        if change == changes[-1]:
            os.utime(texts / "in" / "3.txt", (1, 1))
    assert len(set(names)) == 5


@pytest.mark.slow
def test_of_many_processes_one_tokenizes(texts: Path) -> None:
    program = (
        "from pathlib import Path\n"
        "from titanlite.corpus import prepare\n"
        "prepare.IN_MEMORY_BYTES = 100\n"
        "from titanlite.data.splits import open_data\n"
        "from titanlite.recipe.sections import Data\n"
        "data = Data(corpus='in', validation_percent=20.0)\n"
        "print(open_data(data, 16, 3, texts_folder=Path('cache')).fingerprint)\n"
    )
    ranks = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    said = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], said
    assert {int(out) for out, _ in said} == {opened(folder=None).fingerprint}
    assert sum(b"of texts into" in error for _, error in said) == 1

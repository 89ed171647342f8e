"""What loading reads of the files, and what it holds of them: the bytes that are wanted, a block at a time."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoint_ranks import write_parts

from titanlite.checkpoint import format, load
from titanlite.checkpoint.format import Manifest
from titanlite.checkpoint.load import load_state, read_chunks, runs, without_short_runs
from titanlite.errors import DamagedCheckpointError
from titanlite.models.shard import Shard


def write_rows(folder: Path, whole: torch.Tensor, ranks: int) -> Manifest:
    """A checkpoint of one matrix, `w`, that each rank wrote some rows of."""
    folder.mkdir()
    rows, columns = -(-len(whole) // ranks), [0] * (whole.dim() - 1)
    parts = enumerate(whole.split(rows))
    return write_parts(folder, [{"w": Shard(part, (n * rows, *columns), tuple(whole.shape))} for n, part in parts])


def read_box(folder: Path, manifest: Manifest, into: Shard) -> None:
    """As a rank that verifies none of the files."""
    for file, chunks in format.chunks_by_file(manifest.tensors).items():
        wanted = [part for part in chunks if load.overlap(part[-1].box, into.box)]
        if wanted:
            read_chunks(folder / file, wanted, {"w": into})


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every read of a checkpoint's files beside the manifest, from now on."""
    sizes: list[int] = []

    class Counting(FileIO):
        def readinto(self, memory: Any) -> int | None:
            count = super().readinto(memory)
            sizes.append(count or 0)
            return count

        def read(self, size: int | None = -1) -> bytes | None:
            data = super().read(size)
            sizes.append(len(data or b""))
            return data

    open_regular = load.open_regular

    @contextmanager
    def opened(*arguments: Any) -> Iterator[FileIO]:
        with open_regular(*arguments) as file, Counting(os.dup(file.fileno())) as counting:
            yield counting

    monkeypatch.setattr(load, "open_regular", opened)
    return sizes


def tables_bytes(folder: Path, files: list[str]) -> int:
    """Of the tables at the heads of these files."""
    return sum(8 + int.from_bytes((folder / file).read_bytes()[:8], "little") for file in files)


def test_a_rank_reads_the_bytes_of_its_part_and_no_others(tmp_path: Path, counted: list[int]) -> None:
    """A matrix in eight row blocks on as many ranks is read as one of three column blocks."""
    folder, whole = tmp_path / "step-00000001", torch.randn(64, 6000)
    manifest = write_rows(folder, whole, 8)
    into = Shard(torch.zeros(64, 2000), (0, 2000), (64, 6000))
    read_box(folder, manifest, into)
    assert torch.equal(into.tensor, whole[:, 2000:4000])
    assert sum(counted) == tables_bytes(folder, list(manifest.files)) + into.tensor.nbytes
    counted.clear()
    into = Shard(torch.zeros(3, 6000), (9, 0), (64, 6000))
    read_box(folder, manifest, into)
    assert torch.equal(into.tensor, whole[9:12])
    assert sum(counted) == tables_bytes(folder, ["tensors-00001-000.safetensors"]) + into.tensor.nbytes


def test_short_pieces_of_rows_are_read_as_rows(tmp_path: Path, counted: list[int]) -> None:
    """A call for every few bytes would take longer than the bytes between them."""
    folder, whole = tmp_path / "step-00000001", torch.randn(2000, 30)
    manifest = write_rows(folder, whole, 2)
    into = Shard(torch.zeros(500, 10), (750, 10), (2000, 30))
    read_box(folder, manifest, into)
    assert torch.equal(into.tensor, whole[750:1250, 10:20])
    assert len(counted) == 2 * 3 and sum(counted) == tables_bytes(folder, list(manifest.files)) + 500 * 30 * 4


def test_a_rank_that_verifies_reads_every_byte_once(tmp_path: Path, counted: list[int]) -> None:
    folder, whole = tmp_path / "step-00000001", torch.randn(64, 6000)
    manifest = write_rows(folder, whole, 3)
    into = Shard(torch.zeros(64, 2000), (0, 2000), (64, 6000))
    load_state(folder, {"w": into})
    assert torch.equal(into.tensor, whole[:, 2000:4000])
    assert sum(counted) == sum(entry.bytes for entry in manifest.files.values())


# --- memory

MEASURED = """
import json, sys
from pathlib import Path
import torch
from test_reading import read_box, resident
from titanlite.checkpoint.load import load_state
from titanlite.checkpoint.storage import read_manifest
from titanlite.models.shard import Shard

folder, shape = Path(sys.argv[1]), (6000, 8000)
manifest = read_manifest(folder)
torch.ones(2**20).bfloat16()  # code that is paged in is no buffer
for verified, dtype, box in (
    (True, torch.float32, ((0, 0), shape)),
    (True, torch.bfloat16, ((0, 0), shape)),
    (False, torch.float32, ((0, 1000), (6000, 3000))),
    (False, torch.float32, ((1500, 0), (3000, 8000))),
):
    into = Shard(torch.ones(box[1], dtype=dtype), box[0], shape)
    Path("/proc/self/clear_refs").write_text("5")  # what it had at most is now what it has
    before = resident("VmHWM")
    if verified:
        load_state(folder, {"w": into}, convert=True)
    else:
        read_box(folder, manifest, into)
    print(json.dumps([resident("VmHWM") - before, into.tensor.sum(dtype=torch.float64).item()]))
"""


def resident(field: str) -> int:
    """Bytes of memory that this process has (`VmRSS`) or had at most (`VmHWM`), mapped files counted."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of memory")
def test_loading_holds_a_block_beside_its_part(tmp_path: Path) -> None:
    """By the most memory that a process of its own ever had. A file mapped or a tensor made whole would show."""
    whole = torch.arange(6000.0 * 8000).remainder_(257).view(6000, 8000)  # 192 MB, in two files
    write_rows(tmp_path / "step-00000001", whole, 2)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "step-00000001")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    held, sums = zip(*map(json.loads, done.stdout.splitlines()), strict=True)
    parts = whole, whole.bfloat16(), whole[:, 1000:4000], whole[1500:4500]
    assert list(sums) == [part.sum(dtype=torch.float64).item() for part in parts]
    assert max(held) < 6 * load.BLOCK_BYTES, held


# --- the arithmetic


@settings(deadline=None)
@given(st.data())
def test_runs_are_the_places_of_a_boxs_cells(data: st.DataObject) -> None:
    axes = data.draw(st.lists(st.tuples(*(st.integers(1, 4) for _ in range(3))), max_size=4))
    offset, shape = tuple(5 for _ in axes), tuple(a + b + c - 2 for a, b, c in axes)
    start, size = tuple(5 + a - 1 for a, _, _ in axes), tuple(b for _, b, _ in axes)
    cells = np.arange(int(np.prod(shape))).reshape(shape)

    def inside(box: tuple[tuple[int, ...], tuple[int, ...]]) -> list[int]:
        return cells[tuple(slice(a - 5, a - 5 + n) for a, n in zip(*box, strict=True))].flatten().tolist()

    found = [list(range(first, first + count)) for first, count in runs((offset, shape), (start, size))]
    assert list(itertools.chain(*found)) == inside((start, size))
    assert all(a[-1] + 1 < b[0] for a, b in itertools.pairwise(found)), "runs that meet are one"
    least = data.draw(st.integers(0, 30))
    wide = without_short_runs((offset, shape), (start, size), least)
    assert set(inside((start, size))) <= set(inside(wide))
    assert wide[0][:1] + wide[1][:1] == start[:1] + size[:1], "no more rows than were asked for"
    counts = [count for _, count in runs((offset, shape), wide)]
    assert min(counts) > least or len(counts) == 1


@pytest.mark.parametrize(
    "table",
    [
        *(b"[]", b"{", b"[" * 100_000, b'{"w": 8}', b'{"v": {"data_offsets": [0, 8]}}'),
        *(b'{"w": {"data_offsets": %b}}' % text for text in (b"[0, 3]", b"[0.0, 8.0]", b"[4, 8]", b"[8, 0]", b"[0]")),
        *(b'{"w": {"data_offsets": "08"}}', b'{"w": {"data_offsets": [0, 8]}, "v": {"data_offsets": [4, 8]}}'),
    ],
)
def test_a_table_that_is_none_is_damage_to_who_does_not_verify_it(table: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    manifest = write_rows(folder, torch.ones(2), 1)
    path = folder / "tensors-00000-000.safetensors"
    into = Shard.whole(torch.zeros(2))
    read_box(folder, manifest, into)
    assert into.tensor.sum() == 2
    for content in (len(table).to_bytes(8, "little") + table + b"01234567", (2**62).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        with pytest.raises(DamagedCheckpointError, match="tensors-00000-000"):
            read_box(folder, manifest, into)


def test_a_file_that_shrinks_while_it_is_read_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mapped into memory, it would have killed the process."""
    folder = tmp_path / "step-00000001"
    write_rows(folder, torch.ones(1000, 1000), 1)
    path = folder / "tensors-00000-000.safetensors"
    check_table = format.check_table

    def cut_after(*arguments: Any) -> None:
        check_table(*arguments)
        monkeypatch.setattr(load, "row_blocks", lambda *of: (os.truncate(path, 2_000_000), *blocks(*of))[1:])

    blocks = load.row_blocks
    monkeypatch.setattr(format, "check_table", cut_after)
    with pytest.raises(DamagedCheckpointError, match="is damaged"):
        load_state(folder, {"w": Shard.whole(torch.zeros(1000, 1000))})

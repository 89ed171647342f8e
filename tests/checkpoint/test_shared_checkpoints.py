"""Checkpoints that several ranks write and read: any cutting to any other, and what fails on one fails on all."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import checkpoint_ranks
from support.checkpoint_ranks import write_parts
from support.pool import Pool
from support.runs import flip

from titanlite.checkpoint.format import MANIFEST, overlap
from titanlite.checkpoint.load import assign_files, load_state
from titanlite.checkpoint.save import boxes_to_write
from titanlite.checkpoint.storage import read_manifest
from titanlite.errors import CheckpointError
from titanlite.models.shard import Shard
from titanlite.plan import memory

Cutting = list[dict[str, Shard]]
"""Each rank's shards of the same tensors."""


@st.composite
def cuttings(draw: st.DrawFn, tensors: dict[str, torch.Tensor]) -> Cutting:
    """Each tensor cut by a grid of its own, with as many copies as are left of the ranks."""
    ranks = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    cut: Cutting = [{} for _ in range(ranks)]
    for name, tensor in tensors.items():
        edges, copies = [], ranks
        for extent in tensor.shape:
            parts = draw(st.sampled_from([n for n in range(1, copies + 1) if copies % n == 0]))
            copies //= parts
            inner = st.lists(st.integers(0, extent), min_size=parts - 1, max_size=parts - 1).map(sorted)
            edges.append(list(itertools.pairwise([0, *draw(inner), extent])))
        holders = draw(st.permutations(range(ranks)))
        places = itertools.product(itertools.product(*edges), range(copies))
        for rank, (spans, copy) in zip(holders, places, strict=True):
            held = tensor[tuple(slice(*span) for span in spans)].clone()
            offset = tuple(first for first, _ in spans)
            cut[rank][name] = Shard(held, offset, tuple(tensor.shape), copies, copy)
    return cut


def numbered(shapes: list[list[int]]) -> dict[str, torch.Tensor]:
    """Tensors no two of whose values are the same."""
    first, tensors = 1.0, {}
    for index, shape in enumerate(shapes):
        count = int(np.prod(shape))
        tensors[f"t{index}"] = torch.arange(first, first + count).reshape(shape)
        first += count
    return tensors


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_saved_under_any_cutting_and_loaded_under_any_other(data, tmp_path_factory):
    shapes = st.lists(st.lists(st.integers(0, 6), max_size=3), min_size=1, max_size=3)
    tensors = numbered(data.draw(shapes))
    saved, loaded = data.draw(cuttings(tensors)), data.draw(cuttings(tensors))
    folder = tmp_path_factory.mktemp("cut") / "step-00000001"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "SHARED_BYTES", data.draw(st.sampled_from([1, 16, 2**24])))
        manifest = write_parts(folder, saved, data.draw(st.sampled_from([1, 32, 10**9])))
    assert {file for file in os.listdir(folder) if file != MANIFEST} == set(manifest.files)
    for shards in loaded:
        into = {name: shard.of(torch.full_like(shard.tensor, -1)) for name, shard in shards.items()}
        load_state(folder, into)
        assert all(torch.equal(into[name].tensor, shard.tensor) for name, shard in shards.items())


def test_a_rank_with_nothing_to_write_writes_no_file(tmp_path):
    empty = {"w": Shard(torch.zeros(0, 3), (4, 0), (4, 3))}
    manifest = write_parts(tmp_path, [{"w": Shard(torch.ones(4, 3), (0, 0), (4, 3))}, empty])
    assert sorted(os.listdir(tmp_path)) == [MANIFEST, "tensors-00000-000.safetensors"]
    assert len(manifest.tensors["w"].chunks) == 1


def test_parts_that_do_not_make_a_whole_are_no_checkpoint(tmp_path):
    half = {"w": Shard(torch.zeros(2), (0,), (4,))}
    other = {"w": Shard(torch.zeros(2, dtype=torch.int32), (2,), (4,))}
    for name, cutting, said in (
        ("one", [half], "do not cover the shape"),
        ("twice", [half, half], "do not cover the shape"),
        ("other", [half, other], r"'w' is float32\[4\] on one rank"),
    ):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match=said):
            write_parts(tmp_path / name, cutting)


# --- who writes and verifies what


@given(
    size=st.lists(st.integers(0, 40), max_size=3),
    copies=st.integers(1, 9),
    file_bytes=st.sampled_from([1, 100, 10**9]),
    shared_bytes=st.sampled_from([1, 64, 2**24]),
)
def test_the_copies_of_a_box_write_each_of_its_cells_once(size, copies, file_bytes, shared_bytes):
    offset = tuple(range(3, 3 + len(size)))
    counted = np.zeros([n + 10 for n in size], int)
    nbytes = 4 * int(np.prod(size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "SHARED_BYTES", shared_bytes)
        cut = [boxes_to_write("w", (offset, tuple(size)), nbytes, copies, copy, file_bytes) for copy in range(copies)]
    for place, extent in itertools.chain(*cut):
        assert 0 not in extent
        assert not size or extent[0] == 1 or 4 * np.prod(extent) <= 2 * file_bytes
        counted[tuple(slice(a, a + n) for a, n in zip(place, extent, strict=True))] += 1
    box = tuple(slice(a, a + n) for a, n in zip(offset, size, strict=True))
    assert (counted[box] == 1).all() and counted.sum() == int(np.prod(size))


def test_copies_share_large_boxes_and_take_turns_with_small_ones():
    rows = [boxes_to_write("w", ((0, 0), (1001, 2**18)), 1001 * 2**20, 8, copy, 2**40) for copy in range(8)]
    assert {extent[0] for copy in rows for _, extent in copy} == {125, 126} and all(len(copy) == 1 for copy in rows)
    small = [
        sum(bool(boxes_to_write(f"norm.{n}", ((0,), (64,)), 256, 8, copy, 2**32)) for n in range(800))
        for copy in range(8)
    ]
    assert sum(small) == 800 and min(small) > 60


boxes = st.lists(st.tuples(*(st.integers(0, 5) for _ in range(4))), max_size=3)


@given(boxes)
def test_an_overlap_is_what_both_boxes_have(spans):
    one = tuple(s[0] for s in spans), tuple(s[1] for s in spans)
    other = tuple(s[2] for s in spans), tuple(s[3] for s in spans)
    both = np.zeros([10] * len(spans), int)
    for offset, size in (one, other):
        both[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))] += 1
    part = overlap(one, other)
    assert (part is None) == (not (both == 2).any())
    if part is not None:
        inside = tuple(slice(o, o + s) for o, s in zip(*part, strict=True))
        assert (both[inside] == 2).all() and (both == 2).sum() == np.prod(part[1])


@given(st.data())
def test_files_to_verify_are_dealt_out_evenly_and_to_who_wants_them(data):
    ranks = data.draw(st.integers(1, 8))
    files = {f"f{index}": size for index, size in enumerate(data.draw(st.lists(st.integers(1, 1000), max_size=30)))}
    wanted = [{file: data.draw(st.integers(0, size)) for file, size in files.items()} for _ in range(ranks)]
    shares = assign_files(files, wanted)
    assert sorted(itertools.chain(*shares)) == sorted(files)
    loads = [sum(files[file] for file in share) for share in shares]
    assert max(loads) - min(loads) <= 2 * max(files.values(), default=0)
    # Where each wants a file of its own, as all do that wrote them, it reads that one.
    wanted = [{file: size} for file, size in files.items()]
    assert assign_files(files, wanted) == [[file] for file in files]


# --- real ranks


def damage(folder: Path, step: int, rank: int) -> None:
    flip(folder / f"step-{step:08d}" / f"tensors-{rank:05d}-000.safetensors", -3)


@pytest.mark.parametrize(
    ("fault", "faulty"),
    [
        ("the disk is full", 1), ("the disk is full", 0), ("the disk is full at the sync", 2),
        ("the disk is full for the manifest", 0), ("the rename is refused", 0), ("a mistake", 1),
    ],
)  # fmt: skip
def test_what_fails_on_one_rank_fails_on_all_and_harms_nothing(pool: Pool, tmp_path: Path, fault: str, faulty: int):
    results = pool.run(checkpoint_ranks.save_with_fault, 3, str(tmp_path), fault, faulty)
    for rank, ((kind, text), again, names) in enumerate(results):
        assert again == ("done", "")
        assert kind == ("TypeError" if fault == "a mistake" and rank == faulty else "CheckpointError")
        assert ("a mistake of ours" if fault == "a mistake" else "No space left on device") in text
        assert faulty == 0 or kind == "TypeError" or f"rank {faulty}: " in text
        assert names == ["step-00000001"]
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000003"]


def test_ranks_write_files_of_their_own_and_share_the_verifying(pool: Pool, tmp_path: Path):
    pool.run(checkpoint_ranks.save_steps, 4, str(tmp_path), [5])
    manifest = read_manifest(tmp_path / "step-00000005")
    assert len(manifest.files) == 4 and len(manifest.tensors["optimizer.steps"].chunks) == 1
    results = pool.run(checkpoint_ranks.load_latest, 4, str(tmp_path))
    assert results == [(("done", ""), 5, [], 1)] * 4
    assert sorted(os.listdir(tmp_path)) == ["step-00000005"], "nothing is left of the looking for a shared folder"


@pytest.mark.parametrize("damaged", [0, 2])
def test_one_damaged_file_sends_all_ranks_to_the_checkpoint_before(pool: Pool, tmp_path: Path, damaged: int):
    pool.run(checkpoint_ranks.save_steps, 3, str(tmp_path), [1, 2])
    damage(tmp_path, 2, damaged)
    results = pool.run(checkpoint_ranks.load_latest, 3, str(tmp_path))
    assert [(ended, step) for ended, step, _, _ in results] == [(("done", ""), 1)] * 3
    warnings = [said for _, _, said, _ in results]
    assert f"tensors-{damaged:05d}-000.safetensors is damaged" in warnings[0][0] and warnings[1:] == [[], []]
    damage(tmp_path, 1, 1)
    results = pool.run(checkpoint_ranks.load_latest, 3, str(tmp_path))
    assert len({ended for ended, _, _, _ in results}) == 1
    kind, text = results[0][0]
    assert kind == "CheckpointError" and "no usable checkpoint" in text and "step-00000001" in text


@pytest.mark.parametrize(
    ("strange", "said"),
    [
        ("shape", "model.stage-1: shape [5] in the checkpoint, [6] here"),
        ("fewer", "model.stage-1: in the checkpoint, but not in this model"),
        ("more", "model.more: missing in the checkpoint"),
        ("elsewhere", "rank 1 finds"),
    ],
)
def test_what_does_not_fit_one_rank_is_refused_by_all(pool: Pool, tmp_path: Path, strange: str, said: str):
    pool.run(checkpoint_ranks.save_steps, 3, str(tmp_path), [1])
    results = pool.run(checkpoint_ranks.load_latest, 3, str(tmp_path), strange)
    assert len({ended for ended, _, _, _ in results}) == 1 and all(step is None for _, step, _, _ in results)
    kind, text = results[0][0]
    assert kind == CheckpointError.__name__ and said in text and text.count(said) == 1

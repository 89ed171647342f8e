"""The manifest against hostile and damaged input, and the tiling rule against counting cells."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.checkpoint import format
from titanlite.checkpoint.format import _checksum, decode, encode, tiles
from titanlite.errors import EXIT_CHECKPOINT, CheckpointError, DamagedCheckpointError, NewerFormatError


def fields(**changes):
    chunk = {"offset": [0, 0], "shape": [2, 3], "file": "a.safetensors", "key": "w"}
    base = {
        **{"format": "titanlite-checkpoint", "version": 1, "step": 7, "samples": 70, "tokens": 700},
        "tensors": {"w": {"dtype": "float32", "shape": [2, 3], "chunks": [chunk]}},
        "files": {"a.safetensors": {"bytes": 100, "xxh3_128": "0" * 32}},
        "recipe": "",
        "environment": {"python": "3.11"},
        "values": {"skips": 0, "best": 1.5, "note": "x", "flag": True, "none": None},
    }
    return {**base, **changes}


def signed(table) -> bytes:
    """A manifest whose checksum is right, so that only its content can be refused."""
    return json.dumps({"checksum": _checksum(table), **table}).encode()


def with_chunk(**changes):
    table = fields()
    table["tensors"]["w"]["chunks"][0].update(changes)
    return table


def test_encode_then_decode_gives_the_same_manifest():
    manifest = decode(signed(fields()), "m")
    assert decode(encode(manifest), "m") == manifest
    assert manifest.values == {"skips": 0, "best": 1.5, "note": "x", "flag": True, "none": None}
    assert manifest.values["flag"] is True


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (with_chunk(file="../a"), "file"),
        (with_chunk(file="/etc/passwd"), "file"),
        (with_chunk(file=".."), "file"),
        (with_chunk(file="x/y"), "file"),
        (with_chunk(file="a.safetensors\n"), "file"),
        (with_chunk(file="b.safetensors"), "not among the files"),
        (with_chunk(key=""), "key"),
        (with_chunk(shape=[2, 2]), "cover the shape"),
        (with_chunk(offset=[0, 1]), "cover the shape"),
        (with_chunk(offset=[0]), "cover the shape"),
        (with_chunk(offset=[-1, 0]), "offset"),
        (fields(step=-1), "step"),
        (fields(step="7"), "step"),
        (fields(step=2**63), "step"),
        (fields(step=2**32), "step"),
        (fields(samples=2**62), "samples"),
        (fields(tokens=2**63 - 1), "tokens"),
        (fields(extra=1), "extra"),
        (fields(files={"../x": {"bytes": 1, "xxh3_128": "0" * 32}}), "files"),
        (fields(files={"manifest.json": {"bytes": 1, "xxh3_128": "0" * 32}}), "files"),
        (fields(files={"a.safetensors": {"bytes": 23, "xxh3_128": "0" * 32}}), "too few"),
        (fields(files={"a.safetensors": {"bytes": 100, "xxh3_128": "Z" * 32}}), "xxh3_128"),
        (fields(values={"x": [1]}), "values"),
        (fields(values={"x": 10**400}), "values"),
        (fields(values={"x": float("nan")}), "JSON"),
        (fields(step=float("nan")), "step"),
        (fields(tensors={"w\x1b[31m": fields()["tensors"]["w"]}), "printed"),
        (fields(tensors={"a": fields()["tensors"]["w"], "b": fields()["tensors"]["w"]}), "two chunks"),
        (fields(tensors={"w": {"dtype": "object", "shape": [], "chunks": []}}), "dtype"),
        (fields(tensors={"w": {"dtype": "int8", "shape": [1] * 5, "chunks": []}}), "shape"),
    ],
)
def test_content_that_must_not_be_believed_is_refused_with_its_place(table, said):
    with pytest.raises(DamagedCheckpointError, match="m is not valid") as refusal:
        decode(signed(table), "m")
    assert said in str(refusal.value)
    assert refusal.value.exit_code == EXIT_CHECKPOINT


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"9" * 10_000,
        b'{"format": NaN}', b'{"a": 1e999}', b'{"format": "zip"}',
    ],
)  # fmt: skip
def test_what_is_no_manifest_at_all_is_refused(data):
    with pytest.raises(DamagedCheckpointError):
        decode(data, "m")


def test_a_table_without_end_is_refused_before_it_is_looked_at(monkeypatch):
    monkeypatch.setattr(format, "MAX_TENSORS", 1)
    monkeypatch.setattr(format, "_checksum", pytest.fail)
    with pytest.raises(DamagedCheckpointError, match=r"m is not valid: .* more than 1 tensors"):
        decode(json.dumps(fields(tensors={"a": 0, "b": 0})).encode(), "m")
    monkeypatch.setattr(format, "MAX_TENSORS", 2)
    monkeypatch.setattr(format, "MAX_CHUNKS", 3)
    tables = {"a": {"chunks": [0, 0]}, "b": {"chunks": [0, 0]}}
    with pytest.raises(DamagedCheckpointError, match=r"m is not valid: .* more than .* 3 chunks"):
        decode(json.dumps(fields(tensors=tables)).encode(), "m")


@pytest.mark.parametrize("limit", ["MAX_CHUNKS", "MAX_MANIFEST_BYTES"])
def test_nothing_is_written_that_could_not_be_read_back(monkeypatch, limit):
    manifest = decode(signed(fields()), "m")
    monkeypatch.setattr(format, limit, 0)
    with pytest.raises(CheckpointError, match="too large"):
        encode(manifest)


class Counted:
    """What stands for `itertools` in the module, and counts the corners of boxes."""

    def __init__(self) -> None:
        self.corners = 0

    def product(self, *edges):
        self.corners += 2 ** len(edges)
        return itertools.product(*edges)


def test_work_grows_with_the_chunks_and_no_faster(monkeypatch):
    """Issue 14, section D: a manifest of 912 KiB took 6 s, by 256 corners a chunk where there were 8 dimensions."""
    corners = []
    for chunks in (10, 20):
        counted = Counted()
        monkeypatch.setattr(format, "itertools", counted)
        shape = (chunks, *[1] * (format.MAX_DIMENSIONS - 1))
        boxes = [((index, 0, 0, 0), (1, 1, 1, 1)) for index in range(chunks)]
        assert tiles(shape, boxes)
        corners.append(counted.corners)
    assert corners == [16 * 11, 16 * 21]


def test_a_newer_version_says_which_titanlite_is_needed_whatever_else_changed():
    with pytest.raises(NewerFormatError, match="needs titanlite format 2"):
        decode(json.dumps({"format": "titanlite-checkpoint", "version": 2, "new": {}}).encode(), "m")
    with pytest.raises(DamagedCheckpointError):
        decode(signed(fields(version=0)), "m")
    with pytest.raises(DamagedCheckpointError):
        decode(signed(fields(version="2")), "m")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_flipped_bit_is_refused_or_leaves_the_content_as_it_was(data):
    original = encode(decode(signed(fields()), "m"))
    place = data.draw(st.integers(0, len(original) * 8 - 1))
    damaged = bytearray(original)
    damaged[place // 8] ^= 1 << place % 8
    try:
        manifest = decode(bytes(damaged), "m")
    except (DamagedCheckpointError, NewerFormatError):
        return
    assert manifest == decode(original, "m")  # such as 1e5 and 1E5


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(categories=["L", "C"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(tree, path=()):
    """Every place in a JSON value, as (keys down to it)."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whatever_stands_where_it_should_not_only_a_checkpoint_error_comes_out(data):
    table = fields()
    path = data.draw(st.sampled_from(sorted((p for p in places(table) if p), key=str)))
    parent = table
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = data.draw(anything)
    try:
        manifest = decode(signed(table), "m")
    except (DamagedCheckpointError, NewerFormatError) as error:
        assert str(error).startswith("m ") and len(str(error)) < 3000 and str(error).isprintable()
    else:
        assert decode(encode(manifest), "m") == manifest


def boxes_within(shape):
    return st.tuples(*(st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted) for n in shape)).map(
        lambda spans: (tuple(a for a, _ in spans), tuple(b - a for a, b in spans))
    )


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_tiles_agrees_with_counting_every_cell(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 3), max_size=3)))
    boxes = data.draw(st.lists(boxes_within(shape), max_size=4))
    counted = np.zeros(shape, int)
    for offset, extent in boxes:
        counted[tuple(slice(o, o + e) for o, e in zip(offset, extent, strict=True))] += 1
    assert tiles(shape, boxes) == bool((counted == 1).all())


@given(st.integers(0, 10**12))
def test_folder_names_are_read_back(step):
    assert format.step_of(format.folder_name(step)) == step


@pytest.mark.parametrize(
    "name", ["step-1", "step-00000001.writing", ".step-00000001", "step-000000001", "step--0000001"]
)
def test_other_folders_are_no_checkpoints(name):
    assert format.step_of(name) is None

"""Checkpoints that were damaged after they had been committed."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

from support.chaos.fault import EQUAL, Fault, Outcome
from support.chaos.sandbox import EVERY, STEPS, Sandbox
from support.runs import spoil_weight
from titanlite.checkpoint.format import MANIFEST

_NEWEST, _BEFORE = 3 * EVERY, 2 * EVERY
Damage = Callable[[Path], str]  # damages a checkpoint; says which file, the manifest included


def _shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def _flip(path: Path, first: int, last: int) -> str:
    data = bytearray(path.read_bytes())
    data[random.randrange(first, last)] ^= 1 << random.randrange(8)
    path.write_bytes(data)
    return path.name


def _header_bytes(path: Path) -> int:
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


def _cut(folder: Path, left: Callable[[int], int]) -> str:
    path = _shard(folder)
    path.write_bytes(path.read_bytes()[: left(path.stat().st_size)])
    return path.name


cut_by_a_byte = partial(_cut, left=lambda size: size - 1)
cut_by_half = partial(_cut, left=lambda size: size // 2)


def flipped_in_data(folder: Path) -> str:
    path = _shard(folder)
    return _flip(path, _header_bytes(path), path.stat().st_size)


def flipped_in_header(folder: Path) -> str:
    path = _shard(folder)
    return _flip(path, 0, _header_bytes(path))


def flipped_in_manifest(folder: Path) -> str:
    path = folder / MANIFEST
    data = path.read_bytes()
    place = data.index(b'"samples":') + len(b'"samples":')  # not where another bit means the same
    return _flip(path, place, place + 1)


def missing_shard(folder: Path) -> str:
    path = _shard(folder)
    path.unlink()
    return path.name


def not_finite(folder: Path) -> str:
    return spoil_weight(folder, "model.norm.weight")


def missing_manifest(folder: Path) -> str:
    (folder / MANIFEST).unlink()
    return MANIFEST


def passed_over(row: int, what: str, damage: Damage, ranks: int = 1, slow: bool = False) -> Fault:
    """The command names the file; the run says what it loses and goes on from the checkpoint before."""

    def run(box: Sandbox) -> Outcome:
        box.prepared()
        file = damage(box.checkpoint(_NEWEST))
        found = box.command("checkpoint", "verify", "runs/run", "--deep", code=4)
        assert f"step-{_NEWEST:08d}/{file}" in found and f"step-{_BEFORE:08d}: whole" in found, found
        said = box.train(ranks=ranks).said
        assert box.resumed() == _BEFORE
        assert f"going on from step {_BEFORE}: {EVERY} steps will be trained again" in said, said
        if ranks == 1:
            box.require_whole()
        else:
            assert box.step() == STEPS
        curve = EQUAL if ranks == 1 else "another layout than before: not bit for bit"
        return Outcome(EVERY, curve, box.message(said, "is passed over|will be trained again"))

    return Fault(row, what, "in the newest checkpoint", run, slow)


def extra_file(box: Sandbox) -> Outcome:
    box.prepared()
    (box.checkpoint(_NEWEST) / "notes.txt").write_text("mine")
    found = box.command("checkpoint", "verify", "runs/run", "--deep")
    box.train()
    assert box.resumed() == _NEWEST
    box.require_whole()
    return Outcome(0, EQUAL, box.message(found, "notes.txt"))


def newer_format(box: Sandbox) -> Outcome:
    """Not passed over: an older checkpoint in its place would lose work in silence."""
    box.prepared()
    manifest = box.checkpoint(_NEWEST) / MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 7}))
    said = box.start().ended(4).said
    assert box.steps() == [_BEFORE, _NEWEST] and box.step() == _NEWEST, "nothing has changed"
    return Outcome(None, "nothing trained", box.message(said, "needs titanlite format 7"))


def all_damaged(box: Sandbox) -> Outcome:
    """Training from the beginning again, in silence, would be the worst of answers."""
    box.prepared()
    for step in box.steps():
        cut_by_a_byte(box.checkpoint(step))
    metrics = box.run_folder() / "metrics.jsonl"
    rows = metrics.read_bytes()
    said = box.start().ended(4).said
    assert metrics.read_bytes() == rows
    return Outcome(None, "nothing trained", box.message(said, "no usable checkpoint"))


FAULTS = [
    passed_over(15, "shard cut by one byte", cut_by_a_byte, slow=True),
    passed_over(15, "shard cut by half", cut_by_half),
    passed_over(15, "shard cut by half, met by two ranks", cut_by_half, ranks=2, slow=True),
    passed_over(16, "bit flipped in the tensors", flipped_in_data),
    passed_over(16, "bit flipped in a shard's header", flipped_in_header, slow=True),
    passed_over(16, "bit flipped in the manifest", flipped_in_manifest),
    passed_over(17, "shard missing", missing_shard, slow=True),
    passed_over(17, "manifest missing", missing_manifest),
    Fault(17, "every checkpoint damaged", "cut by one byte", all_damaged),
    Fault(17, "file that no manifest lists", "put into the newest checkpoint", extra_file),
    passed_over(40, "weight that is not a number, under right hashes", not_finite),
    Fault(18, "manifest of a newer format", "version 7", newer_format),
]

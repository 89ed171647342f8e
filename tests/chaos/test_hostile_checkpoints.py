"""A checkpoint made by somebody who means harm: commands refuse it in words, run nothing, write nothing outside.

Each is consistent where it can be: sizes, hashes and the manifest's own checksum are right, so only the attack itself
can be what is refused.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sandbox import EVERY, Sandbox

from titanlite.checkpoint.format import MANIFEST, MAX_TENSORS, _checksum
from titanlite.checkpoint.storage import describe_file

Fields = dict[str, Any]


class Payload:
    """What a pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


def shard(folder: Path) -> Path:
    """The file that every command which reads values must open."""
    tensors: dict[str, Fields] = json.loads((folder / MANIFEST).read_bytes())["tensors"]
    return folder / next(entry["chunks"][0]["file"] for name, entry in tensors.items() if name.startswith("model."))


def change(folder: Path, edit: Callable[[Fields], object] = lambda fields: None) -> None:
    """Edit the manifest, and have it agree with the files again."""
    fields = json.loads((folder / MANIFEST).read_bytes())
    fields.pop("checksum")
    for name in fields["files"]:
        if (folder / name).is_file():
            fields["files"][name] = describe_file(folder / name).model_dump()
    edit(fields)
    (folder / MANIFEST).write_text(json.dumps({"checksum": _checksum(fields), **fields}))


def a_pickle(folder: Path) -> None:
    shard(folder).write_bytes(pickle.dumps(Payload()))
    change(folder)


def a_zip_as_torch_saves_it(folder: Path) -> None:
    with zipfile.ZipFile(shard(folder), "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload()))
    change(folder, lambda fields: fields["files"].update({shard(folder).name: {"bytes": 2**40, "xxh3_128": "0" * 32}}))


def a_path(path: str) -> Callable[[Path], None]:
    def attack(folder: Path) -> None:
        def edit(fields: Fields) -> None:
            name = shard(folder).name
            fields["files"][path] = fields["files"].pop(name)
            for entry in fields["tensors"].values():
                for chunk in entry["chunks"]:
                    chunk["file"] = path if chunk["file"] == name else chunk["file"]

        change(folder, edit)

    return attack


def a_header_without_end(folder: Path) -> None:
    shard(folder).write_bytes(struct.pack("<Q", 2**60) + shard(folder).read_bytes()[8:])
    change(folder)


def tensors_outside_the_file(folder: Path) -> None:
    data = shard(folder).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    header[name]["data_offsets"] = [0, 2**50]
    text = json.dumps(header).encode()
    shard(folder).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    change(folder)


def a_link_to_a_secret(folder: Path) -> None:
    path = shard(folder)
    path.unlink()
    path.symlink_to(folder.parents[3] / "outside/secret")
    change(folder)


def a_pipe(folder: Path) -> None:
    """Whoever opens it waits for ever."""
    path = shard(folder)
    path.unlink()
    os.mkfifo(path)


def a_manifest_that_is_a_pipe(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)


def a_manifest_that_is_a_link(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).symlink_to("/dev/zero")


def a_wrong_hash(folder: Path) -> None:
    change(folder, lambda fields: fields["files"][shard(folder).name].update(xxh3_128="0" * 32))


def overlapping_chunks(folder: Path) -> None:
    def edit(fields: Fields) -> None:
        entry = next(iter(fields["tensors"].values()))
        entry["chunks"].append({**entry["chunks"][0], "key": "again"})

    change(folder, edit)


def a_tensor_larger_than_any_disk(folder: Path) -> None:
    def edit(fields: Fields) -> None:
        entry = next(iter(fields["tensors"].values()))
        entry["shape"] = entry["chunks"][0]["shape"] = [2**31, 2**31]
        entry["chunks"][0]["offset"] = [0, 0]

    change(folder, edit)


def a_tensor_too_many(folder: Path) -> None:
    empty = {"dtype": "int8", "shape": [0], "chunks": []}
    change(folder, lambda fields: fields["tensors"].update({f"t{n}": empty for n in range(MAX_TENSORS)}))


def a_billion_tensors(folder: Path) -> None:
    """They take 20 GB at the least; the file is sparse, and begins well."""
    os.truncate(folder / MANIFEST, 20 * 10**9)


def brackets_without_end(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"[" * 10**6)


ATTACKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickle named as a shard": (a_pickle, "is not a readable safetensors file|too few for its"),
    "torch.save's file named as a shard": (a_zip_as_torch_saves_it, "is damaged: it has .* bytes"),
    "absolute path": (a_path("/etc/passwd"), "is not valid: .*file"),
    "path that leads out": (a_path("../../../outside/secret"), "is not valid: .*file"),
    "header length of 2^60": (a_header_without_end, "is not a readable safetensors file"),
    "header that points past the file": (tensors_outside_the_file, "is not a readable safetensors file"),
    "link to a file outside": (a_link_to_a_secret, "is a link, which no checkpoint holds|too few for its"),
    "pipe": (a_pipe, "is not a regular file"),
    "manifest that is a pipe": (a_manifest_that_is_a_pipe, "is not a regular file"),
    "manifest that is a link": (a_manifest_that_is_a_link, "is a link, which no checkpoint holds"),
    "wrong hash": (a_wrong_hash, "does not match its hash"),
    "overlapping chunks": (overlapping_chunks, "do not cover the shape"),
    "tensor of 2^62 values": (a_tensor_larger_than_any_disk, "too few for its"),
    "10^9 tensors": (a_billion_tensors, "is too large to be a manifest"),
    "brackets without end": (brackets_without_end, "is damaged: it is not JSON"),
}
MAY_PASS: dict[str, tuple[str, ...]] = {
    "inspect": ("pickle", "torch.save", "header", "link to a", "pipe", "wrong hash"),
    "diff": ("wrong hash",),
}
"""Commands that read the manifest alone, or compare no hashes, and the attacks that they therefore do not meet."""
SLOW = {"a tensor more than a manifest may list": (a_tensor_too_many, "more than 1000000 tensors")}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("attack", [*ATTACKS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_it_is_refused_in_words_and_nothing_runs(box: Sandbox, attack: str) -> None:
    act, said = {**ATTACKS, **SLOW}[attack]
    (box.folder / "outside").mkdir()
    (box.folder / "outside/secret").write_text("secret " * 1000)
    box.prepared()
    folder = box.checkpoint(3 * EVERY)
    box.run_folder().rename(box.folder / "mine")
    box.prepared()
    act(folder)
    for other in box.steps()[:-1]:
        (box.checkpoint(other) / MANIFEST).unlink()  # no older one serves in its place
    before = tree(box.folder / "outside"), tree(box.folder / "mine")
    commands = {
        "verify": ("checkpoint", "verify", str(folder), "--deep"),
        "inspect": ("checkpoint", "inspect", str(folder)),
        "diff": ("checkpoint", "diff", str(folder), "mine"),
        "export-hf": ("checkpoint", "export-hf", str(folder), "exported"),
        "generate": ("generate", "runs/run", "--prompt", "7", "--tokens", "1"),
        "train": ("train", "recipe.toml", "--resume"),
        "warm start": ("train", "recipe.toml", "--run.name=warm", f"--checkpoint.warm_start={folder}"),
        "branch": ("train", "recipe.toml", "--run.name=branch", f"--checkpoint.resume_from={folder}"),
    }
    for name, child in [(name, box.begin(*words)) for name, words in commands.items()]:
        code = child.wait()
        if code == 0 and attack.startswith(MAY_PASS.get(name, ())):
            continue
        assert code == 4, f"{name} ended with {code}:\n{child.said}"
        assert "Traceback" not in child.said and box.message(child.said, said), child.said
    assert (tree(box.folder / "outside"), tree(box.folder / "mine")) == before
    assert not (box.folder / "executed").exists() and not (box.folder / "exported").exists()


def test_what_a_start_clears_is_no_more_than_links_to_other_places(box: Sandbox) -> None:
    """Names that a killed process leaves, made links to what is not the run's."""
    (box.folder / "outside").mkdir()
    (box.folder / "outside/secret").write_text("secret")
    box.prepared()
    checkpoints = box.run_folder() / "checkpoints"
    for name in (".step-00000016.writing", ".step-00000008.deleting", ".step-00000099.replaced", ".mark-ab"):
        (checkpoints / name).symlink_to(box.folder / "outside")
    (checkpoints / ".step-00000004.deleting").mkdir()
    (checkpoints / ".step-00000004.deleting/inner").symlink_to(box.folder / "outside")
    box.train()
    assert tree(box.folder / "outside") == {str(box.folder / "outside/secret"): b"secret"}

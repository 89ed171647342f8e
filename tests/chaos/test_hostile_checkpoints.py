"""A checkpoint made by somebody who means harm: commands refuse it in words, run nothing, write nothing outside.

Each is consistent where it can be: sizes, hashes and the manifest's own checksum are right, so only the attack itself
can be what is refused.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random
from typing import Any

import pytest
from support.chaos.sandbox import EVERY, Sandbox

from titanlite.checkpoint.format import MANIFEST, MAX_TENSORS, _checksum
from titanlite.checkpoint.storage import describe_file
from titanlite.cli.main import main as cli

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
            fields["files"][name] = describe_file(folder / name)._asdict()
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
    "pipe": (a_pipe, "not a regular file"),
    "manifest that is a pipe": (a_manifest_that_is_a_pipe, "not a regular file"),
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


JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 2**31, 2**63, 2**70, 0.5, 1e308, "", "x", "../../x", "\x00", "é" * 999, "a.safetensors"),
    *([], {}, [1], [0, 0], [2**40, 2**40], [[0]] * 5, {"a": 1}, "float64", "bfloat16", "int8"),
)


def mutated(data: bytes, random: Random) -> bytes:
    """A manifest with something else in it: bytes of its text, or up to three of its values, with a right checksum."""
    if random.random() < 0.2:
        place, cut = random.randrange(len(data)), random.randrange(9)
        return data[:place] + random.randbytes(random.randrange(9)) + data[place + cut :]
    fields = json.loads(data)
    fields.pop("checksum")
    alike = random.random() < 0.5  # values that pass for sound ones lead further
    for _ in range(random.randint(1, 3)):
        places = list(_places(fields))
        table, key = random.choice(places)
        what = random.randrange(6)
        if alike:
            same = [at for at in places if at[1] == key and type(at[0][at[1]]) is type(table[key])]
            other, name = random.choice(same)
            table[key], other[name] = other[name], table[key]
        elif what == 0:
            del table[key]
        elif what == 1 and isinstance(table[key], str):
            start = random.randrange(len(table[key]) + 1)
            table[key] = table[key][:start] + random.choice(("", "9", "-", "\n", "=")) + table[key][start + 1 :]
        elif what == 2 and isinstance(table, dict):
            table[str(random.choice(JUNK))[:20]] = table.pop(key)
        elif what == 3:
            other, name = random.choice(places)
            table[key] = json.loads(json.dumps(other[name]))
        elif what == 4 and isinstance(table[key], int):
            table[key] += random.choice((-1, 1, 2**31, -(2**31)))
        else:
            table[key] = random.choice(JUNK)
    return json.dumps({"checksum": _checksum(fields), **fields}).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(table or list, key) of every value within; long lists and tables by some of theirs."""
    for key in list(value if isinstance(value, dict) else range(len(value))):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def try_mutations(count: int) -> None:
    """Run commands on so many mutated manifests of `runs/run`, in this process; print what none may end with."""
    (folder,) = Path("runs/run/checkpoints").iterdir()
    data, random, codes = (folder / MANIFEST).read_bytes(), Random(14), Counter[int]()
    for number in range(count):
        text = mutated(data, random)
        (folder / MANIFEST).write_bytes(text)
        train = ["train", "recipe.toml", "--run.name=warm", f"--checkpoint.warm_start={folder}", "--training.steps=1"]
        commands = [
            ["checkpoint", "verify", str(folder), "--deep"], ["checkpoint", "inspect", str(folder)],
            ["checkpoint", "diff", str(folder), "mine"], ["checkpoint", "export-hf", str(folder), "exported"],
            ["generate", "runs/run", "--tokens", "1"], [*train, "--fresh", "--force"],
        ]  # fmt: skip
        for words in commands if number % 20 == 0 else commands[:-1]:
            said = io.StringIO()
            with redirect_stdout(said), redirect_stderr(said):
                try:
                    code = cli(words)
                except BaseException:
                    code = -1
                    traceback.print_exc()
            codes[code] += 1
            if code not in (0, 2, 4) or "Traceback" in said.getvalue():
                print(json.dumps([code, words, said.getvalue()[-2000:], text.decode("utf-8", "replace")]))
        shutil.rmtree("exported", ignore_errors=True)
    print(json.dumps(codes))


def test_mutated_manifests_end_in_words(box: Sandbox) -> None:
    """Issue 14: 500 of them, in a process of its own, whose signals are seen. Most are refused, some say the same."""
    box.train("--training.steps=1")
    shutil.copytree(box.run_folder() / "checkpoints/step-00000001", box.folder / "mine")
    command = [sys.executable, "-c", "import test_hostile_checkpoints as test; test.try_mutations(500)"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=box.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.returncode}:\n{done.stderr[-3000:]}"
    *found, codes = map(json.loads, done.stdout.splitlines())
    assert found == []
    assert sum(codes.values()) == 500 * 5 + 25 and codes["4"] > 1000 and codes["0"] > 100


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

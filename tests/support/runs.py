"""What a run has left in its folder; runs by a name below `runs/` of the working directory, or by their path."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from titanlite.checkpoint.format import MANIFEST, encode
from titanlite.checkpoint.storage import describe_file, read_manifest
from titanlite.observe.jsonl import Row

Curve = dict[str, list[float]]


class KeptRows:
    """A sink that keeps the rows."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def write(self, row: Row) -> None:
        self.rows.append(row)

    def rewind(self, after_step: int) -> None:
        self.rows = [row for row in self.rows if "event" in row or row["step"] <= after_step]

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass

    def curve(self) -> Curve:
        keys = ("loss", "grad_norm", "validation_loss", "bits_per_byte", "model/router_z", "model/load.0/1")
        return {key: [row[key] for row in self.rows if key in row] for key in keys}


def rows(run: str | Path = "tiny", event: str | None = None, key: str = "step") -> list[dict[str, Any]]:
    """Rows of `metrics.jsonl` of this event, or of none, that have this key; not a last line that is not whole yet."""
    path = Path("runs", run, "metrics.jsonl")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in found if row.get("event") == event and key in row]


def curve(run: str | Path = "tiny") -> list[tuple[Any, ...]]:
    """What must not depend on interruptions: bit for bit, since JSON keeps every digit."""
    keys = ("step", "samples", "tokens", "loss", "grad_norm", "lr")
    return [tuple(row[key] for key in keys) for row in rows(run, key="loss")]


def status(run: str | Path = "tiny") -> dict[str, Any]:
    return json.loads(Path("runs", run, "status.json").read_text())  # type: ignore[no-any-return]


def steps(run: str | Path = "tiny") -> list[int]:
    """Steps with a committed checkpoint."""
    return sorted(int(path.name.removeprefix("step-")) for path in Path("runs", run, "checkpoints").glob("step-*"))


def tensors(run: str | Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, if one rank saved it."""
    files = sorted(Path("runs", run, "checkpoints", f"step-{step:08d}").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def flip(file: Path, place: int) -> None:
    """Change one bit of a byte."""
    data = bytearray(file.read_bytes())
    data[place] ^= 0x10
    file.write_bytes(data)


def spoil_weight(folder: Path, name: str) -> str:
    """Make a number of it NaN in a checkpoint whose hashes are right, as an older titanlite saved one; its file."""
    manifest = read_manifest(folder)
    file = manifest.tensors[name].chunks[0].file
    values = load_file(folder / file)
    values[name].view(-1)[-1] = math.nan
    save_file(values, folder / file)
    files = {**manifest.files, file: describe_file(folder / file)}
    (folder / MANIFEST).write_bytes(encode(replace(manifest, files=files)))
    return file

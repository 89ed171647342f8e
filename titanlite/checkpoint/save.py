"""Writing one checkpoint: tensors to safetensors files, then the manifest that makes them one.

Takes tensors by name and knows no model and no optimizer; when to save and what to keep is the manager's matter.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import titanlite
from titanlite.checkpoint.format import DTYPES, MANIFEST, Chunk, FileEntry, Manifest, Scalar, TensorEntry, encode
from titanlite.checkpoint.storage import committed, describe_file

FILE_BYTES = 4 * 2**30
"""A new file begins when the one before would grow past this; a larger tensor has a file to itself."""


def save_state(
    final: Path,
    *,
    step: int,
    samples: int,
    tokens: int,
    tensors: Mapping[str, torch.Tensor],
    values: Mapping[str, Scalar],
    recipe: str,
    file_bytes: int = FILE_BYTES,
) -> Manifest:
    """Write the folder `final` atomically and return its manifest.

    Tensors may be on any device; one file's worth is on the host at a time. Tensors that share storage must be
    reduced to one name by the caller. Raises `CheckpointError` if the disk refuses, with nothing changed on it.
    """
    with committed(final) as folder:
        files: dict[str, FileEntry] = {}
        entries: dict[str, TensorEntry] = {}
        for number, names in enumerate(group_by_size({n: t.nbytes for n, t in tensors.items()}, file_bytes)):
            file = f"tensors-{number:05d}.safetensors"
            _write_tensors(folder / file, {name: tensors[name] for name in names})
            files[file] = describe_file(folder / file)
            entries.update({name: _whole(tensors[name], name, file) for name in names})
        manifest = Manifest(
            step=step, samples=samples, tokens=tokens, tensors=entries, files=files, recipe=recipe,
            environment=environment(tensors), values=dict(values),
        )  # fmt: skip
        (folder / MANIFEST).write_bytes(encode(manifest))
    return manifest


def group_by_size(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in their order, cut into groups of at most `limit` in sum; one that is larger stands alone."""
    groups: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not groups or filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def environment(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """What a run's numbers may depend on beside its recipe: versions, platform, and the device the tensors are on."""
    cuda = next((tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"), None)
    return {
        "titanlite": titanlite.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "device": torch.cuda.get_device_name(cuda) if cuda is not None else "cpu",
    }


def dtype_name(tensor: torch.Tensor) -> str:
    """torch's own name of the dtype, such as `float32`."""
    return str(tensor.dtype).removeprefix("torch.")


def _whole(tensor: torch.Tensor, name: str, file: str) -> TensorEntry:
    """The entry of a tensor that lies in one piece in `file`."""
    dtype, shape = dtype_name(tensor), tuple(tensor.shape)
    if dtype not in DTYPES:
        raise ValueError(f"tensor '{name}' is {dtype}, which a checkpoint cannot hold")
    return TensorEntry.model_validate(
        {
            "dtype": dtype,
            "shape": shape,
            "chunks": (Chunk(offset=(0,) * len(shape), shape=shape, file=file, key=name),),
        }
    )


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """One safetensors file with the permissions a new file has here. Raises `OSError`, whatever the library raised."""
    try:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
    path.chmod(path.parent.stat().st_mode & 0o666)  # the library writes a private temporary file and renames it

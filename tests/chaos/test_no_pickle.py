"""Nothing that can run code when it is read: not imported, not called, not written."""

from __future__ import annotations

import ast
import pickletools
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.chaos.sandbox import Sandbox

import titanlite

PACKAGE = Path(titanlite.__file__).parent
KERNELS = PACKAGE.parent / "kernels"

MODULES = ("pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "torch.package")
CALLS = (
    *("torch.load", "torch.save", "np.load", "numpy.load"),
    *("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list"),
    *("recv_object_list", "FileSystemReader", "FileSystemWriter", "allow_pickle"),
)
"""What pickles inside: torch's own files, numpy's object arrays, objects sent between ranks, DCP's metadata."""


def names(tree: ast.AST) -> Iterator[str]:
    """Modules that are imported, and dotted names and keywords that are used."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, (ast.Attribute, ast.Name)):
            yield ast.unparse(node)
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg


@pytest.mark.parametrize("path", [*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")], ids=lambda path: path.stem)
def test_the_source_knows_no_pickle(path: Path) -> None:
    for name in names(ast.parse(path.read_text(encoding="utf-8"))):
        assert not f"{name}.".startswith(tuple(f"{module}." for module in MODULES)), name
        assert not name.endswith(CALLS), name


def test_a_run_reads_and_writes_no_pickle(box: Sandbox) -> None:
    """With a `pickle` that refuses to work, on two ranks: a start, a resume, an export; and by what the files are."""
    words = ("--metrics.tensorboard=true", "--validation.every_steps=4", "--validation.sequences=4")
    box.start(*words, "--run.stop_after_step=5", ranks=2, fault="pickle_refuses").ended(75)
    box.train(*words, ranks=2, fault="pickle_refuses")
    box.command("checkpoint", "export-hf", "runs/run", "exported", fault="pickle_refuses")
    files = [path for name in ("runs", "exported") for path in (box.folder / name).rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files}
    assert {".safetensors", ".json", ".jsonl", ".toml", ".log"} <= kinds and any("tfevents" in str(f) for f in files)
    for path in files:
        data = path.read_bytes()
        assert not data.startswith((b"PK", b"\x80")), path  # a zip as torch saves it; a pickle's first byte
        with pytest.raises(ValueError):  # read as a pickle, it makes no sense from beginning to end
            list(pickletools.genops(data))

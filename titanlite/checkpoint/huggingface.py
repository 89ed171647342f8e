"""Checkpoints to and from Hugging Face folders, tensor by tensor: a model larger than memory passes through.

No pickle is ever opened.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titanlite.checkpoint import format, save, storage
from titanlite.checkpoint.format import MANIFEST, Box, TensorEntry
from titanlite.checkpoint.load import open_tensors, read_box
from titanlite.corpus.tokenizers import FOLDER, UNKNOWN, Tokenizer, is_another, open_tokenizer, tokenizer_of_run
from titanlite.errors import CheckpointError, DamagedCheckpointError, TitanliteError, UsageError
from titanlite.files import read_file, read_json, replace_file, sync_path, wrap_os_errors
from titanlite.models.shard import is_finite
from titanlite.models.spec import MODELS, ModelSpec, spec_of
from titanlite.recipe.load import to_toml
from titanlite.recipe.paths import check_name, check_path
from titanlite.recipe.sections import Checkpoint, Data, Model, Precision, Recipe, Run, Training
from titanlite.text import pluralize

PREFIX = "model."  # what the weights' names begin with in a checkpoint
SHARD_BYTES = 5 * 10**9  # Hugging Face's own limit for one file of weights
EXPORT_DTYPES = ("float32", "bfloat16")
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
KEPT_FILES = (*TOKENIZER_FILES, GENERATION_CONFIG)  # what an import keeps as it is, for the next export
MAX_JSON_BYTES = 2**26
_CONTEXT = "max_position_embeddings"
_READABLE = ("float64", "float32", "float16", "bfloat16")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Written:
    """What an export or an import made."""

    folder: Path
    tensors: int
    nbytes: int
    files: tuple[str, ...]  # those of the weights, `nbytes` in sum beside their tables
    tokenizer_files: tuple[str, ...]
    without_tokenizer: str = ""  # why an import's run has no tokenizer; empty if it has one


def export_huggingface(
    checkpoint: Path, out: Path, dtype: str | None = None, shard_bytes: int = SHARD_BYTES
) -> Written:
    """Write the weights of a committed checkpoint as a new folder that transformers' `from_pretrained` reads.

    The weights keep their stored dtype, unless `dtype` (one of `EXPORT_DTYPES`) is given. Files are compared with their
    hashes first. Raises `UsageError` if `out` exists, `CheckpointError` if the checkpoint is not whole, is not that of
    its recipe's model, or if the disk refuses; `out` is then not there.
    """
    if dtype is not None and dtype not in EXPORT_DTYPES:
        raise UsageError(f"weights can be exported as {' or '.join(EXPORT_DTYPES)}, not as {dtype}.")
    manifest = storage.read_manifest(checkpoint)
    recipe = storage.recipe_of(manifest, checkpoint)
    spec = spec_of(recipe.model.preset)
    if not spec.huggingface_classes:
        raise UsageError(f"no class of Hugging Face's transformers computes the model family {spec.family}.")
    config = spec.configure(recipe.model)
    stored = {name: entry for name, entry in manifest.tensors.items() if name.startswith(PREFIX)}
    shapes = {PREFIX + name: shape for name, shape in spec.shapes(config).items()}
    for name in [*shapes, *stored]:
        here, there = stored[name].shape if name in stored else "missing", shapes.get(name, "missing")
        if here != there:
            raise CheckpointError(f"{checkpoint} is not its recipe's model: {name} is {here} there, not {there}.")
    for file in format.chunks_by_file(stored):
        storage.verify_file(checkpoint / file, manifest.files[file])
    sources = {
        spec.to_huggingface(name.removeprefix(PREFIX)): _finite_source(
            CheckpointError, checkpoint, name, stored[name], dtype or stored[name].dtype
        )
        for name in shapes
    }
    kept = [name for name in KEPT_FILES if name in manifest.files]
    tokenizer_files = [name for name in kept if name in TOKENIZER_FILES]
    tokenizer = None if tokenizer_files else _tokenizer(checkpoint, manifest, recipe)
    exported = {} if tokenizer is None else tokenizer.export()
    with _new_folder(out) as folder:
        files = _write_shards(folder, sources, shard_bytes)
        for name in kept:
            storage.verify_file(checkpoint / name, manifest.files[name])
            replace_file(folder / name, read_file(checkpoint / name))
        for name, content in exported.items():
            replace_file(folder / name, content)
        special: dict[str, Any] = {}
        if GENERATION_CONFIG in kept:
            special = _read_json(folder, GENERATION_CONFIG)
        elif tokenizer is not None:
            special = {"bos_token_id": tokenizer.separator, "eos_token_id": tokenizer.separator}
            _write_json(folder / GENERATION_CONFIG, special)
        fields = {
            **spec.to_huggingface_config(config),
            _CONTEXT: recipe.training.sequence_length,
            **{key: special.get(key) for key in SPECIAL_TOKENS},
            "torch_dtype": next(iter(sources.values())).dtype,
        }
        _write_json(folder / CONFIG, fields)
    return Written(out, len(sources), _nbytes(sources), tuple(files), (*tokenizer_files, *exported))


@contextmanager
def _blame_folder() -> Iterator[None]:
    """Raise `UsageError` for damage: a Hugging Face folder is the user's to mend."""
    try:
        yield
    except DamagedCheckpointError as damage:
        raise UsageError(str(damage)) from None


@_blame_folder()
def import_huggingface(folder: Path, out: Path) -> Written:
    """Make a new run folder with one checkpoint, of step 0, that holds the weights of a Hugging Face folder.

    Weights become masters: float32, or float64 if any of them is that wide. `KEPT_FILES` stay in the checkpoint; a
    tokenizer.json or a rank file also becomes the run's tokenizer. The recipe begins a run of another name.

    Raises `UsageError` if the folder cannot be taken or `out` exists, `CheckpointError` if the disk refuses; `out` is
    then not there.
    """
    home = out.absolute()
    try:
        check_path(str(home))
        name = check_name(f"{home.name}-trained")
    except ValueError as error:
        raise UsageError(f"{_short(str(out))} cannot be the folder of a run to begin with: {error}") from None
    fields = _read_json(folder, CONFIG)
    spec, section = _family(folder, fields)
    length = fields.get(_CONTEXT, 2048)
    if type(length) is not int or not 1 <= length < 2**63:
        raise UsageError(f"{folder / CONFIG} cannot be taken: its {_CONTEXT} is {_short(length)}.")
    found = _find_weights(folder, spec, section)
    dtypes = {weight.dtype for weight in found.values()}
    master = "float64" if "float64" in dtypes else "float32"
    sources = {
        PREFIX + name: _finite_source(UsageError, folder, weight.chunks[0].key, weight, master)
        for name, weight in found.items()
    }
    kept = [name for name in KEPT_FILES if os.path.lexists(folder / name)]
    tokenizer_files = tuple(name for name in kept if name in TOKENIZER_FILES)
    special = {key: fields[key] for key in SPECIAL_TOKENS if fields.get(key) is not None}
    if GENERATION_CONFIG in kept:
        special = _read_json(folder, GENERATION_CONFIG)
    tokenizer, problem = _find_tokenizer(folder, bool(tokenizer_files), special)
    recipe = Recipe(
        run=Run(name=name),
        model=section,
        data=Data(tokenizer=str(home / FOLDER)) if tokenizer and tokenizer.files else Data(),
        training=Training(sequence_length=length),
        precision=Precision.model_validate({"compute": "bfloat16" if dtypes == {"bfloat16"} else master}),
        checkpoint=Checkpoint(warm_start=str(home)),
    )
    with _new_folder(out) as run:
        checkpoint = run / "checkpoints" / format.folder_name(0)
        checkpoint.mkdir(parents=True)
        for name in kept:
            replace_file(checkpoint / name, read_file(_inside(folder, name)))
        for name in tokenizer.files if tokenizer else ():
            (run / FOLDER).mkdir(exist_ok=True)
            replace_file(run / FOLDER / name, read_file(checkpoint / name))
        if special and GENERATION_CONFIG not in kept:
            _write_json(checkpoint / GENERATION_CONFIG, special)
        fingerprint = tokenizer.fingerprint if tokenizer else UNKNOWN
        files = _write_checkpoint(checkpoint, sources, to_toml(recipe), fingerprint)
        replace_file(run / "recipe.toml", to_toml(recipe).encode())
        sync_path(checkpoint.parent)
    return Written(out, len(sources), _nbytes(sources), tuple(files), tokenizer_files, problem)


def _finite_source(
    kind: type[TitanliteError], folder: Path, name: str, entry: TensorEntry, dtype: str
) -> save.TensorSource:
    """A tensor as it is written. Reading it raises the `kind` of error for what is not finite in that dtype."""

    def read_finite(box: Box) -> Tensor:
        block = read_box(folder, entry, box).to(getattr(torch, dtype))
        if not is_finite(block):
            where = ", ".join(str(folder / chunk.file) for chunk in entry.chunks if format.overlap(chunk.box, box))
            raise kind(f"{where}: {name} holds numbers that are not finite in {dtype}; nothing was written.")
        return block

    return save.TensorSource(dtype, entry.shape, read_finite)


def _nbytes(sources: Mapping[str, save.TensorSource]) -> int:
    return sum(source.nbytes for source in sources.values())


# --- from a checkpoint


def _tokenizer(checkpoint: Path, manifest: format.Manifest, recipe: Recipe) -> Tokenizer | None:
    """What the run was trained with, or `UsageError`; None for imported weights that came without."""
    if manifest.values.get("tokenizer") == UNKNOWN:
        return None
    tokenizer = tokenizer_of_run(checkpoint.absolute().parent.parent, recipe.data)
    if is_another(tokenizer, manifest.values.get("tokenizer")):
        where = ", ".join(map(str, tokenizer.files.values())) or recipe.data.tokenizer
        raise UsageError(f"{checkpoint} was trained with another tokenizer than {where} is now; put that one there.")
    return tokenizer


def _write_shards(folder: Path, sources: Mapping[str, save.TensorSource], shard_bytes: int) -> list[str]:
    groups = save.group_by_size({name: source.nbytes for name, source in sources.items()}, shard_bytes)
    files = [SINGLE]
    if len(groups) > 1:
        files = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
        places = {name: file for file, names in zip(files, groups, strict=True) for name in names}
        _write_json(folder / INDEX, {"metadata": {"total_size": _nbytes(sources)}, "weight_map": places})
    for file, names in zip(files, groups, strict=True):
        save.write_tensors(folder / file, {name: sources[name] for name in names})
    return files


# --- from a Hugging Face folder


def _family(folder: Path, fields: Mapping[str, Any]) -> tuple[ModelSpec, Model]:
    classes = fields.get("architectures")
    known: dict[str, ModelSpec] = {name: spec for spec in map(MODELS.get, MODELS) for name in spec.huggingface_classes}
    spec = known.get(str(classes[0])) if isinstance(classes, list) and len(classes) == 1 else None
    if spec is None:
        raise UsageError(f"{folder / CONFIG} is of {_short(classes)}; only {', '.join(known)} can be imported.")
    try:
        return spec, spec.from_huggingface_config(fields)
    except UsageError as error:
        raise UsageError(f"{folder / CONFIG} cannot be taken: {error}.") from None


def _find_weights(folder: Path, spec: ModelSpec, section: Model) -> dict[str, TensorEntry]:
    """The model's weights, by our names. Raises `UsageError` for the first that is not what the config asks for."""
    config = spec.configure(section)
    found, weights = _tables(folder), {}
    for name, other in spec.tied(config).items():
        _require_tied(folder, found, spec.to_huggingface(name), spec.to_huggingface(other))
    ignored = [*spec.huggingface_derived, *map(spec.to_huggingface, spec.tied(config))]
    found = {name: weight for name, weight in found.items() if not any(fnmatchcase(name, known) for known in ignored)}
    wanted = {spec.to_huggingface(name): (name, shape) for name, shape in spec.shapes(config).items()}
    for theirs, (name, shape) in wanted.items():
        if theirs not in found:
            missing = pluralize(len(wanted.keys() - found.keys()), "tensor")
            raise UsageError(f"{folder} does not hold {theirs} ({missing} in all), which its {CONFIG} asks for.")
        weights[name] = weight = found[theirs]
        where = f"{weight.chunks[0].file}: {theirs}"
        if weight.shape != shape:
            raise UsageError(f"{where} is {list(weight.shape)}, and by {CONFIG} {list(shape)}.")
        if weight.dtype not in _READABLE:
            raise UsageError(f"{where} is {_short(weight.dtype)}, not one of {_READABLE}.")
    for name in found.keys() - wanted.keys():
        file = found[name].chunks[0].file
        raise UsageError(f"{file} holds {_short(name)}, which the model of its {CONFIG} has not.")
    return weights


def _tables(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of the folder's weights. Raises `UsageError`."""
    if os.path.lexists(folder / SINGLE):
        return _table(folder, SINGLE)
    if not os.path.lexists(folder / INDEX):
        if pickles := sorted(name for name in os.listdir(folder) if name.endswith(_PICKLES)):
            raise UsageError(
                f"{folder} has its weights in {_short(pickles[0])}, a pickle, which can run any program when it is "
                "opened; have transformers save it with safe_serialization where you trust it."
            )
        raise UsageError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}.")
    places = _read_json(folder, INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UsageError(f"{folder / INDEX} has no weight_map.")
    for file in places.values():
        if not isinstance(file, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.safetensors", file):
            raise UsageError(f"{folder / INDEX} names {_short(file)}, which is not a safetensors file beside it.")
    tables = {file: _table(folder, file) for file in sorted(set(places.values()))}
    for name, file in places.items():
        if name not in tables[file]:
            raise UsageError(f"{folder / file} does not hold {_short(name)}, which {INDEX} says it does.")
    return {name: tables[file][name] for name, file in places.items()}


def _table(folder: Path, file: str) -> dict[str, TensorEntry]:
    """The tensors of one file, each as a chunk of its own."""
    path = _inside(folder, file)
    with open_tensors(path, []) as opened:
        whole = {key: (tensor.dtype, format.whole_box(tensor.shape)) for key, tensor in opened.table.items()}
    return {
        key: TensorEntry(dtype, box[1], (format.Chunk(*box, str(path), key),)) for key, (dtype, box) in whole.items()
    }


def _require_tied(folder: Path, found: Mapping[str, TensorEntry], name: str, other: str) -> None:
    """A tensor that the config says is another one must be that, where it is there. Raises `UsageError`."""
    weight, same = found.get(name), found.get(other)
    if weight is None or same is None:  # a missing one is reported with all that are
        return
    comparable = weight.shape == same.shape and {weight.dtype, same.dtype} <= {*_READABLE}
    if not comparable or not all(
        torch.equal(read_box(folder, weight, box).double(), read_box(folder, same, box).double())
        for box in format.row_blocks(format.whole_box(weight.shape), 8, save.BLOCK_BYTES)
    ):
        raise UsageError(
            f"{weight.chunks[0].file}: {name} differs from {other}, and by tie_word_embeddings in {CONFIG} they are "
            f"one. If the model was trained with both, set tie_word_embeddings to false; if not, leave {name} out."
        )


def _find_tokenizer(folder: Path, has_files: bool, special: Mapping[str, Any]) -> tuple[Tokenizer | None, str]:
    """The folder's tokenizer, or why there is none. Weights of the byte tokenizer are known by their special tokens."""
    if not has_files:
        tokenizer = open_tokenizer("bytes")
        known = special.get("eos_token_id") == tokenizer.separator
        return (tokenizer, "") if known else (None, f"{folder} holds no tokenizer")
    try:
        return open_tokenizer(str(folder)), ""
    except UsageError as error:
        return None, f"its tokenizer cannot be read: {error}"


def _write_checkpoint(folder: Path, sources: Mapping[str, save.TensorSource], recipe: str, tokenizer: str) -> list[str]:
    """The tensors' files and the manifest of all files in the folder; returns the names of the former."""
    plan = {
        name: save.WriteItem(name, source.shape, (0,) * len(source.shape), source) for name, source in sources.items()
    }
    others = {name: storage.describe_file(folder / name)._asdict() for name in sorted(os.listdir(folder))}
    table = save.write_items(folder, plan)
    metadata = format.CheckpointMetadata(
        0, recipe=recipe, values={"tokenizer": tokenizer}, environment=save.environment(torch.device("cpu"))
    )
    manifest = save.merge_tables([{**table, "files": {**others, **table["files"]}}], metadata)
    replace_file(folder / MANIFEST, format.encode(manifest))
    return list(table["files"])


# --- files


@contextmanager
def _new_folder(final: Path) -> Iterator[Path]:
    """A hidden folder, for files that are synced, that becomes `final` when all went well, and is gone otherwise.

    Raises `UsageError` if `final` exists, `CheckpointError` if the disk refuses.
    """
    if os.path.lexists(final):
        raise UsageError(f"{final} exists already; name a folder that does not.")
    hidden = storage.pending(final)
    try:
        with storage.wrap_os_errors(f"cannot write {final}", final):
            storage.begin(final)
            yield hidden
            sync_path(hidden)
            os.rename(hidden, final)  # fails if another process has filled it meanwhile
            sync_path(final.parent)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _inside(folder: Path, name: str) -> Path:
    """A file of a Hugging Face folder, or of `../../blobs`, where its cache keeps what snapshots link to. Raises
    `UsageError` for anything else: what a link leads to might end up published.
    """
    path = folder / name
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if not os.path.lexists(path):
        raise UsageError(f"{path} is missing.")
    if real.parent not in (home, home.parent.parent / "blobs"):
        raise UsageError(f"{path} is a link that leads out of its folder.")
    if not real.is_file():
        raise UsageError(f"{path} is not a regular file.")
    return real


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path, fields = _inside(folder, name), None
    try:
        with wrap_os_errors(f"{folder / name} cannot be read", path):
            if path.stat().st_size <= MAX_JSON_BYTES:
                fields = read_json(path)
    except ValueError as error:
        raise UsageError(f"{folder / name} is not JSON ({error}).") from None
    if not isinstance(fields, dict):
        raise UsageError(f"{folder / name} is not a JSON object of at most {MAX_JSON_BYTES} bytes.")
    return fields


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    replace_file(path, json.dumps(fields, indent=2).encode() + b"\n")


def _short(value: object) -> str:
    """A value of an untrusted file for a message, without what a terminal would act on."""
    return repr(value)[:100]

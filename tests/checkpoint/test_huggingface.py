"""Export to Hugging Face and import from it: the same logits, the same bytes again, and nothing from a stranger."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.checkpoint_ranks import write_parts
from support.runs import flip
from transformers import AutoModelForCausalLM

from titanlite.checkpoint import huggingface, save
from titanlite.checkpoint.format import CheckpointMetadata
from titanlite.checkpoint.huggingface import export_huggingface, import_huggingface
from titanlite.checkpoint.save import plan_local_save, save_state
from titanlite.checkpoint.storage import find_corruption, newest_at, pending, read_manifest, recipe_of
from titanlite.cli.main import main as cli
from titanlite.data.splits import open_data
from titanlite.errors import CheckpointError, UsageError
from titanlite.models import llama_spec
from titanlite.models.llama_spec import SPEC
from titanlite.models.shard import Shard
from titanlite.recipe.load import load_recipe, to_toml
from titanlite.recipe.sections import Model, Recipe, RopeScaling, Training

SIZES: dict[str, Any] = {
    "preset": "llama3-8b", "dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 40, "vocab_size": 67,
    "rope_theta": 100.0,
}  # fmt: skip
SCALING = RopeScaling(factor=4.0, original_context=16)
MODELS = {
    "grouped": Model(**SIZES),
    "tied, scaled rope": Model(**SIZES, tie_embeddings=True, rope_scaling=SCALING, norm_eps=1e-2),
    "normed queries and keys": Model(**SIZES, qk_norm=True),
    "normed, tied, scaled": Model(**SIZES, qk_norm=True, tie_embeddings=True, rope_scaling=SCALING),
}
PLAIN = MODELS["grouped"]


def recipe(section: Model) -> Recipe:
    return Recipe(model=section, training=Training(sequence_length=48, steps=3))


def model_of(section: Model, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Every weight at random, the norms' too."""
    model = SPEC.build(SPEC.configure(section), dtype).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.2)
    return model


def saved(folder: Path, section: Model = PLAIN, model: torch.nn.Module | None = None) -> Path:
    """A run's checkpoint of step 3, with some optimizer state."""
    model = model_of(section) if model is None else model
    tensors = {f"model.{name}": Shard.whole(parameter) for name, parameter in model.named_parameters()}
    tensors["optimizer.norm.weight.moment"] = Shard.whole(torch.ones(32))
    final = folder / "checkpoints" / "step-00000003"
    save_state(final, plan_local_save(tensors), CheckpointMetadata(3, 9, 9, to_toml(recipe(section))))
    return final


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- the same model


@pytest.mark.parametrize("section", MODELS.values(), ids=MODELS.keys())
def test_transformers_computes_the_same_logits(section: Model, tmp_path: Path) -> None:
    model = model_of(section)
    export_huggingface(saved(tmp_path, section, model), tmp_path / "out", shard_bytes=10_000)
    twin, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(twin).__name__ == ("Qwen3ForCausalLM" if section.qk_norm else "LlamaForCausalLM")
    assert (twin.config.max_position_embeddings, twin.generation_config.eos_token_id) == (48, 256)
    assert twin.dtype == torch.float32
    tokens = torch.randint(0, 67, (2, 48))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), twin(tokens).logits, rtol=2e-5, atol=2e-5)
        # In float64 too, up to transformers' norms and rotation, which are float32 always.
        model = model.double()
        model.embed.compute_dtype = torch.float64
        torch.testing.assert_close(model(tokens), twin.double()(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("section", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_export_import_export_is_bitwise(
    section: Model, dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_huggingface(saved(tmp_path, section), tmp_path / "one", dtype, shard_bytes=20_000)
    monkeypatch.setattr(save, "FILE_BYTES", 15_000)
    import_huggingface(tmp_path / "one", tmp_path / "run")
    export_huggingface(newest_at(tmp_path / "run"), tmp_path / "two", dtype, shard_bytes=20_000)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len([name for name in contents(tmp_path / "one") if name.endswith(".safetensors")]) > 1


def test_the_dtype_is_that_of_the_weights_or_the_one_asked_for(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, model=model_of(PLAIN, torch.float64))
    export_huggingface(checkpoint, tmp_path / "wide")
    export_huggingface(checkpoint, tmp_path / "narrow", "bfloat16")
    wide, narrow = (load_file(tmp_path / name / "model.safetensors") for name in ("wide", "narrow"))
    assert {values.dtype for values in wide.values()} == {torch.float64}
    assert all(torch.equal(wide[name].bfloat16(), values) for name, values in narrow.items())
    dtypes = [json.loads((tmp_path / name / "config.json").read_text())["torch_dtype"] for name in ("wide", "narrow")]
    assert dtypes == ["float64", "bfloat16"]
    for name, stored, compute in (("wide", "float64", "float64"), ("narrow", "float32", "bfloat16")):
        import_huggingface(tmp_path / name, tmp_path / f"run-{name}")
        checkpoint = newest_at(tmp_path / f"run-{name}")
        manifest = read_manifest(checkpoint)
        assert {entry.dtype for entry in manifest.tensors.values()} == {stored}
        assert recipe_of(manifest, checkpoint).precision.compute == compute


def test_what_several_ranks_wrote_in_parts_is_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows on one pair of ranks, columns on the other, read by blocks that fit neither."""
    model = model_of(PLAIN)
    cut: list[dict[str, Shard]] = [{} for _ in range(4)]
    for number, (name, parameter) in enumerate(model.named_parameters()):
        whole, along = parameter.detach(), number % parameter.dim()
        middle = whole.shape[along] // 3
        for rank, (first, last) in enumerate(((0, middle), (middle, whole.shape[along]))):
            offset = tuple(first if axis == along else 0 for axis in range(whole.dim()))
            part = whole.narrow(along, first, last - first).clone()
            cut[rank + 2 * (number % 2)][f"model.{name}"] = Shard(part, offset, tuple(whole.shape))
    folder = tmp_path / "step-00000003"
    folder.mkdir()
    write_parts(folder, cut, 3000, to_toml(recipe(PLAIN)), step=3)
    monkeypatch.setattr(save, "BLOCK_BYTES", 700)
    export_huggingface(folder, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = {SPEC.to_huggingface(name): values for name, values in model.named_parameters()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], values) for name, values in expected.items())


def watch_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the process's own memory (what is not the disk's cache), from now on at every block that is written."""
    seen: list[int] = []
    row_blocks = save.row_blocks

    def own_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def watched(*arguments: Any) -> Iterator[Any]:
        for box in row_blocks(*arguments):
            yield box
            seen.append(own_bytes())

    monkeypatch.setattr(save, "row_blocks", watched)
    return seen


@pytest.mark.parametrize("way", ["export", "import"])
def test_memory_is_bounded_by_blocks_and_not_by_tensors(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = Model(**{**SIZES, "vocab_size": 2**18, "layers": 1})  # two tables of 32 MiB
    checkpoint = saved(tmp_path, section)
    if way == "import":
        export_huggingface(checkpoint, tmp_path / "hf")
    monkeypatch.setattr(save, "BLOCK_BYTES", 2**18)
    monkeypatch.setattr(save, "BATCH_BYTES", 2**20)
    seen = watch_memory(monkeypatch)
    if way == "import":
        import_huggingface(tmp_path / "hf", tmp_path / "out")
    else:
        files = export_huggingface(checkpoint, tmp_path / "out", shard_bytes=2**25).files
        assert len(files) == 3 and (tmp_path / "out" / huggingface.INDEX).exists()
    assert len(seen) > 200
    assert max(seen) - seen[0] < 8 * 2**20


def test_generate_reads_what_was_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of any context: it takes memory for no more than there will be."""
    section = Model(**{**SIZES, "vocab_size": 272})
    export_huggingface(saved(tmp_path, section), tmp_path / "hf")
    config = tmp_path / "hf" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 2**45}))
    assert cli(["checkpoint", "import-hf", str(tmp_path / "hf"), str(tmp_path / "run")]) == 0
    assert cli(["generate", str(tmp_path / "run"), "--prompt", "a", "--tokens", "3"]) == 0
    assert cli(["generate", str(tmp_path / "run"), "--prompt", "a", "--tokens", "0"]) == 2
    assert "error" in capsys.readouterr().err


def test_the_imported_recipe_trains_on_from_the_weights_wherever_it_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Issue 14, item 2: by a first loss that transformers computes too, from another folder than the import's."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "corpus.txt").write_text("".join(f"{n} squared is {n * n}.\n" for n in range(200)))
    section = Model(**{**SIZES, "vocab_size": 272})
    export_huggingface(saved(tmp_path, section), tmp_path / "hf")
    monkeypatch.chdir(tmp_path)
    assert cli(["checkpoint", "import-hf", "hf", "model"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("train on: titanlite train model/recipe.toml ")
    assert load_recipe("model/recipe.toml").recipe.model.preset == "custom"
    monkeypatch.chdir(tmp_path / "elsewhere")
    words = ["--training.steps=1", "--training.global_batch=2", "--data.corpus=corpus.txt", "--optimizer.lr=1e-30"]
    words += ["--data.validation_percent=0.0"]
    assert cli(["train", "../model/recipe.toml", *words]) == 0
    rows = map(json.loads, Path("runs/model-trained/metrics.jsonl").read_text().splitlines())
    first = next(row["loss"] for row in rows if "loss" in row)
    data = open_data(load_recipe("runs/model-trained/recipe.toml").recipe.data, 48, 0, validated=False).train
    samples = torch.tensor(np.stack([data.sample(number) for number in (0, 1)])).long()
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert first == pytest.approx(twin(samples, labels=samples).loss.item(), rel=1e-4)
    into = ["--run.output_dir=..", "--run.name=model"]
    capsys.readouterr()
    assert cli(["train", "../model/recipe.toml", *words, *into]) == 2
    said = capsys.readouterr().err
    assert "imported weights" in said and "run.name" in said


def test_tokenizer_files_and_generation_config_travel(tmp_path: Path) -> None:
    export_huggingface(saved(tmp_path), tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": [1, 2],   "top_p": 0.9}')
    assert import_huggingface(tmp_path / "hf", tmp_path / "run").tokenizer_files == ("tokenizer.json",)
    export_huggingface(newest_at(tmp_path / "run"), tmp_path / "again")
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"] == [1, 2]


# --- the config


@st.composite
def configs(draw: st.DrawFn) -> llama_spec.LlamaConfig:
    heads = draw(st.integers(1, 8))
    floats = st.floats(1e-9, 1e9)
    scaling = st.builds(
        RopeScaling, factor=floats, low_freq_factor=st.floats(0.5, 2), high_freq_factor=st.floats(3, 9),
        original_context=st.integers(1, 2**40),
    )  # fmt: skip
    return llama_spec.LlamaConfig(
        dim=heads * 2 * draw(st.integers(1, 64)), layers=draw(st.integers(1, 10_000)), heads=heads,
        kv_heads=draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])),
        ffn_dim=draw(st.integers(1, 2**40)), vocab_size=draw(st.integers(1, 2**40)), rope_theta=draw(floats),
        rope_scaling=draw(st.none() | scaling), norm_eps=draw(st.floats(1e-9, 1)), tie_embeddings=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
    )  # fmt: skip


@settings(deadline=None)
@given(st.sampled_from(list(llama_spec.PRESETS.values())) | configs())
def test_a_config_comes_back_as_it_was(config: llama_spec.LlamaConfig) -> None:
    fields = json.loads(json.dumps(llama_spec.to_huggingface_config(config)))
    section = llama_spec.from_huggingface_config(fields)
    assert llama_spec.model_config(section) == config
    newer = {key: value for key, value in fields.items() if not key.startswith("rope")}
    newer["rope_parameters"] = {"rope_theta": fields["rope_theta"], **(fields["rope_scaling"] or {})}
    newer["rope_parameters"].setdefault("rope_type", "default")
    assert llama_spec.from_huggingface_config(newer) == section
    assert section.preset == "custom" or section == Model(preset=section.preset)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_other_config_is_taken_or_refused_in_words(data: st.DataObject) -> None:
    fields = llama_spec.to_huggingface_config(replace(llama_spec.PRESETS["debug"], rope_scaling=RopeScaling()))
    key = data.draw(st.sampled_from([*fields, "layer_types", "rope_parameters", "quantization_config"]))
    fields[key] = data.draw(anything)
    try:
        config = llama_spec.model_config(llama_spec.from_huggingface_config(fields))
    except UsageError as refused:
        assert "\n" not in str(refused)
    else:
        assert config.heads * config.head_dim == config.dim


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"head_dim": 16}, "head_dim"),
        ({"num_key_value_heads": 3}, "do not divide"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling"),  # issue 14, item 3
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default", "factor": 8.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"rope_theta": 1e4}}, "rope_parameters"),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"layer_types": ["sliding_attention"]}, "sliding_attention"),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "only LlamaForCausalLM"),
        ({"max_position_embeddings": True}, "max_position_embeddings"),
    ],
)
def test_a_config_that_asks_for_something_else_is_refused(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = exported(tmp_path)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
    refused(folder, tmp_path / "run", said)


# --- folders from strangers


def exported(tmp_path: Path) -> Path:
    export_huggingface(saved(tmp_path), tmp_path / "hf", shard_bytes=20_000)
    return tmp_path / "hf"


def refused(folder: Path, out: Path, said: str) -> None:
    before = sorted(os.listdir(out.parent))
    with pytest.raises(UsageError) as refusal:
        import_huggingface(folder, out)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)
    assert sorted(os.listdir(out.parent)) == before, "nothing is left behind"


def pickled(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")


def pointing(target: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["model.norm.weight"] = target
        path.write_text(json.dumps(index))

    return change


def without_a_file(folder: Path) -> None:
    next(folder.glob("model-00002-*")).unlink()


def linked_out(folder: Path) -> None:
    (folder.parent / "secret").write_text("{}")
    (folder / "tokenizer.json").symlink_to(folder.parent / "secret")


def named_pipe(folder: Path) -> None:
    without_a_file(folder)
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()
    os.mkfifo(folder / next(name for name in names if name.startswith("model-00002-")))


def changed_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for path in folder.glob("model-*"):
            tensors |= load_file(path)
            path.unlink()
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def giant_header(folder: Path) -> None:
    next(folder.glob("model-00001-*")).write_bytes(struct.pack("<Q", 2**62) + b"{}")


def cut_short(folder: Path) -> None:
    path = next(folder.glob("model-00002-*"))
    os.truncate(path, path.stat().st_size - 1)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle": (pickled, "a pickle, which can run any program"),
    "index leads up": (pointing("../hf/model-00001-of-00002.safetensors"), "not a safetensors file beside it"),
    "index is absolute": (pointing("/etc/passwd"), "not a safetensors file beside it"),
    "index names a pickle": (pointing("model.bin"), "not a safetensors file beside it"),
    "index lies": (pointing("model-00001-of-00004.safetensors"), "does not hold 'model.norm.weight'"),
    "link out of the folder": (linked_out, "leads out of its folder"),
    "pipe": (named_pipe, "not a regular file"),
    "missing file": (without_a_file, "is missing"),
    "giant header": (giant_header, "not a readable safetensors file"),
    "cut": (cut_short, "not a readable safetensors file"),
    "missing tensor": (changed_tensors(lambda t: t.pop("model.norm.weight")), "does not hold model.norm.weight"),
    "transposed": (
        changed_tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].T.contiguous()})),
        "/model.safetensors: lm_head.weight is [32, 67], and by config.json [67, 32]",
    ),
    "integers": (
        changed_tensors(lambda t: t.update({"model.norm.weight": torch.ones(32).int()})),
        "/model.safetensors: model.norm.weight is 'int32'",
    ),
    "not finite": (
        changed_tensors(lambda t: t["model.norm.weight"].fill_(math.inf)),
        "/model.safetensors: model.norm.weight holds numbers",
    ),
    "unexpected": (changed_tensors(lambda t: t.update(more=torch.ones(1))), "/model.safetensors holds 'more'"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("["), "is not JSON"),
    "config nests": (lambda folder: (folder / "config.json").write_text("[" * 10**5), "is not JSON"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES.keys())
def test_what_is_damaged_or_hostile_is_refused(damage: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    folder = exported(tmp_path)
    damage(folder)
    refused(folder, tmp_path / "run", said)


def test_a_file_that_shrinks_during_an_import_is_the_folders_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that was cut before: exit code 2, and the file's name."""
    folder, read_box = exported(tmp_path), huggingface.read_box
    path = next(folder.glob("model-00002-*"))

    def cut_first(*arguments: Any) -> torch.Tensor:
        os.truncate(path, 1000)
        return read_box(*arguments)

    monkeypatch.setattr(huggingface, "read_box", cut_first)
    refused(folder, tmp_path / "run", path.name)


def test_a_config_that_the_disk_does_not_give_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    folder = exported(tmp_path)
    monkeypatch.setattr(huggingface, "read_json", refuse)
    refused(folder, tmp_path / "run", "config.json cannot be read: Input/output error")


def test_what_follows_from_the_config_is_not_read(tmp_path: Path) -> None:
    """Old Llama files hold the rotation's frequencies, and some tied models their head once more."""
    export_huggingface(saved(tmp_path, MODELS["tied, scaled rope"]), tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    assert import_huggingface(tmp_path / "hf", tmp_path / "run").tensors == len(weights) - 2


@pytest.mark.parametrize("shape", [(67, 32), (66, 32)])
def test_a_head_that_is_not_the_embedding_it_is_said_to_be_is_refused(
    tmp_path: Path, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 14, item 3: by values or by shape."""
    monkeypatch.setattr(save, "BLOCK_BYTES", 700)
    export_huggingface(saved(tmp_path, MODELS["tied, scaled rope"]), tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"][: shape[0]].clone()
    weights["lm_head.weight"][-1, -1] += shape[0] // 67
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    refused(tmp_path / "hf", tmp_path / "run", "lm_head.weight differs from model.embed_tokens.weight")


def test_hugging_faces_cache_is_links_to_blobs(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    (tmp_path / "cache" / "blobs").mkdir(parents=True)
    snapshot = tmp_path / "cache" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(folder.iterdir()):
        path.rename(tmp_path / "cache" / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert import_huggingface(snapshot, tmp_path / "run").tensors > 10


# --- export: refusals


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path)
    flip(checkpoint / "tensors-00000-000.safetensors", -3)
    with pytest.raises(CheckpointError, match="content does not match its hash"):
        export_huggingface(checkpoint, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["checkpoints"]


def test_weights_of_another_model_than_the_recipes_are_refused(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, PLAIN, model_of(Model(**{**SIZES, "ffn_dim": 44})))
    with pytest.raises(CheckpointError, match=r"ffn.gate.weight is .44, 32. there, not .40, 32."):
        export_huggingface(checkpoint, tmp_path / "out")


def test_a_model_with_windows_is_not_exported_without_them(tmp_path: Path) -> None:
    section = Model(**{**SIZES, "window": 8})
    with pytest.raises(UsageError, match=r"model\.window"):
        export_huggingface(saved(tmp_path, section, model_of(section)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_weights_that_are_not_finite_in_their_dtype_are_not_exported(tmp_path: Path, dtype: str | None) -> None:
    """Issue 14, item 18: NaN, and what is finite in float32 and not in bfloat16."""
    model = model_of(PLAIN)
    with torch.no_grad():
        model.norm.weight[3] = 3.4e38 if dtype else math.nan
    with pytest.raises(CheckpointError, match=r"model.norm.weight holds numbers that are not finite"):
        export_huggingface(saved(tmp_path, PLAIN, model), tmp_path / "out", dtype)
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_when_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = saved(tmp_path)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "write_tensors", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*out: No space left on device \(.* free\)"):
        export_huggingface(checkpoint, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["checkpoints"]


def test_an_existing_folder_is_never_written_to(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        export_huggingface(tmp_path / "checkpoints" / "step-00000003", tmp_path / "there")
    with pytest.raises(UsageError, match="exists already"):
        import_huggingface(folder, tmp_path / "there")
    assert os.listdir(tmp_path / "there") == [] and not pending(tmp_path / "there").exists()


@pytest.mark.parametrize("name", ["x" * 250, "x\a"], ids=["too long for the run's name", "control character"])
def test_a_folder_that_no_recipe_can_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the folder of a run"):
        import_huggingface(exported(tmp_path), tmp_path / name)


# --- the command


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path)
    command = ["checkpoint", "export-hf", f"{tmp_path}/3", f"{tmp_path}/out"]
    assert cli([*command, "--dtype", "int8"]) == 2 and "float32 or bfloat16" in capsys.readouterr().err
    assert cli([*command, "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert "in 1 file" in said and "the byte tokenizer has no files" in said
    assert cli(["checkpoint", "export-hf", f"{tmp_path}/4", f"{tmp_path}/other"]) == 2
    assert "step-00000004" in capsys.readouterr().err
    assert cli(["checkpoint", "import-hf", f"{tmp_path}/out", f"{tmp_path}/run"]) == 0
    assert f"{len(SPEC.shapes(SPEC.configure(PLAIN)))} tensors" in capsys.readouterr().out
    assert list(find_corruption(newest_at(tmp_path / "run"), deep=True)) == []
    assert cli(["checkpoint", "inspect", f"{tmp_path}/out"]) == 2
    assert "titanlite checkpoint import-hf" in capsys.readouterr().err

"""The schema in words: what a key means, takes and defaults to, for the command line, the documents and editors.

Everything here is derived from `sections.py`; nothing about a key is said twice.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from titanlite.errors import UsageError
from titanlite.recipe.sections import Recipe, recipe_class
from titanlite.recipe.toml import format_value
from titanlite.registry import did_you_mean

Schema = dict[str, Any]

_EXAMPLES: dict[str, Any] = {
    "extends": "base.toml",
    "run.stop_after_step": 1000,
    "run.stop_after_minutes": 55.0,
    "checkpoint.warm_start": "runs/base",
    "checkpoint.resume_from": "runs/base/500",
    "model.dim": 768,
    "model.layers": 12,
    "model.heads": 12,
    "model.kv_heads": 4,
    "model.ffn_dim": 2048,
    "model.vocab_size": 512,
    "model.rope_theta": 500000.0,
    "model.rope_scaling": {"factor": 8.0, "original_context": 8192},
    "model.norm_eps": 1e-5,
    "model.tie_embeddings": True,
    "model.qk_norm": True,
    "kernels.rms_norm": "triton",
    "kernels.rope": "torch",
    "kernels.swiglu": "torch",
    "kernels.float8_quantise": "torch",
    "data.corpus": ["texts/*.txt", "more/pages.jsonl"],
    "data.sources": [{"name": "web", "path": "data/web", "weight": 0.7}, {"name": "wiki", "path": "wiki", "weight": 1}],
    "data.stages": [{"until": "50B", "weights": {"web": 0.9, "wiki": 0.1}}, {"weights": {"wiki": 1.0}}],
    "data.validation": [{"name": "news", "path": "news.jsonl"}],
    "data.tokenizer": "path/to/tokenizer.json",
    "data.separator": "<|end_of_text|>",
    "data.skip_steps": [1200, 1201],
    "data.special_tokens": ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"],
    "training.steps": 1000,
    "training.tokens": "100B",
    "training.microbatch": 8,
    "schedule.decay_steps": 200,
    "parallel.pipeline.microbatches": 16,
    "parallel.pipeline.blocks_per_stage": [7, 8, 8, 9],
    "recompute.budget": 0.5,
}
"""Values for keys whose default shows nothing; the others' default is their example."""

SYNONYMS = {
    "accumulation": "training.microbatch",
    "batch_size": "training.global_batch",
    "beta1": "optimizer.betas",
    "beta2": "optimizer.betas",
    "context_length": "training.sequence_length",
    "dataset": "data.corpus",
    "dtype": "precision.compute",
    "epsilon": "optimizer.eps",
    "eval_interval": "validation.every_steps",
    "global_batch_size": "training.global_batch",
    "grad_clip": "optimizer.clip_norm",
    "gradient_accumulation_steps": "training.microbatch",
    "hidden_dim": "model.ffn_dim",
    "hidden_size": "model.dim",
    "intermediate_size": "model.ffn_dim",
    "learning_rate": "optimizer.lr",
    "log_interval": "metrics.log_every",
    "max_grad_norm": "optimizer.clip_norm",
    "max_steps": "training.steps",
    "micro_batch_size": "training.microbatch",
    "n_embd": "model.dim",
    "n_head": "model.heads",
    "n_heads": "model.heads",
    "n_kv_heads": "model.kv_heads",
    "n_layer": "model.layers",
    "n_layers": "model.layers",
    "num_attention_heads": "model.heads",
    "num_hidden_layers": "model.layers",
    "num_key_value_heads": "model.kv_heads",
    "num_workers": "data.workers",
    "rms_norm_eps": "model.norm_eps",
    "save_interval": "checkpoint.every_steps",
    "save_steps": "checkpoint.every_steps",
    "seq_len": "training.sequence_length",
    "tie_word_embeddings": "model.tie_embeddings",
    "total_tokens": "training.tokens",
    "train_steps": "training.steps",
    "warmup": "schedule.warmup_steps",
    "weight_tying": "model.tie_embeddings",
}
"""Other projects' words for keys of ours."""

_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def json_schema() -> Schema:
    """JSON schema (draft 2020-12) of a recipe file, for editors that complete and check TOML."""
    generated = _tidy(recipe_class().model_json_schema())
    extends = {"type": "string", "minLength": 1, "description": "Recipe that this one changes; relative to this file."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "titanlite recipe",
        "description": generated["description"],
        "type": "object",
        "additionalProperties": False,
        "properties": {"extends": extends, **generated["properties"]},
        "$defs": generated["$defs"],
    }


def _tidy(schema: Any) -> Any:
    """Without the titles that pydantic derives from names, and without null: TOML has none, a key is just absent."""
    if isinstance(schema, list):
        return [_tidy(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    names = schema.get("properties", {})
    tidy = {key: _tidy(value) for key, value in schema.items() if key not in ("title", "properties")}
    if names:
        tidy["properties"] = {name: _tidy(value) for name, value in names.items()}
    for bound in _BOUNDS:
        if float(tidy.get(bound, 0.5)).is_integer():  # older pydantic writes 0.0 for 0
            tidy[bound] = int(tidy[bound])
    if "const" in tidy:  # … and an enum of one beside a const
        tidy.pop("enum", None)
    if tidy.get("default", ...) is None or "$ref" in tidy:
        tidy.pop("default", None)
    if "description" in tidy:
        tidy["description"] = " ".join(tidy["description"].split())
    options = [option for option in tidy.get("anyOf", []) if option != {"type": "null"}]
    if len(options) == 1:
        del tidy["anyOf"]
        tidy.update(options[0])
    elif options:
        tidy["anyOf"] = options
    return tidy


def _schema() -> Schema:
    return _schema_of(recipe_class())


@functools.cache
def _schema_of(recipe: type[Recipe]) -> Schema:
    return json_schema()


def key_schema(path: tuple[str, ...]) -> Schema | None:
    """Schema of a section or key, `$ref` resolved; None where the recipe has no such key. Elements of arrays of tables
    are named by their number.
    """
    schema: Schema = _schema()
    for name in path:
        if is_tables(schema) and name.isdigit():
            schema = schema["items"]
        elif name in schema.get("properties", {}):
            schema = schema["properties"][name]
        elif schema.get("additionalProperties"):
            schema = schema["additionalProperties"]
        else:
            return None
        if "$ref" in schema:
            schema = {**_schema()["$defs"][schema["$ref"].rpartition("/")[2]], **schema}
    return schema


def is_tables(schema: Schema) -> bool:
    """Whether a key is an array of tables, such as `[[data.sources]]`."""
    return "$ref" in schema.get("items", {})


def holds_keys(schema: Schema) -> bool:
    """Whether there is something below a key."""
    return "properties" in schema or is_tables(schema) or bool(schema.get("additionalProperties"))


def all_keys() -> list[str]:
    """Every key a recipe can set, dotted, in the schema's order (sections themselves are not listed)."""

    def below(path: tuple[str, ...]) -> list[str]:
        properties = (key_schema(path) or {}).get("properties", {})
        if not properties:
            return [".".join(path)]
        return [key for name in properties for key in below((*path, name))]

    return below(())


def _named() -> dict[str, list[str]]:
    return _named_by(recipe_class())


@functools.cache
def _named_by(recipe: type[Recipe]) -> dict[str, list[str]]:
    """Sections and keys by their last names; those of arrays of tables without a number."""
    named: dict[str, list[str]] = {}
    for key in all_keys():
        tables = (key_schema((*key.split("."), "0")) or {}).get("properties", {})
        for full in (*accumulate(key.split("."), "{}.{}".format), *(f"{key}.{name}" for name in tables)):
            names = named.setdefault(full.rpartition(".")[2], [])
            names += [full] if full not in names else []
    return named


def suggest_key(name: str, known: Sequence[str] = (), table: Sequence[str] = ()) -> str:
    """`did you mean 'section.key'?` for a name that `table`, whose keys are `known`, does not have; or nothing.

    In this order: the same name in another section, another project's word for it, the nearest spelling.
    """
    named = {**_named(), **{key: [".".join([*table, key])] for key in known}}
    synonym = [SYNONYMS[name]] if name in SYNONYMS else []
    near = [key for close in difflib.get_close_matches(name, named, n=1) for key in named[close]]
    best = named.get(name) or synonym or near
    return f"did you mean {' or '.join(repr(key) for key in best)}?" if best else ""


def find_key(key: str) -> tuple[tuple[str, ...], Schema]:
    """Path and schema of a section or a key; in arrays of tables a number may be left out, for any will do.

    Raises `UsageError` for one that is not there, with the nearest that are.
    """
    path: tuple[str, ...] = ()
    table: Schema = _schema()
    for name in key.split("."):
        path = (*path, "0", name) if is_tables(table) and not name.isdigit() else (*path, name)
        if (schema := key_schema(path)) is None:
            hint = suggest_key(name, list(table.get("properties", {})), path[:-1]) or did_you_mean(key, all_keys())
            raise UsageError(f"a recipe has no key '{key}'; {hint or 'see docs/recipe.md'}")
        table = schema
    return path, table


def type_in_words(schema: Schema) -> str:
    """What a value must be: `a whole number, at least 1`."""
    if "anyOf" in schema:
        return ", or ".join(type_in_words(option) for option in schema["anyOf"])
    if "const" in schema:
        return format_value(schema["const"])
    if "enum" in schema:
        return f"one of {', '.join(format_value(choice) for choice in schema['enum'])}"
    if "properties" in schema:
        return "a table"
    if is_tables(schema):
        return "a list of tables"
    match schema.get("type"):
        case "boolean":
            return "true or false"
        case "integer":
            return f"a whole number{_range_in_words(schema)}"
        case "number":
            return f"a number{_range_in_words(schema)}"
        case "object":
            return f"a table of names, each {type_in_words(schema['additionalProperties'])}"
        case "array" if "prefixItems" in schema:
            return f"a list of {len(schema['prefixItems'])}, each {type_in_words(schema['prefixItems'][0])}"
        case "array":
            return f"a list{' of one or more' if schema.get('minItems') else ''}, each {type_in_words(schema['items'])}"
    if "examples" in schema:
        return f"text such as {format_value(schema['examples'][0])}"
    return "text (not empty)" if schema.get("minLength") else "text"


def _range_in_words(schema: Schema) -> str:
    if "minimum" in schema and "maximum" in schema:
        return f" from {schema['minimum']:g} to {schema['maximum']:g}"
    bounds = [f"{word} {schema[bound]}" for bound, word in _BOUNDS.items() if bound in schema]
    return f", {' and '.join(bounds)}" if bounds else ""


def explain(key: str) -> str:
    """What a section or a key (`training`, `training.steps`) means. Raises `UsageError` for one that is not there."""
    path, schema = find_key(key)
    if "properties" in schema and len(path) == 1:
        return _explain_section(key, schema)
    table, name = ".".join(path[:-1]), path[-1]
    example = _EXAMPLES.get(key, schema.get("default"))
    lines = [
        key,
        f"  {(schema if 'description' in schema else key_schema(path[:-1]) or {})['description']}",
        "",
        f"  type     {type_in_words(schema)}",
        f"  default  {_default_in_words(schema)}",
    ]
    inner = key_schema((*path, "0")) if is_tables(schema) else schema
    if inner is not None and "properties" in inner:
        lines.append(f"  keys     {', '.join(inner['properties'])}")
    if example is not None:
        in_file = f"[{table}] {name} = {format_value(example)}" if table else f"{name} = {format_value(example)}"
        lines.append(f"  example  {in_file}")
    return "\n".join(lines)


def _explain_section(key: str, schema: Schema) -> str:
    width = max(map(len, schema["properties"]))
    keys = [f"  {name:<{width}}  {(key_schema((key, name)) or {})['description']}" for name in schema["properties"]]
    return "\n".join([f"[{key}] {schema['description']}", "", *keys, "", f"More: titanlite check --explain {key}.KEY"])


def _default_in_words(schema: Schema) -> str:
    return format_value(schema["default"]) if "default" in schema else "none"


def reference_markdown() -> str:
    """`docs/recipe.md`: every section and key with its type, default and meaning."""
    lines = [
        "# Recipe reference",
        "",
        "Generated from `titanlite/recipe/sections.py` by `titanlite schema --markdown > docs/recipe.md`.",
        "",
        'A recipe is a TOML file. `extends = "base.toml"` starts from another one, relative to the file that says so:',
        "tables merge key by key, and the nearer file wins; `--section.key=value` on the command line wins over files.",
    ]
    for section in recipe_class().model_fields:
        lines += _section_markdown((section,))
    return "\n".join(lines) + "\n"


def _section_markdown(path: tuple[str, ...]) -> list[str]:
    schema = key_schema(path) or {}
    header = f"[{'.'.join(path)}]"
    if is_tables(schema):
        header, path = f"[{header}]", (*path, "0")
        schema = key_schema(path) or {}
    lines = ["", f"## `{header}`", "", schema["description"], ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    tables = []
    for name in schema["properties"]:
        key = key_schema((*path, name)) or {}
        tables += [name] if "properties" in key or is_tables(key) else []
        cells = [f"`{name}`", type_in_words(key), f"`{_default_in_words(key)}`", key["description"]]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    for name in tables:
        lines += _section_markdown((*path, name))
    return lines


def main(argv: list[str]) -> int:
    """`titanlite schema`: print the JSON schema, or the reference page."""
    parser = argparse.ArgumentParser(
        prog="titanlite schema", description="Print the JSON schema of recipes, which editors complete them from."
    )
    parser.add_argument("--markdown", action="store_true", help="print the reference page (docs/recipe.md) instead")
    arguments = parser.parse_args(argv)
    if arguments.markdown:
        print(reference_markdown(), end="")
    else:
        print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
    return 0

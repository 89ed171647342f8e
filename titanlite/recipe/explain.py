"""The schema in words: what a key means, takes and defaults to, for the command line, the documents and editors.

Everything here is derived from `sections.py`; nothing about a key stands twice.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from titanlite.errors import UsageError
from titanlite.recipe.sections import Recipe, recipe_class
from titanlite.recipe.toml import format_value
from titanlite.registry import did_you_mean
from titanlite.text import format_table

Schema = dict[str, Any]

SYNONYMS = {  # other projects' words for keys of ours
    word: key
    for key, words in {
        "checkpoint.every_steps": "save_interval save_steps",
        "data.corpus": "dataset",
        "data.workers": "num_workers",
        "metrics.log_every": "log_interval",
        "model.dim": "hidden_size n_embd",
        "model.ffn_dim": "hidden_dim intermediate_size",
        "model.heads": "n_head n_heads num_attention_heads",
        "model.kv_heads": "n_kv_heads num_key_value_heads",
        "model.layers": "n_layer n_layers num_hidden_layers",
        "model.norm_eps": "rms_norm_eps",
        "model.tie_embeddings": "tie_word_embeddings weight_tying",
        "optimizer.betas": "beta1 beta2",
        "optimizer.clip_norm": "grad_clip max_grad_norm",
        "optimizer.eps": "epsilon",
        "optimizer.lr": "learning_rate",
        "precision.compute": "dtype",
        "schedule.warmup_steps": "warmup",
        "training.global_batch": "batch_size global_batch_size",
        "training.microbatch": "accumulation gradient_accumulation_steps micro_batch_size",
        "training.sequence_length": "context_length seq_len",
        "training.steps": "max_steps train_steps",
        "training.tokens": "total_tokens",
        "validation.every_steps": "eval_interval",
    }.items()
    for word in words.split()
}

_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


class _TomlSchema(GenerateJsonSchema):
    """Without null: TOML has none, a key is just absent. Without titles made of names; descriptions in one line."""

    def nullable_schema(self, schema: Any) -> Schema:
        return self.generate_inner(schema["schema"])

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def generate_inner(self, schema: Any) -> Schema:
        generated = super().generate_inner(schema)
        if generated.get("default", ...) is None or "$ref" in generated:
            generated.pop("default", None)
        if "description" in generated:
            generated["description"] = " ".join(generated["description"].split())
        return generated


def json_schema() -> Schema:
    """JSON schema (draft 2020-12) of a recipe file, for editors that complete and check TOML."""
    return _json_schema_of(recipe_class())


@functools.cache
def _json_schema_of(recipe: type[Recipe]) -> Schema:
    generated = recipe.model_json_schema(schema_generator=_TomlSchema)
    for section in generated["$defs"].values():
        section.pop("title", None)
    meaning = "Recipe that this one changes; relative to this file."
    extends = {"type": "string", "minLength": 1, "description": meaning, "examples": ["base.toml"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "titanlite recipe",
        "description": generated["description"],
        "type": "object",
        "additionalProperties": False,
        "properties": {"extends": extends, **generated["properties"]},
        "$defs": generated["$defs"],
    }


def _resolve(schema: Schema) -> Schema:
    """With what its `$ref` names."""
    return {**json_schema()["$defs"][schema["$ref"].rpartition("/")[2]], **schema} if "$ref" in schema else schema


def key_schema(path: Sequence[str]) -> Schema:
    """Schema of a section or key, in arrays of tables with or without a number; empty if there is none."""
    schema: Schema = json_schema()
    for name in path:
        if is_tables(schema):
            schema = _resolve(schema["items"])
            if name.isdigit():
                continue
        schema = _resolve(schema.get("properties", {}).get(name) or schema.get("additionalProperties") or {})
    return schema


def is_tables(schema: Schema) -> bool:
    """Whether a key is an array of tables, such as `[[data.sources]]`."""
    return "$ref" in schema.get("items", {})


def _walk(schema: Schema, prefix: str = "", *, into_tables: bool = False) -> Iterator[tuple[str, Schema]]:
    """Every section and key below a schema, dotted; if asked for, also the keys of arrays of tables."""
    for name, inner in schema.get("properties", {}).items():
        inner = _resolve(inner)
        yield f"{prefix}{name}", inner
        table = _resolve(inner["items"]) if into_tables and is_tables(inner) else inner
        yield from _walk(table, f"{prefix}{name}.", into_tables=into_tables)


def all_keys() -> list[str]:
    """Every key a recipe can set, dotted, in the schema's order (sections themselves are not listed)."""
    return [key for key, schema in _walk(json_schema()) if "properties" not in schema]


def suggest_key(name: str, known: Iterable[str] = (), table: Sequence[str] = ()) -> str:
    """`did you mean 'section.key'?` for a name that `table`, whose keys are `known`, does not have; or nothing."""
    named: dict[str, list[str]] = {}
    for key, _ in _walk(json_schema(), into_tables=True):
        named.setdefault(key.rpartition(".")[2], []).append(key)
    named |= {key: [".".join([*table, key])] for key in known}
    synonym = [SYNONYMS[name]] if name in SYNONYMS else []
    near = [key for close in difflib.get_close_matches(name, named, n=1) for key in named[close]]
    best = named.get(name) or synonym or near  # the name in another section, another project's word, the spelling
    return f"did you mean {' or '.join(map(repr, best))}?" if best else ""


def find_key(key: str) -> tuple[list[str], Schema]:
    """Path and schema of a section or a key. Raises `UsageError`, with the nearest that there are."""
    *table, name = path = key.split(".")
    if schema := key_schema(path):
        return path, schema
    hint = suggest_key(name, key_schema(table).get("properties", ()), table) or did_you_mean(key, all_keys())
    raise UsageError(f"a recipe has no key '{key}'; {hint or 'see docs/recipe.md'}")


def describe_type(schema: Schema) -> str:
    """What a value must be: `a whole number, at least 1`."""
    match schema:
        case {"anyOf": kinds}:
            return ", or ".join(map(describe_type, kinds))
        case {"enum": values}:
            return f"one of {', '.join(map(format_value, values))}"
        case {"properties": _}:
            return "a table"
        case {"items": {"$ref": _}}:
            return "a list of tables"
        case {"type": "boolean"}:
            return "true or false"
        case {"type": "integer"}:
            return f"a whole number{_describe_range(schema)}"
        case {"type": "number"}:
            return f"a number{_describe_range(schema)}"
        case {"additionalProperties": kind}:
            return f"a table of names, each {describe_type(kind)}"
        case {"prefixItems": items}:
            return f"a list of {len(items)}, each {describe_type(items[0])}"
        case {"items": kind}:
            return f"a list{' of one or more' if schema.get('minItems') else ''}, each {describe_type(kind)}"
        case {"pattern": _}:
            return f"text such as {format_value(schema['examples'][0])}"
    return "text (not empty)" if schema.get("minLength") else "text"


def _describe_range(schema: Schema) -> str:
    if "minimum" in schema and "maximum" in schema:
        return f" from {schema['minimum']:g} to {schema['maximum']:g}"
    bounds = [(word, schema[bound]) for bound, word in _BOUNDS.items() if bound in schema]
    texts = [f"{word} {int(value) if float(value).is_integer() else value}" for word, value in bounds]
    return f", {' and '.join(texts)}" if texts else ""


def _describe_default(schema: Schema) -> str:
    return format_value(schema["default"]) if "default" in schema else "none"


def explain(key: str) -> str:
    """What a section or a key (`training`, `training.steps`) means. Raises `UsageError` for one that is not there."""
    path, schema = find_key(key)
    keys = (_resolve(schema["items"]) if is_tables(schema) else schema).get("properties", {})
    if keys and len(path) == 1:
        rows = [(name, _resolve(inner)["description"]) for name, inner in keys.items()]
        head, more = f"[{key}] {schema['description']}", f"More: titanlite check --explain {key}.KEY"
        return "\n".join([head, "", *(f"  {line}" for line in format_table(rows)), "", more])
    *table, name = path
    rows = [("type", describe_type(schema)), ("default", _describe_default(schema))]
    if keys:
        rows.append(("keys", ", ".join(keys)))
    for example in schema.get("examples", [schema["default"]] if "default" in schema else [])[:1]:
        header = f"[{'.'.join(table)}] " if table else ""
        rows.append(("example", f"{header}{name} = {format_value(example)}"))
    meaning = (schema if "description" in schema else key_schema(table))["description"]
    return "\n".join([key, f"  {meaning}", "", *(f"  {line}" for line in format_table(rows))])


def reference_markdown() -> str:
    """`docs/recipe.md`: every section and key with its type, default and meaning."""
    lines = [
        "# Recipe reference",
        "",
        "Generated from `titanlite/recipe/sections.py` by `titanlite schema --markdown > docs/recipe.md`.",
        "",
        'A recipe is a TOML file. `extends = "base.toml"` starts from another one, relative to the file that names it:',
        "tables merge key by key, and the nearer file wins; `--section.key=value` on the command line wins over files.",
    ]
    for section in recipe_class().model_fields:
        lines += _reference_of(section, key_schema([section]))
    return "\n".join(lines)


def _reference_of(key: str, schema: Schema) -> Iterator[str]:
    header = f"[{key}]"
    if is_tables(schema):
        header, schema = f"[{header}]", _resolve(schema["items"])
    yield from ("", f"## `{header}`", "", schema["description"], "")
    yield from ("| key | type | default | meaning |", "|---|---|---|---|")
    keys = {name: _resolve(inner) for name, inner in schema["properties"].items()}
    for name, inner in keys.items():
        cells = [f"`{name}`", describe_type(inner), f"`{_describe_default(inner)}`", inner["description"]]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    for name, inner in keys.items():
        if "properties" in inner or is_tables(inner):
            yield from _reference_of(f"{key}.{name}", inner)

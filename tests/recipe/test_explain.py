from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from titanlite.errors import UsageError
from titanlite.recipe.explain import all_keys, explain, json_schema, key_schema, reference_markdown
from titanlite.recipe.load import load_recipe
from titanlite.recipe.sections import Recipe
from titanlite.recipe.toml import format_value, parse_toml

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))
SCHEMA = jsonschema.Draft202012Validator(json_schema())


def test_what_is_committed_is_that_of_the_code() -> None:
    schema = (ROOT / "titanlite.schema.json").read_text(encoding="utf-8")
    reference = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert json.loads(schema) == json_schema(), "run: titanlite schema > titanlite.schema.json"
    assert reference == reference_markdown() + "\n", "run: titanlite schema --markdown > docs/recipe.md"


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    assert "null" not in json.dumps(json_schema()), "TOML has no null"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_fits_the_schema_and_names_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    SCHEMA.validate(parse_toml(text))
    first = text.partition("\n")[0]
    assert first.startswith("#:schema ")
    assert (path.parent / first.removeprefix("#:schema ")).resolve() == ROOT / "titanlite.schema.json"


def test_the_resolved_recipe_fits_the_schema(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('[training]\ntokens = "2M"\n[model.rope_scaling]\n')
    SCHEMA.validate(parse_toml(load_recipe(path).text))


@pytest.mark.parametrize(
    "values",
    [
        {"trainig": {}},
        {"training": {"steps": 0}},
        {"training": {"tokens": "1Q"}},
        {"training": {"step": 1}},
        {"optimizer": {"betas": [0.9]}},
        {"precision": {"compute": "bf16"}},
        {"data": {"corpus": []}},
        {"model": {"dim": "x"}},
    ],
)
def test_the_schema_refuses_what_the_code_refuses(values: dict[str, Any]) -> None:
    assert not SCHEMA.is_valid(values)


@pytest.mark.parametrize("key", all_keys())
def test_every_key_is_explained_by_a_valid_example(key: str) -> None:
    text, schema = explain(key), key_schema(key.split(".")) or {}
    assert all(f"  {part} " in text for part in ("type", "default", "example"))
    assert len(schema["description"]) > 10
    for example in schema.get("examples", []):
        values = parse_toml(f"{key} = {format_value(example)}")
        SCHEMA.validate(values)
        values.pop("extends", None)
        Recipe.model_validate(values)


def test_sections_and_tables_are_explained() -> None:
    assert "global_batch     Sequences in one optimizer step" in explain("training")
    assert "factor" in explain("model.rope_scaling")
    assert explain("training.steps").split("\n")[3] == "  type     a whole number, at least 1"
    assert "relative to the others" in explain("data.sources.weight")
    assert "  type     a number, above 0" in explain("data.stages.weights.web")


@pytest.mark.parametrize("section", Recipe.model_fields)
def test_every_section_lists_its_keys_and_tables(section: str) -> None:
    """Issue 14, item 22: [parallel] and [precision] hold tables, whose meaning stands elsewhere in the schema."""
    names = (key_schema((section,)) or {})["properties"]
    lines = dict(line.split(maxsplit=1) for line in explain(section).splitlines() if line.startswith("  "))
    assert list(lines) == list(names)
    assert all(len(meaning) > 10 for meaning in lines.values())


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("training.setps", "'training.steps'"),
        ("trainin", "'training'"),
        ("lr", "'optimizer.lr'"),
        ("learning_rate", "'optimizer.lr'"),
        ("every_steps", "'validation.every_steps' or 'checkpoint.every_steps'"),
        ("pipeline", "'parallel.pipeline'"),
        ("data.sources.weigth", "'data.sources.weight'"),
        ("run.name.x", "'run.name'"),
        ("x.y", "docs"),
        ("", "docs"),
    ],
)
def test_unknown_keys(key: str, hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        explain(key)

"""Runs of a small model whose linears multiply in float8: sizes are multiples of 32, on two ranks of a tp group too."""

from __future__ import annotations

from typing import Any

from parity_runs import small_recipe

from titanlite.recipe.sections import Recipe

MODEL = {"dim": 64, "layers": 3, "heads": 4, "kv_heads": 4, "ffn_dim": 128, "vocab_size": 272}


def float8_recipe(corpus: str, recipe: str, **sections: dict[str, Any]) -> Recipe:
    """In float64, but for the factors of products."""
    sections.setdefault("training", {"microbatch": 1})
    section = {"enabled": True, "recipe": recipe, "min_size": 0}
    precision = {"compute": "float64", "float8": section, **sections.pop("precision", {})}
    return small_recipe(corpus, model=MODEL, optimizer={"lr": 1e-3}, precision=precision, **sections)

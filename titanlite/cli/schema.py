"""`titanlite schema`: what recipes may hold, for editors and for docs/recipe.md."""

from __future__ import annotations

import argparse
import json

from titanlite.errors import EXIT_DONE
from titanlite.recipe.explain import json_schema, reference_markdown


def main(argv: list[str]) -> int:
    description = "Print the JSON schema of recipes, which editors complete them from."
    parser = argparse.ArgumentParser(prog="titanlite schema", description=description)
    parser.add_argument("--markdown", action="store_true", help="print the reference page (docs/recipe.md) instead")
    markdown = parser.parse_args(argv).markdown
    print(reference_markdown() if markdown else json.dumps(json_schema(), indent=2, ensure_ascii=False))
    return EXIT_DONE

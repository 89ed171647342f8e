"""Quantities as people write them: `"100B"` tokens, `"80GiB"` of memory."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

_COUNT_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(value: Any) -> Any:
    """An integer, or a string such as `"2_000_000"`, `"2.5M"` or `"100B"`, as an integer.

    Anything else is returned as it is, for the schema to refuse. Raises `ValueError` for a string that is
    no whole count.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([0-9][0-9_]{,99})(?:\.([0-9]{1,99}))?\s*([KMBT]?)", value.strip())
    if match is None:
        raise ValueError(
            f"'{value[:60]}' is not a count; write a whole number, or one with K, M, B or T such as '2.5M'"
        )
    whole, fraction, unit = match.group(1).replace("_", ""), match.group(2) or "", match.group(3)
    scaled, remainder = divmod(int(whole + fraction) * _COUNT_UNITS[unit], 10 ** len(fraction))
    if remainder:
        raise ValueError(f"'{value}' is not a whole number")
    return scaled


def fits_64_bits(value: int) -> int:
    """`value` as it is. Raises `ValueError` where TOML's integers, and torch's, end."""
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{value} does not fit into 64 bits; write a smaller number.")
    return value


Count = Annotated[
    int,
    BeforeValidator(parse_count),
    AfterValidator(fits_64_bits),
    Field(ge=1),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "string", "pattern": r"^[0-9][0-9_]*(\.[0-9]+)?\s*[KMBT]?$", "examples": ["100B"]},
            ]
        }
    ),
]
"""A positive count that a recipe may write as `"100B"`."""

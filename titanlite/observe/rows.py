"""What a row of metrics is: a plain dictionary that begins with its step. No torch.

Metrics rows are made in `metrics.py`; the two other kinds here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]


def validation_row(step: int, validation_loss: float, bits_per_byte: float, set_name: str | None = None) -> Row:
    """Row of a validation after `step` steps: mean loss in nats a token, and bits a byte of text; of several validation
    sets each has a row, with its name.
    """
    row = {"step": step, "validation_loss": validation_loss, "bits_per_byte": bits_per_byte}
    return row if set_name is None else {**row, "set": set_name}


def event_row(step: int, event: str, detail: str, values: Mapping[str, Any] | None = None) -> Row:
    """Row of something that happened after `step` steps, such as a resume, a skipped step or a stop.

    `values` are for machines what `detail` is for people; numbers in them are finite.
    """
    row = {"step": step, "event": event, "detail": detail}
    return row if values is None else {**row, "values": dict(values)}

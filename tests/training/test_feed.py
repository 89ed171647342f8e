"""Tables of documents that grow in the middle of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.runs import rows
from support.tiny import train

from titanlite.parallel import apply


def test_a_batch_of_more_documents_is_said_once_for_each_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sequences' 16 tokens are a document or less at first, then one to two documents each."""
    monkeypatch.setattr(apply, "compile_units", lambda *_, **__: None)  # what is said does not hang on it
    texts = [{"text": "long " * 200}, *[{"text": "ab"}] * 400]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    given = ("--data.corpus=texts.jsonl", "--data.document_mask=true", "--data.validation_percent=0")
    assert train(*given, "--compile.enabled=true", "--training.steps=30") == 0
    found = rows(event="recompiled")
    assert 1 <= len(found) <= 3 and len({row["detail"] for row in found}) == len(found)

"""What a recipe names as data, by file names, sizes and sidecars: for `titanlite check`, which reads no corpus."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from titanlite.data.corpora import CORPORA
from titanlite.data.corpora.files import Asked, FileReader
from titanlite.data.sources import open_token_file, token_files
from titanlite.data.splits import named_sources
from titanlite.data.tokenizers import Tokenizer, describe_separator, tokenizer_of
from titanlite.errors import Finding, UsageError
from titanlite.recipe.sections import Data

MOST_FILES = 1000
"""Of an entry, so many files are looked at."""


def survey(section: Data) -> tuple[dict[str, Any], list[Finding]]:
    """The tokenizer, sources and validation sets of a recipe without errors, in plain values; and warnings of what is
    missing, or cannot be read, on this machine.
    """
    tokenizer, findings = tokenizer_of(section), list[Finding]()
    sources = [_look(name, paths, key, section, tokenizer, findings) for name, paths, key in named_sources(section)]
    for named, source in zip(section.sources, sources, strict=False):
        source["weight"] = named.weight
    sets = [
        _look(each.name, each.path, f"data.validation.{index}.path", section, tokenizer, findings)
        for index, each in enumerate(section.validation)
    ]
    found = {
        "tokenizer": section.tokenizer,
        "tokenizer_tokens": tokenizer.vocab_size,
        "separator": tokenizer.separator,
        "separator_in_words": describe_separator(tokenizer),
        "packing": section.packing,
        "document_mask": section.document_mask,
        "sources": sources,
        "stages": [stage.model_dump() for stage in section.stages],
        "validation": sets,
    }
    return found, findings


def _look(
    name: str, path: str | Sequence[str], key: str, section: Data, tokenizer: Tokenizer, findings: list[Finding]
) -> dict[str, Any]:
    """`tokens` are those of token files; of text, only the bytes are known, as they lie on the disk."""
    paths = [path] if isinstance(path, str) else list(path)
    files = size = tokens = 0
    more, reader = False, FileReader(section.text_key, Asked(entries=key))
    for entry in paths:
        try:
            for prefix in (prefixes := token_files(entry)):
                file = open_token_file(prefix, section, tokenizer)
                files, tokens, size = files + 1, tokens + len(file.tokens), size + file.tokens.file.size
            if not prefixes and entry not in CORPORA:
                texts = list(islice(reader.files(entry), MOST_FILES + 1))
                more = more or len(texts) > MOST_FILES
                files, size = files + len(texts[:MOST_FILES]), size + sum(text.size for text in texts[:MOST_FILES])
        except UsageError as error:
            findings.append(Finding(key, str(error), severity="warning"))
    return {"name": name, "paths": paths, "files": files, "more_files": more, "bytes": size, "tokens": tokens}

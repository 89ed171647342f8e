"""What a recipe names as data, by file names, sizes and sidecars: for `titanlite check`, which reads no corpus."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

from titanlite.corpus.corpora import CORPORA
from titanlite.corpus.corpora.files import FileFinder
from titanlite.corpus.token_file import paths_of
from titanlite.corpus.tokenizers import Tokenizer, describe_separator, tokenizer_of
from titanlite.data.sources import find_token_files, open_token_file
from titanlite.data.splits import named_sets, named_sources
from titanlite.errors import Finding, UsageError
from titanlite.recipe.sections import Data
from titanlite.text import list_some

MOST_FILES = 1000  # of an entry that are looked at


def survey(section: Data) -> tuple[dict[str, Any], list[Finding]]:
    """The data of a recipe without errors, in plain values; and warnings of what cannot be read on this machine."""
    tokenizer, findings = tokenizer_of(section), list[Finding]()
    sources = [_describe(*each, section, tokenizer, findings) for each in named_sources(section)]
    for named, source in zip(section.sources, sources, strict=False):
        source["weight"] = named.weight
    found = {
        "tokenizer": section.tokenizer,
        "tokenizer_tokens": tokenizer.vocab_size,
        "separator": tokenizer.separator,
        "separator_in_words": describe_separator(tokenizer),
        "packing": section.packing,
        "document_mask": section.document_mask,
        "sources": sources,
        "stages": [stage.model_dump() for stage in section.stages],
        "validation": [_describe(*each, section, tokenizer, findings) for each in named_sets(section)],
    }
    return found, findings + find_shared_texts(section)


def find_shared_texts(section: Data) -> list[Finding]:
    """Warnings of a file that several sources or validation sets read, by whichever names and links, and of texts that
    are held out though other sets are named. What cannot be read is left to those who read it.
    """
    sources, sets = named_sources(section), named_sets(section)
    if len(sources) + len(sets) == 1:
        return []
    seen: dict[Any, str] = {}
    shared: dict[tuple[str, str], list[str]] = {}
    texts = False
    for _, paths, key in (*sources, *sets):
        for path, is_text in _find_files(paths, key, section):
            texts = texts or (is_text and not key.startswith("data.validation"))
            with suppress(OSError):
                status = None if path in CORPORA else os.stat(path)
                other = seen.setdefault((status.st_dev, status.st_ino) if status else path, key)
                if other != key:
                    shared.setdefault((key, other), []).append(os.path.realpath(path) if status else path)
    found = []
    for (key, other), files in shared.items():
        fix = "take it out of one, if that is not meant."
        if key.startswith("data.validation") and not other.startswith("data.validation"):
            fix = "what is trained on shows nothing as a validation set; take it out of one."
        found.append((key, f"{list_some(files, 1)}: {other} reads the same;", fix))
    if sets and texts and (percent := section.validation_percent):
        problem = f"{percent:g} % of the texts are held out, and nothing reads them: data.validation names other sets;"
        found.append(("data.validation_percent", problem, "set it to 0 to train on them too."))
    return [Finding(*each, severity="warning") for each in found]


def _find_files(paths: Sequence[str], key: str, section: Data) -> Iterator[tuple[str, bool]]:
    """All files that are read, and whether they are texts; of token files the ids."""
    finder = FileFinder(section.text_key, key)
    for entry in paths:
        with suppress(UsageError):
            if prefixes := find_token_files(entry):
                yield from ((str(paths_of(prefix).bin), False) for prefix in prefixes)
            elif entry in CORPORA:
                yield entry, True
            else:
                yield from ((str(file.path), True) for file in finder.find(entry))


def _describe(
    name: str, paths: list[str], key: str, section: Data, tokenizer: Tokenizer, findings: list[Finding]
) -> dict[str, Any]:
    """`tokens` are those of token files; of text, only the bytes are known, as they lie on the disk."""
    files = size = tokens = 0
    more, finder = False, FileFinder(section.text_key, key)
    for entry in paths:
        try:
            for prefix in (prefixes := find_token_files(entry)):
                file = open_token_file(prefix, section, tokenizer)
                files, tokens, size = files + 1, tokens + len(file.tokens), size + file.tokens.file.size
            if not prefixes and entry not in CORPORA:
                texts = list(islice(finder.find(entry), MOST_FILES + 1))
                more = more or len(texts) > MOST_FILES
                files, size = files + len(texts[:MOST_FILES]), size + sum(text.size for text in texts[:MOST_FILES])
        except UsageError as error:
            findings.append(Finding(key, str(error), severity="warning"))
    return {"name": name, "paths": paths, "files": files, "more_files": more, "bytes": size, "tokens": tokens}

"""`titanlite data train-tokenizer`: a byte-level BPE of one's own corpus, by the `tokenizers` library. The same texts
give the same files, however many threads count them. What is not UTF-8 in a text is passed over here; the tokenizer
takes it all the same, byte by byte.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from titanlite.corpus.corpora import is_held_out, read_corpus
from titanlite.corpus.tokenizers import CONFIG, config_json, require_distinct, split_utf8
from titanlite.corpus.tokenizers.byte_pairs import byte_level_tokenizer
from titanlite.errors import DataError, UsageError
from titanlite.files import replace_file, wrap_os_errors
from titanlite.recipe.paths import input_argument, path_argument
from titanlite.recipe.sections import Data
from titanlite.text import format_bytes, format_count

SEPARATOR = "<|end_of_text|>"
MIN_FREQUENCY = 2  # pairs that occur less often are not merged: a token that is seen once teaches nothing
_PROGRESS_SECONDS = 15.0


def add_train_tokenizer_command(commands: Any) -> None:
    """Add it to the parsers of `titanlite data`."""
    line = "train a byte-level BPE on texts; writes tokenizer.json and tokenizer_config.json"
    command = commands.add_parser("train-tokenizer", help=line, description=line, allow_abbrev=False)
    command.set_defaults(action=_train_tokenizer)
    add = command.add_argument
    add("inputs", nargs="+", type=input_argument, metavar="INPUT", help="as data.corpus in a recipe; several make one")
    add("--out", type=path_argument, required=True, metavar="FOLDER", help="where the files go")
    add("--vocab-size", type=int, required=True, metavar="N", help="tokens, the special ones counted")
    line = f"special token that stands between documents (default {SEPARATOR})"
    add("--separator", default=SEPARATOR, metavar="TOKEN", help=line)
    line = "another special token; can be given several times"
    add("--special-token", action="append", default=[], metavar="TOKEN", help=line)
    add("--text-key", default="text", help="as data.text_key in a recipe")
    line = "leave out the documents that data.validation_percent holds out"
    add("--held-out", type=float, default=0.0, metavar="PERCENT", help=line)
    add("--force", action="store_true", help="overwrite a tokenizer that is there")


def _train_bpe(texts: Iterator[str], vocab_size: int, special: tuple[str, ...]) -> tuple[str, int]:
    """The `tokenizer.json` of a byte-level BPE of at most `vocab_size` tokens, and how many it has."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = byte_level_tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(  # special tokens are added last: no text may encode to them
        vocab_size=vocab_size - len(special), min_frequency=MIN_FREQUENCY, special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=sys.stderr.isatty(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    for name in special:
        if tokenizer.token_to_id(name) is not None:
            raise DataError(f"the corpus makes '{name}' a token by itself; name the special token otherwise.")
    tokenizer.add_special_tokens(list(special))
    return tokenizer.to_str(pretty=True), tokenizer.get_vocab_size(with_added_tokens=True)


def _train_tokenizer(arguments: argparse.Namespace) -> None:
    special = (arguments.separator, *arguments.special_token)
    require_distinct(special, "--special-token")
    least = 256 + len(special)
    if not least <= arguments.vocab_size < 2**31:
        parts = f"256 bytes and {len(special)} special tokens"
        raise UsageError(f"--vocab-size {arguments.vocab_size}: must be at least {least}, for {parts}.")
    if not 0 <= arguments.held_out < 100:
        raise UsageError("--held-out must be a percentage from 0 to below 100.")
    file = arguments.out / "tokenizer.json"
    if file.exists() and not arguments.force:
        raise UsageError(f"{file} is there already; name another folder, or add --force to overwrite it.")
    read: Counter[str] = Counter()
    texts = _texts(arguments.inputs, Data(text_key=arguments.text_key), arguments.held_out, read)
    content, size = _train_bpe(texts, arguments.vocab_size, special)
    if not read["documents"]:
        raise DataError(f"{', '.join(arguments.inputs)}: no text at all; give a corpus with text in it.")
    with wrap_os_errors(f"cannot write {file}", file):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file.with_name(CONFIG), config_json({}, arguments.separator))
        replace_file(file, content.encode())
    print(f"{file}: {size:,} tokens, of {_describe(read)}")
    if size < arguments.vocab_size:
        print(f"fewer than --vocab-size {arguments.vocab_size}: no other pair of tokens occurs twice in the corpus.")


def _texts(inputs: Sequence[str], section: Data, held_out_percent: float, read: Counter[str]) -> Iterator[str]:
    """What is UTF-8 of all documents that are not held out; counted in `read`."""
    printed = time.monotonic()
    for document in read_corpus(inputs, section):
        if is_held_out(document.name, held_out_percent):
            continue
        read.update(documents=1, bytes=len(document.content))
        yield from split_utf8(document.content)[::2]
        if time.monotonic() - printed >= _PROGRESS_SECONDS:
            printed = time.monotonic()
            print(f"read {_describe(read)}", file=sys.stderr)


def _describe(read: Counter[str]) -> str:
    return f"{format_count(read['documents'])} documents, {format_bytes(read['bytes'])}"
